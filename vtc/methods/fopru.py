"""FoPru: what the encoder attends to, token by token or in whole rows of the picture (arXiv 2411.14164)."""

from dataclasses import dataclass

from torch import Tensor

from ..method import Layer, Need, Select, register, scores
from ..tokens import Tokens


@register
@dataclass
class FoPru(Select):
    """Keeps the tokens that receive most attention, or whole rows of the picture.

    strategy  "rank": the tokens of the highest significance; "row": the rows of the grid with the highest
              sum, whole, so that what lies side by side stays together
    signal    a token's significance: the attention it receives from all tokens, "mean_attention", from
              patches, "patch_attention", or from CLS, "cls_attention"
    layer     the block whose attention is read

    There is no official code. The paper's abstract says: significance from the encoder's attention, the two
    strategies, the kept tokens back in their own order. That the significance is the attention received in
    the last layer but one, averaged over heads, and that a row counts by its sum, is recollection of the
    paper's method section and not checked against it.

    Departures: "row" keeps exactly k tokens, so the row that would not fit whole keeps its best ones. Rows
    are those of a tile, not of the tiled picture.
    """

    name = "fopru"
    paper = "arXiv:2411.14164"
    positions = "repack"

    strategy: str = "rank"
    signal: str = "mean_attention"
    layer: Layer = -2

    def __post_init__(self):
        if self.strategy not in ("rank", "row"):
            raise ValueError(f"strategy must be 'rank' or 'row', not {self.strategy!r}")
        known = ("mean_attention", "patch_attention", "cls_attention")
        if self.signal not in known:
            raise ValueError(f"signal must be one of {', '.join(known)}, not {self.signal!r}")

    @property
    def needs_grid(self) -> bool:
        return self.strategy == "row"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.layer,)),)

    @property
    def scored(self) -> bool:
        return self.strategy == "rank"

    def score(self, tokens: Tokens) -> Tensor:
        return getattr(tokens, self.signal)[:, 0]  # (B, 1, N) -> (B, N)

    def select(self, tokens: Tokens, k: int) -> Tensor:
        if self.strategy == "rank":
            return super().select(tokens, k)
        significance = scores(self, tokens)  # (B, N)
        rows = significance.unflatten(1, tokens.grid).sum(dim=2)  # (B, rows)
        rank = rows.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # 0 for the best
        rank = rank.repeat_interleave(tokens.grid[1], dim=1)  # (B, N) of the row of each token
        order = significance.argsort(dim=1, descending=True, stable=True)
        order = order.gather(1, rank.gather(1, order).argsort(dim=1, stable=True))  # the best row first
        return order[:, :k]
