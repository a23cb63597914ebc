"""Shards: the tokens of some hundred pictures in one file, and how a training reads them."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from . import manifest
from .sequence import TokenSequence

if TYPE_CHECKING:
    from .base import Tokenizer

FORMATS = ("safetensors", "parquet")


@dataclass(frozen=True)
class Shard:
    """The tokens of n pictures, one after the other.

    tokens      (T,) codes as unsigned integers, or (T, d) values of continuous tokens
    offsets     (n + 1,) int64: picture i has the tokens from offsets[i] to offsets[i + 1]
    names       the pictures' paths in their folder, with "/"
    sizes       the width and height of each file's picture, upright
    index       (T,) which place of the tokenizer each token takes; None where they are 0, 1, 2, ... of every
                picture
    unreadable  names of those that could not be read, and why
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: Sequence[str]
    sizes: Sequence[tuple[int, int]]
    index: np.ndarray | None = None
    unreadable: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> tuple[str, Tensor, Tensor]:
        """Name, codes (k,) int64 or values (k, d), and the tokens' places (k,) int64."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"the shard has {len(self)} pictures, there is no number {i}")
        i %= len(self)
        own = slice(self.offsets[i], self.offsets[i + 1])
        tokens = torch.from_numpy(self.tokens[own].astype(np.int64 if self.coded else self.tokens.dtype))
        index = np.arange(len(tokens)) if self.index is None else self.index[own].astype(np.int64)
        return self.names[i], tokens, torch.from_numpy(index)

    @property
    def coded(self) -> bool:
        return self.tokens.ndim == 1

    @property
    def lengths(self) -> np.ndarray:
        """(n,) int64, how many tokens each picture has."""
        return np.diff(self.offsets)

    def sequence(self, tokenizer: Tokenizer, start: int = 0, stop: int | None = None) -> TokenSequence:
        """The tokens of some of the pictures as the tokenizer that made them decodes them, on its device."""
        device = next(tokenizer.parameters()).device
        some = [self[i] for i in range(len(self))[start:stop]]
        lengths = torch.tensor([len(tokens) for _, tokens, _ in some], dtype=torch.long)
        tokens, index = (
            torch.nn.utils.rnn.pad_sequence([one[part] for one in some], True, -1).to(device)
            for part in (1, 2)
        )
        if self.coded:
            return tokenizer.tokens_of(tokens, lengths, index)
        return TokenSequence(tokens.float(), lengths.to(device), None, index)


def read_tokens(folder: str | Path) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of every picture that `tokenize_folder` read: its name, codes (k,) int64 or values (k, d) as they are
    stored, and the tokens' places (k,) int64. One shard is in memory at a time.

    Raises OSError where there is no manifest, ValueError for an unfinished run and for a damaged shard.
    """
    for file in shard_files(folder):
        shard = read_shard(file)
        yield from (shard[i] for i in range(len(shard)))


def shard_files(folder: str | Path) -> list[Path]:
    """The shards of a finished run, in order: `read_shard(shard_files(folder)[i])` is access at random.

    Raises OSError where there is no manifest, ValueError where the run was not finished.
    """
    return [Path(folder) / shard["file"] for shard in manifest.finished(folder)["shards"]]


def read_shard(file: str | Path) -> Shard:
    """Raises OSError where there is no such file, ValueError where it is no shard or damaged."""
    file = Path(file)
    if not file.is_file():
        raise OSError(f"there is no shard {file}")
    from .parquet import from_parquet

    try:
        return from_parquet(file) if file.suffix == ".parquet" else _from_safetensors(file)
    except ImportError:
        raise
    except Exception as error:  # each library has its own
        raise ValueError(f"{file} is damaged or no shard of tokens ({error})") from error


def write_shard(shard: Shard, file: Path) -> None:
    """Writes under another name first: a shard is there as a whole or not at all."""
    from .parquet import to_parquet

    to_bytes = to_parquet if file.suffix == ".parquet" else _to_safetensors
    # another machine may be at the same shard, where one was lost and came back
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with aside.open("wb") as opened:
            opened.write(to_bytes(shard))
            opened.flush()
            os.fsync(opened.fileno())
        aside.replace(file)
    finally:
        aside.unlink(missing_ok=True)


def _to_safetensors(shard: Shard) -> bytes:
    from safetensors.numpy import save

    tensors = {
        "ids" if shard.coded else "values": shard.tokens,
        "offsets": shard.offsets,
        "lengths": shard.lengths.astype(np.int32),
    }
    if shard.index is not None:
        tensors["index"] = shard.index
    # One entry only: the format has no order of several, and the bytes of a shard should be always the same.
    images = {"names": shard.names, "sizes": shard.sizes, "unreadable": shard.unreadable}
    return save(tensors, {"images": json.dumps(images)})


def _from_safetensors(file: Path) -> Shard:
    from safetensors import safe_open

    with safe_open(file, framework="np") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        images = json.loads(opened.metadata()["images"])
    tokens = tensors["ids"] if "ids" in tensors else tensors["values"]
    sizes = [tuple(size) for size in images["sizes"]]
    return Shard(
        tokens, tensors["offsets"], images["names"], sizes, tensors.get("index"), images["unreadable"]
    )
