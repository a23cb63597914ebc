from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import Reduction
from ..transformer import initialise
from .base import Grid, LearnedModule, Resampler
from .grids import spread
from .in_encoder import BetweenBlocks
from .mlp import Mlp
from .registry import register_module

LICENCE = "MIT by the authors' README, Apache-2.0 by their licence file"


@register_module
class TokenSlimming(BetweenBlocks, Resampler):
    """Means of all tokens, by weights that each gives itself with a small network (SiT's token slimming).

    The module of arXiv:2111.12624; the weights of each token out sum to 1. A set goes in: the order of tokens
    changes nothing. Parameters are those of the official code, of which a model's `tsm.0` is loaded; `Staged`
    loads all. The number of tokens is a size of the last layer, so there is one for each module.

    Fresh, all tokens out are about the mean of the tokens in. `start_from` some features fits the last layer
    so that they start as means of blocks of the grid, as near as features tell where they are from. The
    official code has no such start: it trains the encoder along, with `ReverseSlimming` and
    `slimming_distillation`.
    """

    name = "token-slimming"
    paper = "arXiv:2111.12624"
    weights = LICENCE
    prefixes = ("tsm.0.",)
    whole_grid = False

    @dataclass(frozen=True)
    class Config:
        """tokens: how many come out. ratio: hidden width by width."""

        in_width: int = 1024
        tokens: int = 144
        ratio: float = 0.5

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        hidden = int(c.in_width * c.ratio)
        if c.tokens < 1 or hidden < 1:
            raise ValueError(f"tokens and hidden width are at least 1, not {c.tokens} and {hidden}")
        self.weight = nn.Sequential(
            nn.LayerNorm(c.in_width), nn.Linear(c.in_width, hidden), nn.GELU(), nn.Linear(hidden, c.tokens)
        )
        self.scale = nn.Parameter(torch.ones(1, 1, 1))
        initialise(self)

    def counts(self, n: int) -> list[int]:
        return [self.config.tokens]

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        self.checked(x, grid, k, levels)
        return self.slim(x)

    def slim(self, x: Tensor, prefix: int = 0) -> Tensor:
        """(B, prefix + N, width) to (B, prefix + tokens, width), between the layers of an encoder.

        The first `prefix` tokens (CLS) stay as they are and are mixed into no other.
        """
        first, x = x[:, :prefix], x[:, prefix:]
        return torch.cat([first, self.weights_of(x).transpose(1, 2) @ x], 1)

    def reduction(self, x: Tensor, grid: Grid, k: int, levels: Sequence[Tensor] = ()) -> Reduction:
        """The same tokens as mixtures, each in the place of the token that it has most of."""
        self.checked(x, grid, k, levels)
        mix = self.weights_of(x).transpose(1, 2)  # (B, tokens, N)
        index, source = _places(mix.detach())
        return Reduction(index, source, mix=mix)

    def weights_of(self, x: Tensor) -> Tensor:
        """(B, N, tokens), which sum to 1 over the N."""
        return (self.weight(x) * self.scale).softmax(1)

    def begin(self, found: Sequence[tuple[Tensor, Grid]], projector: nn.Module | None) -> None:
        grid = found[0][1]
        self.start_from(torch.cat([x for x, other in found if other == grid]).float(), grid)

    @torch.no_grad()
    def start_from(
        self,
        features: Tensor,
        grid: Grid,
        sharpness: float = 10.0,
        ridge: float = 1e-3,
        steps: int = 50,
    ) -> None:
        """Fits the last layer on features (images, N, width) of a grid, so that each token out is about the
        mean of its block; blocks are those of `grids.spread`, a square number of them on a square grid.

        First by least squares, where a token of the block gets the logit `sharpness` and others get 0, then
        by `steps` of L-BFGS on the cross-entropy of weights and blocks, which is convex. ridge: of the first
        fit, by the mean square of the hidden numbers. Raises ValueError for fewer tokens in than out.
        """
        self.checked(features, grid)
        if self.config.tokens > grid[0] * grid[1]:
            raise ValueError(f"{self.config.tokens} tokens have no blocks on a grid of {grid[0]} x {grid[1]}")
        owner = spread(grid, self.config.tokens)[1].to(features.device)  # (N,)
        blocks = F.one_hot(owner, self.config.tokens)  # (N, tokens)
        hidden = self.weight[:3](features.to(self.scale))  # (images, N, hidden)
        wanted = sharpness * blocks.double().repeat(len(features), 1)
        centred = hidden.double().flatten(0, 1)
        centred = centred - centred.mean(0)
        gram = centred.T @ centred
        gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        solved = torch.linalg.solve(gram, centred.T @ (wanted - wanted.mean(0))).T  # (tokens, hidden)
        shares = blocks / blocks.sum(0)
        self.weight[3].weight.copy_(_fitted(solved.float(), hidden.float(), shares, steps))
        nn.init.zeros_(self.weight[3].bias)  # adds the same to all tokens in, which the softmax takes off
        nn.init.ones_(self.scale)


