"""Rectified flow: straight paths between noise and data (arXiv:2209.03003), and guidance along them.

Time goes from 0, where the data is, to 1, where the noise is; a model learns the velocity noise - data.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # what is there (B, ...), time (B,) -> dx/dt (B, ...)


def path(data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Where the path of each image is at its time t (B,): the shape of data (B, ...)."""
    t = t.view(-1, *[1] * (data.dim() - 1))
    return t * noise + (1 - t) * data


def flow_loss(model: Velocity, data: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The mean squared error of the velocity noise - data that a model predicts at times t (B,)."""
    predicted = model(path(data, noise, t), t)
    return F.mse_loss(predicted.float(), (noise - data).float())


def sample(model: Velocity, noise: Tensor, steps: int) -> Tensor:
    """Data from noise by as many Euler steps of equal length. Raises ValueError for fewer than one."""
    if steps != int(steps) or steps < 1:
        raise ValueError(f"a flow takes 1 or more steps, not {steps!r}")
    x = noise
    for step in range(steps):
        # every time from whole numbers: a sum of steps would drift
        x = x - model(x, torch.full((len(x),), 1 - step / steps, device=x.device)) / steps
    return x


def logit_normal_times(
    n: int, mean: float = 0.0, std: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Training times (n,) in (0, 1), most of them halfway (arXiv:2403.03206)."""
    return (mean + std * torch.randn(n, generator=generator)).sigmoid()


def same_noise(batch: int, shape: tuple[int, ...], seed: int, like: Tensor) -> Tensor:
    """Normal noise (batch, *shape), for every image the same, whatever the batch and the device."""
    noise = torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed))
    return noise.to(like).expand(batch, *shape)


def time_embedding(t: Tensor, dim: int, max_period: float = 10000.0, scale: float = 1.0) -> Tensor:
    """Cosines and sines of times (B,) with frequencies scale * max_period^(-i / half): (B, dim), float32."""
    half = dim // 2
    frequencies = scale * torch.exp(-math.log(max_period) * torch.arange(half, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return F.pad(torch.cat([angles.cos(), angles.sin()], 1), (0, dim % 2))


class Guidance:
    """Classifier-free guidance (arXiv:2207.12598): away from what the model predicts without its condition.

    scale  how far: 1 is the conditional prediction itself
    """

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """(B, ...) and (B, ...) to (B, ...)."""
        return unconditional + self.scale * (conditional - unconditional)


class ProjectedGuidance(Guidance):
    """Adaptive projected guidance (arXiv:2410.02416), which does not oversaturate at large scales.

    The difference of the two predictions gets a momentum over the steps, is made no longer than `threshold`
    (0: any length), and its part along the conditional prediction is weighted by `eta`. It remembers the
    steps of one sampling: every sampling takes a new one.
    """

    def __init__(
        self, scale: float, momentum: float = -0.5, threshold: float = 2.5, eta: float = 0.0
    ) -> None:
        super().__init__(scale)
        self.momentum, self.threshold, self.eta = momentum, threshold, eta
        self.average: Tensor | None = None

    def __call__(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        difference = conditional - unconditional
        if self.average is not None:
            difference = difference + self.momentum * self.average
        self.average = difference
        flat, along = difference.flatten(1).double(), F.normalize(conditional.flatten(1).double(), dim=1)
        if self.threshold > 0:
            length = flat.norm(dim=1, keepdim=True).clamp(min=1e-12)
            flat = flat * (self.threshold / length).clamp(max=1)
        parallel = (flat * along).sum(1, keepdim=True) * along
        update = (flat - parallel + self.eta * parallel).view_as(conditional).to(conditional)
        return conditional + (self.scale - 1) * update
