"""Runs a method over the tokens of one block of an encoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ..method import Method
from ..tokens import Reduction, Tokens
from .passage import Passage
from .ragged import Ragged, of_group
from .reducer import check_reduction


class BlockReducer:
    """Gives a method the patch tokens of one block, pictures of one size at a time.

    prefix  tokens in front of the patches
    depth   blocks that may reduce tokens
    """

    def __init__(self, method: Method, prefix: int, depth: int):
        self.method, self.prefix, self.depth = method, prefix, depth
        self._learned = method.module is not None  # gradients flow through what it makes
        self._checked: set[tuple[int, int, int]] = set()  # block, tokens before and after

    def reduce(
        self, block: int, passage: Passage, x: Tensor, size: Tensor, extras: dict[str, Tensor]
    ) -> Reduction:
        """What leaves a block of the patch tokens x (B, n, D)."""
        if not len(x):  # no pictures, of which methods know nothing
            none = torch.arange(passage.width(block), device=x.device).expand(0, -1)
            return Reduction.select(none, x.shape[1])
        state = passage.state(block)
        tokens = Tokens(
            x if self._learned else x.detach(),
            grid=passage.groups[0].grid,
            place=None if state is None else state.index,
            size=size,
            lot=passage.lot,
            prefix=self.prefix,
            layer=block,
            depth=self.depth,
            extras=extras,
        )
        if passage.padding(block) is None:
            return self._ask(tokens, passage.width(block))
        reductions = []
        for group in passage.groups:
            part = of_group(tokens, group, block)
            k = group.left[block]
            whole = torch.arange(k, device=x.device).expand(len(part.x), -1)
            reductions.append(self._ask(part, k) if k < part.n else Reduction.select(whole, k))
        return Ragged.of(passage.groups, reductions, x.shape[1])

    def _ask(self, tokens: Tokens, k: int) -> Reduction:
        if self._learned:
            reduction = self.method.reduce(tokens, k)
        else:
            # Scores are what they are, whatever precision the model's own products have.
            with torch.no_grad(), torch.autocast(tokens.x.device.type, enabled=False):
                reduction = self.method.reduce(tokens, k)
        counted = (tokens.layer, tokens.n, k)
        # What is in it is looked at once, since a GPU would have to wait.
        check_reduction(self.method.name, reduction, tokens, k, contents=counted not in self._checked)
        self._checked.add(counted)
        return reduction
