"""What tells one host from another: its kind, its widths and a few numbers of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hosts.opening import open_model

if TYPE_CHECKING:
    from ..hosts import Vision
    from ..hosts.trunk import Trunk

MATRICES, VECTORS, VALUES = 8, 4, 6  # how many are looked at, and how many numbers of each
TOLERANCE = 2**-6  # relative: half precision of a number rounds it by up to 2**-9, twice by more


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Of a vision-language model, or of a vision transformer by itself, as JSON has it: "kind", "widths" and
    "weights", a few numbers of some tensors of encoder and projector by name. What training of the language
    model or another dtype changes is not in it."""
    return _of(open_model(model))


def check_host(module: Any, opened: Vision | Trunk) -> None:
    """Raises ValueError where a module was trained on another host than this one."""
    if module.host is None:
        return
    here, there = _of(opened), module.host
    differs = None
    if (here["kind"], here["widths"]) != (there["kind"], there["widths"]):
        differs = f"not on this {_told(here)}"
    elif not _alike(_tensors(opened), there["weights"]):
        differs = f"whose encoder or projector has other weights than this {here['kind']}"
    if differs:
        raise ValueError(
            f"the module '{module.name}' was trained on a {_told(there)}, {differs}; call "
            "module.trained_on(None) to use it all the same"
        )


def _told(host: dict[str, Any]) -> str:
    return f"{host['kind']} ({', '.join(f'{name} {width}' for name, width in host['widths'].items())})"


def _of(opened: Vision | Trunk) -> dict[str, Any]:
    tensors = _tensors(opened)
    matrices = sorted(name for name, tensor in tensors.items() if tensor.dim() > 1)
    vectors = sorted(set(tensors) - set(matrices))  # which are never quantised
    chosen = [*_spread(matrices, MATRICES), *_spread(vectors, VECTORS)]
    weights = {name: _sample(tensors[name]) for name in chosen}
    return {"kind": _kind(opened), "widths": _widths(opened), "weights": weights}


def _kind(opened: Vision | Trunk) -> str:
    host = getattr(opened, "host", None)
    return host.name if host is not None else type(opened.tower).__name__


def _widths(opened: Vision | Trunk) -> dict[str, int]:
    """How many numbers a token has: in the encoder, where that is told, and in the language model."""
    tower, widths = (opened.encoder.tower, {}) if hasattr(opened, "encoder") else (opened.tower, {})
    width = getattr(getattr(tower, "config", None), "hidden_size", getattr(tower, "embed_dim", None))
    if isinstance(width, int):
        widths["vision"] = width
    if hasattr(opened, "base"):
        widths["text"] = opened.base.config.get_text_config().hidden_size
    return widths


def _tensors(opened: Vision | Trunk) -> dict[str, Tensor]:
    """Those of encoder and projector whose numbers are theirs in any dtype: not quantised, not elsewhere."""
    if hasattr(opened, "encoder"):
        parts = {"encoder": opened.encoder.tower, "projector": opened.projector}
    else:
        parts = {"encoder": opened.tower}
    return {
        f"{part}.{name.replace('base_layer.', '')}": parameter.detach()
        for part, module in parts.items()
        if module is not None
        for name, parameter in module.named_parameters()
        if parameter.is_floating_point() and parameter.device.type != "meta" and "lora_" not in name
    }


def _sample(tensor: Tensor) -> list[float]:
    flat = tensor.flatten()
    return flat[_spread(range(len(flat)), VALUES)].float().tolist()


def _spread(values: Sequence[Any], n: int) -> list[Any]:
    """n of them, or all that there are, evenly spread."""
    n = min(n, len(values))
    return [values[i * (len(values) - 1) // max(1, n - 1)] for i in range(n)]


def _alike(tensors: dict[str, Tensor], weights: dict[str, list[float]]) -> bool:
    """Whether what is known of both is the same. Of a host of which nothing is known, its widths decide."""
    for name in weights.keys() & tensors.keys():
        found, wanted = (torch.tensor(values) for values in (_sample(tensors[name]), weights[name]))
        if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=TOLERANCE, atol=1e-5):
            return False
    return True
