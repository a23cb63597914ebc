"""Finding blocks, attention modules and prefix tokens of a vision encoder by its structure."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from .host import Host

ATTENTION_NAMES = ("self_attn", "attention", "attn")
RESIZABLE_TOWERS = ("clip_vision_model", "siglip_vision_model")  # interpolate their position embeddings


@dataclass
class Encoder:
    """A vision encoder: its blocks in order, and how many CLS / register tokens stand beside the patches.

    blocks is empty where none are recognised, as in a convolutional encoder. latent is True where the tokens
    are made by a resampler behind the encoder, so that nothing in its blocks is about one token. resizable is
    True where it takes smaller pictures, and the projector behind it works token by token.
    """

    tower: nn.Module
    blocks: list[nn.Module]
    prefix: int = 0
    suffix: int = 0
    latent: bool = False
    resizable: bool = False

    @classmethod
    def of(cls, tower: nn.Module, host: Host) -> Encoder:
        extra = extra_tokens(tower)
        prefix, suffix = (0, extra) if host.cls_last else (extra, 0)
        # MiniCPM-V merges patches behind one of its blocks; those that follow see what tokens are made of
        config = getattr(tower, "config", None)
        blocks = find_blocks(tower)[getattr(config, "insert_layer_id", -1) + 1 :]
        resizable = host.resizable and getattr(config, "model_type", None) in RESIZABLE_TOWERS
        return cls(tower, blocks, prefix, suffix, host.latent, resizable)

    @property
    def has_cls(self) -> bool:
        return self.prefix + self.suffix > 0

    @property
    def cls(self) -> int:
        """The index of the CLS token in a row."""
        return 0 if self.prefix else -1

    def attention(self, layer: int) -> nn.Module:
        return _attention(self.blocks[layer])


def find_blocks(tower: nn.Module) -> list[nn.Module]:
    """The blocks with attention of the list that has most of them; the others in it are convolutions."""
    lists = [
        [block for block in module if _attention(block) is not None]
        for module in tower.modules()
        if isinstance(module, nn.ModuleList)
    ]
    return max(lists, key=len, default=[])


def _attention(block: nn.Module) -> nn.Module | None:
    found = map(block._modules.get, ATTENTION_NAMES)
    return next((module for module in found if not isinstance(module, (nn.ModuleList, type(None)))), None)


def extra_tokens(tower: nn.Module) -> int:
    """How many CLS, distillation and register tokens an encoder has, read off its parameters."""
    extra = 0
    for name, parameter in tower.named_parameters():
        leaf = name.rsplit(".", 1)[-1]
        if leaf in ("class_embedding", "cls_token", "distillation_token"):
            extra += 1
        elif leaf in ("register_tokens", "cls_register_token"):
            extra += parameter.shape[-2]
    return extra
