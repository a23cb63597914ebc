from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..transformer import initialise
from .base import Grid, LearnedModule
from .grids import from_windows
from .proxy_injection import Injection, ProjectedAttention
from .proxy_windows import partition
from .registry import register_module
from .replacement import check_grid, zero

ACTIVATIONS = ("geglu", "gelu-approximate")


class FeedForward(nn.Module):
    """Two layers with the parameter names of diffusers: net.0.proj, net.2."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.gated = activation == "geglu"
        first = nn.Module()
        first.proj = nn.Linear(width, 4 * width * (1 + self.gated))
        self.net = nn.ModuleList([first, nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.net[0].proj(x)
        if self.gated:
            x, gate = x.chunk(2, dim=-1)
            return self.net[2](x * F.gelu(gate))
        return self.net[2](F.gelu(x, approximate="tanh"))


@register_module
class ProxyBlock(LearnedModule, Injection):
    """The block of PT-DiT, a diffusion transformer with proxy tokens (arXiv:2409.04005), for one picture.

    Proxies of windows attend to each other and are read by all tokens; then tokens attend within windows,
    within windows shifted by a half, and to a text; then a feed-forward network. Without weights for proxies
    and shifted windows (linear_1_visual and linear_2 start at zero) it is a block with window attention.

    Parameters are those of the code in Ascend/MindSpeed-MM; no weights are published.

    Departures: one frame; tokens row by row, not window by window. `text_width` None is a block that reads
    no text, where that code fails. There proxies are read as if they were as wide as the text, which must
    then be as wide as tokens; here it need not be. There the times of a batch's pictures are mixed up; here
    each picture is modulated by its own.
    """

    name = "proxy-block"
    paper = "arXiv:2409.04005"

    @dataclass(frozen=True)
    class Config:
        """modulated: scaled, shifted and gated by what a time embedding says. Others: `ProxyAttention`."""

        width: int = 1152
        heads: int = 16
        window: int = 8
        proxies: int = 2
        pool: str = "strided_mean"
        bias: bool = False
        shifted: bool = True
        modulated: bool = True
        text_width: int | None = None
        activation: str = "gelu-approximate"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        c = config
        if c.activation not in ACTIVATIONS:
            raise ValueError(f"activation is one of {', '.join(ACTIVATIONS)}, not {c.activation!r}")
        self._make(c)
        self.norm1, self.norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.ff = FeedForward(c.width, c.activation)
        if c.text_width is not None:
            self.attn2 = ProjectedAttention(c.width, c.heads, c.bias, context=c.text_width)
        if c.shifted:
            self.attn3 = ProjectedAttention(c.width, c.heads, c.bias)
            self.shift_window_norm = nn.LayerNorm(c.width)
            self.linear_2 = nn.Linear(c.width, c.width)
        initialise(self)
        if c.modulated:
            self.scale_shift_table = nn.Parameter(torch.randn(6, c.width) * c.width**-0.5)
            if c.shifted:
                self.proxy_scale_shift_table = nn.Parameter(torch.randn(3, c.width) * c.width**-0.5)
        zero(self.linear_1_visual)
        if c.shifted:
            zero(self.linear_2)

    def forward(
        self, x: Tensor, grid: Grid, time: Tensor | None = None, text: Tensor | None = None
    ) -> Tensor:
        """x (B, N, width) row by row; time (B, 6 * width) where modulated; text (B, T, text_width) where
        there is one.

        Raises ValueError for a grid that windows do not tile, and for a time or text missing or too much.
        """
        c = self.config
        check_grid(self.name, x, grid, c.width)
        for name, given, wanted in (
            ("time", time, c.modulated),
            ("text", text, c.text_width is not None),
        ):
            if (given is not None) != wanted:
                raise ValueError(f"this block {'needs' if wanted else 'reads no'} {name}")
        attention, own, network = self._modulation(time)
        x = x + self.injected(x, grid)
        windows = partition(_modulate(self.norm1(x), attention), grid, c.window)  # (B, P, n, width)
        read = self.attn1(windows.flatten(0, 1)).unflatten(0, windows.shape[:2])
        x = x + _gate(from_windows(read, grid, c.window), attention)
        if c.shifted:
            x = x + self.linear_2(_gate(self._shifted(x, grid, own), own))
        if text is not None:
            x = x + self.attn2(x, text)
        return x + _gate(self.ff(_modulate(self.norm2(x), network)), network)

    def _shifted(self, x: Tensor, grid: Grid, modulation: Tensor | None) -> Tensor:
        window = self.config.window
        by = window // 2
        rolled = roll(x, grid, -by)
        windows = partition(_modulate(self.shift_window_norm(rolled), modulation), grid, window)
        mask = wrap_mask(grid, window, x.device)[:, None]  # (P, 1, n, n)
        mask = mask.repeat(len(x), 1, 1, 1)  # pictures times windows, as they lie in the batch below
        read = self.attn3(windows.flatten(0, 1), mask=mask).unflatten(0, windows.shape[:2])
        return roll(from_windows(read, grid, window), grid, by)

    def _modulation(self, time: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Shift, scale and gate, (B, 3, width), of the windows, the shifted windows and the network."""
        if time is None:
            return None, None, None
        time = time.unflatten(1, (6, -1))
        both = self.scale_shift_table + time
        own = self.proxy_scale_shift_table + time[:, :3] if self.config.shifted else None
        return both[:, :3], own, both[:, 3:]


def roll(x: Tensor, grid: Grid, by: int) -> Tensor:
    """(B, N, width) with rows and columns moved on by `by`."""
    return x.unflatten(1, grid).roll((by, by), (1, 2)).flatten(1, 2)


def wrap_mask(grid: Grid, window: int, device: torch.device | str | None = None) -> Tensor:
    """(P, n, n), True where two tokens of a window are neighbours before a shift by half a window too."""
    parts = []
    for size in grid:
        place = torch.arange(size, device=device)
        parts.append((place >= size - window).int() + (place >= size - window // 2).int())
    part = (parts[0][:, None] * 3 + parts[1]).reshape(1, -1, 1)
    part = partition(part, grid, window)[0, :, :, 0]  # (P, n)
    return part[:, :, None] == part[:, None]


def _modulate(x: Tensor, modulation: Tensor | None) -> Tensor:
    return x if modulation is None else x * (1 + modulation[:, 1:2]) + modulation[:, :1]


def _gate(x: Tensor, modulation: Tensor | None) -> Tensor:
    return x if modulation is None else x * modulation[:, 2:]
