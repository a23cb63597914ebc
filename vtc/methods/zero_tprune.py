"""Zero-TPrune: similar tokens go, then those that the attention graph ranks lowest (arXiv 2305.17328)."""

import math
from dataclasses import dataclass
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Need, Select, register
from ..tokens import Tokens, gather


@register
@dataclass
class ZeroTPrune(Select):
    """Drops the similar, then the unimportant tokens, ranked by a weighted PageRank over attention.

    similar     the share of the removed tokens that go for their similarity; at most half of all tokens do
    iterations  rounds of the ranking in the first three blocks, in the middle, and in the last three; where
                there are fewer than 12 blocks, in a quarter of them instead of three
    start       "cls": CLS starts the ranking with sqrt(tokens) times the vote of others; "uniform" with the
                same (Zero-TPrune-uni), and so it is where no token stands in front of the patches
    variance    heads whose votes have a variance outside of these bounds do not count; if that is all, all do

    Order I', S, I: one round of ranking splits the tokens into an important and a less important half; those
    of the latter whose keys are most similar to a key of the former go; the rest is ranked by attention among
    what is left. No code was published; read into the paper: votes start at 1, which the bounds of the
    variance need; keys are averages over heads; rows of attention are divided by their sums again after the
    similar ones have gone; tokens leave in spatial order, and where, the schedule says instead of a search.
    """

    name = "zero-tprune"
    paper = "arXiv:2305.17328"
    stages = ("encoder",)
    schedule = "staged"
    after_block = True

    similar: float = 0.5
    iterations: tuple[int, int, int] = (30, 5, 1)
    start: str = "cls"
    variance: tuple[float, float] = (0.01, 0.7)

    def __post_init__(self):
        if not 0 <= self.similar <= 1:
            raise ValueError(f"similar={self.similar} must be a share between 0 and 1")
        if self.start not in ("cls", "uniform"):
            raise ValueError(f"start must be 'cls' or 'uniform', not {self.start!r}")
        if not _numbers(self.iterations, 3) or any(t != int(t) or t < 0 for t in self.iterations):
            raise ValueError(
                f"iterations must be three numbers of rounds like (30, 5, 1), not {self.iterations!r}"
            )
        if not _numbers(self.variance, 2) or not self.variance[0] <= self.variance[1]:
            raise ValueError(
                f"variance must be a lower and an upper bound like (0.01, 0.7), not {self.variance!r}"
            )

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("attention", (-2,)), Need("keys", (-2,)))

    def select(self, tokens: Tokens, k: int) -> Tensor:
        n, prefix = tokens.n, tokens.prefix
        attention = tokens.attention[:, 0].float()  # (B, H, M, M)
        left, stays = torch.arange(n, device=attention.device).expand(len(attention), n), None
        gone = min(math.floor(self.similar * (n - k) + 0.5), n // 2)
        if gone:
            guide = self.importance(attention, 1, prefix)[:, prefix : prefix + n]
            left = left.gather(1, _unlike(tokens.keys[:, 0], guide, gone))  # (B, n - gone)
            stays = torch.ones_like(attention[:, 0, 0])  # (B, M), 0 for what is gone
            stays[:, prefix : prefix + n] = torch.zeros_like(guide).scatter(1, left, 1)
        score = self.importance(attention, self._rounds(tokens), prefix, stays)
        score = score[:, prefix : prefix + n].gather(1, left)
        return left.gather(1, score.sort(dim=1, descending=True, stable=True).indices[:, :k])

    def importance(self, attention: Tensor, rounds: int, prefix: int, stays: Tensor | None = None) -> Tensor:
        """How many votes every token has after so many rounds of passing them on: (B, H, M, M) -> (B, M).
        Tokens whose `stays` (B, M) is 0 neither have nor get any,
        and the others share theirs among themselves."""
        shares = torch.ones_like(attention[:, :, :1])  # (B, H, 1, M)
        if stays is None:
            stays = shares[:, :1]
        else:
            stays = stays[:, None, None]  # (B, 1, 1, M)
            given = (attention @ stays.transpose(2, 3)).transpose(2, 3)  # to those that stay
            shares = shares / given.clamp_min(1e-30)
        count = stays.sum(dim=3)  # (B, 1, 1)
        votes = stays.expand_as(shares)
        if self.start == "cls" and prefix:
            votes = torch.cat([count[..., None].sqrt().expand(*votes.shape[:2], 1, 1), votes[..., 1:]], 3)
        for _ in range(rounds):
            votes = (votes * shares) @ attention * stays
        votes = votes[:, :, 0]  # (B, H, M)
        low, high = self.variance
        stays = stays[:, :, 0]
        mean = votes.sum(dim=2, keepdim=True) / count
        variance = ((votes - mean).square() * stays).sum(dim=2) / count[..., 0]
        heads = (variance >= low) & (variance <= high)  # (B, H)
        heads |= ~heads.any(dim=1, keepdim=True)
        total = (votes.square() * heads[..., None]).sum(dim=1)
        return (total / heads.sum(dim=1, keepdim=True)).sqrt()

    def _rounds(self, tokens: Tokens) -> int:
        first, middle, last = map(int, self.iterations)
        few = min(3, tokens.depth // 4)
        if tokens.layer < few:
            return first
        return last if tokens.layer >= tokens.depth - few else middle


def _numbers(values: object, count: int) -> bool:
    whole = isinstance(values, (tuple, list)) and len(values) == count
    return whole and all(isinstance(value, Real) and not isinstance(value, bool) for value in values)


def _unlike(keys: Tensor, importance: Tensor, gone: int) -> Tensor:
    """Ascending positions without the `gone` less important tokens whose keys (B, N, d) are the most similar
    to one of a more important token; of equally similar ones the least important goes first."""
    n = importance.shape[1]
    keys = F.normalize(keys.float(), dim=-1)
    order = importance.sort(dim=1, descending=True, stable=True).indices
    more, less = order[:, : n - n // 2], order[:, n - n // 2 :].flip(1)
    closest = (gather(keys, less) @ gather(keys, more).transpose(1, 2)).amax(dim=2)  # (B, n // 2)
    similar = less.gather(1, closest.sort(dim=1, descending=True, stable=True).indices[:, :gone])
    removed = torch.zeros_like(order).scatter(1, similar, 1)
    return removed.argsort(dim=1, stable=True)[:, : n - gone]
