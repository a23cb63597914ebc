"""Finding blocks, attention modules and prefix tokens of a vision encoder by its structure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTENTION_NAMES = ("self_attn", "attention", "attn")


@dataclass
class Encoder:
    """A vision encoder: its blocks in order, and how many CLS / register tokens precede the patches."""

    tower: nn.Module
    blocks: list[nn.Module]
    prefix: int

    @property
    def has_cls(self) -> bool:
        return self.prefix > 0

    def attention(self, layer: int) -> nn.Module:
        return next(
            module for module in map(self.blocks[layer]._modules.get, ATTENTION_NAMES) if module is not None
        )


def find_blocks(tower: nn.Module) -> list[nn.Module]:
    """The longest list of modules that each hold an attention module. Raises ValueError if there is none."""
    lists = [
        list(module)
        for module in tower.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(any(name in block._modules for name in ATTENTION_NAMES) for block in module)
    ]
    if not lists:
        raise ValueError(f"{type(tower).__name__} has no list of attention blocks that vtc recognises")
    return max(lists, key=len)


def prefix_length(tower: nn.Module) -> int:
    """1 for an encoder with a CLS token, read off its parameters; plus its registers."""
    prefix = 0
    for name, parameter in tower.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("class_embedding", "cls_token"):
            prefix += 1
        elif leaf == "register_tokens":
            prefix += parameter.shape[-2]
    return prefix
