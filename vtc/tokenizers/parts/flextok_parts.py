"""What FlexTok (arXiv:2502.13967) puts in front of its transformers and behind them. Parameters have their
published names."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .flextok_blocks import modulate, norm
from .flow import time_embedding
from .places import at_places


class PatchEmbedder(nn.Module):
    """Latents (B, C, h, w) to embedded patches (B, N, width); within one channels come last."""

    def __init__(self, channels: int, patch: int, width: int) -> None:
        super().__init__()
        self.patch = patch
        self.patch_proj = nn.Linear(channels * patch**2, width)

    def forward(self, latents: Tensor) -> Tensor:
        return self.patch_proj(patchify(latents, self.patch))


class Positions(nn.Module):
    """Embeddings that are added to a sequence, or to the places of a grid row by row: (places, width).

    kind: "sincos" (grids only, fixed; MoCo v3, arXiv:2104.02057), "learnable_sum" or "learnable_prod" of one
    embedding for each axis.
    """

    def __init__(self, width: int, sizes: tuple[int, ...], kind: str) -> None:
        super().__init__()
        if kind == "sincos" and len(sizes) == 2 and width % 4 == 0:
            self.posembs = nn.Parameter(_sincos(*sizes, width), requires_grad=False)  # (1, width, h, w)
        elif kind in ("learnable_sum", "learnable_prod") and len(set(sizes)) == 1:
            self.posembs = nn.Parameter(torch.randn(len(sizes), 1, width, sizes[0]) * 0.02)
        else:
            raise ValueError(
                "positions are 'sincos' of a grid and a width that 4 divides, or 'learnable_sum' or "
                f"'learnable_prod' of equal sides, not {kind!r} of {sizes} and {width}"
            )
        self.kind, self.axes = kind, len(sizes)

    def forward(self) -> Tensor:
        table = self.posembs
        if self.kind != "sincos" and self.axes == 2:
            rows, columns = table[0][..., None], table[1][..., None, :]
            table = rows + columns if self.kind == "learnable_sum" else rows * columns
        elif self.kind != "sincos":
            table = table[0]
        return table.flatten(2)[0].T


class Registers(nn.Module):
    """Learned queries that read the picture: the first k, for each image the same, (B, k, width)."""

    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.registers = nn.Parameter(nn.init.trunc_normal_(torch.empty(count, width), std=0.02))

    def forward(self, batch: int, k: int) -> Tensor:
        return self.registers[:k].expand(batch, -1, -1)


class Linear(nn.Module):
    """A linear layer, `proj`."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Readout(Linear):
    """Norm, modulation where there is an embedding, and a linear layer.

    base: the width at which a μP readout (arXiv:2203.03466) is a plain one; its input is divided by
    width / base. None: a plain one.
    """

    def __init__(self, width: int, outputs: int, modulated: bool, base: int | None) -> None:
        super().__init__(width, outputs)
        self.shrink = 1.0 if base is None else base / width
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """x (B, T, width), embedding (B, width) where modulated: (B, T, outputs)."""
        x = norm(x)
        if embedding is not None:
            x = modulate(x, *self.adaLN_modulation(embedding)[:, None].chunk(2, -1))
        return self.proj(x * self.shrink)


class TimeEmbedder(nn.Module):
    """Times (B,), in [0, max_time], to embeddings (B, width)."""

    def __init__(self, frequencies: int, width: int, max_time: float) -> None:
        super().__init__()
        self.frequencies, self.scale = frequencies, 1000.0 / max_time
        self.mlp = nn.Sequential(nn.Linear(frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        waves = time_embedding(t, self.frequencies, max_period=256, scale=self.scale)
        return self.mlp(waves.to(self.mlp[0].weight))


class MaskToken(nn.Module):
    """What stands at the places of tokens that are not there (`dropout_mask_token`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.dropout_mask_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))

    def forward(self, tokens: Tensor, valid: Tensor, index: Tensor, places: int) -> Tensor:
        """Tokens (B, k, width) at their places (B, k), the mask token everywhere else: (B, places, width)."""
        return at_places(tokens, valid, index, self.dropout_mask_token, places)


class NullCondition(nn.Module):
    """What stands at every place where there is no condition (`nullcond`)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.nullcond = nn.Parameter(nn.init.trunc_normal_(torch.empty(width), std=0.02))

    def forward(self, tokens: Tensor, drop: Tensor) -> Tensor:
        """Tokens (B, places, width) without those of the images to drop (B,)."""
        return torch.where(drop[:, None, None], self.nullcond.to(tokens), tokens)


def patchify(latents: Tensor, patch: int) -> Tensor:
    """(B, C, h, w) to (B, N, patch * patch * C), channels last in each patch."""
    tiles = latents.unflatten(2, (-1, patch)).unflatten(4, (-1, patch))  # (B, C, rows, patch, columns, patch)
    return tiles.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, patch: int, rows: int) -> Tensor:
    """The inverse of `patchify`, for a grid with that many rows."""
    tiles = patches.unflatten(1, (rows, -1)).unflatten(3, (patch, patch, -1))
    return tiles.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def _sincos(rows: int, columns: int, width: int) -> Tensor:
    """(1, width, rows, columns): sine and cosine of the row, then of the column."""
    frequencies = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    row, column = (torch.arange(size)[:, None] * frequencies for size in (rows, columns))  # (size, width / 4)
    row = torch.cat([row.sin(), row.cos()], 1)[:, None].expand(-1, columns, -1)
    column = torch.cat([column.sin(), column.cos()], 1)[None].expand(rows, -1, -1)
    return torch.cat([row, column], -1).permute(2, 0, 1)[None].contiguous()
