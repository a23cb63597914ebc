"""The tokens of a batch of images, as many of each as it needs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class TokenSequence:
    """An ordered sequence of tokens for each of B images, padded to the longest, of K.

    values   (B, K, d)  what the decoder is given; zeros behind an image's own tokens
    lengths  (B,)       int64, how many tokens each image has, 0 to K
    ids      (B, K)     int64, the number of each code; -1 behind an image's own tokens; None where tokens are
                        continuous
    index    (B, K)     int64, which of the tokenizer's places each token takes, ascending; -1 behind an
                        image's own tokens. 0, 1, 2, ... unless tokens are dropped in the middle (KARL) or
                        stand for several places (CAT)
    extras   tensors with B rows that the tokenizer tells beside: halting probabilities, expected lengths
    """

    values: Tensor
    lengths: Tensor
    ids: Tensor | None = None
    index: Tensor | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        b, k = self.values.shape[:2]
        if self.lengths.shape != (b,) or (b and int(self.lengths.max()) > k):
            raise ValueError(f"lengths must be {b} numbers up to {k}, not {self.lengths.tolist()}")
        valid = self.valid
        if self.index is None:
            object.__setattr__(self, "index", torch.arange(k, device=self.values.device).expand(b, k))
        object.__setattr__(self, "index", self.index.masked_fill(~valid, -1))
        object.__setattr__(self, "values", self.values.masked_fill(~valid[..., None], 0))
        if self.ids is not None:
            object.__setattr__(self, "ids", self.ids.masked_fill(~valid, -1))

    @classmethod
    def of(cls, values: Tensor, ids: Tensor | None = None, **extras: Tensor) -> TokenSequence:
        """All K tokens of every image."""
        b, k = values.shape[:2]
        return cls(values, torch.full((b,), k, device=values.device), ids, extras=extras)

    @property
    def valid(self) -> Tensor:
        """(B, K), True for an image's own tokens."""
        place = torch.arange(self.values.shape[1], device=self.values.device)
        return place[None] < self.lengths[:, None]

    def truncate(self, k: int | Sequence[int] | Tensor) -> TokenSequence:
        """The first k tokens of every image, or of each its own number: k (B,). One with fewer keeps all.

        Raises ValueError for a number below 1.
        """
        k = torch.as_tensor(k, device=self.lengths.device)
        if k.dtype.is_floating_point or k.dtype == torch.bool or (k.numel() and int(k.min()) < 1):
            raise ValueError(
                f"a sequence is truncated to whole numbers of 1 or more tokens, not {k.tolist()}"
            )
        if k.dim() and k.shape != self.lengths.shape:
            raise ValueError(f"{len(self)} images take one length or {len(self)}, not {tuple(k.shape)}")
        lengths = self.lengths.minimum(k.to(self.lengths.dtype))
        longest = int(lengths.max()) if len(self) else 0
        cut = {name: getattr(self, name)[:, :longest] for name in ("values", "index")}
        ids = None if self.ids is None else self.ids[:, :longest]
        return replace(self, lengths=lengths, ids=ids, **cut)

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, images: int | slice | Tensor) -> TokenSequence:
        """The tokens of some of the images, padded to the longest of them."""
        if isinstance(images, int):
            if not -len(self) <= images < len(self):
                raise IndexError(f"there is no image {images} of {len(self)}")
            images = slice(images, images + 1 or None)
        lengths = self.lengths[images]
        longest = int(lengths.max()) if len(lengths) else 0
        ids = None if self.ids is None else self.ids[images, :longest]
        extras = {name: extra[images] for name, extra in self.extras.items()}
        return TokenSequence(
            self.values[images, :longest], lengths, ids, self.index[images, :longest], extras
        )

    def __iter__(self) -> Iterator[TokenSequence]:
        return (self[i] for i in range(len(self)))

    @classmethod
    def cat(cls, sequences: Sequence[TokenSequence]) -> TokenSequence:
        """One batch of several, padded to the longest. Extras that not all of them have are left out."""
        if not sequences:
            raise ValueError("there are no sequences to join")
        longest = max(s.values.shape[1] for s in sequences)

        def joined(parts: list[Tensor], fill: int) -> Tensor:
            return torch.cat(
                [
                    torch.cat([p, p.new_full((len(p), longest - p.shape[1], *p.shape[2:]), fill)], 1)
                    for p in parts
                ]
            )

        shared = set.intersection(*(set(s.extras) for s in sequences))
        extras = {name: torch.cat([s.extras[name] for s in sequences]) for name in sorted(shared)}
        ids = None if sequences[0].ids is None else joined([s.ids for s in sequences], -1)
        return cls(
            joined([s.values for s in sequences], 0),
            torch.cat([s.lengths for s in sequences]),
            ids,
            joined([s.index for s in sequences], -1),
            extras,
        )

    def to(self, device: torch.device | str) -> TokenSequence:
        moved = {name: extra.to(device) for name, extra in self.extras.items()}
        ids = None if self.ids is None else self.ids.to(device)
        return TokenSequence(
            self.values.to(device), self.lengths.to(device), ids, self.index.to(device), moved
        )
