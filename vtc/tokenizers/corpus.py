"""A folder of pictures becomes shards of tokens."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import manifest
from .base import Tokenizer
from .images import check_fit, to_floats
from .job import Job, smallest
from .opening import held, open_tokenizer, pick_device, progress_bar
from .parquet import pyarrow
from .parse import parse_policy, policy_from
from .policies import CHUNK, Fixed, MeanBudget, Policy
from .shards import FORMATS, read_shard

DTYPES = ("float16", "float32")


def tokenize_folder(
    folder: str | Path,
    tokenizer: str | Path | Tokenizer,
    policy: str | int | Policy | None = None,
    out: str | Path = "tokens",
    *,
    format: str = "safetensors",
    shard_size: int = 1024,
    fit: str = "crop",
    dtype: str = "float16",
    calibrate: int = 256,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
    ray: bool = False,
    actors: int | None = None,
) -> dict[str, Any]:
    """Writes the tokens of all pictures in a folder and its sub-folders into `out`, and returns the manifest.

    tokenizer   a folder, a name on the Hugging Face Hub, or a `Tokenizer`, which goes to `device` and into
                evaluation mode
    policy      how many tokens each picture gets: a number, a `Policy`, what `parse_policy` reads; None: all
    format      of the shards, "safetensors" or "parquet", of `shard_size` pictures each
    fit         how a picture becomes a square: see `load_images`
    dtype       of continuous tokens, "float16" or "float32"; codes are uint16, or uint32 where there are more
    calibrate   on how many pictures, the first by name, a mean budget is calibrated
    device      None: a CUDA device where there is one, of this machine or of the cluster's, else the CPU
    workers     threads that read pictures ahead; None: as many as there are cores, at most 8
    ray         over a Ray cluster, by `actors` processes (None: as many as it has room for); all its machines
                see `folder`, `out` and the tokenizer under the same paths

    A run that was stopped goes on at the first missing shard when it is started again, and ends with the
    same bytes. Whether pictures have changed since is told by their names and sizes. Those that cannot be
    read are listed in the manifest, with a reason. Neither batch size nor Ray changes tokens, but for the
    last bits of continuous values, and codes that are equally near, where a device adds up in another order.

    Raises OSError where there is no such folder or tokenizer, RuntimeError where another process writes to
    `out`, and ValueError for a folder without a readable picture; for settings or pictures other than those
    `out` was begun with, unless `overwrite`; and for a policy that is for evaluation only.
    """
    folder, out = Path(folder), Path(out)
    for value, known in ((format, FORMATS), (dtype, DTYPES)):
        if value not in known:
            raise ValueError(f"tokens are stored as {' or '.join(known)}, not as {value!r}")
    counts = {"shard_size": shard_size, "batch_size": batch_size, "calibrate": calibrate, "actors": actors,
              "workers": workers}  # fmt: skip
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is a number of 1 or more, not {count}")
    if format == "parquet":
        pyarrow()  # says so where it is missing, before the work
    check_fit(fit)
    images = _images(folder, out)
    asked = read_policy(policy)
    source = None if isinstance(tokenizer, Tokenizer) else str(tokenizer)
    # where a cluster does the work, its machines may have devices that this one has not
    tokenizer = open_tokenizer(tokenizer, pick_device(None if ray else device))
    stored = smallest(tokenizer.quantize.size) if tokenizer.quantize.size else np.dtype(dtype)
    settings = manifest.versions() | {
        "tokenizer": manifest.describe(tokenizer, source),
        "policy_asked": asked and asked.to_dict(),
        "calibrate": calibrate if isinstance(asked, MeanBudget) else None,
        "fit": fit, "format": format, "dtype": stored.name, "shard_size": shard_size,
    }  # fmt: skip
    workers = workers or min(8, os.cpu_count() or 1)
    job = Job(folder.resolve(), out.resolve(), format, shard_size, fit, stored, batch_size, workers, asked)
    names = [name for name, _ in images]
    with held(out, overwrite), _large_pictures_welcome():
        known = manifest.read(out)
        if known is None:
            policy = _tried(job, tokenizer, names, calibrate)
            known = manifest.begin(out, settings | {"policy": policy and policy.to_dict()}, images)
        manifest.check_same(out, known, settings, images)
        numbers = range(-(-len(names) // shard_size))
        missing = [n for n in numbers if not job.has(names, n)]
        if known["complete"] and not missing:
            return known
        begun = {name: known[name] for name in (*settings, "policy")}
        job = replace(job, policy=begun["policy"] and policy_from(begun["policy"]))
        with progress_bar(len(names), progress, "tokenize") as bar:
            bar.update(len(names) - sum(len(job.part(names, n)) for n in missing))
            if ray:
                from .ray_corpus import write_shards

                where = device and str(device)
                given = source or tokenizer
                write_shards(job, given, begun["tokenizer"], names, missing, where, actors, bar.update)
            for n in [] if ray else missing:
                job.write(tokenizer, names, n, bar.update)
        files = [job.file(n) for n in numbers]
        return manifest.finish(out, begun, ((file, read_shard(file)) for file in files))


def read_policy(policy: str | int | Policy | None) -> Policy | None:
    """Raises ValueError for what is no policy, or one for evaluation only."""
    policy = parse_policy(policy) if isinstance(policy, str) else policy
    policy = Fixed(policy) if isinstance(policy, int) else policy
    for one in (policy, getattr(policy, "policy", None)):
        if one is not None and not isinstance(one, Policy):
            raise ValueError(f"a policy is a number of tokens, text or a Policy, not {one!r}")
        if one is not None and one.evaluation_only:
            raise ValueError(f"the policy '{one.name}' is for evaluation only: a corpus needs another")
    return policy


def _images(folder: Path, out: Path) -> manifest.Listed:
    if not folder.is_dir():
        raise OSError(f"there is no folder {folder}")
    if folder.resolve() == out.resolve():
        raise ValueError(f"the tokens cannot go into {folder} itself: give another output folder")
    images = manifest.list_images(folder, leave_out=out)
    if not images:
        raise ValueError(f"{folder} and its sub-folders hold no pictures")
    return images


def _tried(job: Job, tokenizer: Tokenizer, names: list[str], n: int) -> Policy | None:
    """The policy calibrated where it needs that, and found to work, before anything is written."""
    size, device = tokenizer.config.image_size, next(tokenizer.parameters()).device
    policy = job.policy
    if isinstance(policy, MeanBudget):
        read = (reading.pixels for reading in job.read(names, size) if reading.pixels is not None)
        pixels = list(islice(read, n))
        chunks = [torch.stack(pixels[i : i + CHUNK]) for i in range(0, len(pixels), CHUNK)]
        policy = policy.calibrate(tokenizer, [to_floats(chunk.to(device)) for chunk in chunks])
    with torch.inference_mode():
        tokenizer.encode(torch.zeros(1, 3, size, size, device=device), policy)
    return policy


@contextmanager
def _large_pictures_welcome() -> Iterator[None]:
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
