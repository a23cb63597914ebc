"""VScan: windows choose by a shallow layer, all by a deep one, the rest is merged (arXiv 2505.22654)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Layer, Merge, Need, register
from ..nearest import nearest
from ..tokens import Reduction, Tokens


@register
@dataclass
class VScan(Merge):
    """Keeps what CLS attends to early, window by window, and late, anywhere; merges the rest into it.

    Half of the budget is spent evenly on windows, by the attention of a shallow layer, the rest on the whole
    picture by that of a deep one. Each other token is averaged into the kept token whose projected features
    are most like its own. This is the half of the method behind the vision encoder; its second half drops
    tokens in the middle of the language model.

    local    the share of the budget that the windows get
    windows  how many windows the picture has in its rows and in its columns
    shallow  the layer that chooses in windows: block 5 of 24 in the paper
    deep     the layer that chooses over all: the one that LLaVA reads
    signal   "cls_attention", or "mean_attention" for encoders without CLS

    Where windows do not divide the grid the last ones are larger, as in the official code for Qwen2.5-VL.
    Departures: what is left of the windows' share, as each gets the same, goes to the deep layer, so that
    always exactly k tokens come out; with fewer than 32, where the windows are 16, that is all. Tokens of
    windows cannot be chosen again, even where the deep attention is zero.
    """

    name = "vscan"
    paper = "arXiv:2505.22654"
    positions = "repack"
    needs_grid = True

    local: float = 0.5
    windows: int = 4
    shallow: Layer = 5.5 / 24
    deep: Layer = -2
    signal: str = "cls_attention"

    def __post_init__(self):
        if not 0 <= self.local <= 1:
            raise ValueError(f"local={self.local} must be a share between 0 and 1")
        if self.windows != int(self.windows) or self.windows < 1:
            raise ValueError(f"windows must be a whole number of at least 1, not {self.windows!r}")
        if self.signal not in ("cls_attention", "mean_attention"):
            raise ValueError(f"signal must be 'cls_attention' or 'mean_attention', not {self.signal!r}")

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need(self.signal, (self.shallow, self.deep)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        shallow, deep = getattr(tokens, self.signal).float().unbind(dim=1)  # (B, N) each
        window = self._windows(tokens.grid, deep.device)  # (N,)
        order = shallow.sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, window[order].sort(dim=1, stable=True).indices)  # (B, N) window by window
        size = window.bincount()  # (W,)
        rank = torch.arange(tokens.n, device=deep.device) - (size.cumsum(0) - size).repeat_interleave(size)
        local = order[:, rank < int(k * self.local + 1e-6) // len(size)]
        others = deep.scatter(1, local, -torch.inf).sort(dim=1, descending=True, stable=True).indices
        index = torch.cat([local, others[:, : k - local.shape[1]]], dim=1)
        return Reduction.merge(index, nearest(tokens.x, index))

    def _windows(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        """The window of each place, numbered in raster order."""
        sides = [min(int(self.windows), length) for length in grid]
        row, col = (
            (torch.arange(length, device=device) // (length // side)).clamp_max(side - 1)
            for length, side in zip(grid, sides)
        )
        return (row[:, None] * sides[1] + col).flatten()
