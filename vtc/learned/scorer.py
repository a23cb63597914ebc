from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .base import Grid
from .registry import register_module
from .selector import Selector, gumbel_choice


@register_module
class LearnedScorer(Selector):
    """A small MLP that tells which tokens can go at some block of an encoder (DynamicViT, arXiv:2106.02034).

    Parameter names are those of `score_predictor.<stage>` of the published models (MIT), of which the first
    stage's is loaded; `Staged` loads all. It reads tokens without CLS: half of the channels of each, and the
    other half averaged over the tokens that are still there. At inference `forward` keeps the k best,
    (B, N, D) to (B, k, D).

    In training nothing is removed: `decide` draws a choice, `policy_softmax` keeps others from looking at
    tokens that went, and `ratio_loss` and `token_distillation` go beside the task's own loss. That forward
    with all tokens is the trainer's own; `vtc.compress()` always removes tokens.

    Departures: where no token is left in an image their average is zero, not NaN; tokens stay in the order of
    the grid where the official code sorts them by score; and the number of tokens is that of the input where
    it is that of 224 pixels.
    """

    name = "learned-scorer"
    whole_grid = False
    schedule = "staged"
    paper = "arXiv:2106.02034"
    weights = "MIT"
    prefixes = ("score_predictor.0.",)

    @dataclass(frozen=True)
    class Config:
        in_width: int = 384

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config.in_width
        if c % 4:
            raise ValueError(f"in_width is a multiple of 4, not {c}")
        self.in_conv = nn.Sequential(nn.LayerNorm(c), nn.Linear(c, c), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(c, c // 2),
            nn.GELU(),
            nn.Linear(c // 2, c // 4),
            nn.GELU(),
            nn.Linear(c // 4, 2),
            nn.LogSoftmax(dim=-1),
        )

    def log_probabilities(self, x: Tensor, there: Tensor | None = None) -> Tensor:
        """Of tokens (B, N, D) to stay and to go: (B, N, 2). there: (B, N), 1 for those not gone earlier."""
        there = x.new_ones(x.shape[:2]) if there is None else there.to(x.dtype)
        own, shared = self.in_conv(x).chunk(2, dim=2)
        shared = (shared * there[..., None]).sum(1, keepdim=True) / there.sum(1).clamp(min=1)[:, None, None]
        return self.out_conv(torch.cat([own, shared.expand_as(own)], 2))

    def scores(self, x: Tensor, grid: Grid) -> Tensor:
        return self.log_probabilities(x)[..., 0].float()

    def decide(
        self, x: Tensor, there: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws which tokens stay, straight through: ones and zeros (B, N). Those gone earlier are gone."""
        drawn = gumbel_choice(self.log_probabilities(x, there), 1.0, generator)[..., 0]
        return drawn if there is None else drawn * there


def policy_softmax(logits: Tensor, there: Tensor, eps: float = 1e-6) -> Tensor:
    """The weights of attention logits (B, heads, M, M) where nobody but themselves looks at tokens that are
    gone: there (B, M) is 0 for those. In float32, and differentiable in `there`."""
    there, m = there.float(), logits.shape[-1]
    seen = there[:, None, None, :]  # (B, 1, 1, M)
    seen = seen + (1 - seen) * torch.eye(m, device=logits.device)
    logits = logits.float()
    weights = (logits - logits.amax(-1, keepdim=True)).exp() * seen
    return (weights + eps / m) / (weights.sum(-1, keepdim=True) + eps)


def ratio_loss(decisions: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    """How far the share of kept tokens of each image, (B, N) for each stage, is from that wanted: squared."""
    off = [(kept.mean(1) - share).square().mean() for kept, share in zip(decisions, shares, strict=True)]
    return torch.stack(off).mean()


def token_distillation(student: Tensor, teacher: Tensor, there: Tensor) -> Tensor:
    """The mean square difference of tokens (B, N, D) from the teacher's, of those that are there (B, N)."""
    off = (student - teacher.detach()).square().mean(2) * there.detach()
    return off.sum() / there.detach().sum().clamp(min=1)
