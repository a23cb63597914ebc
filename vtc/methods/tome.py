"""ToMe: bipartite soft matching, here between the encoder and the language model (arXiv 2210.09461)."""

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
    """Merges the most similar tokens, judged by the keys of one encoder layer, until k are left.

    One round merges tokens of even position into their most similar token of odd position, so it removes at
    most half; further rounds follow until exactly k are left, on group averages of the keys. Departures: the
    sequence holds patches only, so parity counts from the first patch, not from CLS; and a further round
    splits the tokens in their spatial order, where the paper's next block has the even ones first.

    layer  the block whose keys judge similarity; the second to last, which LLaVA reads
    """

    name = "tome"
    paper = "arXiv:2210.09461"

    layer: Layer = -2

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("keys", (self.layer,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        batch, n = tokens.size.shape
        index = torch.arange(n, device=tokens.x.device).expand(batch, n)  # (B, N) tokens still there
        place = index  # (B, N) the token that each token has gone into
        keys = tokens.keys[:, 0].float()  # (B, N, D)
        reduction = Reduction.merge(index, place)
        while reduction.k > k:
            metric = reduction.apply(keys, tokens.size)
            step = match(metric, min(reduction.k - k, reduction.k // 2))
            goes = index.gather(1, step.index.gather(1, step.source))  # (B, K) where each token left goes
            place = goes.gather(1, reduction.source)
            index = index.gather(1, step.index)
            reduction = Reduction.merge(index, place)
        return reduction


def match(metric: Tensor, r: int) -> Reduction:
    """One round: the r even tokens with the most similar odd partner go into it. metric (B, N, D)."""
    batch, n, _ = metric.shape
    metric = F.normalize(metric, dim=-1)
    odd = metric[:, 1::2].transpose(1, 2)  # (B, D, N/2)
    few = max(1, _PAIRS // (batch * n))  # rows at a time: all pairs of 10,000 tokens would be 100 MB
    found = [(rows @ odd).max(dim=2) for rows in metric[:, ::2].split(few, dim=1)]
    best, partner = (torch.cat(part, dim=1) for part in zip(*found))  # (B, N/2) each
    even = best.sort(dim=1, descending=True, stable=True).indices[:, :r]  # (B, r)
    place = torch.arange(n, device=metric.device).repeat(batch, 1)
    place = place.scatter(1, 2 * even, 2 * partner.gather(1, even) + 1)
    gone = torch.zeros(batch, n, dtype=torch.bool, device=metric.device).scatter(1, 2 * even, True)
    index = gone.long().argsort(dim=1, stable=True)[:, : n - r]  # (B, N - r) those that stay, in order
    return Reduction.merge(index, place)
