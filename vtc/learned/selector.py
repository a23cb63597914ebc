from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokens import Reduction, gather
from ..transformer import blocks, initialise, run
from .base import Grid, Resampler
from .calibrated import Calibrated
from .in_encoder import BetweenBlocks
from .reading import positions
from .registry import register_module


class Selector(BetweenBlocks, Resampler):
    """Tokens that stay as they are, chosen by scores that are learned. A subclass defines `scores`.

    Each kind is trained by losses of its own, and then works at any stage. It may also learn from the loss of
    a host, as in stage "distill" of `vtc train`, which is in neither paper: in training mode a host is given
    exactly k drawn tokens (the highest scores with Gumbel noise, which draws without replacement), and the
    gradient of a score is what it is worth that its token is itself and not the average of all, times the
    slope of the score's sigmoid. (To scale tokens tells little: language models normalise them.)
    """

    any_number = True

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
        share = scores.gather(1, index).sigmoid()  # (B, k)
        reduction, drawn = Reduction.select(index, x.shape[1]), gather(x, index)
        own = drawn.detach() - x.detach().mean(1, keepdim=True)  # (B, k, D)
        reduction.new = drawn + own * (share - share.detach()).to(x.dtype)[..., None]
        return reduction


@register_module
class ReconstructingSelector(Calibrated, Selector):
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
        self._uncalibrated(c.in_width)
        self.selector = _Transformer(c, 2)
        self.masked = nn.Parameter(torch.zeros(c.in_width))
        self.reconstructor = _Transformer(c, c.in_width)
        initialise(self, c.width**-0.5)

    def logits(self, x: Tensor, grid: Grid) -> Tensor:
        """To go and to stay: (B, N, 2)."""
        return self.selector(self.units(x).to(self.dtype), grid).float()

    def scores(self, x: Tensor, grid: Grid) -> Tensor:
        go, stay = self.logits(x, grid).unbind(2)
        return stay - go

    def chosen(self, x: Tensor, grid: Grid) -> Tensor:
        """Which tokens are more likely to stay than to go, as many as that may be: (B, N) bool."""
        self.checked(x, grid)
        return self.scores(x, grid) > 0

    def reconstruct(self, x: Tensor, grid: Grid, mask: Tensor) -> Tensor:
        """All features (B, N, D) in calibrated units, from those where mask (B, N) is 1."""
        mask, units = mask[..., None].to(self.dtype), self.units(x).to(self.dtype)
        return self.reconstructor(mask * units + (1 - mask) * self.masked, grid).float()

    def training_loss(
        self, x: Tensor, grid: Grid, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses to be summed: `reconstruction`, the mean square error in calibrated units, and `sparsity`,
        the share of tokens kept beyond `keep`."""
        self.checked(x, grid)
        mask = gumbel_choice(self.logits(x, grid), self.config.temperature, generator)[..., 1]  # (B, N)
        off = self.reconstruct(x, grid, mask) - self.units(x)
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
