"""Shards of tokens become pictures again."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from . import manifest
from .base import Tokenizer
from .images import to_images
from .opening import open_tokenizer, pick_device, progress_bar
from .shards import read_shard, shard_files


def detokenize_folder(
    tokens: str | Path,
    folder: str | Path,
    tokenizer: str | Path | Tokenizer | None = None,
    *,
    length: int | None = None,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> list[Path]:
    """Decodes what `tokenize_folder` wrote into PNG files, and returns their paths.

    They are named as the pictures were, in the same sub-folders; where two pictures differ in nothing but the
    suffix it stays in the name, like a.jpg.png.

    tokenizer   None: the one the manifest names, where it was given by a path or name
    length      so many tokens of each picture at most; None: all there are
    overwrite   write into a folder that holds files already
    options     for the decoder, as in `Tokenizer.decode`

    Raises OSError where there are no tokens or no tokenizer; ValueError for an unfinished run, for a damaged
    shard, for a tokenizer other than the one that made the tokens, for a folder with files in it, and for a
    name that leads out of it.
    """
    folder, files = Path(folder), shard_files(tokens)
    described = manifest.finished(tokens)["tokenizer"]
    if batch_size < 1:
        raise ValueError(f"batch_size is a number of pictures of 1 or more, not {batch_size}")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} holds files already: give a new folder, or --overwrite")
    tokenizer = open_tokenizer(_named(described, tokenizer), pick_device(device))
    manifest.check_tokenizer(described, tokenizer)
    if length is not None:
        tokenizer.check_length(length)
    targets = png_names(name for file in files for name in read_shard(file).names)
    for name in targets.values():
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise ValueError(f"the name {name!r} leads out of {folder}: these tokens are not safe to unpack")
    written = []
    with (
        progress_bar(len(targets), progress, "detokenize") as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for file in files:
            shard = read_shard(file)
            for start in range(0, len(shard), batch_size):
                with torch.inference_mode():
                    sequence = shard.sequence(tokenizer, start, start + batch_size)
                    images = to_images(tokenizer.decode(sequence, length, **options))
                paths = [folder / targets[name] for name in shard.names[start : start + batch_size]]
                for path in paths:
                    path.parent.mkdir(parents=True, exist_ok=True)
                list(pool.map(lambda image, path: image.save(path), images, paths))
                written += paths
                bar.update(len(paths))
    return written


def png_names(names: Iterable[str]) -> dict[str, str]:
    """The PNG file of each picture. Its own suffix is left out where no other's name is the same then.

    None has the name of a folder that others are in.
    """
    names = sorted(names)
    bare = {name: str(PurePosixPath(name).with_suffix(".png")) for name in names}
    often = Counter(bare.values())
    taken = {str(parent) for name in names for parent in PurePosixPath(name).parents}
    found = {}
    for name in sorted(names, key=lambda name: often[bare[name]] > 1):
        wanted = short = bare[name] if often[bare[name]] == 1 else f"{name}.png"
        n = 2
        while wanted in taken:
            wanted, n = f"{short.removesuffix('.png')}-{n}.png", n + 1
        taken.add(wanted)
        found[name] = wanted
    return found


def _named(described: dict[str, Any], tokenizer: str | Path | Tokenizer | None) -> str | Path | Tokenizer:
    if tokenizer is not None:
        return tokenizer
    source = described["source"]
    if source is None:
        raise ValueError("the tokens were made by a tokenizer that had no name: give it, by --tokenizer")
    try:
        return open_tokenizer(source, "cpu")
    except (OSError, ValueError) as error:
        raise OSError(
            f"the tokenizer was {source}, and cannot be opened ({error}): say by --tokenizer where it is now"
        ) from error
