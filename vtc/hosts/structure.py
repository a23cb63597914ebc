"""Finding blocks, attention modules and prefix tokens of a vision encoder by its structure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

ATTENTION_NAMES = ("self_attn", "attention", "attn")


@dataclass
class Encoder:
    """A vision encoder: its blocks in order, and how many CLS / register tokens stand beside the patches.

    blocks is empty where none are recognised, as in a convolutional encoder. latent is True where the tokens
    are made by a resampler behind the encoder, so that nothing in its blocks is about one token.
    """

    tower: nn.Module
    blocks: list[nn.Module]
    prefix: int = 0
    suffix: int = 0
    latent: bool = False

    @classmethod
    def of(cls, tower: nn.Module, cls_last: bool = False, latent: bool = False) -> Encoder:
        extra = extra_tokens(tower)
        prefix, suffix = (0, extra) if cls_last else (extra, 0)
        return cls(tower, find_blocks(tower), prefix, suffix, latent)

    @property
    def has_cls(self) -> bool:
        return self.prefix + self.suffix > 0

    @property
    def cls(self) -> int:
        """The index of the CLS token in a row."""
        return 0 if self.prefix else -1

    def attention(self, layer: int) -> nn.Module:
        return next(
            module for module in map(self.blocks[layer]._modules.get, ATTENTION_NAMES) if module is not None
        )


def find_blocks(tower: nn.Module) -> list[nn.Module]:
    """The longest list of modules that each hold an attention module; empty if there is none."""
    lists = [
        list(module)
        for module in tower.modules()
        if isinstance(module, nn.ModuleList)
        and len(module)
        and all(any(name in block._modules for name in ATTENTION_NAMES) for block in module)
    ]
    return max(lists, key=len, default=[])


def extra_tokens(tower: nn.Module) -> int:
    """1 for an encoder with a CLS token, read off its parameters; plus its registers."""
    extra = 0
    for name, parameter in tower.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("class_embedding", "cls_token"):
            extra += 1
        elif leaf == "register_tokens":
            extra += parameter.shape[-2]
    return extra
