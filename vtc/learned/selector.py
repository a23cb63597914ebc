from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import Reduction
from ..transformer import blocks, initialise, run
from .base import Grid, Resampler, register_module
from .in_encoder import BetweenBlocks
from .reading import positions


class Selector(BetweenBlocks, Resampler):
    """Tokens that stay as they are, chosen by scores that are learned. A subclass defines `scores`.

    Each kind is trained by losses of its own, and then works at any stage. Or by whatever loss a host has,
    such as stage "distill" of `vtc train`: in training mode the choice is drawn (the highest with Gumbel
    noise, which draws without replacement), and those chosen are scaled by a one whose gradient is that of
    their scores.
    """

    any_number = True

    @property
    def out_width(self) -> int:
        return self.config.in_width

    def scores(self, x: Tensor, grid: Grid) -> Tensor:
        """How much each token should stay: (B, N) float32, the same order as the probability to stay."""
        raise NotImplementedError

    @torch.no_grad()
    def select(self, x: Tensor, grid: Grid, k: int) -> Tensor:
        """The k tokens with the highest scores, row by row: (B, k)."""
        best = self.scores(x, grid).sort(dim=1, descending=True, stable=True).indices
        return best[:, :k].sort(dim=1).values

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        return gather(x, self.select(x, grid, self.checked(x, grid, k, levels)))

    def reduction(self, x: Tensor, grid: Grid, k: int, levels: Sequence[Tensor] = ()) -> Reduction:
        self.checked(x, grid, k, levels)
        if not (self.training and torch.is_grad_enabled()):
            return Reduction.select(self.select(x, grid, k), x.shape[1])
        scores = self.scores(x, grid)
        index = (scores + gumbel(scores)).topk(k, dim=1).indices.sort(dim=1).values
        share = scores.gather(1, index).sigmoid()
        reduction = Reduction.select(index, x.shape[1])
        reduction.new = gather(x, index) * (1 + share - share.detach()).to(x.dtype)[..., None]
        return reduction


@register_module
class ReconstructingSelector(Selector):
    """Keeps the features from which the others can be told (Adaptive Token Reduction, arXiv:2503.16660).

    A transformer gives each token of a vision encoder two logits, to go and to stay. In training a choice is
    drawn (Gumbel-softmax, hard, straight through), one learned vector takes the place of tokens that go, and
    a second transformer reconstructs all of them. There is no official code. What the paper leaves open:

    - both transformers know places, by sines and cosines that are added, so that any grid will do;
    - they are as wide as `width`, with linear layers around where that is not the width of the features;
    - features are in the units that `calibrate` learns, so that the error is about 1 where nothing is kept,
      and `sparsity` says how much the share of kept tokens counts against it;
    - the least share counts in each image by itself, and is subtracted, so that the loss can reach zero.

    forward (B, N, D) to (B, k, D): the k tokens with the highest logits, row by row.
    """

    name = "reconstructing-selector"
    paper = "arXiv:2503.16660"

    @dataclass(frozen=True)
    class Config:
        """keep         the share of tokens below which nothing is gained by dropping more
        temperature  of the Gumbel-softmax
        """

        in_width: int = 1024
        width: int = 512
        depth: int = 3
        heads: int = 8
        ratio: float = 4.0
        keep: float = 0.25
        temperature: float = 1.0
        sparsity: float = 1.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.width % 4 or c.width % c.heads:
            raise ValueError(f"width is a multiple of 4 and of heads, not {c.width} with {c.heads}")
        if not 0 < c.keep <= 1 or not c.temperature > 0:
            raise ValueError(
                f"keep is a share of tokens above 0 and temperature positive, not {c.keep}, {c.temperature}"
            )
        self.register_buffer("mean", torch.zeros(c.in_width))
        self.register_buffer("std", torch.ones(c.in_width))
        self.selector = _Transformer(c, 2)
        self.masked = nn.Parameter(torch.zeros(c.in_width))
        self.reconstructor = _Transformer(c, c.in_width)
        initialise(self, c.width**-0.5)

    @torch.no_grad()
    def calibrate(self, x: Tensor) -> None:
        """Takes mean and standard deviation of each channel from features (..., D) of many images."""
        x = x.flatten(0, -2).float()
        self.mean.copy_(x.mean(0))
        self.std.copy_(x.std(0).clamp(min=1e-4 * float(x.std()) + 1e-8))

    def units(self, x: Tensor) -> Tensor:
        """Features in calibrated units, in the dtype of the weights."""
        return ((x.float() - self.mean.float()) / self.std.float()).to(self.dtype)

    def logits(self, x: Tensor, grid: Grid) -> Tensor:
        """To go and to stay: (B, N, 2)."""
        return self.selector(self.units(x), grid).float()

    def scores(self, x: Tensor, grid: Grid) -> Tensor:
        go, stay = self.logits(x, grid).unbind(2)
        return stay - go

    def chosen(self, x: Tensor, grid: Grid) -> Tensor:
        """Which tokens are more likely to stay than to go, as many as that may be: (B, N) bool."""
        self.checked(x, grid)
        return self.scores(x, grid) > 0

    def reconstruct(self, x: Tensor, grid: Grid, mask: Tensor) -> Tensor:
        """All features (B, N, D) in calibrated units, from those where mask (B, N) is 1."""
        mask = mask[..., None].to(self.dtype)
        return self.reconstructor(mask * self.units(x) + (1 - mask) * self.masked, grid).float()

    def training_loss(
        self, x: Tensor, grid: Grid, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses to be summed: `reconstruction`, the mean square error in calibrated units, and `sparsity`,
        the share of tokens kept beyond `keep`."""
        self.checked(x, grid)
        mask = gumbel_choice(self.logits(x, grid), self.config.temperature, generator)[..., 1]  # (B, N)
        off = self.reconstruct(x, grid, mask) - self.units(x).float()
        beyond = mask.mean(1).clamp(min=self.config.keep) - self.config.keep
        return {
            "reconstruction": off.square().mean(),
            "sparsity": self.config.sparsity * beyond.mean(),
        }


class _Transformer(nn.Module):
    def __init__(self, c: ReconstructingSelector.Config, out: int) -> None:
        super().__init__()
        self.width = c.width
        self.input_proj = nn.Linear(c.in_width, c.width) if c.in_width != c.width else nn.Identity()
        self.blocks = blocks(c.width, c.depth, c.heads, c.ratio)
        self.ln_post = nn.LayerNorm(c.width)
        self.head = nn.Linear(c.width, out)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = self.input_proj(x)
        x = x + positions(grid, self.width, x)
        return self.head(self.ln_post(run(self.blocks, x)))


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


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The tokens of x (B, N, D) at index (B, k): (B, k, D)."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def gumbel_choice(logits: Tensor, temperature: float, generator: torch.Generator | None = None) -> Tensor:
    """Draws one of the last dimension with the probabilities of logits: ones and zeros, with the gradient of
    the soft choice (straight through). A generator is one of the CPU."""
    soft = ((logits.float() + gumbel(logits, generator)) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
    return hard + (soft - soft.detach())


def gumbel(like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Gumbel noise of a tensor's shape, float32. A generator is one of the CPU."""
    uniform = torch.rand(like.shape, generator=generator, device="cpu" if generator else like.device)
    return -(-uniform.clamp(1e-10, 1 - 1e-7).log()).log().to(like.device)


def stage_counts(n: int, keep: float, stages: int = 3) -> list[int]:
    """How many of n tokens stay at each stage: the share `keep` of those before it, rounded down."""
    return [int(n * keep**stage) for stage in range(1, stages + 1)]


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
