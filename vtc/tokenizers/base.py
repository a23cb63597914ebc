"""What all tokenizers share: images to tokens and back, and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from . import checkpoints
from .bottlenecks import Bottleneck
from .policies import Policy
from .sequence import TokenSequence

Length = int | Sequence[int] | Tensor | Policy


class Tokenizer(nn.Module):
    """An image as an ordered sequence of 1 to `max_tokens` tokens, and back.

    A system subclasses this, is decorated with `register_tokenizer`, and defines

    Config           a frozen dataclass of its options, `image_size` among them; `self.config` is one
    quantize         its bottleneck (vtc.tokenizers.bottlenecks)
    encode_images    (B, 3, H, W), k -> a TokenSequence of k tokens for every image
    decode_values    values (B, k, d), valid (B, k), index (B, k) -> (B, 3, H, W); an image comes out
                     as if its padding was not there, whatever else is in the batch
    halt             where `halts`: images, epsilon -> a TokenSequence, as many tokens of each as it chooses

    and where weights of it are published: `published`, the configuration of each by its name on the Hub;
    `config_from`, which reads a published configuration; `rename`, which turns a published state dict into
    this one's.
    """

    name: ClassVar[str]
    paper: ClassVar[str]
    weights: ClassVar[str] = "none published"  # the licence of the published weights
    Config: ClassVar[type]
    published: ClassVar[dict[str, Any]] = {}
    published_file: ClassVar[str | None] = None  # in repositories that hold other models' weights too
    ordered: ClassVar[bool] = True  # the first k tokens are a picture, the better the more
    prefix_stable: ClassVar[bool] = True  # encoding with k tokens gives the first k of encoding with all
    halts: ClassVar[bool] = False  # chooses the length itself

    config: Any
    quantize: Bottleneck

    def __init__(self, config: Any) -> None:
        super().__init__()
        if not isinstance(config, self.Config):
            raise TypeError(f"{type(self).__name__} takes a {type(self).__name__}.Config, not {config!r}")
        self.config = config

    # -- lengths

    @property
    def lengths(self) -> Sequence[int]:
        """The numbers of tokens an image may have, ascending."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int:
        return self.lengths[-1]

    @property
    def bits_per_token(self) -> float:
        """log2 of the number of codes; 16 per number of a continuous token."""
        return self.quantize.bits

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights: what images and tokens are computed in."""
        return next(self.parameters()).dtype

    @classmethod
    def outline(cls, config: Any) -> tuple[Sequence[int], int | None]:
        """The lengths that a configuration gives and the number of codes, None where tokens are continuous.

        Without weights. A system of which the networks need another library says it without them.
        """
        with torch.device("meta"):
            tokenizer = cls(config)
        return tokenizer.lengths, tokenizer.quantize.size

    # -- images to tokens to images

    def encode(self, images: Tensor, length: Length | None = None) -> TokenSequence:
        """The tokens of images (B, 3, H, W) with values in [0, 1].

        length: None for all tokens; a number; one number for each image; or a Policy that chooses.
        Raises ValueError for images of another shape or range, and for a length the tokenizer does not have.
        """
        if isinstance(length, Policy):
            self._checked(images)
            return length.encode(self, images)
        images = self._checked(images)
        if length is None:
            return self.encode_images(images, self.max_tokens)
        k = self.check_length(length)
        if not len(images):
            return self.encode_images(images, self.max_tokens)
        if k.dim() and not self.prefix_stable:
            return self._encode_apart(images, k)
        return self.encode_images(images, int(k.max())).truncate(k)

    def decode(
        self, tokens: TokenSequence, length: int | Sequence[int] | Tensor | None = None, **options: Any
    ) -> Tensor:
        """Images (B, 3, H, W) with values in [0, 1] from tokens, or from the first `length` of them.

        options: what the system's decoder takes beside (flow decoders: steps, guidance, seed).
        Raises ValueError for a length the tokenizer does not have, and for an image without tokens.
        """
        if length is not None:
            tokens = tokens.truncate(self.check_length(length))
        if len(tokens) and int(tokens.lengths.min()) < 1:
            raise ValueError("an image without tokens cannot be decoded: give each at least one")
        if tokens.values.shape[1] > self.max_tokens or tokens.values.shape[2] != self.quantize.dim:
            raise ValueError(
                f"{self.name} decodes up to {self.max_tokens} tokens of {self.quantize.dim} numbers, "
                f"not {tuple(tokens.values.shape[1:])}"
            )
        values = tokens.values.to(self.dtype)  # codes are looked up in float32
        return self.decode_values(values, tokens.valid, tokens.index, **options).clamp(0, 1)

    def forward(self, images: Tensor, length: Length | None = None) -> Tensor:
        """What is left of images at that length: (B, 3, H, W)."""
        return self.decode(self.encode(images, length))

    def tokens_of(
        self, ids: Tensor, lengths: Sequence[int] | Tensor | None = None, index: Tensor | None = None
    ) -> TokenSequence:
        """The sequence with codes `ids` (B, K), as `TokenSequence.ids` gives them.

        Raises ValueError for a continuous tokenizer and for a code that does not exist.
        """
        if lengths is None:
            lengths = (ids >= 0).sum(1)
        lengths = torch.as_tensor(lengths, device=ids.device)
        own = torch.arange(ids.shape[1], device=ids.device)[None] < lengths[:, None]
        return TokenSequence(self.quantize.lookup(ids.masked_fill(~own, 0)), lengths, ids, index)

    def halt(self, images: Tensor, epsilon: float | None = None) -> TokenSequence:
        """As many tokens of each image as the tokenizer finds enough for an error of epsilon."""
        from .registry import get_tokenizer, list_tokenizers

        able = ", ".join(name for name in list_tokenizers() if get_tokenizer(name).halts)
        raise ValueError(f"{self.name} has no halting or length head; these have: {able}")

    def encode_images(self, images: Tensor, k: int) -> TokenSequence:
        raise NotImplementedError

    def decode_values(self, values: Tensor, valid: Tensor, index: Tensor) -> Tensor:
        raise NotImplementedError

    def check_length(self, length: int | Sequence[int] | Tensor) -> Tensor:
        """One length or one for each image as a tensor. ValueError for one the tokenizer does not have."""
        try:
            k = torch.as_tensor(length)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(f"a length is a whole number, or one for each image, not {length!r}") from None
        if k.dtype in (torch.uint16, torch.uint32, torch.uint64) or not k.numel():
            k = k.long()  # torch hardly computes with those, and takes no numbers for floats
        if k.dtype.is_floating_point or k.dtype == torch.bool or k.dim() > 1:
            raise ValueError(f"a length is a whole number, or one for each image, not {length!r}")
        wrong = sorted(set(k.flatten().tolist()) - set(self.lengths))
        if wrong:
            raise ValueError(f"{self.name} encodes to {told(self.lengths, ' or ')} tokens, not to {wrong[0]}")
        return k

    def _encode_apart(self, images: Tensor, k: Tensor) -> TokenSequence:
        """Each image at its own length k (B,), where fewer tokens are not the first of more."""
        if len(k) != len(images):
            raise ValueError(f"{len(images)} images take one length or {len(images)}, not {len(k)}")
        own = {n: (k == n).nonzero().flatten() for n in k.unique().tolist()}
        order = torch.cat(list(own.values())).argsort()
        return TokenSequence.cat([self.encode_images(images[i], n) for n, i in own.items()])[order]

    def _checked(self, images: Tensor) -> Tensor:
        """The images in the type of the weights."""
        side = self.config.image_size
        if images.dim() != 4 or images.shape[1:] != (3, side, side) or not images.is_floating_point():
            raise ValueError(
                f"{self.name} takes float images (B, 3, {side}, {side}), not {tuple(images.shape)} "
                f"{images.dtype}; vtc.tokenizers.load_images makes them from files"
            )
        # within rounding: a resized or half-precision picture may stick out by a little
        if images.numel() and not -0.01 <= float(images.min()) <= float(images.max()) <= 1.01:
            raise ValueError("images have values in [0, 1], without mean and standard deviation taken off")
        return images.to(self.dtype)

    # -- weights

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None, **options: Any) -> Tokenizer:
        """A tokenizer with its weights: from a folder or file that `save_pretrained` or the paper's authors
        wrote, or by its name on the Hugging Face Hub. In evaluation mode.

        options: replace those of the configuration that do not change weights.
        Raises OSError where nothing is found, ValueError where configuration or weights are of another kind.
        """
        return checkpoints.load(cls, name, revision, options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes config.json and model.safetensors into a folder."""
        checkpoints.save(self, folder)

    @classmethod
    def config_from(cls, published: dict[str, Any]) -> Any | None:
        """This system's configuration from one its authors published; None where it is of another system."""
        return None

    @classmethod
    def rename(cls, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Published weights under the names of this class."""
        return state


def told(lengths: Sequence[int], between: str = ", ") -> str:
    """Lengths in words: "1 to 64" where there is none missing, else each of them."""
    if len(lengths) > 1 and list(lengths) == list(range(lengths[0], lengths[-1] + 1)):
        return f"{lengths[0]} to {lengths[-1]}"
    return between.join(map(str, lengths))
