"""The transformer block of the learned modules, and the masks that say which token sees which.

Names of parameters are those of OpenAI's CLIP, which TiTok and its descendants use. A mask is boolean, True
where a query (row) may attend to a key (column), and is broadcast over heads.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`, by fused attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x (B, T, width); mask (T, T) or (B, T, T) or (B, 1, T)."""
        b, t, width = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)
        qkv = qkv.view(b, t, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, T, d)
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]  # the same for all heads of a picture
        x = F.scaled_dot_product_attention(q, k, v, mask)
        return self.out_proj(x.transpose(1, 2).reshape(b, t, width))


class Block(nn.Module):
    """A pre-norm block: attention, then an MLP with GELU."""

    def __init__(self, width: int, heads: int, ratio: float = 4.0) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.ln_2 = nn.LayerNorm(width)
        hidden = int(width * ratio)
        self.mlp = nn.Sequential(
            OrderedDict(c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width))
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask)
        return x + self.mlp(self.ln_2(x))


def blocks(width: int, depth: int, heads: int, ratio: float = 4.0) -> nn.ModuleList:
    return nn.ModuleList(Block(width, heads, ratio) for _ in range(depth))


def run(layers: nn.ModuleList, x: Tensor, mask: Tensor | None = None) -> Tensor:
    for layer in layers:
        x = layer(x, mask)
    return x


def causal_last(n: int, k: int, device: torch.device | str | None = None) -> Tensor:
    """The mask of n image tokens followed by k registers: (n + k, n + k).

    Image tokens see each other and no register; register i sees the image and the registers up to itself. So
    what the first registers become does not depend on how many there are (FlexTok, arXiv:2502.13967).
    """
    place = torch.arange(n + k, device=device)
    return (place[None, :] < n) | ((place[None, :] <= place[:, None]) & (place[:, None] >= n))


def present(n: int, valid: Tensor | None) -> Tensor | None:
    """The mask of n tokens that are always there followed by tokens of which some are padding: (B, 1, n + k).

    valid: (B, k), True for those that are there; None, or all True: no mask.
    """
    if valid is None or bool(valid.all()):
        return None
    return F.pad(valid, (n, 0), value=True)[:, None]


def initialise(module: nn.Module, std: float = 0.02) -> None:
    """Weights as vision transformers start: truncated normal, zero biases."""
    module.apply(partial(_initialise, std=std))


def _initialise(module: nn.Module, std: float) -> None:
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        nn.init.trunc_normal_(module.weight, std=std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    if isinstance(module, Attention):
        nn.init.trunc_normal_(module.in_proj_weight, std=std)
