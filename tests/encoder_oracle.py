"""What a compressed encoder must equal: its blocks restated step by step, tokens reduced between attention
and MLP (or behind the block) by plain gathers and averages.

The bare model gives the oracle what enters its first block, and what its blocks are called with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from tiny.encoders import Encoder, make
from torch import Tensor, nn

import vtc
from vtc.method import Merge, Method, Need, Select
from vtc.record import Record
from vtc.tokens import Reduction, Tokens


class Watch:
    """Notes what enters and leaves each block of an encoder: one behind compress() sees what it hands out."""

    def __init__(self, spec: Encoder, model: nn.Module):
        self.blocks = spec.blocks_of(model)

    def __enter__(self) -> Watch:
        self.entered: list[Tensor] = []
        self.given: list[dict[str, Any]] = []
        self.left: list[Tensor] = []
        self.hooks = [b.register_forward_pre_hook(self._before, with_kwargs=True) for b in self.blocks]
        self.hooks += [b.register_forward_hook(self._behind) for b in self.blocks]
        return self

    def __exit__(self, *exception: Any) -> None:
        for hook in self.hooks:
            hook.remove()

    def _before(self, block: nn.Module, args: tuple, kwargs: dict) -> None:
        self.entered.append(args[0] if args else kwargs["hidden_states"])
        self.given.append(kwargs)

    def _behind(self, block: nn.Module, args: tuple, output: Any) -> None:
        self.left.append(output[0] if isinstance(output, tuple) else output)


@dataclass
class Step:
    """The state behind one block.

    x       what goes on: (B, prefix + K, D)
    size    (B, K) patches in each token
    index   (B, K) the places they have in the picture
    source  (B, N) where each patch went, over all blocks
    full    (B, prefix + N, D) un-merged; dropped tokens are as they last were
    tokens  what the method saw; None where the block did not reduce
    """

    x: Tensor
    size: Tensor
    index: Tensor
    source: Tensor
    full: Tensor
    tokens: Tokens | None = None


@dataclass
class State:
    x: Tensor  # (B, prefix + n, D)
    size: Tensor  # (B, n)
    place: Tensor  # (B, n)
    source: Tensor  # (B, N)
    full: Tensor  # (B, N, D)
    soft: list[Tensor] = field(default_factory=list)  # (B, n, k) how tokens are un-merged, where any is soft
    is_soft: bool = False
    waiting: list[Tensor] = field(default_factory=list)  # (B, 1, D) averages that join later
    tail: int = 0  # how many of them stand behind the patches
    steps: list[Step] = field(default_factory=list)

    def patches(self, prefix: int) -> Tensor:
        return self.x[:, prefix : prefix + self.place.shape[1]]


def run(
    spec: Encoder,
    blocks: Sequence[nn.Module],
    x: Tensor,
    given: Sequence[dict[str, Any]],
    method: Method | None = None,
    left: Sequence[int] | None = None,
    lot: Tensor | None = None,
    carry: bool = False,
) -> list[Step]:
    """All blocks one after the other. x (B, prefix + N, D) is what enters the first, `given` the keyword
    arguments of each, left[l] how many patch tokens must leave block l. carry: averages of the patches go
    round reductions and stand behind the patches from then on."""
    prefix, batch, n = spec.prefix, len(x), x.shape[1] - spec.prefix
    every = torch.arange(n, device=x.device).expand(batch, n)
    state = State(x, torch.ones(batch, n), every, every, x[:, prefix:])
    takers = _takers(left, n, len(blocks)) if carry else []
    proportional, late = method is not None and method.proportional, method is not None and method.after_block
    for layer, block in enumerate(blocks):
        tokens = None
        bias = state.size.log() if proportional else torch.zeros_like(state.size)
        look = attend(block, state.x, given[layer], prefix, state.place, bias)
        state.x = state.x + look.added
        due = left is not None and left[layer] < state.place.shape[1]
        if due and not late:
            tokens = _tokens(spec, state, look, method, layer, len(blocks), lot)
            _reduce(state, prefix, method.reduce(tokens, left[layer]))
        shift = mlp(block, state.x)
        state.x = state.x + shift
        _put_back(state, prefix)
        if due and late:
            tokens = _tokens(spec, state, look, method, layer, len(blocks), lot, shift)
            _reduce(state, prefix, method.reduce(tokens, left[layer]))
            _put_back(state, prefix)
        if carry:
            _carry(state, prefix, layer, takers, len(blocks))
        full = torch.cat([state.x[:, :prefix], state.full], dim=1)
        state.steps.append(Step(state.x, state.size, state.place, state.source, full, tokens))
    return state.steps


def _takers(left: Sequence[int], n: int, depth: int) -> list[int]:
    """The blocks behind which averages join the sequence: those that reduce, and the last but one."""
    return sorted({block for block in range(depth) if left[block] < (n, *left)[block]} | {depth - 2})


def _carry(state: State, prefix: int, layer: int, takers: list[int], depth: int) -> None:
    mean = state.patches(prefix).mean(1, keepdim=True)
    if layer in takers:
        state.x = torch.cat([state.x, *state.waiting], dim=1)
        state.tail, state.waiting = state.tail + len(state.waiting), []
    if layer < takers[-1]:
        state.waiting.append(mean)
    if layer == depth - 1:
        state.x, state.tail = state.x[:, : state.x.shape[1] - state.tail], 0


def _tokens(
    spec: Encoder,
    state: State,
    look: Look,
    method: Method,
    layer: int,
    depth: int,
    lot: Tensor | None,
    shift: Tensor | None = None,
) -> Tokens:
    own = slice(spec.prefix, spec.prefix + state.place.shape[1])  # the patches
    cls_row = look.weights[:, :, 0, own]  # (B, H, n)
    extras = {
        "keys": look.keys[:, :, own].mean(1)[:, None],
        "attention": look.weights[:, None],
        "mean_attention": look.weights.mean((1, 2))[:, None, own],
        "cls_attention": cls_row.mean(1)[:, None],
        "cls_values": (cls_row * look.values[:, :, own].norm(dim=-1)).sum(1)[:, None],
    }
    if shift is not None:
        extras["shift"] = shift[:, own].norm(dim=-1)[:, None]
    wanted = {need.kind for need in method.needs}
    return Tokens(
        state.patches(spec.prefix).detach(),
        grid=spec.grid,
        size=state.size,
        place=state.place,
        prefix=spec.prefix,
        layer=layer,
        depth=depth,
        lot=lot,
        extras={kind: extra.detach() for kind, extra in extras.items() if kind in wanted},
    )


def _reduce(state: State, prefix: int, reduction: Reduction) -> None:
    front, patches = state.x[:, :prefix], state.patches(prefix)
    back = state.x[:, prefix + patches.shape[1] :]
    state.full = torch.where((state.source < 0)[..., None], state.full, _rows(patches, state.source))
    state.x = torch.cat([front, combine(reduction, patches, state.size), back], dim=1)
    members = _members(reduction)
    state.size = (members @ state.size[..., None])[..., 0] if reduction.size is None else reduction.size
    state.soft.append(members.transpose(1, 2) if reduction.spread is None else reduction.spread)
    state.is_soft |= reduction.spread is not None
    state.place = state.place.gather(1, reduction.index)
    composed = reduction.source.gather(1, state.source.clamp_min(0))
    state.source = torch.where(state.source < 0, -1, composed)


def _put_back(state: State, prefix: int) -> None:
    if state.is_soft:
        state.full = state.patches(prefix)
        for spread in reversed(state.soft):
            state.full = spread @ state.full
        return
    back = _rows(state.patches(prefix), state.source)
    state.full = torch.where((state.source < 0)[..., None], state.full, back)


def _rows(x: Tensor, source: Tensor) -> Tensor:
    return torch.stack([row[slots.clamp_min(0)] for row, slots in zip(x, source)])


def _members(reduction: Reduction) -> Tensor:
    """(B, K, N): one where a token is in a slot."""
    slots = torch.arange(reduction.k)[:, None]
    return (reduction.source[:, None] == slots).float()


def combine(reduction: Reduction, x: Tensor, size: Tensor) -> Tensor:
    """Averages of each slot's members, weighted by size: (B, n, D) -> (B, K, D). One alone is itself."""
    if reduction.mix is not None or reduction.combine == "mlerp":
        return reduction.apply(x, size)
    if reduction.pruned:
        return _rows(x, reduction.index)
    members = _members(reduction)  # (B, K, n)
    weights = members * (size if reduction.weight is None else reduction.weight)[:, None]
    if reduction.combine == "mean":
        weights = weights / weights.sum(2, keepdim=True)
    alone = members.sum(2, keepdim=True) == 1
    return torch.where(alone, members, weights) @ x


