"""An encoder whose blocks learn how many tokens pruning and merging leave."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..capture import computed
from ..hosts.trunk import STAGE, Block, Trunk
from ..methods.diffrate import DiffRate
from ..schedule import Budget, Schedule, counts
from ..stages.consumers import consumers
from ..taps import Call, Tap
from ..threads import ByThread
from ..tokens import Tokens

_LEAST = 1e-6  # how much is seen of a token that was removed, so that its use has a gradient


class _Choice:
    """A distribution over how many of n tokens stay."""

    def __init__(self, n: int, granularity: int, device: torch.device):
        self.n = n
        self.candidates = torch.arange(n, 0, -granularity, device=device).float()
        self.logits = torch.zeros_like(self.candidates, requires_grad=True)

    def count(self) -> Tensor:
        """The mean, rounded up, with the gradient of the mean."""
        mean = (self.logits.softmax(0) * self.candidates).sum()  # float32 in an autocast, too
        return mean + ((mean - 1e-4).ceil().clamp_max(self.n) - mean).detach()

    def mask(self, k: int, n: int) -> Tensor:
        """0 for the tokens after the first k of n in the order of importance, else 1, with the gradient of
        the probability that as many stay: (N,)."""
        rank = torch.arange(self.n, device=self.logits.device)
        stays = ((self.candidates > rank[:, None]) * self.logits.softmax(0)).sum(dim=1)  # (N,)
        hard = ((rank < k) | (rank >= n)).float()
        return hard + (stays - stays.detach())


@dataclass
class _State:
    """What enters a block: which patch tokens are still there (B, N), with a gradient; how many those are in
    each row; and how many patches each token stands for (B, N)."""

    mask: Tensor
    left: int
    size: Tensor

    def bias(self) -> Tensor:
        """What attention to each patch token is biased by: (B, N)."""
        return (self.mask * (1 - _LEAST) + _LEAST).log() + self.size.log()


class Learner:
    """All blocks of an encoder, and for whatever pools its tokens what the encoder stage is."""

    def __init__(self, trunk: Trunk, keep: Budget, schedule: Schedule, granularity: int):
        self.trunk, self.keep, self.schedule, self.granularity = trunk, keep, schedule, granularity
        self.weights = [(_weights(block.attention), _weights(block.mlp)) for block in trunk.blocks]
        self.choices: list[tuple[_Choice, _Choice]] = []  # for each block but the first
        self.states: dict[int, _State] = {}  # what enters each block; a backward may run one again
        self.classifying: ByThread[bool] = ByThread()

    @contextmanager
    def installed(self) -> Iterator[None]:
        parts = [_Site(self, number, block) for number, block in enumerate(self.trunk.blocks)]
        parts += consumers(self)
        done = []
        setattr(self.trunk.tower, STAGE, self)
        try:
            for part in parts:
                part.install()
                done.append(part)
            yield
        finally:
            for part in reversed(done):
                part.remove()
            delattr(self.trunk.tower, STAGE)

    # What poolers ask; here they are called in the forward that they pool.

    def leaves_as(self, x: Tensor) -> None: ...

    def pools(self, x: Tensor) -> None: ...

    # One forward

    def begin(self, x: Tensor) -> None:
        """Tokens (B, M, D) enter the first block."""
        batch, n, width = x.shape[0], x.shape[1] - self.trunk.prefix, x.shape[2]
        if not self.choices:
            self.n, self.width = n, width
            self.choices = [
                tuple(_Choice(n, self.granularity, x.device) for _ in range(2)) for _ in self.trunk.blocks[1:]
            ]
            left = counts(self.keep, self.schedule, n, len(self.trunk.blocks))
            self.wanted = self._operations(left) / self._operations([n] * len(left))
        if n != self.n:
            raise ValueError(f"rates are counts: pictures of {n} patches cannot follow those of {self.n}")
        ones = torch.ones(batch, n, device=x.device)
        self.states = {0: _State(ones, n, ones)}

    def reduce(self, block: int, x: Tensor, importance: Tensor) -> Tensor:
        """Patch tokens (B, N, D) as they go on to the MLP; those that others joined are means now."""
        state, (prune, merge) = self.states[block], self.choices[block - 1]
        pruned = min(state.left, int(prune.count()))
        kept = min(pruned, int(merge.count()))
        mask, size = state.mask, state.size
        importance = importance.masked_fill(mask.detach() < 0.5, -1)  # those removed before come last
        rank = importance.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # (B, N)
        if pruned < state.left:
            mask = mask * prune.mask(pruned, state.left)[rank]
        if kept < pruned:
            mask = mask * merge.mask(kept, pruned)[rank]
            extras = {"cls_attention": importance[:, None]}
            with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
                tokens = Tokens(x.detach(), (1, self.n), size=size, layer=0, extras=extras)
                reduction = DiffRate(prune=[pruned]).reduce(tokens, kept)
            places = reduction.index[..., None].expand(-1, -1, x.shape[2])
            x = x.scatter(1, places, reduction.apply(x))
            size = size.scatter(1, reduction.index, reduction.sizes(size))
        self.states[block + 1] = _State(mask, kept, size)
        return x

    def bias(self, block: int) -> Tensor:
        """Of the attention logits: (B, 1, M, M). A token always sees itself, else its own use would stay
        unknown when it is removed."""
        state = self.states[block]
        of_key, own = (F.pad(b, (self.trunk.prefix, 0)) for b in (state.bias(), state.size.log()))  # (B, M)
        itself = torch.eye(of_key.shape[1], dtype=torch.bool, device=of_key.device)
        return torch.where(itself, own[:, None], of_key[:, None])[:, None]

    # What pools the tokens asks this

    def sizes(self) -> Tensor | None:
        state = self.states.get(len(self.trunk.blocks))
        return None if state is None else state.mask * state.size

    def bias_of(self, tokens: int) -> Tensor:
        return F.pad(self.states[len(self.trunk.blocks)].bias(), (tokens - self.n, 0))

    def padded(self) -> bool:
        return False

    def mapping(self) -> Any:
        raise RuntimeError(
            "rates are learned from what an encoder makes of CLS and pooled tokens, not from maps"
        )

    # The schedule

    def logits(self) -> list[Tensor]:
        return [choice.logits for pair in self.choices for choice in pair]

    def pruned(self) -> list[int]:
        return [self.n, *(int(prune.count()) for prune, _ in self.choices)]

    def kept(self) -> list[int]:
        return [int(left) for left in self._left()]

    def share(self) -> Tensor:
        """The blocks' operations, as a share of those with all tokens."""
        if not self.states:
            raise RuntimeError(f"the loss did not call {self.trunk.name}, or in the form of a compiled graph")
        return self._operations(self._left()) / self._operations([self.n] * len(self.trunk.blocks))

    def _left(self) -> list[Tensor]:
        """How many patch tokens leave each block. The gradient goes to both counts, the larger too."""
        left = [torch.tensor(float(self.n), device=self.choices[0][0].logits.device)]
        for prune, merge in self.choices:
            pruned, merged = prune.count(), merge.count()
            least = torch.stack([left[-1], pruned, merged]).min().detach()
            left.append(least + (pruned - pruned.detach()) + (merged - merged.detach()))
        return left

    def _operations(self, left: Any) -> Any:
        """Multiplications in the blocks for one picture."""
        now, total = self.n + self.trunk.prefix, 0
        for k, (attention, mlp) in zip(left, self.weights):
            total = total + now * attention + 2 * now**2 * self.width
            now = k + self.trunk.prefix
            total = total + now * mlp
        return total


