"""What all modules with proxy tokens are made of (arXiv:2409.04005)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .base import Grid
from .proxy_windows import check_windows, partition, pooled
from .replacement import HostAttention, attend, check_heads, put


class ProjectedAttention(nn.Module):
    """Multi-head attention with the parameter names of diffusers: to_q, to_k, to_v, to_out.0."""

    def __init__(self, width: int, heads: int, bias: bool = False, context: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        context = context or width
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context, width, bias=bias)
        self.to_v = nn.Linear(context, width, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor, context: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x (B, T, width) over context (B, S, its width), or over itself; mask: the bias of `attend`."""
        return self.to_out[0](self.attended(*self.projected(x, context), mask))

    def projected(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of x, keys and values of context."""
        context = x if context is None else context
        return self.to_q(x), self.to_k(context), self.to_v(context)

    def attended(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        return attend(q, k, v, self.heads, mask)

    def start_from(self, host: HostAttention) -> None:
        layers = (self.to_q, self.to_k, self.to_v)
        for layer, weight, bias in zip(layers, host.qkv.chunk(3), host.qkv_bias.chunk(3), strict=True):
            put(layer, weight, bias)
        put(self.to_out[0], host.out, host.out_bias)


class Injection(nn.Module):
    """What the modules with proxy tokens have in common: proxies of windows that attend to each other, are
    read by all tokens, and are added through a layer that is zero at first (arXiv:2409.04005).

    c: a Config with width, heads, window, proxies, pool and bias.
    """

    def _make(self, c: Any, inject: bool = True) -> None:
        check_heads(c.width, c.heads)
        check_windows(c.window, c.proxies, c.pool)
        if inject:
            self.proxy_norm1, self.proxy_cross_norm = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
            self.norm_before = nn.LayerNorm(c.width)
            self.proxy_attn1 = ProjectedAttention(c.width, c.heads, c.bias)
            self.pvisual_attn2 = ProjectedAttention(c.width, c.heads, c.bias)
            self.linear_1_visual = nn.Linear(c.width, c.width)
        self.attn1 = ProjectedAttention(c.width, c.heads, c.bias)

    def injected(self, x: Tensor, grid: Grid) -> Tensor:
        """What the proxies tell each token: (B, N, width)."""
        c = self.config
        proxies = pooled(partition(x, grid, c.window), c.window, c.proxies, c.pool, self.training)
        proxies = proxies.flatten(1, 2)
        proxies = proxies + self.proxy_attn1(self.proxy_norm1(proxies))  # (B, windows * proxies^2, width)
        told = self.pvisual_attn2(self.norm_before(x), self.proxy_cross_norm(proxies))
        return self.linear_1_visual(told)
