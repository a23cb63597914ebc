from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..tokenizers.schedules import DropSchedule
from ..tokenizers.sequence import TokenSequence
from ..transformer import blocks, initialise
from .base import Grid, Resampler
from .calibrated import Calibrated
from .feature_decoder import FeatureDecoder
from .pyramid import Pyramid
from .reading import Reader, mixture, positions, waves
from .registry import register_module

if TYPE_CHECKING:
    from ..method import Method

LEAST = 1e-4  # an error below this counts as none


@register_module
class OrderedResampler(Calibrated, Resampler):
    """Registers that read the features in order, each those before it too, and a head that tells how many do.

    Features of a frozen vision encoder (B, N, D) on a grid of any shape become up to `tokens` tokens of the
    same width, in front of the host's projector. The compressor of this project, made of published parts:
    registers that are causal among themselves, so that k tokens are computed by k registers (FlexTok,
    arXiv:2502.13967), and that start from averages from coarse to fine (ReToK, arXiv:2601.01535; ResTok,
    arXiv:2601.03955); prefixes and all tokens trained together (nested dropout, arXiv:1402.0915), with
    further registers behind them in training alone (ReToK); an error asked for, at which tokens stop (KARL,
    arXiv:2507.07995).

    A fresh module gives the averages (see `Pyramid`): what the registers read is added to them through
    `out_proj`, which is zero. Registers attend to features and to registers up to themselves, features to
    nothing: the cost is that of k * N pairs. Beside what attention weighs, each register reads a mixture of
    cosine waves over the grid, `mixture`, at first one each. Values are not normalised (published resamplers
    do), so that a linear code of the features, such as their principal components, is learned in few steps.
    They are in the units that `calibrate` learns from features of the encoder; before it those units are 1.

    A tiny decoder, whose queries are the places of the grid, reconstructs the features from the first k
    tokens, as a refinement of the averages they started from. It gives the first stage of training its loss
    and every k its error: the mean square over places and channels, in calibrated units, so that 1 is about
    what the encoder's mean feature alone leaves.

    The halting head differs from KARL's. After each token it tells a logistic distribution of the logarithm
    of the error, so that one head serves every epsilon, and a smaller epsilon never gets fewer tokens. It is
    told what the registers have read and what the averages leave over, which is known without decoding. Its
    labels are the decoder's errors themselves.
    """

    name = "ordered"
    paper = "arXiv:2502.13967, arXiv:2601.01535, arXiv:2507.07995"
    ordered = True

    @dataclass(frozen=True)
    class Config:
        """in_width   of the features, and of the tokens
        tokens     the longest sequence
        start      "residual" or "mean": what a cell of the pyramid holds
        order      of cosine waves along each side: order * order different ones
        tail       registers behind the last token that are there in training only
        drop       how many tokens are kept in training: the kind of a `DropSchedule`, with `levels`
        cosine     how much 1 - cos counts beside smooth L1
        epsilon    what `halt` allows where nothing is asked for, with probability `confidence`
        error      what the halting head was taught: "features", the decoder's error; "answers", how far the
                   host's answers are from those with all tokens, in nats for each of their words; "", nothing
        """

        in_width: int = 1024
        tokens: int = 64
        width: int = 512
        depth: int = 2
        heads: int = 8
        ratio: float = 2.0
        order: int = 12
        start: str = "residual"
        decoder_width: int = 256
        decoder_depth: int = 2
        decoder_heads: int = 4
        tail: int = 0
        drop: str = "uniform"
        levels: tuple[int, ...] = ()
        cosine: float = 1.0
        epsilon: float = 0.3
        confidence: float = 0.5
        error: str = ""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        for width, heads in ((c.width, c.heads), (c.decoder_width, c.decoder_heads)):
            if heads < 1 or width < 1 or width % 4 or width % heads:
                raise ValueError(f"a width is a multiple of 4 and of its heads, not {width} with {heads}")
        if min(c.tokens, c.depth, c.order) < 1 or c.tail < 0:
            raise ValueError(
                "tokens, depth and order are 1 or more and the tail 0 or more registers, not "
                f"{c.tokens}, {c.depth}, {c.order} and {c.tail}"
            )
        self.schedule = DropSchedule(c.drop, c.levels)
        Pyramid((1, 1), 1, c.start)  # raises ValueError for an unknown start
        every = c.tokens + c.tail
        self._uncalibrated(c.in_width)
        self.input_proj = nn.Linear(c.in_width, c.width)
        self.registers = nn.Parameter(torch.randn(every, c.width))
        self.mixture = mixture(every, c.heads, c.order)
        self.readers = nn.ModuleList(Reader(c.width, c.heads, c.ratio) for _ in range(c.depth))
        self.blocks = blocks(c.width, c.depth, c.heads, c.ratio)
        self.out_proj = nn.Linear(c.width, c.in_width)
        self.ln_halting = nn.LayerNorm(c.width)
        self.halting = nn.Sequential(nn.Linear(c.width + 2, c.width), nn.GELU(), nn.Linear(c.width, 2))
        size = (c.decoder_width, c.decoder_depth, c.decoder_heads)
        self.decoder = FeatureDecoder(c.in_width, every, size, c.ratio, c.order)
        initialise(self, c.width**-0.5)
        initialise(self.decoder, c.decoder_width**-0.5)
        for last in (self.out_proj, self.decoder.out_proj):  # averages alone are what a fresh module tells
            nn.init.zeros_(last.weight)

    def counts(self, n: int) -> range:
        return range(1, min(self.config.tokens, n) + 1)

    def draw(self, grid: Grid, generator: torch.Generator | None = None) -> int:
        """As the schedule has it."""
        return int(self.schedule.draw(self.counts_for(grid)[-1], 1, generator))

    def as_method(self, epsilon: float | None = None, confidence: float | None = None) -> Method:
        """What `vtc.compress()` makes of it. With either of them each image gets as many tokens as `halt`
        tells, `keep` at most. Raises ValueError as that does."""
        from .method import FromModule

        self._checked_halting(epsilon, confidence)
        if (epsilon, confidence) != (None, None) and not self.config.error:
            raise ValueError(
                "the halting head of this module was not trained, or not after its tokens: leave epsilon and "
                "confidence out, or train it by a last stage of kind length"
            )
        return FromModule(self, epsilon, confidence)

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        k = self.checked(x, grid, k, levels)
        return self.features(self.read(x, grid, k)[0]).to(x.dtype)

    def owners(self, x: Tensor, grid: Grid, k: int) -> Tensor:
        """The token that starts as the average of the smallest cell around a place."""
        return Pyramid(grid, k).finest(x.device).expand(len(x), -1)

    def read(self, x: Tensor, grid: Grid, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (B, k, D) in calibrated units, what registers have read (B, k, width), and the mean square
        that averages leave over after each (B, k). k may go into the tail."""
        x = self.units(x)  # (B, N, D) float32
        cells, left = Pyramid(grid, k, self.config.start).values(x)
        own = self.input_proj.weight.dtype
        context = self.input_proj(x.to(own))
        context = context + positions(grid, self.config.width, context)
        hidden = self.registers[:k] + self.input_proj(cells.to(own))  # (B, k, width)
        earlier = torch.ones(k, k, dtype=torch.bool, device=x.device).tril()
        weights = self.mixture[:, :k] @ waves(grid, self.config.order, context) / x.shape[1]  # (heads, k, N)
        for reader, block in zip(self.readers, self.blocks):
            hidden = block(reader(hidden, context, weights), earlier)
        tokens = cells + self.out_proj(hidden).float()
        return tokens, hidden, left

    def features(self, tokens: Tensor) -> Tensor:
        """Tokens (B, k, D) from calibrated units to those of the features; `told` is its inverse."""
        return tokens * self.std.float() + self._offset(tokens.shape[1])

    def told(self, tokens: Tensor) -> Tensor:
        return (tokens.float() - self._offset(tokens.shape[1])) / self.std.float()

    def _offset(self, k: int) -> Tensor:
        """The mean feature where a token starts as an average, zero where as a difference: (k, D)."""
        average = torch.arange(k, device=self.mean.device) < (1 if self.config.start == "residual" else k)
        return average[:, None] * self.mean.float()

    def decode(self, tokens: Tensor, grid: Grid, lengths: Tensor | None = None) -> Tensor:
        """Features (B, N, D) from tokens (B, k, D) that this module made, of which each image has the first
        lengths (B,); None: all."""
        return self._decode(self.told(tokens), grid, lengths) * self.std.float() + self.mean.float()

    def _decode(self, tokens: Tensor, grid: Grid, lengths: Tensor | None) -> Tensor:
        b, k, _ = tokens.shape
        lengths = torch.full((b,), k, device=tokens.device) if lengths is None else lengths
        valid = torch.arange(k, device=tokens.device) < lengths[:, None]  # (B, k)
        return self.decoder(tokens, valid, Pyramid(grid, k, self.config.start), grid)

    def training_loss(
        self, x: Tensor, grid: Grid, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses to be summed, each the smooth L1 plus `cosine` times 1 - cos of the reconstruction: `full`
        from all tokens, without which nested dropout costs quality there, and `prefix` from as many as the
        schedule draws for each image, the tail among them."""
        k = self.checked(x, grid)
        c = self.config
        every = k + c.tail
        tokens, _, _ = self.read(x, grid, every)
        drawn = self.schedule.draw(every, len(x), generator).to(x.device)
        lengths = torch.cat([torch.full_like(drawn, k), drawn])
        full, prefix = self._decode(tokens.repeat(2, 1, 1), grid, lengths).chunk(2)
        target = self.units(x)
        return {"full": self._loss(full, target), "prefix": self._loss(prefix, target)}

    def _loss(self, found: Tensor, wanted: Tensor) -> Tensor:
        angle = 1 - F.cosine_similarity(found, wanted, dim=2)
        return F.smooth_l1_loss(found, wanted) + self.config.cosine * angle.mean()

    @torch.no_grad()
    def errors(self, x: Tensor, grid: Grid, lengths: Tensor) -> Tensor:
        """The error (B, m) with each of lengths (B, m) of the tokens."""
        tokens, _, _ = self.read(x, grid, int(lengths.max()))
        return self._errors(tokens, self.units(x), grid, lengths)

    def _errors(self, tokens: Tensor, wanted: Tensor, grid: Grid, lengths: Tensor) -> Tensor:
        found = [self._decode(tokens, grid, own) - wanted for own in lengths.unbind(1)]
        return torch.stack([off.square().mean((1, 2)) for off in found], 1)

    def smallest(self, x: Tensor, grid: Grid, epsilon: float) -> Tensor:
        """The fewest tokens with which the error is at most epsilon, all where it never is: (B,). Decodes
        with every number of tokens."""
        every = torch.tensor(self.counts_for(grid), device=x.device).expand(len(x), -1)
        enough = self.errors(x, grid, every) <= epsilon
        enough[:, -1] = True
        return enough.int().argmax(1) + 1

    def foretell(self, hidden: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
        """Location and scale of the log error after each token, two (B, k), from what `read` gives."""
        known = torch.stack([left, left[:, :1].expand_as(left)], -1).add(LEAST).log()  # (B, k, 2)
        told = self.halting(torch.cat([self.ln_halting(hidden), known.to(hidden)], -1)).float()
        return known[..., 0] + told[..., 0], F.softplus(told[..., 1]) + 0.05

    def halting_loss(self, x: Tensor, grid: Grid, lengths: Tensor, error: Tensor | None = None) -> Tensor:
        """How unlikely the halting head finds the errors at `lengths` (B, m); nothing else learns from it.

        error: (B, m) what the tokens are wrong by; None: by what the decoder makes of them.
        """
        with torch.no_grad():
            tokens, hidden, left = self.read(x, grid, int(lengths.max()))
            if error is None:
                error = self._errors(tokens, self.units(x), grid, lengths)
        location, scale = (part.gather(1, lengths) for part in self._after(hidden, left))
        distance = ((error + LEAST).log() - location) / scale
        # negative log-likelihood of a logistic distribution
        return (distance + 2 * F.softplus(-distance) + scale.log()).mean()

    def _after(self, hidden: Tensor, left: Tensor) -> list[Tensor]:
        """`foretell`, indexed by how many tokens there are."""
        return [F.pad(part, (1, 0)) for part in self.foretell(hidden, left)]

    def halt(
        self, x: Tensor, grid: Grid, epsilon: float | None = None, confidence: float | None = None
    ) -> TokenSequence:
        """Tokens up to the first after which the error is at most epsilon, probably.

        confidence: how probably, between 0 and 1. All tokens where it is never so. Extras: `error` (B, K),
        the foretold median error after each token. Raises ValueError for an epsilon that is not positive.
        """
        epsilon, confidence = self._checked_halting(epsilon, confidence)
        tokens, hidden, left = self.read(x, grid, self.checked(x, grid))
        location, scale = self.foretell(hidden, left)
        enough = (math.log(epsilon + LEAST) - location) / scale >= math.log(confidence / (1 - confidence))
        enough[:, -1] = True
        error = (location.exp() - LEAST).clamp(min=0)
        all_ = TokenSequence.of(self.features(tokens).to(x.dtype), error=error)
        return all_.truncate(enough.int().argmax(1) + 1)

    def _checked_halting(self, epsilon: float | None, confidence: float | None) -> tuple[float, float]:
        epsilon = self.config.epsilon if epsilon is None else epsilon
        confidence = self.config.confidence if confidence is None else confidence
        fine = all(isinstance(value, Real) and value is not True for value in (epsilon, confidence))
        if not fine or not epsilon > 0 or not 0 < confidence < 1:
            raise ValueError(
                f"epsilon is positive and confidence between 0 and 1, not {epsilon!r} and {confidence!r}"
            )
        return epsilon, confidence
