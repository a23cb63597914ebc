"""A tokenizer's encoder in front of a host's projector, in the place of its vision tower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..method import Need, Select
from ..tokens import Tokens
from ..transformer import blocks, causal_last, initialise, run
from .base import Length, Tokenizer, told


class TokenSource(nn.Module):
    """The tokens of a tokenizer, made as wide as what a host's projector is given.

    A linear layer, a position embedding and a few blocks that are causal over the tokens, so that the first k
    are the same however many there are. They start at random: train them, and the projector, with the host.

        source = TokenSource.for_host(model, processor, tokenizer)
        handle = vtc.compress(model, source, keep=16)  # 16 tokens to an image; the vision tower does not run

    tokenizer   its weights rest (no gradients), unless `train_tokenizer`
    width       numbers to a token that the projector is given
    length      None, a number, or a length policy: how many tokens an image gets, at most `keep`
    mean, std   what the host's processor took off the pixels and divided them by: put back here
    Raises ValueError for a width that 64 does not divide and that is above 64; and when it runs, where `keep`
    is a part of tokens that are in no order.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        width: int,
        depth: int = 2,
        length: Length | None = None,
        mean: Sequence[float] = (0.0, 0.0, 0.0),
        std: Sequence[float] = (1.0, 1.0, 1.0),
        train_tokenizer: bool = False,
    ) -> None:
        super().__init__()
        if width > 64 and width % 64:
            raise ValueError(f"the heads of a token source are 64 wide, which {width} is no multiple of")
        self.tokenizer, self.width, self.length = tokenizer, width, length
        tokenizer.requires_grad_(train_tokenizer)
        self.lift = nn.Linear(tokenizer.quantize.dim, width)
        self.position = nn.Parameter(torch.randn(tokenizer.max_tokens, width) * 0.02)
        self.blocks = blocks(width, depth, max(1, width // 64))
        self.norm = nn.LayerNorm(width)
        self.register_buffer("mean", torch.tensor(tuple(mean)).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(tuple(std)).view(3, 1, 1), persistent=False)
        for part in (self.lift, self.blocks):
            initialise(part)

    @classmethod
    def for_host(cls, model: nn.Module, processor: Any, tokenizer: Tokenizer, **options: Any) -> TokenSource:
        """One that fits a transformers vision-language model and its processor."""
        look = getattr(processor, "image_processor", processor)
        normalised = getattr(look, "do_normalize", True)
        mean, std = (look.image_mean, look.image_std) if normalised else ((0.0,) * 3, (1.0,) * 3)
        width = model.config.vision_config.hidden_size
        return cls(tokenizer, width, mean=mean, std=std, **options)

    def forward(self, pixels: Tensor, k: int | None = None) -> tuple[Tensor, Tensor]:
        """Pixels (B, 3, H, W) as the host's processor makes them, to tokens (B, K, width), zero where an
        image has fewer, and lengths (B,).

        k: at most so many to an image.
        """
        side = self.tokenizer.config.image_size
        images = pixels.to(self.mean.device).float() * self.std.float() + self.mean.float()
        if images.shape[-2:] != (side, side):
            images = F.interpolate(images, (side, side), mode="bicubic", antialias=True)
        length = self.length
        if length is None and k is not None:
            length = next((n for n in self.tokenizer.lengths if n >= k), None)
        tokens = self.tokenizer.encode(images.clamp(0, 1), length)
        if k is not None and tokens.values.shape[1] > k:
            if not self.tokenizer.ordered:
                raise ValueError(
                    f"tokens of {self.tokenizer.name} are in no order, of which the first {k} mean nothing: "
                    f"give keep as one of its lengths, {told(self.tokenizer.lengths)}"
                )
            tokens = tokens.truncate(k)
        values, place = tokens.values.to(self.lift.weight), tokens.index.clamp(min=0)
        x = self.lift(values) + self.position[place]  # (B, K, width)
        x = run(self.blocks, x, causal_last(0, x.shape[1], x.device))
        return self.norm(x) * tokens.valid[..., None], tokens.lengths

    def as_method(self) -> FromSource:
        """What `vtc.compress()` makes of it."""
        return FromSource(self)


@dataclass
class FromSource(Select):
    """Tokens of a source in the place of the vision tower's: the first places of the grid hold them."""

    source: TokenSource = field(repr=False)

    name = "token-source"
    stages = ("features",)

    @property
    def needs(self) -> tuple[Need, ...]:
        return (Need("vision"),)

    def count(self, tokens: Tokens, k: int) -> Tensor:
        # places without a token are exactly zero in front of the projector, and there alone
        return (tokens.vision != 0).any(-1).sum(1).clamp(1, k)

    def select(self, tokens: Tokens, k: int) -> Tensor:
        return torch.arange(k, device=tokens.x.device).expand(len(tokens.x), -1)

    def to_dict(self) -> dict[str, Any]:
        raise ValueError(
            "a token source has weights of its own and is no plan to save: save its state_dict()"
        )
