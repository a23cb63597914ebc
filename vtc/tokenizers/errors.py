"""How far a picture is from another: one number for each image of a batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Metric = Callable[[Tensor, Tensor], Tensor]


def l1(images: Tensor, others: Tensor) -> Tensor:
    """Mean absolute difference of values: (B, C, H, W) twice to (B,), float32."""
    return (images.float() - others.float()).abs().flatten(1).mean(1)


def mse(images: Tensor, others: Tensor) -> Tensor:
    """Mean squared difference of values: (B, C, H, W) twice to (B,), float32."""
    return (images.float() - others.float()).square().flatten(1).mean(1)


def psnr(images: Tensor, others: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of values in [0, 1], dB: (B, C, H, W) twice to (B,); infinite if equal."""
    return -10 * mse(images, others).log10()


def wrong(images: Tensor, others: Tensor, tolerance: float = 0.15) -> Tensor:
    """The share of wrong pixels, of which a channel is off by more than the tolerance: (B, C, H, W) twice to
    (B,). Faint texture and noise do not count, an object that is missing does."""
    return ((images.float() - others.float()).abs().amax(1) > tolerance).float().mean((1, 2))


METRICS: dict[str, Metric] = {"l1": l1, "mse": mse, "psnr": psnr, "wrong": wrong}
RISING = ("psnr",)  # the higher the better


def error_of(metric: str | Metric) -> Metric:
    """The metric as an error, the lower the better: PSNR with its sign turned, a function as it is.

    Raises ValueError for an unknown name, and where the function does not give a number for each image.
    """
    if isinstance(metric, str) and metric not in METRICS:
        raise ValueError(f"an error is one of {', '.join(METRICS)} or a function, not {metric!r}")
    function, sign = (METRICS[metric], sign_of(metric)) if isinstance(metric, str) else (metric, 1)

    def error(images: Tensor, others: Tensor) -> Tensor:
        found = sign * torch.as_tensor(function(images, others), device=images.device)
        if found.shape != (len(images),) or bool(found.isnan().any()):
            raise ValueError(
                f"an error is one number for each of {len(images)} images, "
                f"not {tuple(found.shape)} of which {int(found.isnan().sum())} are none"
            )
        return found.to(torch.float64)

    return error


def sign_of(metric: str | Metric) -> int:
    """-1 where more is better, else 1."""
    return -1 if metric in RISING else 1
