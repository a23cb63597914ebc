"""VTC-CLS: the tokens that CLS attends to, over many layers, stay (arXiv 2412.05819)."""

from dataclasses import dataclass

from torch import Tensor

from ..method import Layer, Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class VTCCLS(Select):
    """Keeps the tokens that CLS attends to most, attention summed over an ensemble of layers.

    start, stop  blocks start..stop-1 are summed, as in the official attentions[start:stop]. The code excludes
                 the last block and publishes no start; the default is 14 of 24 blocks, at any depth.
    layers       any other list of blocks; start = stop - 1 = -2 gives FasterVLM
    """

    name = "vtc-cls"
    paper = "arXiv:2412.05819"
    positions = "repack"

    start: int | float = 14 / 24
    stop: int = -1
    layers: tuple[Layer, ...] | None = None

    def __post_init__(self):
        if self.layers is not None and not isinstance(self.layers, (tuple, list)):
            raise ValueError(f"layers is a list of blocks like (14, -2), not {self.layers!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        layers = (slice(self.start, self.stop),) if self.layers is None else tuple(self.layers)
        return (Need("cls_attention", layers),)

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.cls_attention.sum(dim=1)  # (B, layers, N) -> (B, N)
