"""Model x methods x budgets x tasks: one row each, in a file that a killed sweep continues from."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import shlex
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from ..api import compress
from ..method import SETTINGS, Method, get_method
from ..tokens import Keep, count_kept
from . import learned
from .calibrate import OWN, check
from .prompts import Batches
from .results import Results, Row, newest, read_rows
from .runner import BASELINES, BLIND, FULL, Setting, is_method, now, run
from .tasks import Task, load_task

MethodSpec = str | tuple[str, dict[str, Any]]
DECODER = "decoder"
HALTING = ("epsilon", "confidence")  # with these options a module chooses the number of tokens itself


def sweep(
    model: nn.Module,
    processor,
    methods: MethodSpec | Iterable[MethodSpec],
    keeps: Keep | Iterable[Keep],
    tasks: str | Task | Iterable[str | Task] = "scenes",
    *,
    n: int | None = None,
    split: str = "test",
    seeds: Iterable[int] = (0,),
    baselines: Iterable[str] = ("random", "downsample"),
    output: str | Path = "results.jsonl",
    batch_size: int = 64,
    repeats: int = 3,
    command: str | None = None,
    progress: bool = True,
) -> list[Row]:
    """Runs what `output` does not hold yet and returns the rows of the whole sweep, each a line of the file.

    methods   names, or (name, options) pairs; one with an option `seed` is run once per seed. `positions` and
              `allocate` of `compress()` may stand among the options. A name may be the folder of a module
              with weights, which runs at the budgets that it can make of the first picture; rows call it by
              the module's name and a digest of its weights, so that one trained anew is run anew
    keeps     budgets as in `compress()`, and those of calibrate.py: "own", the number that a method chooses
              itself, and "mean:16" or "mean:0.11", the fraction of the scores that comes to so many tokens on
              average. Those, and "p:0.9", are for methods with a number of their own or with scores, and not
              for baselines; beside each of them the method runs with as many tokens of every picture as it
              kept on average, and so does `random` where it runs at all
    baselines run beside the methods at every budget: a score says little without them. One that the model
              cannot serve, such as an encoder that sees one resolution only, is left out with a warning
    tasks     "scenes", "jsonl:PATH" or a `Task`; n and split are for the names
    command   what the rows say they were made by; None: the command line of this process

    Every task is also run once with all tokens ("full") and once without the image ("blind"). A run that
    fails is a row with an `error`, is warned of, and is tried again by the next sweep into the same file.
    Raises ValueError for an unknown method, option, budget, task or model, RuntimeError for a model that is
    compressed already, before anything is run.
    """
    compress(model, "uniform", keep=1.0).remove()  # refuses a model of no known family or compressed already
    methods = [_staged(spec) for spec in many(methods)]
    named = [spec if isinstance(spec, str) else spec[0] for spec in methods]
    methods += [name for name in many(baselines) if name not in named and serves(model, name)]
    staged = [spec for spec in methods if not isinstance(spec, str) and spec[1].get("stage") == DECODER]
    if staged and "random" in many(baselines) and "random" not in [name for name, _ in staged]:
        methods.append(("random", {"stage": DECODER}))
    settings = [Setting(FULL), Setting(BLIND), *expand(methods, many(keeps), many(seeds))]
    tasks = [task if isinstance(task, Task) else load_task(task, n, split) for task in many(tasks)]
    identity = identify(model)

    def runner(task: Task) -> Callable[[Setting], Row]:
        return partial(run, model, Batches(processor, task, batch_size), repeats=repeats)

    grids: dict[str, Any] = {}

    def fits(task: Task, setting: Setting) -> bool:
        if not is_method(setting.method) or not learned.is_module(setting.method):
            return True
        if task.name not in grids:
            grids[task.name] = learned.grid_of(model, Batches(processor, task, 1))
        return _makes(setting, grids[task.name])

    rows = complete(output, identity, tasks, settings, runner, command, progress, fits)
    names = [spec if isinstance(spec, str) else spec[0] for spec in methods]
    chance = many(seeds) if "random" in names else []
    for task in tasks if any(isinstance(keep, str) for keep in many(keeps)) else []:
        known = newest([row for row in read_rows(output)[0] if _about(row, identity, task)])
        own = [row for row in rows if _about(row, identity, task)]
        beside = list(counterparts(own, known, chance))
        rows += complete(output, identity, [task], beside, runner, command, progress)
    return rows


def complete(
    output: str | Path, identity: str, tasks: list[Task], settings: list[Setting],
    runner: Callable[[Task], Callable[[Setting], Row]], command: str | None, progress: bool,
    fits: Callable[[Task, Setting], bool] = lambda task, setting: True,
) -> list[Row]:  # fmt: skip
    """Runs every setting on every task that `output` has no row of, by what `runner` makes of a task; those
    that do not fit are left out."""
    command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    pairs = [(task, setting) for task in tasks for setting in settings if fits(task, setting)]
    planned = {run_key(identity, task, setting): (task, setting) for task, setting in pairs}
    with Results(output) as results:
        missing = {key: run for key, run in planned.items() if not _done(results.rows.get(key))}
        with _bar(len(missing), progress) as bar:
            ready = None
            for key, (task, setting) in missing.items():
                bar.set_postfix_str(f"{task.name}: {setting}")
                if ready is not task:
                    ready, make = task, runner(task)
                row = _describe(key, identity, task, setting, command)
                results.append(row | _attempt(make, task, setting))
                bar.update()
        return [results.rows[key] for key in planned]


def counterparts(rows: list[Row], known: list[Row], seeds: list[int]) -> Iterator[Setting]:
    """What has to be run for a fair look at `rows` of budgets that differ from picture to picture: the same
    method, and random tokens, with as many tokens of every picture as were kept on average. `known` are rows
    that need no second run."""
    fixed = [row for row in known if _is_fixed(row)]
    done = {_run(row.get("folder", row["method"]), row["options"], _count(row)) for row in fixed}
    for row in rows:
        if "error" in row or not isinstance(row["keep"], str):
            continue
        k, own = _count(row), (row.get("folder", row["method"]), fixed_options(row))
        for method, options in [own, *(("random", {"seed": seed}) for seed in seeds)]:
            if _run(method, options, k) not in done:
                done.add(_run(method, options, k))
                yield Setting(method, k, options)


def fixed_options(row: Row) -> dict[str, Any]:
    """The options with which the method of a row keeps as many tokens as it is told."""
    if row["keep"] != OWN:
        return row["options"]
    if "folder" in row:
        return {name: value for name, value in row["options"].items() if name not in HALTING}
    return row["options"] | {"adaptive": False}


def _makes(setting: Setting, grid: tuple[int, int] | None) -> bool:
    """Whether a module can make a budget of a grid. What only the run can tell, is run."""
    if grid is None or isinstance(setting.keep, str):
        return True
    return count_kept(setting.keep, grid[0] * grid[1]) in learned.load(setting.method).counts_for(grid)


def _count(row: Row) -> int:
    return max(1, math.floor(row["tokens"] + 0.5))


def _run(method: str, options: dict[str, Any], k: int) -> str:
    return json.dumps([method, options, k], sort_keys=True)


def _is_fixed(row: Row) -> bool:
    return "error" not in row and is_method(row["method"]) and not isinstance(row["keep"], str)


def _about(row: Row, identity: str, task: Task) -> bool:
    place = tuple(row.get(name) for name in ("model", "task", "split", "n"))
    return place == (identity, task.name, task.split, len(task.items))


def identify(model: nn.Module, name: str | None = None) -> str:
    """The model's name and a digest of its weights: retrained weights under an old name are another model."""
    name = name or getattr(model.config, "name_or_path", "") or type(model).__name__
    if Path(name).is_dir():
        name = Path(name).resolve().name
    digest = hashlib.sha256()
    for path, weight in model.state_dict().items():
        # A few numbers of each tensor: reading all of a large model would take longer than a run.
        sample = weight.detach().flatten()[:: max(1, weight.numel() // 16)].float().cpu()
        digest.update(path.encode() + sample.numpy().tobytes())
    return f"{name}@{digest.hexdigest()[:8]}"


def run_key(identity: str, task: Task, setting: Setting) -> str:
    """Names a run; the same wherever and whenever it is run."""
    what = [identity, task.name, task.split, len(task.items), task.fingerprint]
    how = [setting.method, setting.options, setting.keep]
    if is_method(setting.method) and learned.is_module(setting.method):
        how[0] = learned.card(setting.method).name
    elif is_method(setting.method):
        how.append(_source(setting.method))
    return hashlib.sha256(json.dumps([*what, *how], sort_keys=True).encode()).hexdigest()[:16]


def many(values: Any) -> list:
    """A list of what was given, alone or several."""
    pair = isinstance(values, tuple) and len(values) == 2 and isinstance(values[1], dict)
    return [values] if pair or isinstance(values, (str, int, float, Task)) else list(values)


def _source(method: str) -> str:
    """The code of a method: one that was rewritten is run anew; "" where python does not know it."""
    try:
        return inspect.getsource(type(get_method(method)))
    except OSError:
        return ""


def _done(row: Row | None) -> bool:
    return row is not None and "error" not in row


def expand(methods: list[MethodSpec], keeps: list[Keep], seeds: list[int]) -> Iterator[Setting]:
    """Every method at every budget that it can have, once per seed where it has one."""
    for keep in map(check, keeps):
        for spec in methods:
            name, options = (spec, {}) if isinstance(spec, str) else spec
            own = {option: value for option, value in options.items() if option not in SETTINGS}
            method = get_method(name, **own)
            fields = {field.name for field in dataclasses.fields(method)}
            if isinstance(keep, str) and not _varies(method, keep):
                continue
            seeded = "seed" in fields and "seed" not in options
            for seed in seeds if seeded else (None,):
                yield Setting(name, keep, options if seed is None else {**options, "seed": seed})


def _staged(spec: MethodSpec) -> MethodSpec:
    """A method that drops tokens inside of the language model says so in its name: before, all enter it."""
    name, options = (spec, {}) if isinstance(spec, str) else spec
    own = {option: value for option, value in options.items() if option not in SETTINGS}
    inside = "stage" not in options and get_method(name, **own).stages[0] == DECODER
    return (name, {**options, "stage": DECODER}) if inside else spec


def _varies(method: Method, keep: str) -> bool:
    """Whether a method can have a budget that differs from picture to picture; if not, and it is no baseline,
    a warning says so."""
    if method.name in BASELINES:
        return False
    chooses = getattr(method, "adaptive", False) or getattr(method, "epsilon", None) is not None
    able = chooses if keep == OWN else getattr(method, "scored", False)
    if not able:
        what = "chooses no number of tokens itself" if keep == OWN else "has no scores"
        warnings.warn(f"'{method.name}' runs without keep={keep!r}: it {what}", stacklevel=4)
    return able


def serves(model: nn.Module, name: str, **options: Any) -> bool:
    """Whether a model can be compressed by a method; if not, a warning says why."""
    get_method(name)
    try:
        compress(model, name, keep=0.5, **options).remove()
    except ValueError as error:
        warnings.warn(f"the sweep runs without the baseline '{name}': {error}", stacklevel=3)
        return False
    return True


def _describe(key: str, identity: str, task: Task, setting: Setting, command: str) -> Row:
    method = is_method(setting.method)
    row = {
        "key": key, "model": identity, "task": task.name, "split": task.split, "n": len(task.items),
        "method": setting.method, "options": setting.options, "seed": setting.options.get("seed"),
        "keep": setting.keep if method else None, "command": command,
    }  # fmt: skip
    return row | learned.described(setting.method) if method and learned.is_module(setting.method) else row


def _attempt(make: Callable[[Setting], Row], task: Task, setting: Setting) -> Row:
    try:
        return make(setting)
    except Exception as error:  # whatever a method does wrong, the other runs go on
        message = f"{type(error).__name__}: {error}"
        warnings.warn(f"the run of {setting} on {task.name} failed: {message}", stacklevel=4)
        return {"error": message, "date": now()}


def _bar(total: int, progress: bool):
    from tqdm import tqdm

    return tqdm(total=total, disable=None if progress else True, unit="run", desc="sweep")
