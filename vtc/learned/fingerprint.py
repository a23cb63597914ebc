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
OF_DECODER = 4  # how many of the language model, of either kind
TOLERANCE = 2**-6  # relative: half precision of a number rounds it by up to 2**-9, twice by more


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Of a vision-language model, or of a vision transformer by itself, as JSON has it: "kind", "widths" and
    "weights", a few numbers of some tensors by name. Those of the language model matter to modules with an
    adapter alone: others go along with its training. What another dtype changes is not in it."""
    return _of(open_model(model))


def check_host(module: Any, opened: Vision | Trunk) -> None:
    """Raises ValueError where a module was trained on another host than this one."""
    if module.host is None:
        return
    here, there = _of(opened), module.host
    differs = None
    widths = {name: here["widths"].get(name) for name in there["widths"]}
    if (here["kind"], widths) != (there["kind"], there["widths"]):
        differs = f"not on this {_told(here)}"
    elif not _alike(_of_vision(opened), there["weights"]):
        differs = f"whose encoder or projector has other weights than this {here['kind']}"
    elif module.adapter is not None and not _alike(_of_decoder(opened), there["weights"]):
        differs = "whose language model, which its adapter is for, has other weights than this one"
    if differs:
        raise ValueError(
            f"the module '{module.name}' was trained on a {_told(there)}, {differs}; call "
            "module.trained_on(None) to use it all the same"
        )


def _told(host: dict[str, Any]) -> str:
    return f"{host['kind']} ({', '.join(f'{name} {width}' for name, width in host['widths'].items())})"


def _of(opened: Vision | Trunk) -> dict[str, Any]:
    weights = _samples(_of_vision(opened), MATRICES, VECTORS)
    weights |= _samples(_of_decoder(opened), OF_DECODER, OF_DECODER)
    return {"kind": _kind(opened), "widths": _widths(opened), "weights": weights}


def _samples(tensors: dict[str, Tensor], matrices: int, vectors: int) -> dict[str, list[float]]:
    """A few numbers of some of them; vectors are never quantised."""
    broad = sorted(name for name, tensor in tensors.items() if tensor.dim() > 1)
    chosen = [*_spread(broad, matrices), *_spread(sorted(set(tensors) - set(broad)), vectors)]
    return {name: _sample(tensors[name]) for name in chosen}


def _kind(opened: Vision | Trunk) -> str:
    host = getattr(opened, "host", None)
    return host.name if host is not None else type(opened.tower).__name__


def _widths(opened: Vision | Trunk) -> dict[str, int | list[int]]:
    """How many numbers a token has: in the encoder, where that is told, and in the language model; and which
    layer of the encoder is read, where a host can choose."""
    tower, widths = (opened.encoder.tower, {}) if hasattr(opened, "encoder") else (opened.tower, {})
    width = getattr(getattr(tower, "config", None), "hidden_size", getattr(tower, "embed_dim", None))
    if isinstance(width, int):
        widths["vision"] = width
    if hasattr(opened, "base"):
        widths["text"] = opened.base.config.get_text_config().hidden_size
        if (layer := getattr(opened.base.config, "vision_feature_layer", None)) is not None:
            widths["layer"] = layer
    return widths


def _of_vision(opened: Vision | Trunk) -> dict[str, Tensor]:
    if not hasattr(opened, "encoder"):
        return _named("encoder", opened.tower)
    return _named("encoder", opened.encoder.tower) | _named("projector", opened.projector)


def _of_decoder(opened: Vision | Trunk) -> dict[str, Tensor]:
    """Without embeddings, which become more when words are added."""
    return _named("decoder", opened.decoder.layers) if hasattr(opened, "decoder") else {}


def _named(part: str, module: nn.Module | None) -> dict[str, Tensor]:
    """Those whose numbers are theirs in any dtype: not quantised, not elsewhere."""
    return {
        f"{part}.{name.replace('base_layer.', '')}": parameter.detach()
        for name, parameter in (module.named_parameters() if module is not None else ())
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
