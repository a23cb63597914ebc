"""What a projector is given, for methods that look at it or merge tokens in front of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..hosts import Vision
from ..hosts.host import Layout
from ..threads import ByThread


class Projection:
    """Notes what the projector is given while `recording()`, and projects further tokens."""

    def __init__(self, vision: Vision):
        self.vision, self.projector = vision, vision.projector
        self._calls: ByThread[list[tuple[Tensor, int]]] = ByThread()  # inputs (rows, M, D'), tokens out
        self._hook: Any = None

    def install(self) -> None:
        if self.projector is not None:
            self._hook = self.projector.register_forward_hook(self._note)

    def remove(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._calls.clear()

    @contextmanager
    def recording(self) -> Iterator[list[tuple[Tensor, int]]]:
        calls: list[tuple[Tensor, int]] = []
        self._calls.set(calls)
        try:
            yield calls
        finally:
            self._calls.pop()

    def _note(self, module: nn.Module, args: tuple, output: Any) -> None:
        calls = self._calls.get()
        if calls is not None and args and isinstance(args[0], Tensor) and isinstance(output, Tensor):
            tokens = output.shape[:-1].numel()
            calls.append((args[0], tokens if len(args) == 1 else -1))

    def single(self, calls: list[tuple[Tensor, int]], layouts: list[Layout]) -> list[bool]:
        """For each image whether it works token by token: one token out for each that went in, nothing in it
        that looks at several, and nothing behind it that blends what it made."""
        tokens = sum(tokens for _, tokens in calls)
        alone = bool(calls) and all(given.shape[:-1].numel() == tokens for given, tokens in calls)
        alone = alone and token_by_token(self.projector)
        before = tokens == sum(own.length for own in layouts)  # patches were joined before
        return [alone and (before or not _joined([own])) for own in layouts]

    def given(self, calls: list[tuple[Tensor, int]], layouts: list[Layout]) -> list[list[Tensor]] | None:
        """What it was given for the tokens of each tile of each image, (n, D'); None where that cannot be
        told."""
        if not calls or len({given.shape[-1] for given, _ in calls}) > 1:
            return None
        if any(layout.patches is None for layout in layouts):
            return None
        every = [patches for layout in layouts for patches in layout.patches]
        sizes = [len(patches) for patches in every]
        tokens = torch.cat([self._without_cls(given).flatten(0, -2) for given, _ in calls])
        if _joined(layouts) and len(tokens) == sum(layout.length for layout in layouts):  # joined before
            if len(tokens) > sum(sizes):  # with newline tokens
                parts = tokens.split([layout.length for layout in layouts])
                return [[part[tile.slots] for tile in own.tiles] for part, own in zip(parts, layouts)]
            # Tiles come in the order of their patches: some families show all whole views first.
            order = sorted(range(len(every)), key=lambda tile: int(every[tile].min()))
            found = dict(zip(order, tokens.split([sizes[tile] for tile in order])))
            numbers = iter(range(len(every)))
            return [[found[next(numbers)] for _ in own.tiles] for own in layouts]
        if max(int(patches.max()) for patches in every) >= len(tokens):
            return None
        return [[tokens[patches].mean(dim=1) for patches in own.patches] for own in layouts]

    def _without_cls(self, given: Tensor) -> Tensor:
        """Some models send CLS through the projector, too: (rows, M, D')."""
        encoder, config = self.vision.encoder, getattr(self.vision.encoder.tower, "config", None)
        side, patch = (getattr(config, name, None) for name in ("image_size", "patch_size"))
        if not (isinstance(side, int) and isinstance(patch, int) and given.dim() == 3):
            return given
        own = given.shape[1] - encoder.prefix == (side // patch) ** 2
        return given[:, encoder.prefix :] if own else given

    def project(self, tokens: Tensor) -> Tensor:
        """Merged tokens (R, k, D') -> (R, k, D)."""
        return self.projector(tokens)


def _joined(layouts: list[Layout]) -> bool:
    """Whether any token is made of several patches."""
    every = [patches for own in layouts for patches in own.patches or ()]
    return any(bool((patches != patches[:, :1]).any()) for patches in every)


def token_by_token(projector: nn.Module) -> bool:
    """Whether all that has weights in a module is a linear layer or a norm."""
    for module in projector.modules():
        own = next(module.parameters(recurse=False), None) is not None
        if own and not isinstance(module, nn.Linear) and "Norm" not in type(module).__name__:
            return False
    return True
