"""Modules that take the place of an encoder's self-attention, and what they start from."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Grid, LearnedModule

HEADS = ("num_heads", "num_attention_heads", "heads")
OUT = ("out_proj", "o_proj", "projection_layer")


class AttentionReplacement(LearnedModule):
    """A module for the place of self-attention in a block: forward(x, grid) gives (B, N, width) for x
    (B, N, width), which is row by row of grid = (rows, columns).

    The residual connection and the norm before it are the host's. `start_from` takes over the weights of the
    attention that is replaced and sets what is new so that it adds nothing.
    """

    one_grid: ClassVar[bool] = False  # made for one grid, the option `window`

    def start_from(self, attention: HostAttention | nn.Module) -> None:
        """Raises ValueError for an attention of another width or number of heads."""
        raise NotImplementedError

    def fits(self, grid: Grid) -> None:
        """Raises ValueError for a grid that it cannot attend on."""

    def flops(self, grid: Grid) -> int:
        """Operations for one picture of a grid: 2 m n k for each product of matrices, which is the convention
        of torch's FlopCounterMode; folding, norms and softmaxes are not counted."""
        raise NotImplementedError


class HostAttention(NamedTuple):
    """The weights of a self-attention: qkv (3 * width, width), its bias, out (width, width), its bias."""

    heads: int
    qkv: Tensor
    qkv_bias: Tensor
    out: Tensor
    out_bias: Tensor

    @property
    def width(self) -> int:
        return self.out.shape[0]

    @classmethod
    def of(cls, attention: nn.Module) -> HostAttention:
        """From transformers' vision towers (q_proj, k_proj, v_proj, and out_proj as in CLIP, o_proj as in ViT
        or projection_layer as in InternViT), from `nn.MultiheadAttention` and `vtc.transformer.Attention`
        (in_proj_weight, out_proj), or from timm (qkv, proj).

        Raises ValueError for another module, and for one that does more than to project and attend: that
        normalises queries, keys or what was attended to, or gates it.
        """
        name = type(attention).__name__
        heads = next((getattr(attention, name) for name in HEADS if _has(attention, name)), 0)
        last = next((name for name in OUT if _has(attention, name)), "")
        read = ("q_proj", "k_proj", "v_proj", last)
        if last and _has(attention, *read):
            parts = [_linear(getattr(attention, name)) for name in read[:3]]
            qkv, bias = (torch.cat(both) for both in zip(*parts, strict=True))
        elif _has(attention, *(read := ("in_proj_weight", "out_proj"))):
            qkv, read = attention.in_proj_weight.detach(), (*read, "in_proj_bias")
            bias = qkv.new_zeros(len(qkv)) if attention.in_proj_bias is None else attention.in_proj_bias
        elif _has(attention, *(read := ("qkv", "proj"))):
            qkv, bias = _linear(attention.qkv)
        else:
            heads = 0
        if not heads:
            raise ValueError(
                f"no query, key, value and output projections were found in a {name}: give a HostAttention"
            )
        if more := _more(attention, read):
            raise ValueError(
                f"a {name} does more than to project and attend, which no replacement takes over: it has "
                f"{', '.join(more)}"
            )
        out = getattr(attention, "proj" if "proj" in read else last)
        if qkv.shape != (3 * out.out_features, out.out_features):
            raise ValueError(
                f"queries, keys and values of a {name} are not as wide as its tokens: {tuple(qkv.shape)} for "
                f"tokens of {out.out_features}"
            )
        return cls(heads, qkv, bias.detach(), *_linear(out))

    @classmethod
    def fitting(
        cls, attention: HostAttention | nn.Module, name: str, width: int, heads: int
    ) -> HostAttention:
        """The same for a module of that name, width and number of heads. Raises ValueError for others."""
        host = attention if isinstance(attention, HostAttention) else cls.of(attention)
        if (host.width, host.heads) != (width, heads):
            raise ValueError(
                f"{name} has width {width} and {heads} heads; the attention to start from has width "
                f"{host.width} and {host.heads} heads"
            )
        return host

    def check(self, **options: bool) -> None:
        """Raises ValueError where a bias that is not zero has no place."""
        for name, there in options.items():
            if not there and bool(self.qkv_bias.any()):
                raise ValueError(f"the attention to start from has biases: make the module with {name}=True")


def _more(attention: nn.Module, read: tuple[str, ...]) -> list[str]:
    """What has a part in an attention beside the projections that are read."""
    idle = (nn.Identity, nn.Dropout)
    modules = [name for name, part in attention.named_children() if not isinstance(part, idle)]
    parameters = [name for name, _ in attention.named_parameters(recurse=False)]
    return [name for name in (*modules, *parameters) if name not in read]


def attention_flops(tokens: int, width: int, keys: int | None = None) -> int:
    """Operations of a self-attention of some tokens, projections included; where each sees only a few keys,
    of as many."""
    return 8 * tokens * width**2 + 4 * tokens * (tokens if keys is None else keys) * width


def _has(module: nn.Module, *names: str) -> bool:
    return all(getattr(module, name, None) is not None for name in names)


def _linear(layer: nn.Linear) -> tuple[Tensor, Tensor]:
    weight = layer.weight.detach()
    return weight, weight.new_zeros(len(weight)) if layer.bias is None else layer.bias.detach()


@torch.no_grad()
def put(layer: nn.Linear | nn.Conv2d, weight: Tensor, bias: Tensor) -> None:
    """Weights into a layer, whose bias may be absent."""
    layer.weight.copy_(weight.reshape(layer.weight.shape))
    if layer.bias is not None:
        layer.bias.copy_(bias)


def zero(*parts: nn.Module | nn.Parameter) -> None:
    for part in parts:
        for parameter in part.parameters() if isinstance(part, nn.Module) else [part]:
            nn.init.zeros_(parameter)


def attend(
    q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Multi-head attention of q (B, T, width) over k and v (B, S, width): (B, T, width).

    bias: added to the logits, or True where a query may see a key; broadcast to (B, heads, T, S).
    """
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if bias is not None and bias.dtype != torch.bool:
        bias = bias.to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, bias, scale=scale).transpose(1, 2).flatten(2)


def check_grid(name: str, x: Tensor, grid: Grid, width: int, prefix: int = 0) -> None:
    """Raises ValueError for x that is not (B, prefix + rows * columns, width)."""
    if x.dim() != 3 or x.shape[1:] != (prefix + grid[0] * grid[1], width) or min(grid) < 1:
        raise ValueError(
            f"{name} takes (B, {f'{prefix} + ' * bool(prefix)}rows * columns, {width}), not "
            f"{tuple(x.shape)} for a grid of {grid[0]} rows and {grid[1]} columns"
        )


def check_heads(width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{heads} heads do not divide a width of {width}")
