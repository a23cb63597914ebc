"""EViT: the tokens that CLS attends to stay, all others become one (arXiv 2202.07800)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Merge, Need, register
from ..tokens import Reduction, Tokens

FUSES = ("sum", "mean", "none")


@register
@dataclass
class EViT(Merge):
    """Keeps the tokens that CLS attends to most; the others are fused into one token, weighted by attention.

    fuse       "sum" as EViT: weights are not divided by their sum, so that the fused token is as short as
               the attention it stands for is little; "mean" divides them; "none" drops the others, as EViT
               without fusing and the Top-K of the token reduction benchmark
    attention  "cls", or "mean": what a token receives from all, for encoders without a CLS token

    A fused token is an ordinary candidate in the next block. Departures: k counts the fused token, so k - 1
    others stay (the official code gives ceil(rate * n) + 1), and at k = 1 all are fused; where k = n, nothing
    is. Tokens stay in spatial order, the fused one in the place of the dropped token with the most attention,
    where the official code sorts by attention and puts it last. Gradients do not flow into its weights.
    """

    name = "evit"
    paper = "arXiv:2202.07800"
    stages = ("encoder",)
    schedule = "staged"

    fuse: str = "sum"
    attention: str = "cls"

    def __post_init__(self):
        if self.fuse not in FUSES:
            raise ValueError(f"fuse must be one of {', '.join(FUSES)}, not {self.fuse!r}")
        if self.attention not in ("cls", "mean"):
            raise ValueError(f"attention must be 'cls' or 'mean', not {self.attention!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(f"{self.attention}_attention", (-2,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        attention = tokens.cls_attention if self.attention == "cls" else tokens.mean_attention
        return keep_and_fuse(attention[:, 0], k, self.fuse)


def keep_and_fuse(score: Tensor, k: int, fuse: str) -> Reduction:
    """The k - 1 highest scores (B, N) stay, the other tokens become one in the place of the highest of them;
    with fuse "none", the k highest stay."""
    score = score.float()
    order = score.sort(dim=1, descending=True, stable=True).indices  # (B, N)
    index, rest = order[:, :k], order[:, k - 1 :]  # the last of the k is the place of the rest
    if fuse == "none":
        return Reduction.select(index, score.shape[1])
    place = torch.arange(score.shape[1], device=score.device).expand_as(score)
    place = place.scatter(1, rest, rest[:, :1].expand_as(rest))
    if fuse == "mean":  # the same for any scale of the scores, and plain where all of the rest have none
        most = score.gather(1, rest[:, :1])  # (B, 1)
        tiny = torch.finfo(score.dtype).tiny
        score = torch.where(most > 0, score / most.clamp_min(tiny), 1.0).clamp_max(1.0)
    return Reduction.merge(index, place, score, combine=fuse)
