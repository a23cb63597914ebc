"""What reads the tokens that leave an encoder: poolers count a merged token as many times as it has patches,
and methods that make maps of the tokens are shown all patches."""

from __future__ import annotations

import functools
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..hosts.trunk import STAGE  # where a wrapped method finds its stage, as it must on a deep copy
from ..taps import Call, Tap

if TYPE_CHECKING:
    from .encoder import EncoderStage


def consumers(stage: EncoderStage) -> list[Any]:
    """Parts with install() and remove() for all that pools or maps the tokens of the stage's encoder."""
    tower, family = stage.trunk.tower, stage.trunk.family
    parts: list[Any] = [_Method(stage, name, _mapping) for name in family.grids]
    pool = getattr(tower, "attn_pool", None)
    if family.pools == "timm":
        parts += [_Method(stage, "pool", _timm_pool), _Norm(stage, tower.norm)]
        parts += [_attention_pool(stage, pool)] if pool is not None else []
    if family.pools == "open_clip":
        parts.append(_Method(stage, "_global_pool", _open_clip_pool))
        pools = [pool, getattr(tower, "attn_pool_contrastive", None)]
        parallel = getattr(tower, "attn_pool_type", None) == "parallel"  # else the second pools the first
        pools = pools if parallel else pools[:1]
        parts += [_attention_pool(stage, pool.attn) for pool in pools if pool is not None]
    if family.pools == "probe" and getattr(tower, "head", None) is not None:
        parts.append(_Probe(stage, tower.head))
    if type(stage.trunk.model).__name__.endswith("ForImageClassification"):
        parts.append(_Classifier(stage))
    return parts


class _Method:
    """A method of the encoder, wrapped on this instance only."""

    def __init__(self, stage: EncoderStage, name: str, made: Any):
        self.stage, self.name, self.made = stage, name, made

    def install(self) -> None:
        tower = self.stage.trunk.tower
        original = getattr(tower, self.name).__func__
        self.wrapper = functools.wraps(original)(self.made(original))
        setattr(tower, self.name, MethodType(self.wrapper, tower))

    def remove(self) -> None:
        tower = self.stage.trunk.tower
        if getattr(vars(tower).get(self.name), "__func__", None) is self.wrapper:
            delattr(tower, self.name)


def _mapping(original: Any) -> Any:
    def method(tower: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with getattr(tower, STAGE).mapping():
            return original(tower, *args, **kwargs)

    return method


def _timm_pool(original: Any) -> Any:
    def pool(tower: nn.Module, x: Tensor, pool_type: str | None = None) -> Any:
        kind = tower.global_pool if pool_type is None else pool_type
        stage = getattr(tower, STAGE)
        if tower.attn_pool is not None or kind not in ("token", "max", ""):
            stage.pools(x)
        if tower.attn_pool is None and kind not in ("token", "max", ""):
            first = 0 if getattr(tower, "pool_include_prefix", False) else tower.num_prefix_tokens
            x = _weighted(stage, x, first, f"global_pool={kind!r}" if kind != "avg" else None)
        return original(tower, x, pool_type)

    return pool


def _open_clip_pool(original: Any) -> Any:
    def pool(tower: nn.Module, x: Tensor) -> Any:
        if tower.pool_type == "avg" and tower.attn_pool is None:
            pooled, _ = original(tower, _weighted(getattr(tower, STAGE), x, 1))
            return pooled, x[:, 1:]
        return original(tower, x)

    return pool


class _Norm:
    """The last norm: a head may be called with what it gives later, after other forwards."""

    def __init__(self, stage: EncoderStage, norm: nn.Module):
        self.stage, self.norm = stage, norm

    def install(self) -> None:
        self._hook = self.norm.register_forward_hook(self._note)

    def remove(self) -> None:
        self._hook.remove()

    @torch.compiler.disable
    def _note(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        self.stage.leaves_as(output)


def _attention_pool(stage: EncoderStage, attention: nn.Module) -> Tap:
    def bias(call: Call) -> Tensor | None:
        bias = stage.bias_of(call.key.shape[2])
        return None if bias is None else bias[:, None, None]  # (B, 1, 1, M)

    return Tap(attention, lambda: stage.sizes() is not None, bias)


class _Probe:
    """A pool by torch's attention with one query, as SigLIP has it."""

    def __init__(self, stage: EncoderStage, head: nn.Module):
        self.stage, self.head = stage, head
        self._hooks: list[Any] = []

    def install(self) -> None:
        self._hooks = [
            self.head.register_forward_pre_hook(self._unmask),
            self.head.attention.register_forward_pre_hook(self._bias, with_kwargs=True),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _unmask(self, module: nn.Module, args: tuple) -> tuple | None:
        return args[:1] if self.stage.padded() else None

    def _bias(self, module: nn.MultiheadAttention, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        bias = self.stage.bias_of(args[1].shape[1])  # (B, K), tells of padding too
        if bias is None:
            return None
        bias = bias.to(args[1].dtype).repeat_interleave(module.num_heads, dim=0)[:, None]  # (B heads, 1, K)
        return args, {**kwargs, "attn_mask": bias}


class _Classifier:
    """A classification model of transformers: it averages the patches in its own forward, if it does."""

    def __init__(self, stage: EncoderStage):
        self.stage = stage
        self._hooks: list[Any] = []

    def install(self) -> None:
        trunk = self.stage.trunk
        self._hooks = [
            trunk.model.register_forward_pre_hook(self._enter),
            trunk.model.register_forward_hook(self._leave, always_call=True),
            trunk.tower.register_forward_hook(self._weigh),
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _enter(self, *_: Any) -> None:
        self.stage.classifying.set(True)

    def _leave(self, *_: Any) -> None:
        self.stage.classifying.pop()

    def _weigh(self, module: nn.Module, args: tuple, output: Any) -> None:
        if self.stage.classifying.get() and self.stage.padded():
            raise RuntimeError("pictures of several sizes are classified together only by restore='unmerge'")
        if self.stage.classifying.get() and self.stage.sizes() is not None:
            output["last_hidden_state"] = _weighted(
                self.stage, output["last_hidden_state"], self.stage.trunk.prefix
            )


def _weighted(stage: EncoderStage, x: Tensor, first: int, unknown: str | None = None) -> Tensor:
    """Tokens (B, M, D) whose plain mean, the first ones left out, is the mean of the patches."""
    size = stage.sizes()  # (B, K)
    if size is None:
        return x
    if unknown:
        raise RuntimeError(
            f"merged tokens cannot be pooled by {unknown}: give restore='unmerge' to compress()"
        )
    ones = size.new_ones(len(size), x.shape[1] - first - size.shape[1])  # prefix tokens that are averaged too
    weight = torch.cat([ones, size], dim=1)
    weight = weight / weight.mean(dim=1, keepdim=True)
    patches = x[:, first:] * weight[..., None].to(x.dtype)
    return torch.cat([x[:, :first], patches], dim=1)
