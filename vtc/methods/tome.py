"""ToMe: bipartite soft matching (arXiv 2210.09461), and the rounds that other mergers share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Layer, Merge, Need, register
from ..tokens import Reduction, Tokens

_PAIRS = 1 << 22  # similarities held at once: 16 MiB


@register
@dataclass
class ToMe(Merge):
    """Merges the most similar tokens, judged by the keys of one layer, until k are left.

    One round merges tokens of even position into their most similar token of odd position, so it removes at
    most half; where more must go at once, further rounds follow on group averages of the keys. Positions
    count from the first token of the encoder's sequence: CLS is at 0 and the patches begin at 1. As in the
    official code an encoder goes on with the even tokens that stay, in their order, then all odd ones;
    without CLS the even ones stand by falling similarity. In that order the next block, or round, counts its
    positions. Departures: registers count as positions too, but are never merged; equally similar tokens are
    taken in turn, where the official sort leaves it open.

    layer         the block whose keys judge after the encoder; the second to last, which LLaVA reads
    order         "paper", or "spatial": tokens go on in the order of their places
    proportional  whether later blocks attend to a merged token as to its members
    """

    name = "tome"
    paper = "arXiv:2210.09461"
    stages = ("features", "encoder")

    layer: Layer = -2
    order: str = "paper"
    proportional: bool = True

    def __post_init__(self):
        if self.order not in ("paper", "spatial"):
            raise ValueError(f"order must be 'paper' or 'spatial', not {self.order!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("keys", (self.layer,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        keys = tokens.keys[:, 0].float()  # (B, N, D)

        def step(now: Reduction, r: int) -> Reduction:
            found = match(now.apply(keys, tokens.size), r, tokens.prefix)
            return found if self.order == "paper" else found.ascending()

        return in_rounds(tokens, k, step)


def in_rounds(tokens: Tokens, k: int, step: Callable[[Reduction, int], Reduction]) -> Reduction:
    """Merges by `step(what is merged by now, r)`, which removes r tokens, at most half, until k stay."""
    every = torch.arange(tokens.n, device=tokens.x.device).expand(len(tokens.x), -1)  # (B, N)
    reduction = Reduction(every, every)
    while reduction.k > k:
        found = step(reduction, min(reduction.k - k, reduction.k // 2))
        index, source = reduction.index.gather(1, found.index), found.source.gather(1, reduction.source)
        reduction = Reduction(index, source)
    return reduction


def match(metric: Tensor, r: int, prefix: int) -> Reduction:
    """One round: the r even tokens with the most similar odd partner go into it. metric (B, N, D)."""
    batch, n, _ = metric.shape
    metric = F.normalize(metric, dim=-1)
    even, odd = parity(n, prefix, metric.device)
    partners = metric[:, odd].transpose(1, 2)  # (B, D, N/2)
    few = max(1, _PAIRS // (batch * n))  # rows at a time: all pairs of 10,000 tokens would be 100 MB
    found = [(rows @ partners).max(dim=2) for rows in metric[:, even].split(few, dim=1)]
    best, partner = (torch.cat(part, dim=1) for part in zip(*found))  # (B, N/2) each
    ranked = best.sort(dim=1, descending=True, stable=True).indices
    merged, rest = ranked[:, :r], ranked[:, r:]
    if prefix:
        rest = rest.sort(dim=1).values
    index = torch.cat([even[rest], odd.expand(batch, -1)], dim=1)  # (B, N - r)
    slot = torch.arange(n - r, device=index.device).expand(batch, -1)
    source = index.new_empty(batch, n).scatter(1, index, slot)
    into = rest.shape[1] + partner.gather(1, merged)  # (B, r)
    return Reduction(index, source.scatter(1, even[merged], into))


def parity(n: int, prefix: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The patches at even and at odd positions of a sequence that has `prefix` other tokens in front."""
    patches = torch.arange(n, device=device)
    return patches[prefix % 2 :: 2], patches[1 - prefix % 2 :: 2]
