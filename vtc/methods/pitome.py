"""PiToMe: what is like many others is merged, what stands out is left alone (arXiv 2405.16148)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..method import Layer, Merge, Need, register
from ..tokens import Reduction, Tokens, gather
from .tome import in_rounds, match

_HALVES = {"first": (True, False), "last": (False, True), "none": (False, False), "both": (True, True)}


@register
@dataclass
class PiToMe(Merge):
    """Merges the tokens of highest energy, those that lie among many like them, and protects the others.

    Energy is the mean over all tokens of ELU(cosine of keys - margin), with a margin that falls linearly over
    the depth. To remove r tokens, the 2r of highest energy are split by even and odd rank, and each even one
    joins its most similar odd one. In half of the blocks the official code splits all tokens by rank instead,
    and merges the r most similar pairs as ToMe does. Departures: one round removes at most half, and further
    rounds follow where more must go, which the official code refuses; equal energies go by position; groups
    go on in the order of their places, which changes nothing but ties. All pairs of an image's tokens are in
    memory at once.

    margin  in the first block; the official code has 0.75 for DeiT, 0.9 for AugReg models
    pairs   the half of the depth that merges the most similar pairs: "first", as the official code for DeiT;
            "last", as that for AugReg and MAE; "none", as the paper says; "both"
    layer   the block whose keys judge after the encoder; the second to last, which LLaVA reads
    """

    name = "pitome"
    paper = "arXiv:2405.16148"
    stages = ("encoder", "features")

    margin: float = 0.75
    pairs: str = "first"
    layer: Layer = -2

    def __post_init__(self):
        if self.pairs not in _HALVES:
            raise ValueError(f"pairs must be one of {', '.join(_HALVES)}, not {self.pairs!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("keys", (self.layer,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        keys = tokens.keys[:, 0].float()  # (B, N, D)
        margin = self.margin * (1 - tokens.layer / tokens.depth)
        late = 2 * tokens.layer >= tokens.depth

        def step(now: Reduction, r: int) -> Reduction:
            metric = F.normalize(now.apply(keys, tokens.size), dim=-1)
            similar = metric @ metric.transpose(1, 2)  # (B, N, N)
            similar.diagonal(dim1=1, dim2=2).fill_(1)  # rounding must not rank two tokens
            energy = F.elu(similar - margin).mean(dim=2)
            rank = energy.sort(dim=1, descending=True, stable=True).indices  # (B, N)
            metric = gather(metric, rank)
            found = match(metric, r, prefix=0) if _HALVES[self.pairs][late] else _halve(metric, r)
            source = torch.empty_like(rank).scatter(1, rank, found.source)  # of ranks -> of positions
            return Reduction(rank.gather(1, found.index), source).ascending()

        return in_rounds(tokens, k, step)


def _halve(metric: Tensor, r: int) -> Reduction:
    """Of the first 2r tokens each even one joins its most similar odd one. metric (B, N, D), unit length."""
    batch, n, _ = metric.shape
    even, odd = metric[:, 0 : 2 * r : 2], metric[:, 1 : 2 * r : 2]
    partner = (even @ odd.transpose(1, 2)).argmax(dim=2)  # (B, r)
    stay = torch.arange(n - r, device=metric.device).expand(batch, -1)  # slots: the odd ones, the protected
    into = torch.stack([partner, stay[:, :r]], dim=2).flatten(1)  # (B, 2r)
    position = torch.arange(n, device=metric.device)
    return Reduction(
        torch.cat([position[1 : 2 * r : 2], position[2 * r :]]).expand(batch, -1),
        torch.cat([into, stay[:, r:]], dim=1),
    )
