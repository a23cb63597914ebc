"""What encoder, projector and prompt showed of themselves in one call."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..capture import Recording
from .levels import Found


@dataclass
class Recorded:
    """What was seen of one call.

    attention  of the encoder
    projected  what the projector was given
    levels     what left some blocks of the encoder
    single     for each image whether its tokens can be reduced in front of it
    texts      for each image the prompt around it (T, D), and which of it is behind the image (T,)
    """

    attention: Recording
    projected: list[tuple[Tensor, int]]
    levels: Found = field(default_factory=dict)
    single: list[bool] = field(default_factory=list)
    texts: list[tuple[Tensor, Tensor]] | None = None