# -- rules made for these tests: each reads other facts and returns another kind of reduction


@dataclass
class Pairs(Merge):
    """The k tokens of the longest keys stay, each other one goes into the most similar of them."""

    name = "test-pairs"
    stages = ("encoder",)
    proportional = True
    needs = (Need("keys", (-2,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        keys = tokens.keys[:, 0].float()  # (B, n, d)
        kept = keys.norm(dim=-1).sort(dim=1, descending=True, stable=True).indices[:, :k]
        return nearest(keys, kept)


class Ordered(Pairs):
    """The same, and tokens go on in the order of their places, so that a record tells which is which."""

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        return super().assign(tokens, k).ascending()


@dataclass
class ByCLS(Select):
    """The tokens that CLS attends to most, with the values they have there."""

    name = "test-cls"
    stages = ("encoder",)
    needs = (Need("cls_attention", (-2,)), Need("cls_values", (-2,)))

    def score(self, tokens: Tokens) -> Tensor:
        return tokens.cls_attention[:, 0] + tokens.cls_values[:, 0]


@dataclass
class Turned(Merge):
    """The last tokens come first; of the rest, those that are attended to least are dropped. A sum of sizes
    is not what it says a token stands for."""

    name = "test-turned"
    stages = ("encoder",)
    schedule = "staged"
    proportional = True
    needs = (Need("mean_attention", (-2,)), Need("attention", (-2,)))

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        score = tokens.mean_attention[:, 0] + tokens.attention[:, 0, :, 0].amax(1)[:, -tokens.n :]
        order = score.sort(dim=1, descending=True, stable=True).indices
        reduction = nearest(tokens.x.float(), order[:, :k].sort(dim=1, descending=True).values)
        lost = order[:, (k + tokens.n + 1) // 2 :]
        source = reduction.source.scatter(1, lost, -1)
        size = torch.zeros_like(tokens.size[:, :k]).scatter_add(
            1, source.clamp_min(0), torch.where(source < 0, 0, tokens.size)
        )
        return Reduction(reduction.index, source, size=size.sqrt())


@dataclass
class Behind(Merge):
    """Tokens that the MLP changed most stay; reduced behind the block."""

    name = "test-behind"
    stages = ("encoder",)
    after_block = True
    needs = (Need("shift", (-2,)),)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        kept = tokens.shift[:, 0].sort(dim=1, descending=True, stable=True).indices[:, :k]
        reduction = nearest(tokens.x.float(), kept)
        reduction.combine = "mlerp"
        return reduction


@dataclass
class Mixed(Pairs):
    """Merges in even blocks and prunes in odd ones: what is pruned there stands for several patches."""

    name = "test-mixed"

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        merged = super().assign(tokens, k)
        return Reduction.select(merged.index, tokens.n) if tokens.layer % 2 else merged


@dataclass
class Soft(Merge):
    """Every token is in every slot a little."""

    name = "test-soft"
    stages = ("encoder",)

    def assign(self, tokens: Tokens, k: int) -> Reduction:
        x = F.normalize(tokens.x.float(), dim=-1)
        kept = torch.arange(k).expand(len(x), k)
        reduction = nearest(x, kept)
        near = x[:, :k] @ x.transpose(1, 2) * 4  # (B, k, n)
        reduction.mix, reduction.spread = near.softmax(2), near.softmax(1).transpose(1, 2)
        return reduction


def nearest(x: Tensor, kept: Tensor) -> Reduction:
    """Each token of x (B, n, D) goes into the most similar of those kept (B, k), a kept one into itself."""
    unit = F.normalize(x, dim=-1)
    alike = unit @ torch.stack([row[index] for row, index in zip(unit, kept)]).transpose(1, 2)  # (B, n, k)
    slots = torch.arange(kept.shape[1]).expand_as(kept)
    return Reduction(kept, alike.argmax(2).scatter(1, kept, slots))


RULES = {rule.name: rule for rule in (Pairs, ByCLS, Turned, Behind, Mixed, Soft)}


def spied(method: Method) -> tuple[Method, list[Tokens]]:
    """The same method, and a list of what it is given."""
    seen, reduce = [], method.reduce

    def note(tokens: Tokens, k: int) -> Reduction:
        seen.append(tokens)
        return reduce(tokens, k)

    method.reduce = note
    return method, seen


# -- what the tests share


_shared: dict[str, nn.Module] = {}


def shared(name: str) -> nn.Module:
    """The encoder of that name; a test leaves it as it was, or the next one gets another."""
    if name not in _shared or vtc.api.current(_shared[name]) is not None:
        _shared[name] = make(name)
    return _shared[name]


def tensors(output: Any) -> list[Tensor]:
    """All tensors of an output, in a fixed order."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, Mapping):
        output = list(output.values())
    return [t for part in output or () for t in tensors(part)]


def equal(output: Any, other: Any) -> bool:
    pairs = list(zip(tensors(output), tensors(other), strict=True))
    return bool(pairs) and all(torch.equal(a, b) for a, b in pairs)


def close(found: Tensor, expected: Tensor, atol: float = 2e-5) -> None:
    torch.testing.assert_close(found, expected, atol=atol, rtol=1e-4)


@torch.no_grad()
def bare(spec: Encoder, model: nn.Module, pixels: Tensor) -> tuple[Any, Watch]:
    """The output of the model as it is, and what goes through its blocks."""
    with Watch(spec, model) as watch:
        output = spec.call(model, pixels)
    return output, watch


@torch.no_grad()
def compressed(
    spec: Encoder, model: nn.Module, pixels: Tensor, method: Method | str, **settings: Any
) -> tuple[Any, Watch, list[Record]]:
    """The same of the compressed model, and its records."""
    with vtc.compress(model, method, **settings) as handle, Watch(spec, model) as watch:
        output = spec.call(model, pixels)
        return output, watch, handle.last


# -- a block


@dataclass
class Look:
    """One attention. added (B, M, D): what it adds; weights (B, H, M, M); keys, values (B, H, M, d)."""

    added: Tensor
    weights: Tensor
    keys: Tensor
    values: Tensor


def attend(
    block: nn.Module, x: Tensor, given: dict[str, Any], prefix: int, place: Tensor, bias: Tensor
) -> Look:
    """The attention branch of a pre-norm block. bias (B, n) is added to the logits of each patch token as a
    key; what stands behind the patches has none."""
    attn = part(block, "attn", "self_attn", "attention")
    h = part(block, "norm1", "layer_norm1", "layernorm_before", "ln_1")(x)
    q, k, v = heads(attn, h)
    rope = given.get("rope")
    if rope is not None:  # timm: sines, then cosines
        sin, cos = rope.chunk(2, dim=-1)
        q, k = (rotate(t, cos, sin, prefix, place, getattr(attn, "rotate_half", False)) for t in (q, k))
    if given.get("position_embeddings") is not None:
        cos, sin = given["position_embeddings"]
        q, k = (rotate(t, cos, sin, prefix, place, True) for t in (q, k))
    logits = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5  # (B, H, M, M)
    logits = logits + F.pad(bias, (prefix, x.shape[1] - prefix - bias.shape[1]))[:, None, None]
    weights = logits.softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)  # (B, M, D)
    inner = part(attn, "norm", "ln_inner")
    y = part(attn, "out_proj", "o_proj", "proj", "projection_layer")(y if inner is None else inner(y))
    outer = part(block, "ln_attn")
    y = y if outer is None else outer(y)
    return Look(y * scale(block, 1), weights, k, v)


def mlp(block: nn.Module, x: Tensor) -> Tensor:
    """What the MLP branch adds to each token."""
    h = part(block, "norm2", "layer_norm2", "layernorm_after", "ln_2")(x)
    return block.mlp(h) * scale(block, 2)


def heads(attn: nn.Module, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values after their norms: (B, H, M, d) each."""
    if getattr(attn, "in_proj_weight", None) is not None:  # open_clip
        parts = F.linear(h, attn.in_proj_weight, attn.in_proj_bias).chunk(3, dim=-1)
    elif getattr(attn, "qkv", None) is not None:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:  # EVA: keys have none
            bias = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
        parts = F.linear(h, attn.qkv.weight, bias).chunk(3, dim=-1)
    else:
        parts = attn.q_proj(h), attn.k_proj(h), attn.v_proj(h)
    q, k, v = parts
    count = getattr(attn, "num_heads", None) or attn.num_attention_heads
    q_norm, k_norm = part(attn, "q_norm", "ln_q"), part(attn, "k_norm", "ln_k")
    whole = type(attn).__name__ == "InternVLVisionAttention"  # its norms are over all heads together
    if q_norm is not None and whole:
        q, k = q_norm(q), k_norm(k)
    q, k, v = (t.unflatten(2, (count, -1)).transpose(1, 2) for t in (q, k, v))
    if q_norm is not None and not whole:
        q, k = q_norm(q), k_norm(k)
    return q, k, v


def rotate(t: Tensor, cos: Tensor, sin: Tensor, prefix: int, place: Tensor, half: bool) -> Tensor:
    """Rotary embedding of the patches of t (B, H, prefix + n, d) by the angles (N, d) or (H, N, d) of the
    places (B, n) that they have in the picture."""
    front, patches = t[:, :, :prefix], t[:, :, prefix:]
    cos, sin = (torch.stack([angle[..., p, :] for p in place]) for angle in (cos, sin))  # (B, (H,) n, d)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    if half:
        first, second = patches.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
    else:
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
    return torch.cat([front, patches * cos + turned * sin], dim=2)


def scale(block: nn.Module, branch: int) -> Tensor | float:
    """LayerScale of the attention branch (1) or the MLP branch (2)."""
    for name in (f"ls{branch}", f"ls_{branch}", f"layer_scale{branch}"):
        if isinstance(module := getattr(block, name, None), nn.Module):
            return next(iter(module.parameters()), 1.0)
    for name in (f"gamma_{branch}", f"lambda_{branch}"):
        if getattr(block, name, None) is not None:
            return getattr(block, name)
    return 1.0


def part(module: nn.Module, *names: str) -> nn.Module | None:
    found = (getattr(module, name, None) for name in names)
    return next((child for child in found if isinstance(child, nn.Module)), None)
