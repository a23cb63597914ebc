"""DiffRate: prunes to one count and merges to another, both learned for each block (arXiv 2305.17997)."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from pathlib import Path

import torch
import torch.nn.functional as F

from ..method import Merge, Need, register
from ..tokens import Reduction, Tokens, gather


@register
@dataclass
class DiffRate(Merge):
    """Drops what CLS attends to least, then merges the next least into the most similar of the others.

    Of the tokens that leave a block, those that CLS attends to least are pruned. The rest of them join the
    kept token with the most similar features (cosine) and count in a plain mean; their size counts times
    their similarity, so that sizes shrink. Attention is always proportional to size.

    prune  the share of the removed tokens that is pruned rather than merged, or a list that says for each
           block how many patches pruning leaves, as learned or published (see `published`); never fewer than
           the budget. Over the 28 published schedules of DeiT and MAE the share lies between 0.2 and 0.7,
           the median of 0.42 is about the default

    Departures: no token has a negative similarity, which could make sizes negative and their logarithm NaN:
    it counts as 0. Tokens go on in the order they came in, where the official code leaves them sorted by
    importance; as each block sorts anew, that decides ties only. Ties go to the first place.
    """

    name = "diffrate"
    paper = "arXiv:2305.17997"
    stages = ("encoder",)
    proportional = True

    # Not a plain number, for which a list would be no valid option.
    prune: float | list[int] = field(default_factory=lambda: 0.4)

    def __post_init__(self):
        if isinstance(self.prune, Sequence) and not isinstance(self.prune, str):
            if not all(isinstance(p, Integral) and not isinstance(p, bool) and p >= 1 for p in self.prune):
                raise ValueError(f"prune lists how many patches stay in each block, >= 1, not {self.prune!r}")
            self.prune = [int(p) for p in self.prune]
        elif isinstance(self.prune, bool) or not isinstance(self.prune, Real) or not 0 <= self.prune <= 1:
            raise ValueError(f"prune must be a share between 0 and 1 or a list by block, not {self.prune!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("cls_attention", (-2,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        importance = tokens.cls_attention[:, 0].float()  # (B, N)
        order = importance.sort(dim=1, descending=True, stable=True).indices[:, : self._left(tokens, k)]
        kept, merged = order[:, :k], order[:, k:]  # (B, M), (B, P - M)
        if merged.shape[1] == 0:
            return Reduction.select(kept, tokens.n)
        x = tokens.x.float()
        similarity = F.normalize(gather(x, merged), dim=-1) @ x.transpose(1, 2)  # (B, P - M, N)
        similarity = similarity / x.norm(dim=-1).clamp_min(1e-12)[:, None]
        # In order of importance, so that the first of equals is the most important.
        best, slot = similarity.gather(2, kept[:, None].expand(-1, merged.shape[1], -1)).max(dim=2)
        source = torch.full_like(kept[:, :1], -1).repeat(1, tokens.n)  # (B, N)
        source = source.scatter(1, kept, kept).scatter(1, merged, kept.gather(1, slot))
        reduction = Reduction.merge(kept, source, weight=torch.ones_like(importance))
        counted = torch.ones_like(importance).scatter(1, merged, best.clamp_min(0))
        reduction.size = reduction.sizes(tokens.size.float() * counted)
        return reduction

    def _left(self, tokens: Tokens, k: int) -> int:
        """How many tokens pruning leaves, of which k stay after merging."""
        n = tokens.n
        if not isinstance(self.prune, list):
            return n - int(self.prune * (n - k) + 0.5)
        if tokens.layer >= len(self.prune):
            raise ValueError(
                f"prune says what stays in {len(self.prune)} blocks and tokens are reduced in block "
                f"{tokens.layer}: give a number for each block of the encoder"
            )
        return min(n, max(k, self.prune[tokens.layer]))


def published(name: str) -> tuple[DiffRate, list[int]]:
    """The method and the `keep` of a schedule of SCHEDULES: `vtc.compress(model, method, keep=keep)`.

    They were learned on ImageNet at 224 pixels, patches of 16 (14 for MAE-H), for the model of that name.
    """
    if name not in SCHEDULES:
        raise ValueError(f"there is no published schedule {name!r}; known: {', '.join(SCHEDULES)}")
    pruned, merged = SCHEDULES[name]
    return DiffRate(prune=pruned), [min(p, m) for p, m in zip(pruned, merged)]


def _schedules() -> dict[str, tuple[list[int], list[int]]]:
    table = json.loads(Path(__file__).with_suffix(".json").read_text())
    return {name: (left["pruned"], left["merged"]) for name, left in table.items()}


# Patches that pruning leaves and patches that merging leaves, by block, as published: a number may exceed
# what enters its block.
SCHEDULES = _schedules()
