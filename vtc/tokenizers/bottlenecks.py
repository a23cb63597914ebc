"""Bottlenecks: what a latent may be. Each gives values for the decoder, the numbers of codes where
it has such, and its own loss."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Code(NamedTuple):
    """values (..., d) for the decoder, gradients straight through; ids (...) or None; loss: a number."""

    values: Tensor
    ids: Tensor | None
    loss: Tensor


class Bottleneck(nn.Module):
    """Takes latents (..., `channels`), gives values (..., `dim`)."""

    channels: int
    dim: int
    size: int | None = None  # how many codes there are; None: continuous

    @property
    def bits(self) -> float:
        """What one token takes: log2 of the number of codes; 16 for every continuous number."""
        return 16.0 * self.dim if self.size is None else math.log2(self.size)

    def forward(self, z: Tensor) -> Code:
        raise NotImplementedError

    def lookup(self, ids: Tensor) -> Tensor:
        """The values of codes: ids (...) to (..., dim). ValueError where there are none of that number."""
        raise ValueError(f"{type(self).__name__} is continuous: it has no codes to look up")

    def _checked(self, ids: Tensor) -> Tensor:
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.size:
            raise ValueError(
                f"codes are numbered 0 to {self.size - 1}, not {int(ids.min())} to {int(ids.max())}"
            )
        return ids


class VQ(Bottleneck):
    """The nearest entry of a codebook, in float32 (VQ-VAE, arXiv:1711.00937).

    With `l2` latents and entries are compared at length 1, and the value is the entry at length 1 (ViT-VQGAN,
    arXiv:2110.04627). The loss is mse(value, sg(z)) + beta * mse(sg(value), z), of the normalised latents.
    """

    def __init__(self, size: int, dim: int, l2: bool = False, beta: float = 0.25) -> None:
        super().__init__()
        self.size, self.dim, self.channels, self.l2, self.beta = size, dim, dim, l2, beta
        self.embedding = nn.Embedding(size, dim)
        nn.init.uniform_(self.embedding.weight, -1 / size, 1 / size)

    def forward(self, z: Tensor) -> Code:
        with torch.autocast(z.device.type, enabled=False):
            z = self._scaled(z.float())
            codebook = self._scaled(self.codebook().float())
            flat = z.detach().reshape(-1, self.dim)
            # |z - e|^2 without |z|^2, which is the same for all entries
            distance = codebook.square().sum(1) - 2 * flat @ codebook.T
            ids = distance.argmin(1).view(z.shape[:-1])
            values = F.embedding(ids, codebook)
            loss = F.mse_loss(values, z.detach()) + self.beta * F.mse_loss(z, values.detach())
            return Code(z + (values - z).detach(), ids, loss)

    def codebook(self) -> Tensor:
        """The entries as they were learnt: (size, dim)."""
        return self.embedding.weight

    def lookup(self, ids: Tensor) -> Tensor:
        return self._scaled(F.embedding(self._checked(ids), self.codebook()).float())

    def _scaled(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=-1) if self.l2 else z


class FSQ(Bottleneck):
    """Every number rounded to one of a few levels: no codebook, no loss (arXiv:2309.15505).

    Values lie in [-1, 1]. They must not be quantised again, since the first step is tanh: go through `ids`.
    """

    def __init__(self, levels: tuple[int, ...] = (8, 8, 8, 5, 5, 5)) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ takes levels of 2 or more, not {tuple(levels)}")
        self.levels = tuple(levels)
        self.dim = self.channels = len(levels)
        self.size = math.prod(levels)
        basis = [math.prod(levels[:i]) for i in range(len(levels))]
        self.register_buffer("level", torch.tensor(levels), persistent=False)
        self.register_buffer("basis", torch.tensor(basis), persistent=False)

    def forward(self, z: Tensor) -> Code:
        with torch.autocast(z.device.type, enabled=False):
            bounded = self.bound(z)
            rounded = bounded + (bounded.round() - bounded).detach()
            ids = ((bounded.detach().round().long() + self.level // 2) * self.basis).sum(-1)
            return Code(rounded / (self.level // 2), ids, bounded.new_zeros(()))

    def bound(self, z: Tensor) -> Tensor:
        """What is rounded: latents (..., dim) to numbers between the lowest level and the highest."""
        half = (self.level - 1) * 1.001 / 2
        offset = torch.where(self.level % 2 == 0, 0.5, 0.0)
        return (z.float() + (offset / half).atanh()).tanh() * half - offset

    def lookup(self, ids: Tensor) -> Tensor:
        digits = self._checked(ids)[..., None] // self.basis % self.level  # (..., dim)
        half = self.level // 2
        return (digits - half).float() / half


class KL(Bottleneck):
    """A Gaussian of which the mean, or with `sample` a draw, is the value (VAE, arXiv:1312.6114).

    Latents are means and log-variances side by side. The loss is the mean KL divergence from a standard
    normal distribution, in nats per token.
    """

    def __init__(self, dim: int, sample: bool = False) -> None:
        super().__init__()
        self.dim, self.channels, self.sample = dim, 2 * dim, sample

    def forward(self, z: Tensor) -> Code:
        mean, logvar = z.float().chunk(2, -1)
        logvar = logvar.clamp(-30, 20)
        loss = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum(-1).mean()
        values = mean + torch.randn_like(mean) * (0.5 * logvar).exp() if self.sample else mean
        return Code(values, None, loss)


class Continuous(Bottleneck):
    """No bottleneck: the latent itself."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = self.channels = dim

    def forward(self, z: Tensor) -> Code:
        return Code(z, None, z.new_zeros(()))
