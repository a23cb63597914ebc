"""What it is worth that a halting head chooses the number of tokens of each picture.

The same numbers are dealt to the pictures by chance, several times, so that all that differs is which picture
has which. Lengths come into a run by the method: each picture is known by its lot (see `vtc.tokens.Tokens`).
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..api import compress
from ..cost import first_token
from ..learned.base import Grid, Resampler
from ..method import Method
from ..tokens import Tokens
from .learned import described, load
from .prompts import Batches, place
from .questions import dataset
from .ranks import bootstrap, rank_correlation
from .results import Results, Row
from .runner import ask, making
from .scenes import scene
from .sweep import identify
from .tasks import load_task

NEAR = 0.05  # tokens by which a mean on the pictures it is set on may miss
STEPS = 40
LEAST, MOST = 1e-4, 1e4  # errors between which one is looked for


class OutOfReach(ValueError):
    """A mean that a halting head does not come near, whatever error is asked for."""


@dataclass
class Seen:
    """What a module is given of the pictures of a task: `lots` (N,) in the order of the items, and `tokens`
    in batches."""

    lots: np.ndarray
    tokens: list[Tokens]

    @property
    def grid(self) -> Grid:
        return self.tokens[0].grid


@torch.no_grad()
def look(model: nn.Module, batches: Batches, module: Resampler) -> Seen:
    """One pass over a task, whose items have one picture each. Raises ValueError where a picture is several
    rows of tokens, or two pictures have the same lot."""
    seen: list[Tokens] = []

    def count(tokens: Tokens, k: int) -> Tensor:
        seen.append(replace(tokens, extras={}))
        return torch.full((len(tokens.x),), k)

    lots: list[int] = []
    probe = counting(module.as_method(), count)
    with compress(model, probe, keep=module.counts(1)[0]):
        for batch in batches:
            before = len(seen)
            if batch.items:
                first_token(model, place(batch.inputs, model))()
            found = {}
            for tokens in seen[before:]:
                found |= dict(zip(tokens.group.tolist(), tokens.lot.tolist(), strict=True))
            if sum(len(tokens.x) for tokens in seen[before:]) != len(batch.items):
                raise ValueError("lengths are dealt to pictures of one row of tokens, one to each item")
            lots += [found[image] for image in range(len(batch.items))]
    if len(set(lots)) != len(lots):
        raise ValueError("two items show the same picture: lengths are dealt to pictures that all differ")
    return Seen(np.array(lots), seen)


def counting(method: Method, count: Callable[[Tokens, int], Tensor]) -> Method:
    """The same method, whose number of tokens another function decides."""
    own = copy.copy(method)
    own.count = count
    return own


def given(module: Resampler, lots: np.ndarray, lengths: np.ndarray) -> Method:
    """A module's method with the length (N,) of each picture, known by its lot (N,)."""
    table = dict(zip(lots.tolist(), lengths.tolist(), strict=True))

    def count(tokens: Tokens, k: int) -> Tensor:
        return torch.tensor([table[lot] for lot in tokens.lot.tolist()]).clamp(max=k)

    return counting(module.as_method(), count)


@torch.no_grad()
def halted(module: Resampler, seen: Seen, epsilon: float, most: int) -> np.ndarray:
    """(N,) as many tokens as the halting head gives to each picture, at most `most`."""
    method = halting(module, epsilon)
    by_lot = {}
    for tokens in seen.tokens:
        by_lot |= dict(zip(tokens.lot.tolist(), method.count(tokens, most).tolist(), strict=True))
    return np.array([by_lot[lot] for lot in seen.lots.tolist()])


def halting(module: Resampler, epsilon: float) -> Method:
    """Raises TypeError where a module has no halting head."""
    return module.as_method(epsilon=epsilon)


def calibrate(module: Resampler, seen: Seen, mean: float, most: int) -> float:
    """The error to ask for with which pictures have `mean` tokens on average. Raises OutOfReach for a mean
    that the head does not come near."""
    low, high = np.log(LEAST), np.log(MOST)  # a larger error is reached with fewer tokens
    for _ in range(STEPS):
        middle = (low + high) / 2
        found = halted(module, seen, float(np.exp(middle)), most).mean()
        if abs(found - mean) <= NEAR:
            return float(np.exp(middle))
        low, high = (middle, high) if found > mean else (low, middle)
    if abs(found - mean) > 0.5:
        raise OutOfReach(f"the halting head gives {found:.1f} tokens where {mean} are wanted on average")
    return float(np.exp(middle))


def sweep_lengths(
    model: nn.Module, processor, folder: str, means: Iterable[float], *, shuffles: int = 5, n: int = 2000,
    sample: int = 512, batch_size: int = 64, output: str | Path, command: str, progress: bool = True,
) -> list[Row]:  # fmt: skip
    """Runs what `output` does not hold yet and returns the rows of a module's folder on n test scenes.

    For each of `means` the halting head is asked for the error that comes to it on `sample` scenes of the
    validation split. Rows are of kind "halting", with the lengths it then chose; "shuffled", with the same
    lengths dealt by chance, one of each of so many seeds; "fixed", all pictures with the mean, to a whole
    token. A mean out of the head's reach is left out with a warning. Raises RuntimeError where a run does not
    have the lengths that were meant for it.
    """
    module, identity = load(folder), identify(model)
    tasks = {split: load_task("scenes", size, split) for split, size in (("validation", sample), ("test", n))}
    task, batches = tasks["test"], Batches(processor, tasks["test"], batch_size)
    base = {"model": identity, "task": task.name, "split": task.split, "n": n, **described(folder)}
    looked: dict[str, Seen] = {}

    def seen(split: str) -> Seen:
        if split not in looked:
            looked[split] = look(model, Batches(processor, tasks[split], batch_size), module)
        return looked[split]

    def asked(lengths: np.ndarray | int) -> Row:
        if isinstance(lengths, int):
            return answers(model, batches, module.as_method(), lengths)
        row = answers(model, batches, given(module, seen("test").lots, lengths), int(lengths.max()))
        return _checked(row, lengths)

    rows: dict[str, Row] = {}
    with Results(output) as results, _bar(progress) as bar:

        def add(what: dict[str, Any], make: Callable[[], Row]) -> Row:
            told = [identity, task.fingerprint, base["method"], what, sample]
            key = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
            bar.set_postfix_str(" ".join(f"{name}={value}" for name, value in what.items()))
            if key not in results.rows:
                results.append({"key": key, **base, **what, "command": command, **make()})
            bar.update()
            return rows.setdefault(key, results.rows[key])

        for mean in means:

            def halting_row(mean: float = mean) -> Row:
                most = module.counts_for(seen("test").grid)[-1]
                epsilon = calibrate(module, seen("validation"), mean, most)
                chosen = lengths_row(module, seen("test"), epsilon, objects("test", n), most)
                row = answers(model, batches, halting(module, epsilon), most)
                return chosen | _checked(row, np.array(chosen["lengths"]))

            try:
                own = add({"kind": "halting", "mean": mean}, halting_row)["lengths"]
            except OutOfReach as error:
                warnings.warn(f"{folder} runs without a mean of {mean}: {error}", stacklevel=2)
                continue
            for seed in range(shuffles):
                what = {"kind": "shuffled", "mean": mean, "seed": seed}
                add(what, lambda own=own, seed=seed: asked(dealt(own, seed)))
            k = max(1, round(float(np.mean(own))))
            add({"kind": "fixed", "k": k}, lambda k=k: asked(k))
    return list(rows.values())


def objects(split: str, n: int) -> np.ndarray:
    """(n,) how many objects the scenes of a task have."""
    return np.array([len(scene(split, index).objects) for index, _ in dataset(split, n)])


def lengths_row(module: Resampler, seen: Seen, epsilon: float, objects: np.ndarray, most: int) -> Row:
    """What the halting head chose, and whether pictures with more objects (N,) have more tokens."""
    lengths = halted(module, seen, epsilon, most)
    by = {str(count): float(lengths[objects == count].mean()) for count in np.unique(objects).tolist()}
    return {
        "epsilon": epsilon,
        "lengths": lengths.tolist(),
        "by_objects": by,
        "correlation": rank_correlation(objects, lengths),
        "correlation_interval": bootstrap(rank_correlation, objects, lengths),
    }


def dealt(lengths: list[int], seed: int) -> np.ndarray:
    """The same lengths, dealt to the pictures by chance."""
    return np.random.default_rng(seed).permutation(np.array(lengths))


def answers(model: nn.Module, batches: Batches, method: Method, keep: int) -> Row:
    """Asks all items with a method and returns what came of it, as `runner.run` does, without costs."""
    made = making()
    with compress(model, method, keep=keep):
        tally = ask(model, batches)
    return {**tally.row(), **made()}


def _checked(row: Row, lengths: np.ndarray) -> Row:
    if abs(row["tokens"] - lengths.mean()) > 1e-6:
        raise RuntimeError(
            f"pictures had {row['tokens']:.2f} tokens on average where {lengths.mean():.2f} were meant"
        )
    return row


def _bar(progress: bool):
    from tqdm import tqdm

    return tqdm(disable=None if progress else True, unit="run", desc="lengths")
