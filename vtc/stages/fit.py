"""Whether a module with weights fits the widths of a host, at the place where it works."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from ..hosts import Vision
from .projection import token_by_token

if TYPE_CHECKING:
    from ..learned.base import Resampler


def check_fit(vision: Vision, module: Resampler) -> None:
    """Raises ValueError for a module that no picture's tokens could be given to. Where that depends on the
    picture, as with projectors that join patches of some, it is told when the model runs."""
    host, text = vision.host, vision.base.config.get_text_config().hidden_size
    widths = (module.in_width, module.out_width)
    if module.place == "instead":
        if vision.projector is None or host.late or host.memory:
            raise ValueError(
                f"'{module.name}' takes the place of a projector between encoder and prompt, which "
                f"{host.name} has not: use a module of {text} numbers to a token that works behind it"
            )
        given = _given(vision)
        if given and module.in_width not in given:
            _refuse(module, f"the projector of this {host.name} is given", " or ".join(map(str, given)))
        if module.out_width != text:
            raise ValueError(
                f"'{module.name}' makes tokens of {module.out_width} numbers, the language model of this "
                f"{host.name} takes {text}: make it with out_width={text}"
            )
        return
    in_front = module.place == "before" and vision.projector is not None and not host.memory
    # The features of a late projector are what it will be given.
    given = _given(vision) if host.late or (in_front and token_by_token(vision.projector)) else []
    fitting = given if host.late else [*given, text]
    if fitting and widths[0] not in fitting:
        where = "projector" if given else "language model"
        _refuse(module, f"the {where} of this {host.name} is given", str(fitting[0]))
    if widths[0] != widths[1]:
        raise ValueError(
            f"'{module.name}' makes tokens of {widths[1]} numbers of {widths[0]}, which in front of a "
            "projector or behind it are the same: make it with one width"
        )


def _refuse(module: Resampler, what: str, width: str) -> None:
    raise ValueError(
        f"'{module.name}' reads {module.in_width} numbers to a token, {what} {width}: make it with that width"
    )


def _given(vision: Vision) -> list[int]:
    """How many numbers to a token the projector may be given, as far as its weights and configs tell: what
    its first layer takes, and what the encoder makes, of which some projectors put several together."""
    found = []
    for module in vision.projector.modules():
        weight = next(module.parameters(recurse=False), None)
        if weight is not None:
            found += [weight.shape[-1]] if isinstance(module, nn.Linear) or weight.dim() == 1 else []
            break
    width = getattr(getattr(vision.encoder.tower, "config", None), "hidden_size", None)
    found += [width] if isinstance(width, int) else []
    return list(dict.fromkeys(found))