def _weights(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters() if weight.ndim > 1)


class _Site:
    """The hooks on one block. No token is taken away: what goes on differs by the means of merging only."""

    def __init__(self, learner: Learner, number: int, block: Block):
        self.learner, self.number, self.block = learner, number, block
        self.tap = Tap(block.attention, lambda: number > 0, self._see)
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [self.block.module.register_forward_pre_hook(self._enter, with_kwargs=True)]
        if self.number > 0:  # the first block keeps all tokens
            self._hooks += [
                self.block.norm2.register_forward_pre_hook(self._reduce),
                self.block.module.register_forward_hook(self._leave, prepend=True),
            ]
            self.tap.install()

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        if self.number > 0:
            self.tap.remove()

    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = args[0] if args else kwargs["hidden_states"]  # (B, M, D)
        if self.number == 0:
            self.learner.begin(x)
            self.learner.states[1] = self.learner.states[0]

    def _see(self, call: Call) -> Tensor:
        bias = self.learner.bias(self.number)
        self.importance = computed("cls_attention", call.biased(bias), 0, self.learner.trunk.prefix)  # (B, N)
        return bias

    def _reduce(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x, prefix = args[0], self.learner.trunk.prefix
        patches = self.learner.reduce(self.number, x[:, prefix:], self.importance)
        new = torch.cat([x[:, :prefix], patches], dim=1)
        self.shift = new - x
        return (new,)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] + self.shift, *output[1:])
        return output + self.shift
