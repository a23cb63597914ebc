"""The encoder stage: patch tokens are reduced inside the blocks of a vision transformer."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts.trunk import STAGE, Trunk
from ..method import Method
from ..record import Record
from ..schedule import Budget, Schedule, check_budget, counts, show
from ..threads import ByThread
from .block_reducer import BlockReducer
from .consumers import consumers
from .encoder_fit import check_blocks, check_encoder
from .passage import Group, Passage, Seen
from .rows import lots_of
from .site import Site

_RECENT = 16  # forwards whose backward may still come


class EncoderStage:
    """Puts hooks on the blocks of one encoder.

    trunk     the encoder
    schedule  how a budget is spread over blocks (vtc.schedule)
    restore   "unmerge": the output of every block has all patches, un-merged
    carry     "gap": block averages are carried over reductions (arXiv:2501.00243)
    shown     blocks whose output has all patches in any case, because someone reads it
    depth     blocks up to the last one that is read; the others reduce nothing
    """

    name = "encoder"

    def __init__(
        self,
        trunk: Trunk,
        method: Method,
        keep: Budget,
        schedule: Schedule,
        restore: str | None = None,
        carry: str | None = None,
        shown: frozenset[int] = frozenset(),
        depth: int | None = None,
    ):
        check_encoder(trunk, method, restore, carry)
        self.trunk, self.method, self.schedule = trunk, method, schedule
        self.restore, self.carry, self.shown = restore, carry, shown
        self.depth = depth or len(trunk.blocks)
        self.spent = 0.0  # seconds that capturing, scoring and reducing took in the last forward
        self.learned = method.module is not None  # gradients flow through what it makes
        self.keep = self.check(keep)
        self.sites = [Site(self, number, block) for number, block in enumerate(trunk.blocks)]
        self._consumers = consumers(self)
        self._entry: Any = None
        self.reducer = BlockReducer(method, trunk.prefix, self.depth)
        self.finished: Passage | None = None
        self._clear()

    def check(self, keep: Budget | None) -> Budget | None:
        if keep is None and self.method.module.any_number:
            raise ValueError(
                f"'{self.method.name}' makes any number of tokens: give it a budget, like keep=0.25"
            )
        keep = None if keep is None else check_budget(keep)
        # refuses blocks that do not exist
        left = counts(0.5 if keep is None else keep, self.schedule, 10_000, self.depth)
        check_blocks(self.method, left, self.depth)
        return keep

    @property
    def settings(self) -> dict[str, Any]:
        by_block = isinstance(self.keep, (list, dict))
        schedule = None if by_block else self.schedule
        told = {"schedule": schedule, "restore": self.restore, "carry": self.carry}
        return {"keep": self.keep, **{name: value for name, value in told.items() if value is not None}}

    def install(self) -> None:
        setattr(self.trunk.tower, STAGE, self)
        self._entry = self.trunk.entry.register_forward_pre_hook(self._start, with_kwargs=True)
        for part in (*self.sites, *self._consumers):
            part.install()

    def remove(self) -> None:
        delattr(self.trunk.tower, STAGE)
        self._entry.remove()
        for part in (*self._consumers, *self.sites):
            part.remove()
        self._clear()

    def _clear(self) -> None:
        self._current: ByThread[Passage] = ByThread()
        self._done: ByThread[Passage] = ByThread()  # what a pooler finds
        self._recent_done: deque[Passage] = deque(maxlen=_RECENT)
        self._collected: ByThread[list[Passage]] = ByThread()
        self._mapping: ByThread[bool] = ByThread()  # True inside a method that makes maps of the tokens
        self.classifying: ByThread[bool] = ByThread()  # True inside a model with a head
        self._recent: deque[Passage] = deque(maxlen=_RECENT)

    # One forward

    @torch.compiler.disable
    def _start(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_exporting() or torch.jit.is_tracing():
            raise RuntimeError(
                "a compressed encoder cannot be exported or traced, because its hooks decide anew for each "
                "picture: remove() the compression before, or use torch.compile"
            )
        pixels = args[0] if args else kwargs["pixel_values"]  # (B, 3, H, W)
        grids = self.trunk.grids(pixels, args, kwargs)
        n = pixels.shape[1] if pixels.dim() == 3 else grids[0][0] * grids[0][1]
        groups = self._groups(grids, n, pixels.device)
        for site in self.sites:
            site.tap.follow()
        maps = bool(self._mapping.get()) or self.trunk.maps
        if maps and self.carry:
            raise RuntimeError("carry='gap' adds tokens that are no patches, of which no map can be made")
        full = self.restore == "unmerge" or maps
        passage = Passage(groups, n, lots_of(pixels), full, torch.is_grad_enabled())
        self._current.set(passage)
        if passage.training:
            self._recent.append(passage)
        self.spent = 0.0

    def _groups(self, grids: list[tuple[int, int]], n: int, device: torch.device) -> list[Group]:
        """Pictures by size, of which each has n patches with its padding."""
        groups = []
        for grid in dict.fromkeys(grids):
            keep = self.method.budget(grid) if self.keep is None else self.keep
            left = counts(keep, self.schedule, grid[0] * grid[1], self.depth)
            left += left[-1:] * (len(self.sites) - self.depth)
            rows = [row for row, other in enumerate(grids) if other == grid]
            everyone = len(rows) == len(grids) and grid[0] * grid[1] == n
            groups.append(Group(None if everyone else torch.tensor(rows, device=device), grid, left))
        return groups

    def passage(self, block: int, x: Tensor, where: str) -> Passage:
        """The forward to which a run of a block belongs. In a backward that is an earlier one, because
        gradient checkpointing runs blocks, or what is in them, a second time."""
        current = self._current.get()
        if current is not None and (block, where) not in current.seen and where == "block":
            if block == 0 and x.shape[1] != self.trunk.prefix + current.n:
                raise RuntimeError(
                    f"{x.shape[1] - self.trunk.prefix} patch tokens enter the blocks where the picture has "
                    f"{current.n}: vtc cannot reduce tokens where patches are dropped or padded before"
                )
            self.note(current, block, x, where)
            return current
        if self.carry:
            raise RuntimeError("carry='gap' does not go with gradient checkpointing: switch one of them off")
        again = Seen.of(x) if self._recent else None
        known = [(passage, passage.seen.get((block, where))) for passage in reversed(self._recent)]
        same = [(passage, seen) for passage, seen in known if seen is not None and seen.same_values(again)]
        # Where equal pictures went through under several budgets, checkpointing still holds the very tensor.
        for passage, seen in same:
            if seen.address == again.address:
                return passage
        if same:
            return same[0][0]
        raise RuntimeError(
            f"block {block} of {self.trunk.name} was run by itself: while compressed, call the whole "
            f"encoder, and backward() at most {_RECENT} forwards later"
        )

    def note(self, passage: Passage, block: int, x: Tensor, where: str) -> None:
        passage.seen[block, where] = Seen.of(x) if passage.training else None

    def shows(self, passage: Passage, block: int) -> bool:
        return passage.full or block in self.shown

    def left(self, passage: Passage, block: int) -> None:
        """A block is done with."""
        if passage is self._current.get():
            self.finished = passage
            if block == len(self.sites) - 1:
                self._current.pop()
                self._done.set(passage)
                self._recent_done.append(passage)
                if (collected := self._collected.get()) is not None:
                    collected.append(passage)
                passage.short = None

    @contextmanager
    def collecting(self) -> Iterator[list[Passage]]:
        """All forwards of the encoder that this thread finishes meanwhile."""
        passages: list[Passage] = []
        self._collected.set(passages)
        try:
            yield passages
        finally:
            self._collected.pop()

    # What reads the tokens

    @contextmanager
    def mapping(self) -> Iterator[None]:
        """The encoder is called by something that makes maps of its tokens."""
        self._mapping.set(True)
        try:
            yield
        finally:
            self._mapping.pop()

    def leaves_as(self, x: Tensor) -> None:
        """x is what has left the encoder in this thread."""
        passage = self._done.get()
        if passage is not None and passage.left_as is None:
            passage.left_as = Seen.of(x)

    @torch.compiler.disable
    def pools(self, x: Tensor) -> None:
        """What is pooled now is x, maybe of an earlier forward. Raises RuntimeError where it is of none."""
        if self._left_reduced() is None and not any(p.states for p in self._recent_done):
            return
        seen = Seen.of(x)
        for passage in reversed(self._recent_done):
            if passage.left_as is not None and passage.left_as.same_values(seen):
                self._done.set(passage)
                return
        raise RuntimeError(
            f"these tokens are not what {self.trunk.name} gave in one of its last {_RECENT} forwards: pool "
            "what forward_features() returns, or give restore='unmerge' to compress()"
        )

    def sizes(self) -> Tensor | None:
        """How many patches each token stands for that has left the encoder in this thread, (B, K). None where
        each is one patch, or all patches are shown."""
        passage = self._left_reduced()
        return None if passage is None else passage.state(len(self.sites)).size

    def bias_of(self, tokens: int) -> Tensor | None:
        """The logarithm of sizes(), for what attends to them and to other tokens in front: (B, tokens)."""
        passage = self._left_reduced()
        if passage is None:
            return None
        block = len(self.sites)
        bias = passage.bias(block, tokens - passage.state(block).index.shape[1])
        return None if bias is None else bias[:, 0, 0]

    def padded(self) -> bool:
        """Whether padding stands among the tokens that have left the encoder in this thread."""
        passage = self._left_reduced()
        return passage is not None and passage.padding(len(self.sites)) is not None

    def _left_reduced(self) -> Passage | None:
        passage, last = self._done.get(), len(self.sites) - 1
        if passage is None or last in passage.shown or passage.state(last + 1) is None:
            return None
        return passage

    # What is told of it

    @property
    def left_blocks(self) -> str:
        """Patch tokens that leave each block, of the last forward."""
        told = dict.fromkeys(show(group.left) for group in self.finished.groups) if self.finished else ()
        return "; ".join(told)

    @property
    def last(self) -> list[Record]:
        """One record per picture of the last forward."""
        passage = self.finished
        return [] if passage is None else [passage.record(row) for row in range(len(passage.lot))]
