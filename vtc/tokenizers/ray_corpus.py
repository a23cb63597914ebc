"""A corpus tokenized over a Ray cluster: every actor loads the tokenizer once and makes shards."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import manifest
from .base import Tokenizer
from .job import Job
from .opening import open_tokenizer, pick_device


class ShardWriter:
    """Makes the shards whose numbers it is given. Lives in a Ray actor.

    What goes wrong is told with the number: an exception would be tried again, and then be pages long.
    """

    def __init__(self, job: Job, tokenizer: str | Tokenizer, described: dict[str, Any], device: str) -> None:
        self.job, self.error = job, ""
        try:
            self.tokenizer = open_tokenizer(tokenizer, pick_device(device))
            manifest.check_tokenizer(described, self.tokenizer)  # a machine may have others at that path
            self.names = [name for name, _ in manifest.read_images(job.out)]
        except Exception as error:
            self.error = _told(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return batch | {"error": np.array([self._made(n) for n in batch["shard"].tolist()])}

    def _made(self, n: int) -> str:
        try:
            if not self.error:
                self.job.write(self.tokenizer, self.names, n)
            return self.error
        except Exception as error:
            return _told(error)


def write_shards(
    job: Job,
    tokenizer: str | Tokenizer,
    described: dict[str, Any],
    names: list[str],
    shards: list[int],
    device: str | None,
    actors: int | None,
    done: Callable[[int], object],
) -> None:
    """Makes shards by a pool of actors, each with a CPU; with a GPU too where the device is "cuda", or
    None and the cluster has some. `done` is told how many pictures, shard by shard.

    Uses the cluster that the process is connected to, or that RAY_ADDRESS names; else starts one on this
    machine, and ends it. Raises ImportError without Ray, RuntimeError for what went wrong in an actor.
    """
    if not shards:
        return
    ray = _ray()
    if isinstance(tokenizer, Tokenizer):
        tokenizer = copy.deepcopy(tokenizer).cpu()
    elif Path(tokenizer).exists():
        tokenizer = str(Path(tokenizer).resolve())
    with _cluster(ray):
        resources = ray.cluster_resources()
        device = device or ("cuda" if resources.get("GPU", 0) >= 1 else "cpu")
        gpus = int(device.startswith("cuda"))
        room = int(resources.get("GPU" if gpus else "CPU", 0))
        if room < 1:
            raise RuntimeError(f"the Ray cluster has no {'GPU' if gpus else 'CPU'} to work with")
        numbers = ray.data.from_items([{"shard": n} for n in shards], override_num_blocks=len(shards))
        made = numbers.map_batches(
            ShardWriter,
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(actors or room, room, len(shards))),
            num_cpus=1,
            num_gpus=gpus,
            fn_constructor_kwargs={
                "job": job, "tokenizer": tokenizer, "described": described, "device": device
            },
        )  # fmt: skip
        for row in made.iter_rows():
            if row["error"]:
                raise RuntimeError(f"a Ray actor failed: {row['error']}")
            done(len(job.part(names, row["shard"])))


def _ray() -> Any:
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ImportError(
            "a corpus over a cluster needs Ray: pip install 'vision-token-compression[ray]'"
        ) from error
    return ray


@contextmanager
def _cluster(ray: Any) -> Iterator[None]:
    """Connected to a cluster, without what Ray says on the way; its log files have it."""
    mine = not ray.is_initialized()
    if mine:
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    context = ray.data.DataContext.get_current()
    bars, context.enable_progress_bars = context.enable_progress_bars, False
    handlers = [
        one for one in logging.getLogger("ray.data").handlers if isinstance(one, logging.StreamHandler)
    ]
    levels = [handler.level for handler in handlers]
    for handler in handlers:
        handler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        for handler, level in zip(handlers, levels, strict=True):
            handler.setLevel(level)
        if mine:
            ray.shutdown()


def _told(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
