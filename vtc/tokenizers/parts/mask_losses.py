"""What ALTo is trained by (arXiv:2505.16495): losses and a reward, of masks (B, 1, H, W) in [0, 1]."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def edge_map(masks: Tensor) -> Tensor:
    """Where edges are, in two scales, stretched to 0 and 1 in every mask: (B, 1, H, W), without gradients."""
    with torch.no_grad():
        strength = sum(
            weight * _gradient(masks, _sobel(size, masks), 1e-8) for size, weight in ((3, 1.0), (5, 0.5))
        )
        strength = (5 * (strength - 0.1)).sigmoid()
        lowest, highest = strength.amin((1, 2, 3), keepdim=True), strength.amax((1, 2, 3), keepdim=True)
        return (strength - lowest) / (highest - lowest + 1e-8)


def edge_mse(decoded: Tensor, masks: Tensor, emphasis: Tensor) -> Tensor:
    """Mean square error of values multiplied by 1 + emphasis * edge_map(masks); emphasis (B,)."""
    factor = 1 + emphasis[:, None, None, None] * edge_map(masks)
    return F.mse_loss(decoded * factor, masks * factor)


def edge_loss(decoded: Tensor, masks: Tensor, emphasis: Tensor) -> Tensor:
    """How far the gradients of masks are apart: half square, half Huber (from 0.4), times emphasis (B,)."""
    kernel = masks.new_tensor([[1.0, -1.0, -1.0]] * 3)[None, None]
    edges, wanted = (_gradient(picture, kernel, 1e-6) for picture in (decoded, masks))
    squared = F.mse_loss(edges, wanted, reduction="none")
    robust = F.smooth_l1_loss(edges, wanted, reduction="none", beta=0.4)
    return (emphasis[:, None, None, None] * (squared + robust) / 2).mean()


def overlap_loss(decoded: Tensor, masks: Tensor, dice: float = 0.25) -> Tensor:
    """Binary cross-entropy, and `dice` times one minus the Dice coefficient of the whole batch.

    What a language model learns from masks decoded from its probabilities.
    """
    decoded = decoded.clamp(1e-6, 1 - 1e-6)
    shared, total = (decoded * masks).sum(), decoded.sum() + masks.sum()
    return F.binary_cross_entropy(decoded, masks) + dice * (1 - (2 * shared + 1e-6) / (total + 1e-6))


def reward(decoded: Tensor, masks: Tensor, lengths: Tensor, tokens: int, saving: float = 1e-3) -> Tensor:
    """What reinforcement learning of lengths maximises: intersection over union at 0.5, and `saving` for each
    of the `tokens` that are not used: (B,). Two empty masks have an overlap of 1."""
    found, wanted = (picture.flatten(1) > 0.5 for picture in (decoded, masks))
    shared, either = (found & wanted).sum(1), (found | wanted).sum(1)
    return torch.where(either > 0, shared / either.clamp(min=1), 1.0) + saving * (tokens - lengths)


def _gradient(x: Tensor, kernel: Tensor, epsilon: float) -> Tensor:
    padding = kernel.shape[-1] // 2
    along, across = F.conv2d(x, kernel, padding=padding), F.conv2d(x, kernel.mT, padding=padding)
    return (along.square() + across.square() + epsilon).sqrt()


def _sobel(size: int, like: Tensor) -> Tensor:
    """A ramp from -1 to 1 down the rows, weighted by a normal distribution over the columns."""
    place = torch.arange(size, dtype=like.dtype, device=like.device) - size // 2
    weight = (-0.5 * (place * 3 / size).square()).exp()
    return ((place / place.max())[:, None] * (weight / weight.sum()))[None, None]