@torch.enable_grad()
def _fitted(weight: Tensor, hidden: Tensor, shares: Tensor, steps: int) -> Tensor:
    """A last layer (tokens, width) whose softmax over tokens of hidden (images, N, width) is nearer to shares
    (N, tokens), which sum to 1 over the N."""
    weight = weight.clone().requires_grad_()
    if not steps:
        return weight.detach()
    optimizer = torch.optim.LBFGS([weight], max_iter=steps, history_size=10, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        off = -((hidden @ weight.T).log_softmax(1) * shares).sum(1).mean()
        off.backward()
        return off

    optimizer.step(loss)
    return weight.detach()


def _places(mix: Tensor) -> tuple[Tensor, Tensor]:
    """Of mixtures (B, K, N) the place of each, (B, K), all different: the token it has most of, those that
    have most of one first; and for each token the mixture that has most of it, (B, N)."""
    rows = torch.arange(len(mix), device=mix.device)
    free = torch.ones_like(mix[:, 0], dtype=torch.bool)
    index = torch.zeros_like(mix[:, :, 0], dtype=torch.long)
    for slot in mix.amax(2).argsort(dim=1, descending=True, stable=True).unbind(1):  # (B,)
        best = mix[rows, slot].masked_fill(~free, -1).argmax(1)
        index[rows, slot] = best
        free[rows, best] = False
    slots = torch.arange(mix.shape[1], device=mix.device).expand_as(index)
    return index, mix.argmax(1).scatter(1, index, slots)


@register_module
class ReverseSlimming(LearnedModule):
    """Slimmed tokens back to as many as there were (the reverse token slimming module of SiT).

    Of arXiv:2111.12624: `tokens` become `recovered`. In training only, one after every layer that has fewer
    tokens than the teacher. Parameters are those of the official code, of which a model's `rtsm.0` is loaded.
    """

    name = "reverse-slimming"
    paper = "arXiv:2111.12624"
    weights = LICENCE
    prefixes = ("rtsm.0.",)

    @dataclass(frozen=True)
    class Config:
        """ratio: hidden by outer widths, of tokens and of channels."""

        width: int = 1024
        tokens: int = 144
        recovered: int = 576
        ratio: float = 4.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        self.norm1, self.norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.mlp1 = Mlp(c.tokens, int(c.recovered * c.ratio), c.recovered)
        self.mlp2 = Mlp(c.width, int(c.width * c.ratio), c.width)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """(B, tokens, width) to (B, recovered, width). Raises ValueError for another number of tokens."""
        if x.dim() != 3 or x.shape[1:] != (self.config.tokens, self.config.width):
            raise ValueError(
                f"{self.name} takes (B, {self.config.tokens}, {self.config.width}), not {tuple(x.shape)}"
            )
        x = self.mlp1(self.norm1(x).transpose(1, 2)).transpose(1, 2)  # (B, recovered, width)
        return x + self.mlp2(self.norm2(x))


def recalibration_loss(recovered: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """SiT's feature recalibration distillation: mean over layers of the mean square error between recovered
    tokens of the student and the teacher's, each (B, N, width). Nothing flows into the teacher.

    Raises ValueError for different layers.
    """
    shapes = [[tuple(x.shape) for x in layers] for layers in (recovered, teacher)]
    if shapes[0] != shapes[1] or not shapes[0]:
        raise ValueError(f"the layers of student and teacher differ: {shapes[0]} and {shapes[1]}")
    pairs = zip(recovered, teacher, strict=True)
    return torch.stack([F.mse_loss(x, target.detach()) for x, target in pairs]).mean()


def slimming_distillation(
    recovered: Sequence[Tensor],
    teacher: Sequence[Tensor],
    logits: Tensor,
    teacher_logits: Tensor,
    *,
    tokens_weight: float = 2.0,
    logits_weight: float = 2.0,
    temperature: float = 1.0,
) -> dict[str, Tensor]:
    """What SiT adds to the task's loss: `tokens`, the recalibration loss, and `logits`, the KL divergence of
    the student's from the teacher's (B, classes), with their weights. To be summed.

    Without SiT's second, convolutional teacher.
    """
    student, wanted = (F.log_softmax(x / temperature, 1) for x in (logits, teacher_logits.detach()))
    divergence = F.kl_div(student, wanted, reduction="batchmean", log_target=True) * temperature**2
    return {
        "tokens": tokens_weight * recalibration_loss(recovered, teacher),
        "logits": logits_weight * divergence,
    }
