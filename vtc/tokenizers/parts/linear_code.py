"""A linear code of thumbnails: what tokens start from, and what a decoder refines."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearCode(nn.Module):
    """Pictures of `size` pixels through their thumbnails of `side` to `tokens` of `dim` numbers, and back."""

    def __init__(self, size: int, side: int, tokens: int, dim: int) -> None:
        super().__init__()
        self.size, self.side, self.tokens, self.dim = size, side, tokens, dim
        pixels = 3 * side**2
        self.mean = nn.Parameter(torch.full((pixels,), 0.5))
        self.analysis = nn.Parameter(torch.randn(pixels, tokens * dim) * pixels**-0.5)
        self.synthesis = nn.Parameter(torch.randn(tokens * dim, pixels) * 0.01)

    def components(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) to (B, tokens, dim)."""
        return ((self._thumbnails(images) - self.mean) @ self.analysis).unflatten(1, (self.tokens, self.dim))

    def draft(self, values: Tensor) -> Tensor:
        """A blurred picture (B, 3, H, W) from values (B, tokens, dim), which are zero where there is no
        token."""
        return self._enlarged(self.mean + values.flatten(1) @ self.synthesis)

    def drafts(self, values: Tensor, lengths: Tensor) -> Tensor:
        """One from each of `lengths` (B, m) of the first k tokens, values (B, k, dim): (B, m, 3, H, W)."""
        by_token = self.synthesis.view(self.tokens, self.dim, -1)[: values.shape[1]]
        sums = torch.einsum("bkd,kdp->bkp", values, by_token).cumsum(1)  # (B, k, pixels)
        last = (lengths - 1)[..., None].expand(-1, -1, sums.shape[2])
        enlarged = self._enlarged((self.mean + sums.gather(1, last)).flatten(0, 1))
        return enlarged.unflatten(0, lengths.shape)

    @torch.no_grad()
    def start_from(self, images: Tensor, quantize: Callable[[Tensor], Tensor], gain: float) -> None:
        """Makes this the principal components of the thumbnails of images (n, 3, H, W), the largest first: of
        all linear codes the one whose first numbers leave the least error, however many they are.

        quantize: components (n, tokens, dim) to values of the same shape; each component is scaled by what it
        leaves. gain: the standard deviation of each in front of that. Components beyond what images or
        thumbnails have are zero.
        """
        small = self._thumbnails(images)
        self.mean.copy_(small.mean(0))
        variance, basis = torch.linalg.eigh(torch.cov(small.T))  # ascending
        most = min(self.tokens * self.dim, len(images) - 1, len(variance))
        basis, spread = basis.flip(1)[:, :most], variance.flip(0)[:most].clamp(min=1e-6).sqrt()
        for part in (self.analysis, self.synthesis):
            part.zero_()
        self.analysis[:, :most] = basis / spread * gain
        values = quantize(self.components(images)).flatten(1)[:, :most]  # (n, most)
        wanted = (small - self.mean) @ basis
        scale = (values * wanted).sum(0) / values.square().sum(0).clamp(min=1e-6)
        self.synthesis[:most] = scale[:, None] * basis.T

    def _thumbnails(self, images: Tensor) -> Tensor:
        return F.interpolate(images, (self.side, self.side), mode="area").flatten(1)  # (B, 3 * side * side)

    def _enlarged(self, thumbnails: Tensor) -> Tensor:
        thumbnails = thumbnails.view(-1, 3, self.side, self.side)
        return F.interpolate(thumbnails, (self.size, self.size), mode="bicubic")
