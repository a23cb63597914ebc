from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import initialise
from .base import Grid, Resampler
from .grids import as_map, as_tokens
from .registry import register_module
from .replacement import (
    AttentionReplacement,
    HostAttention,
    attend,
    attention_flops,
    check_grid,
    check_heads,
    put,
    zero,
)

BIAS = 7  # side of the stored maps of biases, which are resized to the window


@register_module
class AgentAttention(AttentionReplacement):
    """Attention through few agents, which are pooled queries (Agent Attention, arXiv:2312.08874).

    The agents gather from all keys, and each query reads from the agents:
    softmax(s Q A^T + B2) softmax(s A K^T + B1) V + DWC(V). So the cost grows with N * agents, not with N * N.
    DWC is a depth-wise 3 x 3 convolution over the patches.

    Parameters are those of the paper's DeiT with `prefix` = 1 (a CLS token in front, which gets no
    convolution and is not pooled into agents), and those of its Swin, PVT and CSwin with `prefix` = 0.
    `power` and `residual` are those of the paper's training-free variant for Stable Diffusion (0.3 and
    0.075): the scale of the queries' softmax is s ** power, and residual * V is added.

    After `start_from` it is the training-free agent attention of the host: biases and convolution are zero.
    That equals the host only where its attention is the same for all the queries that an agent stands for.

    Departures: one prefix token at most and the grid must be `window`, but it need not be square; the two
    softmaxes are fused ones.
    """

    name = "agent-attention"
    paper = "arXiv:2312.08874"
    weights = "published without a licence"
    one_grid = True

    @dataclass(frozen=True)
    class Config:
        """agents: a square number. window: (rows, columns) of the grid."""

        width: int = 768
        heads: int = 12
        agents: int = 49
        window: tuple[int, int] = (14, 14)
        prefix: int = 0
        qkv_bias: bool = True
        power: float = 1.0
        residual: float = 0.0

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        check_heads(c.width, c.heads)
        self.side = math.isqrt(c.agents)
        if self.side**2 != c.agents or not 1 <= self.side <= min(c.window):
            raise ValueError(f"agents is a square number whose root fits into the window, not {c.agents}")
        if c.prefix not in (0, 1):
            raise ValueError(f"prefix is 0, or 1 for a CLS token, not {c.prefix}")
        h, n, (rows, columns) = c.heads, c.agents, c.window
        self.qkv = nn.Linear(c.width, 3 * c.width, bias=c.qkv_bias)
        self.proj = nn.Linear(c.width, c.width)
        self.dwc = nn.Conv2d(c.width, c.width, 3, padding=1, groups=c.width)
        initialise(self)
        self.an_bias, self.na_bias = _bias(h, n, BIAS, BIAS), _bias(h, n, BIAS, BIAS)
        self.ah_bias, self.aw_bias = _bias(1, h, n, rows, 1), _bias(1, h, n, 1, columns)
        self.ha_bias, self.wa_bias = _bias(1, h, rows, 1, n), _bias(1, h, 1, columns, n)
        if c.prefix:
            self.ac_bias, self.ca_bias = _bias(1, h, n, 1), _bias(1, h, 1, n)

    def start_from(self, attention: HostAttention | nn.Module) -> None:
        host = HostAttention.fitting(attention, self.name, self.config.width, self.config.heads)
        host.check(qkv_bias=self.config.qkv_bias)
        put(self.qkv, host.qkv, host.qkv_bias)
        put(self.proj, host.out, host.out_bias)
        zero(self.dwc, *(p for name, p in self.named_parameters() if name.endswith("_bias")))

    def fits(self, grid: Grid) -> None:
        if tuple(grid) != tuple(self.config.window):
            window = tuple(self.config.window)
            raise ValueError(
                f"these biases are for a grid of {window}, not {tuple(grid)}: make {self.name} with window"
            )

    def flops(self, grid: Grid) -> int:
        c, n = self.config, grid[0] * grid[1]
        tokens = c.prefix + n
        return attention_flops(tokens, c.width, keys=2 * c.agents) + 18 * n * c.width

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        """x (B, prefix + N, width), and the same shape out. Raises ValueError for a grid that is not the
        window."""
        c, first = self.config, self.config.prefix
        check_grid(self.name, x, grid, c.width, first)
        self.fits(grid)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        agents = _pooled(q[:, first:], grid, (self.side, self.side))  # (B, n, width)
        gathered = attend(agents, k, v, c.heads, self._agent_bias())  # (B, n, width)
        scale = ((c.width // c.heads) ** -0.5) ** c.power
        out = attend(q, agents, gathered, c.heads, self._query_bias(), scale)
        local = as_tokens(self.dwc(as_map(v[:, first:], grid)))
        out = out + F.pad(local, (0, 0, first, 0)) + c.residual * v
        return self.proj(out)

    def _agent_bias(self) -> Tensor:
        """What is added to the logits of agents over keys: (1, heads, n, prefix + N)."""
        bias = _resized(self.an_bias, self.config.window) + (self.ah_bias + self.aw_bias).flatten(3)
        return torch.cat([self.ac_bias, bias], -1) if self.config.prefix else bias

    def _query_bias(self) -> Tensor:
        """What is added to the logits of queries over agents: (1, heads, prefix + N, n)."""
        resized = _resized(self.na_bias, self.config.window).transpose(2, 3)
        bias = resized + (self.ha_bias + self.wa_bias).flatten(2, 3)
        return torch.cat([self.ca_bias, bias], 2) if self.config.prefix else bias


@register_module
class AgentPooling(Resampler):
    """The agents themselves as tokens: pooled patches, each with what its pooled query attends to.

    Agent attention (arXiv:2312.08874) without its second half, as a step of a pre-norm block would take it:
    pool(x) + proj(softmax(s A K^T) V), with A the pooled queries of norm(x). Not in the paper, which returns
    to all tokens. Starts as the mean of patches, since proj is zero. `start_from` an encoder layer's norm and
    attention makes it, without training, what that layer's attention gives to pooled tokens.

    Gives s * s tokens for every s up to the shorter side of the grid.
    """

    name = "agent-pooling"
    paper = "arXiv:2312.08874"

    @dataclass(frozen=True)
    class Config:
        in_width: int = 1024
        heads: int = 16

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        width = config.in_width
        check_heads(width, config.heads)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        initialise(self)
        zero(self.proj)

    def counts(self, n: int) -> list[int]:
        return [s * s for s in range(1, math.isqrt(n) + 1)]

    def counts_for(self, grid: Grid) -> list[int]:
        return [s * s for s in range(1, min(grid) + 1)]

    @torch.no_grad()
    def start_from(self, norm: nn.LayerNorm, attention: HostAttention | nn.Module) -> None:
        """From the first norm and the attention of a layer. Raises ValueError for those of another width or
        number of heads."""
        host = HostAttention.fitting(attention, self.name, self.in_width, self.config.heads)
        self.norm.load_state_dict(norm.state_dict())
        self.norm.eps = norm.eps
        put(self.qkv, host.qkv, host.qkv_bias)
        put(self.proj, host.out, host.out_bias)

    def forward(self, x: Tensor, grid: Grid, k: int | None = None, levels: Sequence[Tensor] = ()) -> Tensor:
        side = math.isqrt(self.checked(x, grid, k, levels))
        q, key, value = self.qkv(self.norm(x)).chunk(3, dim=-1)
        agents = _pooled(q, grid, (side, side))  # (B, k, width)
        return _pooled(x, grid, (side, side)) + self.proj(attend(agents, key, value, self.config.heads))


def _bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape), std=0.02))


def _resized(bias: Tensor, window: Grid) -> Tensor:
    """(heads, n, 7, 7) to (1, heads, n, rows * columns)."""
    return F.interpolate(bias, window, mode="bilinear").flatten(2)[None]


def _pooled(x: Tensor, grid: Grid, size: Grid) -> Tensor:
    """(B, N, width) to (B, size[0] * size[1], width): means."""
    return as_tokens(F.adaptive_avg_pool2d(as_map(x, grid), size))
