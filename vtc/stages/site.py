"""The hooks on one block of an encoder: tokens are reduced between its attention and its MLP.

A block computes x1 = x + f(attention(norm1(x))), x2 = x1 + g(mlp(norm2(x1))), and no hook can shorten x1.
But g works token by token. So norm2 is given the reduced tokens m, the MLP's output is put back to the places
of the tokens that stay, and of the block's output these are taken: x2[stay] = x1[stay] + g(mlp(norm2(m))).
With m - x1[stay] added that is m + g(mlp(norm2(m))): what a block gives that reduces x1 itself.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..capture import computed
from ..hosts.trunk import Block
from ..taps import Call, Tap
from ..threads import ByThread
from ..tokens import Change, Reduction, added, gather
from .passage import Passage
from .ragged import padded

if TYPE_CHECKING:
    from .encoder import EncoderStage


@dataclass
class _Visit:
    """One run of the block."""

    passage: Passage
    entered: bool = True  # through the block's own front door; a backward may run its inside only
    extras: dict[str, Tensor] = field(default_factory=dict)
    shown: Tensor | None = None  # (B, N, D) all patches as the block before showed them
    middle: Tensor | None = None  # (B, M, D) in front of norm2
    change: Change | None = None  # what merging added to the tokens that stay


class Site:
    """The hooks on block `number`."""

    def __init__(self, stage: EncoderStage, number: int, block: Block):
        self.stage, self.number, self.block = stage, number, block
        self.prefix = stage.trunk.prefix
        self.kinds = list(dict.fromkeys(need.kind for need in stage.method.needs))
        self.tap = Tap(block.attention, self._wanted, self._see)
        self._visits: ByThread[_Visit] = ByThread()
        self._hooks: list[Any] = []

    def install(self) -> None:
        block = self.block
        self._hooks = [
            block.module.register_forward_pre_hook(self._enter, with_kwargs=True),
            block.norm1.register_forward_pre_hook(self._begin),
            block.norm2.register_forward_pre_hook(self._shorten),
            block.mlp.register_forward_hook(self._lengthen),
            # In front of the hooks by which transformers collects hidden states.
            block.module.register_forward_hook(self._leave, prepend=True),
        ]
        self.tap.install()

    def remove(self) -> None:
        self.tap.remove()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._visits.clear()

    # In the order in which they are called. A compiled graph breaks here: to trace what methods do in every
    # block would take minutes.

    @torch.compiler.disable
    def _enter(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """Takes the tokens that are left from the patches that the block before showed."""
        x = args[0] if args else kwargs["hidden_states"]  # (B, M, D)
        passage = self.stage.passage(self.number, x, "block")
        visit = _Visit(passage)
        self._visits.set(visit)
        if passage.groups[0].rows is None and passage.reduces_any and _masks(args, kwargs):
            raise RuntimeError(
                f"{self.stage.trunk.name} is given a mask of attention that vtc cannot shorten: leave it out"
            )
        state = passage.state(self.number)
        if state is None:
            return None
        if self.number - 1 in passage.shown:
            visit.shown = x[:, self.prefix :]
            x = torch.cat([x[:, : self.prefix], passage.hide(self.number, visit.shown)], dim=1)
            args, kwargs = ((x, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": x})
        args, kwargs = _unmasked(args, kwargs)  # the bias of attention tells of padding from here on
        rope = self.stage.trunk.family.rope
        if rope and kwargs.get(rope) is not None:
            kwargs = {**kwargs, rope: _positions(kwargs[rope], state.index)}
        return args, kwargs

    @torch.compiler.disable
    def _begin(self, module: nn.Module, args: tuple) -> None:
        visit = self._visits.get()
        if visit is None or not visit.entered:
            visit = _Visit(self.stage.passage(self.number, args[0], "norm1"))
            self._visits.set(visit)
        else:
            self.stage.note(visit.passage, self.number, args[0], "norm1")
        visit.entered = False

    @torch.compiler.disable
    def _wanted(self) -> bool:
        visit = self._visits.get()
        if visit is None:
            return False
        return self._reads(visit.passage) or self._bias(visit.passage) is not None

    @torch.compiler.disable
    def _see(self, call: Call) -> Tensor | None:
        visit = self._visits.get()
        bias = self._bias(visit.passage)
        if self._reads(visit.passage):
            start = time.perf_counter()
            call = call if bias is None else call.biased(bias)
            for kind in self.kinds:
                if kind != "shift":
                    found = self._computed(kind, call, visit.passage)
                    visit.extras[kind] = found[:, None]  # (B, 1, n, ...)
            self.stage.spent += time.perf_counter() - start
        return bias

    @torch.compiler.disable
    def _shorten(self, module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        """In front of the MLP: (B, M, D) -> (B, M - n + K, D)."""
        visit = self._visits.get()
        if visit is None or not self._reduces(visit.passage):
            return None
        visit.middle = args[0]
        if self.stage.method.after_block:
            return None
        x = self._parts(args[0], visit.passage)[1]
        reduction, size = self._reduction(visit, x)
        visit.change = reduction.change(x, size)
        return (self._kept(visit, args[0]),)

    @torch.compiler.disable
    def _lengthen(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """Puts the MLP's output to the places of the tokens that stay: (B, M - n + K, D) -> (B, M, D). Nobody
        looks at what is in the other places, unless dropped tokens are shown, which rest as they were."""
        visit = self._visits.get()
        if visit is None or self.stage.method.after_block or not self._reduces(visit.passage):
            return None
        reduction = visit.passage.states[self.number].reduction
        full = gather(output, self._places(reduction.source.clamp_min(0), reduction.k, visit.passage))
        if self.stage.shows(visit.passage, self.number):
            patches = self._parts(full, visit.passage)[1]
            patches.masked_fill_(reduction.source[..., None] < 0, 0)
        return full

    @torch.compiler.disable
    def _leave(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Takes the tokens that stay from the block's output, or shows all patches where someone looks."""
        visit = self._visits.pop()
        passage = visit.passage
        x = output[0] if isinstance(output, tuple) else output  # (B, M, D)
        new = x
        if self._reduces(passage):
            new = self._after(visit, x)
        if self.stage.carry:
            new = passage.carry(self.number, new, self.prefix)
        if self.stage.shows(passage, self.number) and passage.state(self.number + 1) is not None:
            new = self._show(visit, x, new)
        self.stage.left(passage, self.number)
        if new is x:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    def _after(self, visit: _Visit, x: Tensor) -> Tensor:
        """The tokens that stay, behind the MLP: (B, M, D) -> (B, M - n + K, D)."""
        front, patches, back = self._parts(x, visit.passage)
        if self.stage.method.after_block:
            if "shift" in self.kinds:
                branch = patches - self._parts(visit.middle, visit.passage)[1]
                visit.extras["shift"] = branch.detach().float().norm(dim=-1)[:, None]  # (B, 1, n)
            reduction, size = self._reduction(visit, patches)
            return torch.cat([front, reduction.apply(patches, size), back], dim=1)
        if visit.change is not None and x.requires_grad and not visit.change[1].requires_grad:
            raise RuntimeError(
                "merged tokens would get no gradient: give gradient checkpointing use_reentrant=False"
            )
        return self._kept(visit, x)

    def _show(self, visit: _Visit, x: Tensor, new: Tensor) -> Tensor:
        """All patches un-merged: (B, prefix + K, D) -> (B, prefix + N, D). Dropped ones rest as they were."""
        passage = visit.passage
        before, state = passage.state(self.number), passage.state(self.number + 1)
        front, patches, _ = self._parts(x, passage)
        tokens = new[:, self.prefix :]
        passage.short = tokens if state.soft else None
        resting = None
        if bool((state.source < 0).any()):
            resting = patches if before is None else before.show(patches, visit.shown)
        passage.shown.add(self.number)
        return torch.cat([front, state.show(tokens, resting)], dim=1)

    # What they share.

    def _reduces(self, passage: Passage) -> bool:
        return passage.reduces(self.number)

    def _reads(self, passage: Passage) -> bool:
        """Whether the method is to see this block's attention. It did where a backward runs it again."""
        undecided = self._reduces(passage) and self.number not in passage.states
        return undecided and any(kind != "shift" for kind in self.kinds)

    def _computed(self, kind: str, call: Call, passage: Passage) -> Tensor:
        """What the method reads of this block's attention, (B, n, ...); pictures of one size at a time."""
        if passage.padding(self.number) is None:
            return computed(kind, call, 0, self.prefix, passage.suffix)
        parts = []
        for group in passage.groups:
            found = computed(
                kind, call.cut(group.rows, self.prefix + group.found(self.number)), 0, self.prefix
            )
            parts.append((group.rows, found))
        n = passage.width(self.number - 1) if self.number else passage.n
        n += self.prefix if kind == "attention" else 0
        return padded(parts, n, square=kind == "attention")

    def _bias(self, passage: Passage) -> Tensor | None:
        return passage.bias(self.number, self.prefix, self.stage.method.proportional)

    def _parts(self, x: Tensor, passage: Passage) -> tuple[Tensor, Tensor, Tensor]:
        """CLS and registers, patches, carried averages."""
        stop = x.shape[1] - passage.suffix
        return x[:, : self.prefix], x[:, self.prefix : stop], x[:, stop:]

    def _kept(self, visit: _Visit, x: Tensor) -> Tensor:
        """The tokens of a sequence that stay, merged: (B, M, D) -> (B, M - n + K, D)."""
        reduction = visit.passage.states[self.number].reduction
        new = gather(x, self._places(reduction.index, reduction.source.shape[1], visit.passage))
        if visit.change is None:
            return new
        slot, more = visit.change
        return added(new, (slot + self.prefix, more))

    def _places(self, places: Tensor, count: int, passage: Passage) -> Tensor:
        """Places among `count` patch tokens as places in the sequence, with those of all other tokens around
        them: (B, K) -> (B, prefix + K + suffix)."""
        front = torch.arange(self.prefix, device=places.device)
        back = torch.arange(passage.suffix, device=places.device) + self.prefix + count
        rows = len(places)
        return torch.cat([front.expand(rows, -1), places + self.prefix, back.expand(rows, -1)], dim=1)

    def _reduction(self, visit: _Visit, x: Tensor) -> tuple[Reduction, Tensor]:
        """What the method makes of patch tokens (B, n, D), and their sizes (B, n)."""
        passage = visit.passage
        state = passage.state(self.number)
        size = None if state is None else state.size
        if size is None:
            size = torch.ones(x.shape[:2], device=x.device)
        known = passage.states.get(self.number)
        if known is not None and not self.stage.learned:
            return known.reduction, size
        # What is learned is made once more where a backward runs the block again: it is a part of the graph.
        start = time.perf_counter()
        reduction = self.stage.reducer.reduce(self.number, passage, x, size, visit.extras)
        if known is None:
            state = passage.take(self.number, reduction, size)
            state.reduction = _bare(reduction) if self.stage.learned else reduction
        self.stage.spent += time.perf_counter() - start
        return reduction, size


