"""ATS: tokens are sampled by the attention and the values of CLS, without chance (arXiv 2111.15667)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Need, Select, register
from ..tokens import Tokens


@register
@dataclass
class ATS(Select):
    """Samples tokens at k even quantiles of what CLS takes from them: attention times length of the value.

    The scores, summed up in spatial order and divided by their sum, are a distribution; each of the quantiles
    1/2k, 3/2k, ... takes the token where it comes closest. Departures: quantiles that meet in one token give
    fewer than k in the paper, where k is a maximum; here the highest scores among the others fill up. The
    token reduction benchmark leaves the last quantile out; here all k are taken.
    """

    name = "ats"
    paper = "arXiv:2111.15667"
    stages = ("encoder",)
    schedule = "staged"

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("cls_values", (-2,)),)

    def select(self, tokens: Tokens, k: int) -> Tensor:
        score = tokens.cls_values[:, 0].float()  # (B, N)
        total = score.sum(dim=1, keepdim=True)
        share = torch.where(total > 0, score / total, 1 / tokens.n)
        quantiles = (torch.arange(k, device=score.device) + 0.5) / k  # (k,)
        sampled = _nearest(share.cumsum(dim=1), quantiles.repeat(len(score), 1))
        first = torch.zeros_like(score).scatter(1, sampled, 1.0)
        order = score.sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, first.gather(1, order).sort(dim=1, descending=True, stable=True).indices)
        return order[:, :k]


def _nearest(values: Tensor, wanted: Tensor) -> Tensor:
    """The first position of the ascending values (B, N) that are closest to the wanted ones: (B, k)."""
    above = torch.searchsorted(values, wanted).clamp_max(values.shape[1] - 1)
    low = values.gather(1, (above - 1).clamp_min(0))  # (B, k)
    below = torch.searchsorted(values, low)
    return torch.where(wanted - low <= values.gather(1, above) - wanted, below, above)
