"""TR-PTS, its token half: EViT with an average, in the blocks that matter least (arXiv 2507.22872)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..method import Merge, Need, register
from ..tokens import Reduction, Tokens
from .evit import keep_and_fuse


@register
@dataclass
class TRPTS(Merge):
    """Keeps the tokens that CLS attends to most; the others become their average, weighted by attention.

    after  "attention": in front of the MLP, as EViT; "block": behind it. The paper does not say which.

    The paper removes tokens in the few blocks that its other half, which picks parameters to fine-tune, picks
    the fewest in: `schedule=least(sensitivity, count)`. Without such numbers, it is EViT's placement. No code
    was ever published. Departure: k counts the fused token, as it does in `evit`.
    """

    name = "tr-pts"
    paper = "arXiv:2507.22872"
    stages = ("encoder",)
    schedule = "staged"

    after: str = "attention"

    def __post_init__(self):
        if self.after not in ("attention", "block"):
            raise ValueError(f"after must be 'attention' or 'block', not {self.after!r}")

    @property
    def after_block(self) -> bool:
        return self.after == "block"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("cls_attention", (-2,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        return keep_and_fuse(tokens.cls_attention[:, 0], k, "mean")


def least(sensitivity: Sequence[float], count: int) -> tuple[int, ...]:
    """The `count` blocks with the least sensitivity, ascending, earlier ones first on ties: a `schedule`.

    sensitivity  a number for each block: how many parameters of it are trained, or the sum of their squared
                 gradients on the user's data
    """
    values = [float(value) for value in sensitivity]
    if any(map(math.isnan, values)):
        raise ValueError("the sensitivity of a block is not a number (NaN)")
    if count != int(count) or not 1 <= count <= len(values):
        raise ValueError(f"count must be between 1 and the {len(values)} blocks, not {count!r}")
    by_value = sorted(range(len(values)), key=values.__getitem__)
    return tuple(sorted(by_value[: int(count)]))
