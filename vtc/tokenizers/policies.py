"""Length policies: how many tokens each image gets, for every tokenizer the same."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from .sequence import TokenSequence

if TYPE_CHECKING:
    from .base import Tokenizer


class Policy:
    """Chooses a length for each image. Subclasses define `encode`, or `lengths`, which `encode` uses.

    Whatever else is in the batch, an image gets the same number of tokens.
    """

    evaluation_only: ClassVar[bool] = False  # looks at what it could not know when tokens are made

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> TokenSequence:
        """The tokens of images (B, 3, H, W), as many of each as this policy chooses."""
        tokens = tokenizer.encode_images(images, tokenizer.max_tokens)
        return tokens.truncate(tokenizer.check_length(self.lengths(tokenizer, images, tokens)))

    def lengths(self, tokenizer: Tokenizer, images: Tensor, tokens: TokenSequence) -> Tensor:
        """(B,) int64, how many of all the tokens each image keeps."""
        raise NotImplementedError


@dataclass(frozen=True)
class Fixed(Policy):
    """The same number of tokens for every image."""

    k: int

    def encode(self, tokenizer: Tokenizer, images: Tensor) -> TokenSequence:
        return tokenizer.encode(images, self.k)
