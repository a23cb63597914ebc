"""What vtc works on, found inside of a loaded model."""

from __future__ import annotations

from torch import nn

from . import Vision, is_vlm, open_host
from .trunk import Trunk, find_tower, open_trunk, path_of_tower


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch.compile, PEFT and distributed training. TypeError for no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress() takes a loaded model, not {type(model).__name__}")
    inner = getattr(model, "_orig_mod", None)  # torch.compile
    if inner is None and hasattr(model, "get_base_model"):  # PEFT
        inner = model.get_base_model()
    if inner is None:
        inner = getattr(model, "module", None)  # DistributedDataParallel, FSDP, DeepSpeed
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def open_model(model: nn.Module) -> Vision | Trunk:
    """The parts of a vision-language model or of a vision transformer, inside of its wrappers. Raises
    ValueError for any other model, TypeError for none."""
    model = unwrap(model)
    if is_vlm(model):
        return open_host(model)
    if not find_tower(model) and (path := path_of_tower(model)):
        raise ValueError(
            f"{type(model).__name__} is no known host, but the {type(model.get_submodule(path)).__name__} in "
            f"it is: compress model.{path}"
        )
    return open_trunk(model) if find_tower(model) else open_host(model)
