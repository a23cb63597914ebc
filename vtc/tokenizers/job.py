"""The making of one shard: pictures are read ahead by threads and encoded in batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from .base import Tokenizer
from .images import read_image, to_floats
from .policies import Policy
from .sequence import TokenSequence
from .shards import Shard, read_shard, write_shard

A, B = TypeVar("A"), TypeVar("B")


class Reading(NamedTuple):
    """A picture's pixels (3, size, size) uint8 and the width and height it had; or why it cannot be read."""

    name: str
    pixels: Tensor | None = None
    size: tuple[int, int] = (0, 0)
    reason: str = ""


@dataclass(frozen=True)
class Job:
    """What it takes to make any shard of a corpus, on this machine or another."""

    folder: Path
    out: Path
    format: str
    shard_size: int
    fit: str
    dtype: np.dtype
    batch_size: int
    workers: int
    policy: Policy | None = None

    def file(self, n: int) -> Path:
        return self.out / f"shard-{n:06d}.{self.format}"

    def part(self, names: list[str], n: int) -> list[str]:
        """Those of all names that are the n-th shard's."""
        return names[n * self.shard_size : (n + 1) * self.shard_size]

    def has(self, names: list[str], n: int) -> bool:
        """Whether the n-th shard is there and whole."""
        try:
            shard = read_shard(self.file(n))
        except (OSError, ValueError):
            return False
        return shard.names == [name for name in self.part(names, n) if name not in shard.unreadable]

    def write(
        self, tokenizer: Tokenizer, names: list[str], n: int, done: Callable[[int], object] = bool
    ) -> None:
        """Makes the n-th shard. `done` is told the number of pictures, batch by batch."""
        own = self.part(names, n)
        readings = self.read(own, tokenizer.config.image_size)
        kept, encoded, unreadable = [], [], {}
        while batch := list(islice(readings, self.batch_size)):
            good = [reading for reading in batch if reading.pixels is not None]
            unreadable |= {reading.name: reading.reason for reading in batch if reading.pixels is None}
            kept += good
            if good:
                encoded.append(self._encode(tokenizer, torch.stack([reading.pixels for reading in good])))
            done(len(batch))
        write_shard(self._shard(tokenizer, kept, encoded, unreadable), self.file(n))

    def read(self, names: Iterable[str], size: int) -> Iterator[Reading]:
        def one(name: str) -> Reading:
            try:
                name.encode()
                return Reading(name, *read_image(self.folder / name, size, self.fit))
            except UnicodeEncodeError:
                return Reading(name, reason="its name is not valid UTF-8")
            except ValueError as error:
                return Reading(name, reason=str(error))

        return ahead(one, names, self.workers, 2 * self.batch_size)

    @torch.inference_mode()
    def _encode(self, tokenizer: Tokenizer, pixels: Tensor) -> TokenSequence:
        device = next(tokenizer.parameters()).device
        return tokenizer.encode(to_floats(pixels.to(device)), self.policy).to("cpu")

    def _shard(
        self,
        tokenizer: Tokenizer,
        kept: list[Reading],
        encoded: list[TokenSequence],
        unreadable: dict[str, str],
    ) -> Shard:
        coded = tokenizer.quantize.size is not None
        shape = (0,) if coded else (0, tokenizer.quantize.dim)
        flat, index, lengths = [np.zeros(shape)], [np.zeros(0)], [np.zeros(0, np.int64)]
        counted = True
        for tokens in encoded:
            own = tokens.valid
            flat.append((tokens.ids if coded else tokens.values.float())[own].numpy())
            index.append(tokens.index[own].numpy())
            lengths.append(tokens.lengths.numpy())
            counted &= torch.equal(tokens.index[own], own.cumsum(1)[own] - 1)
        with np.errstate(over="ignore"):
            stored = np.concatenate(flat).astype(self.dtype)
        if not np.isfinite(stored).all():
            raise ValueError(f"the tokens' values do not fit into {self.dtype}: take dtype float32")
        places = np.concatenate(index).astype(smallest(tokenizer.max_tokens))
        return Shard(
            stored,
            np.concatenate([[0], np.concatenate(lengths).cumsum()]),
            [reading.name for reading in kept],
            [reading.size for reading in kept],
            None if counted else places,
            unreadable,
        )


def smallest(numbers: int) -> np.dtype:
    """The smaller of the unsigned types that counts so many numbers."""
    return np.dtype(np.uint16 if numbers <= 2**16 else np.uint32)


def ahead(function: Callable[[A], B], items: Iterable[A], workers: int, n: int) -> Iterator[B]:
    """What a function makes of each item, in order, by threads that are at most n items ahead."""
    with ThreadPoolExecutor(workers) as pool:
        pending: deque = deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) > n:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:  # where nobody wants the rest
            pool.shutdown(wait=True, cancel_futures=True)
