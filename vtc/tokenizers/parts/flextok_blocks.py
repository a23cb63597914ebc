"""The transformer of FlexTok (arXiv:2502.13967): norms without parameters, layers without biases, gated MLPs,
normalised queries and keys; in the decoder shifts, scales and gates that follow from the time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(x: Tensor) -> Tensor:
    """Layer norm over the last dimension without parameters, in float32."""
    return F.layer_norm(x.float(), x.shape[-1:]).to(x)


class Attention(nn.Module):
    """Self-attention with the queries and keys of each head normalised, scaled for μP (arXiv:2203.03466)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, width, bias=False)
        self.wv = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, width); mask (T, T), True where a query (row) may attend to a key (column)."""
        # each (B, heads, T, d)
        q, k, v = (w(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        x = F.scaled_dot_product_attention(norm(q), norm(k), v, mask, scale=8.0 / q.shape[-1])
        return self.proj(x.transpose(1, 2).flatten(2))


class GatedMLP(nn.Module):
    """SwiGLU (arXiv:2002.05202), with two thirds of the hidden width for its third matrix."""

    def __init__(self, width: int, ratio: float = 4.0) -> None:
        super().__init__()
        hidden = int(2 * int(width * ratio) / 3)
        self.fc1 = nn.Linear(width, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)
        self.fc3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)) * self.fc3(x))


class Block(nn.Module):
    """A pre-norm block. With `sets` it is modulated by an embedding (adaLN-zero, arXiv:2212.09748): one set
    of shifts, scales and gates for all tokens, or two, for patches and for the registers behind them."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0, sets: int = 0) -> None:
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = GatedMLP(width, ratio)
        self.sets = sets
        if sets:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, sets * 6 * width))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, embedding: Tensor | None = None, patches: int = 0
    ) -> Tensor:
        """x (B, T, width), with patches first; mask (T, T); embedding (B, width) where modulated."""
        if not self.sets:
            x = x + self.attn(norm(x), mask)
            return x + self.mlp(norm(x))
        each = self.adaLN_modulation(embedding).unflatten(1, (self.sets, -1))  # (B, sets, 6 * width)
        if self.sets == 2:  # (B, T, 6 * width)
            rest = x.shape[1] - patches
            each = torch.cat([each[:, :1].expand(-1, patches, -1), each[:, 1:].expand(-1, rest, -1)], 1)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = each.chunk(6, -1)
        x = x + gate_attn * self.attn(modulate(norm(x), shift_attn, scale_attn), mask)
        return x + gate_mlp * self.mlp(modulate(norm(x), shift_mlp, scale_mlp))


class Transformer(nn.Module):
    """`depth` blocks; see `Block`."""

    def __init__(self, width: int, depth: int, head_dim: int, ratio: float = 4.0, sets: int = 0) -> None:
        super().__init__()
        if width % head_dim:
            raise ValueError(f"head_dim must divide the width: {head_dim} does not divide {width}")
        self.blocks = nn.ModuleList(Block(width, width // head_dim, ratio, sets) for _ in range(depth))

    def forward(
        self, x: Tensor, mask: Tensor | None = None, embedding: Tensor | None = None, patches: int = 0
    ) -> Tensor:
        for block in self.blocks:
            x = block(x, mask, embedding, patches)
        return x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift
