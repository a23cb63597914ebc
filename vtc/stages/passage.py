"""The tokens of one forward on their way through the blocks of an encoder."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..record import Record, Tile
from ..tokens import Reduction, gather


@dataclass
class Seen:
    """What a block was given, so that it is recognised when a backward gives it once more."""

    values: Tensor  # (B, 8)
    address: int

    @classmethod
    def of(cls, x: Tensor) -> Seen:
        return cls(x.detach()[:, :, :8].float().sum(dim=1), x.data_ptr())

    def same_values(self, other: Seen) -> bool:
        return self.values.shape == other.values.shape and torch.equal(self.values, other.values)


@dataclass
class State:
    """What became of the patches when a block had reduced them.

    reduction  the block's own
    index      (B, K) the patches whose places the tokens that are left have, in the order of the tokens
    source     (B, N) the token that each patch has gone into, -1 if it was dropped
    size       (B, K) how many patches each token stands for; None where each is one patch
    before     the state that the block found, None where nothing was reduced yet
    """

    reduction: Reduction
    index: Tensor
    source: Tensor
    size: Tensor | None
    before: State | None

    @cached_property
    def soft(self) -> bool:
        """Whether patches get mixtures of tokens back."""
        return self.reduction.spread is not None or (self.before is not None and self.before.soft)

    def show(self, x: Tensor, resting: Tensor | None) -> Tensor:
        """All patches from the tokens that are left: (B, K, D) -> (B, N, D). Dropped ones have their row of
        `resting` (B, N, D), else zeros."""
        if not self.soft:
            return Reduction(self.index, self.source).expand(x, resting)
        state: State | None = self
        while state is not None:
            x, state = state.reduction.expand(x), state.before
        return x


@dataclass
class Group:
    """Pictures of one size.

    rows  which of the batch; None for all
    grid  rows and columns of their patches
    left  how many patch tokens leave each block
    """

    rows: Tensor | None
    grid: tuple[int, int]
    left: tuple[int, ...]

    @property
    def n(self) -> int:
        return self.grid[0] * self.grid[1]

    def found(self, block: int) -> int:
        """How many patch tokens a block finds."""
        return self.left[block - 1] if block else self.n


@dataclass
class Passage:
    """One forward of the encoder.

    groups    its pictures by size; smaller ones have padding behind their patches
    n         patches of each picture, padding included: N
    lot       (B,) a number for each picture
    full      every block shows all N patches, un-merged, to whoever looks at its output
    training  a backward may run blocks once more
    seen      what entered each block, by which such a run is recognised
    left_as   what has left the encoder, by which poolers that are called later know it
    carried   averages that wait for the next block that takes them up, and how many stand behind the patches
    """

    groups: list[Group]
    n: int
    lot: Tensor
    full: bool
    training: bool
    states: dict[int, State] = field(default_factory=dict)
    seen: dict[tuple[int, str], Seen | None] = field(default_factory=dict)
    shown: set[int] = field(default_factory=set)
    short: Tensor | None = None
    left_as: Seen | None = None
    carried: list[Tensor] = field(default_factory=list)
    suffix: int = 0

    def width(self, block: int) -> int:
        """Patch tokens that leave a block, padding included."""
        return max(group.left[block] for group in self.groups)

    def reduces(self, block: int) -> bool:
        return any(group.left[block] < group.found(block) for group in self.groups)

    @property
    def reduces_any(self) -> bool:
        return any(group.left[-1] < group.n for group in self.groups)

    def padding(self, block: int) -> Tensor | None:
        """Which of the tokens that a block finds are padding, (B, n); None where pictures have one size."""
        if self.groups[0].rows is None:
            return None
        real = self.lot.new_zeros(len(self.lot))
        for group in self.groups:
            real[group.rows] = group.found(block)
        width = self.width(block - 1) if block else self.n
        return torch.arange(width, device=real.device) >= real[:, None]

    def state(self, block: int) -> State | None:
        """What the block finds: the state after the last one before it that reduced tokens."""
        earlier = [number for number in self.states if number < block]
        return self.states[max(earlier)] if earlier else None

    def take(self, block: int, reduction: Reduction, size: Tensor) -> State:
        """Notes what a block did to the tokens, which stood for `size` (B, n) patches."""
        before = self.state(block)
        index, source = reduction.index, reduction.source
        if before is not None:
            index = before.index.gather(1, index)
            source = torch.where(before.source < 0, -1, source.gather(1, before.source.clamp_min(0)))
        single = reduction.pruned and (before is None or before.size is None)
        state = State(reduction, index, source, None if single else reduction.sizes(size), before)
        self.states[block] = state
        return state

    def bias(self, block: int, prefix: int, sizes: bool = True) -> Tensor | None:
        """The logarithm of token sizes for attention, (B, 1, 1, M), and that nothing attends to padding;
        None while all are single patches."""
        state = self.state(block)
        if state is None:
            return None
        bias = None if state.size is None or not sizes else state.size.clamp_min(1e-6).log()
        padding = self.padding(block)
        if padding is not None:
            bias = torch.zeros(padding.shape, device=padding.device) if bias is None else bias
            bias = bias.masked_fill(padding, torch.finfo(torch.float16).min)
        return None if bias is None else F.pad(bias, (prefix, self.suffix))[:, None, None]

    def hide(self, block: int, full: Tensor) -> Tensor:
        """The tokens that are left from the patches shown: (B, N, D) -> (B, K, D)."""
        state = self.state(block)
        if state is None:
            return full
        if not state.soft:
            return gather(full, state.index)
        if self.short is None:
            raise RuntimeError(
                "gradient checkpointing cannot run a block again that shows patches as mixtures of tokens: "
                "switch it off, or leave out restore='unmerge'"
            )
        return self.short

    def carry(self, block: int, x: Tensor, prefix: int) -> Tensor:
        """Carries averages over reductions: behind blocks that reduce, and behind the last but one, all that
        were taken since stand behind the patches; the last block lets go of them. (B, M, D) -> (B, M', D)."""
        if not self.reduces_any:
            return x
        blocks = len(self.groups[0].left)
        takes = [b for b in range(blocks) if self.reduces(b) or b == blocks - 2]
        if block == blocks - 1:
            stop, self.suffix = x.shape[1] - self.suffix, 0
            return x[:, :stop]
        mean = x[:, prefix : x.shape[1] - self.suffix].mean(dim=1, keepdim=True)  # (B, 1, D)
        if block in takes and self.carried:
            x = torch.cat([x, *self.carried], dim=1)
            self.suffix += len(self.carried)
            self.carried.clear()
        if block < takes[-1]:
            self.carried.append(mean)
        return x

    def record(self, row: int) -> Record:
        """What became of one picture."""
        group = next(g for g in self.groups if g.rows is None or bool((g.rows == row).any()))
        every = torch.arange(group.n, device=self.lot.device)
        states = dict(sorted(self.states.items()))
        blocks = {block: _of_row(state, row, group, block) for block, state in states.items()}
        index, source = list(blocks.values())[-1] if blocks else (every, every)
        entering = {"encoder": group.n, "out": len(index)}
        order = every
        if states:
            order = self.state(len(group.left)).index[row, : group.left[-1]].argsort().argsort()
        return Record(
            index, source, group.grid, [Tile(every, group.grid)], entering, blocks, order, len(group.left)
        )


def _of_row(state: State, row: int, group: Group, block: int) -> tuple[Tensor, Tensor]:
    index, source = state.index[row : row + 1, : group.left[block]], state.source[row : row + 1, : group.n]
    whole = Reduction(index, source).ascending()
    return whole.index[0], whole.source[0]