def _bare(reduction: Reduction) -> Reduction:
    """Without the tokens made, which hold the graph of a forward that is over."""
    return Reduction(reduction.index, reduction.source, spread=reduction.spread, pruned=reduction.pruned)


def _masks(args: tuple, kwargs: dict) -> bool:
    """Whether a block is given a mask of attention beside its tokens."""
    given = [*args[1:], kwargs.get("attention_mask"), kwargs.get("attn_mask")]
    return any(isinstance(mask, Tensor) for mask in given)


def _unmasked(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    args = (*args[:1], *(None if isinstance(given, Tensor) else given for given in args[1:]))
    return args, {**kwargs, "attention_mask": None} if "attention_mask" in kwargs else kwargs


def _positions(rope: Tensor | tuple[Tensor, ...], index: Tensor) -> Tensor | tuple[Tensor, ...]:
    """Rotary embeddings of the patches whose places the tokens have: (..., N, d) -> (B, ..., K, d)."""
    if isinstance(rope, tuple):
        return tuple(_positions(part, index) for part in rope)
    heads = rope if rope.dim() > 2 else rope[None]  # (heads, N, d), or (B, heads, N, d)
    heads = heads.expand(len(index), *heads.shape[-3:])
    places = index[:, None, :, None].expand(-1, heads.shape[1], -1, heads.shape[-1])
    return heads.gather(2, places)
