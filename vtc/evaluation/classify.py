"""Classification with fewer tokens inside the encoder: classifier x methods x schedules x budgets x tasks."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..api import compress
from ..encoder_cost import encoder_cost, twin
from ..method import get_method, list_methods
from ..schedule import check_schedule
from .classifiers import Classifier, Inputs
from .pictures import Pictures, load_pictures
from .prompts import Batches, place
from .results import Row
from .runner import FULL, Setting, is_method, making, text
from .sweep import MethodSpec, complete, expand, identify, many, serves
from .tasks import Item

if TYPE_CHECKING:
    from PIL.Image import Image

TIMED = 8  # pictures in the batch whose forward is timed


def sweep_encoder(
    classifier: Classifier,
    methods: MethodSpec | Iterable[MethodSpec] | None,
    keeps: float | int | Iterable[float | int],
    tasks: str | Pictures | Iterable[str | Pictures] = "singles",
    *,
    schedules: str | Iterable[str] | None = None,
    n: int | None = None,
    split: str = "test",
    seeds: Iterable[int] = (0,),
    baselines: Iterable[str] = ("random", "pool"),
    output: str | Path = "results.jsonl",
    batch_size: int = 64,
    repeats: int = 9,
    command: str | None = None,
    progress: bool = True,
) -> list[Row]:
    """Runs what `output` does not hold yet and returns the rows of the whole sweep, each a line of the file.

    classifier  of `open_classifier()`
    methods     names, or (name, options) pairs; None: all that run inside of encoders and the model serves
    keeps       budgets as in `compress()`
    tasks       "singles", "imagefolder:PATH" or `Pictures`; n and split are for the names
    schedules   "constant", "staged", ... or blocks like "3,6,9", as in `compress()`: every method is run with
                each. None: every method with its own, the baselines with all of these
    baselines   run beside the methods at every budget and schedule, where the model serves them
    Everything else is as in `sweep()`; there are no blind runs, because nothing is asked.

    Raises ValueError for an unknown method, option, budget, schedule or task, a model that cannot serve a
    method asked for by name, or classes that are none of its labels; RuntimeError for a model that is
    compressed already; all before anything is run.
    """
    model = classifier.model
    schedules, baselines = _schedules(schedules), many(baselines)
    for schedule in schedules or [None]:  # refuses a model of no known family, or with fewer blocks
        compress(model, "random", keep=1.0, stage="encoder", schedule=schedule).remove()
    named = [] if methods is None else [_pair(spec) for spec in many(methods)]
    for name, options in named:
        compress(model, name, keep=1.0, stage="encoder", **options).remove()
    others = list_methods("encoder") if methods is None else []
    others = [name for name in others if name not in baselines and serves(model, name, stage="encoder")]
    found = _scheduled([*named, *((name, {}) for name in others)], schedules)
    beside = [name for name in baselines if (name, {}) not in named]
    beside = [(name, {}) for name in beside if serves(model, name, stage="encoder")]
    used = schedules or _schedules(dict.fromkeys(text(options["schedule"]) for _, options in found))
    found += _scheduled(beside, used)
    settings = [Setting(FULL), *expand(found, many(keeps), many(seeds))]
    tasks = [task if isinstance(task, Pictures) else load_pictures(task, n, split) for task in many(tasks)]
    for task in tasks:
        classifier.judge(task)

    def runner(task: Pictures) -> Callable[[Setting], Row]:
        return Trial(classifier, task, batch_size, repeats)

    identity = identify(model, classifier.name)
    return complete(output, identity, tasks, settings, runner, command, progress)


class Trial:
    """A classifier on a task: called with a setting, it returns what a row says of it.

    accuracy, top5  shares of the pictures that could be opened whose class was the first, or among the first
                    five; the others are listed in `errors`
    tokens          patch tokens of a picture that leave the last block
    similarity      mean cosine between what the head reads and what it reads with all tokens
    cost            see `encoder_cost()`
    """

    def __init__(self, classifier: Classifier, task: Pictures, size: int, repeats: int):
        self.classifier, self.task, self.repeats = classifier, task, repeats
        self.batches = _Batches(classifier, task, size)
        self.judge, self.bare = classifier.judge(task), twin(classifier.model)

    def __call__(self, setting: Setting) -> Row:
        made, model, attached = making(), self.classifier.model, nullcontext()
        if is_method(setting.method):
            how = {"keep": setting.keep, "stage": "encoder", **setting.options}
            attached = compress(model, setting.method, **how)
        with attached:
            features, hits, errors = self._look(model)
            cost = encoder_cost(model, self.classifier.forward, self._timed, self.bare, self.repeats)
        if setting.method == FULL:
            self._full = features
        accuracy, items = hits[:, 0].float().mean().item(), len(hits)
        return {
            "accuracy": accuracy, "top5": hits.any(dim=1).float().mean().item(),
            "kinds": {"all": {"accuracy": accuracy, "items": items}}, "items": items, "errors": errors,
            "classes": len(self.task.classes), "tokens": cost["blocks"][-1],
            "similarity": F.cosine_similarity(features, self._full, dim=-1).mean().item(),
            "cost": cost, **made(),
        }  # fmt: skip

    @cached_property
    def _full(self) -> Tensor:
        """The features with all tokens, (n, D)."""
        return self._look(self.bare)[0]

    @cached_property
    def _timed(self) -> Inputs:
        """The first pictures that can be opened."""
        found: dict[str, list[Tensor]] = {}
        for batch in self.batches:
            for name, value in batch.inputs.items():
                found.setdefault(name, []).append(value)
            if sum(map(len, next(iter(found.values()), []))) >= TIMED:
                break
        inputs = {name: torch.cat(values)[:TIMED] for name, values in found.items()}
        return place(inputs, self.classifier)

    @torch.no_grad()
    def _look(self, model: nn.Module) -> tuple[Tensor, Tensor, list[dict[str, str]]]:
        """Features (n, D), whether each of the first five classes is the right one (n, 5), and errors."""
        labels = list(self.task.classes)
        features, hits, errors = [], [], []
        for batch in self.batches:
            errors += batch.errors
            if not batch.items:
                continue
            output, seen = self.classifier.features(model, place(batch.inputs, self.classifier))
            scores = self.judge(output).float()
            if not scores.isfinite().all():
                raise FloatingPointError("the model's scores are not all finite")
            right = torch.tensor([labels.index(item.answer) for item in batch.items])
            order = scores.cpu().argsort(dim=1, descending=True, stable=True)[:, :5]
            hits.append(order == right[:, None])
            features.append(seen.float().cpu())
        if not hits:
            raise ValueError(f"no picture of task '{self.task.name}' can be opened: {errors[0]['error']}")
        return torch.cat(features), torch.cat(hits), errors


class _Batches(Batches):
    """The pictures of a task as a classifier takes them."""

    def _inputs(self, items: list[Item], images: list[Image]) -> Inputs:
        return self.processor.prepare(images)


def _pair(spec: MethodSpec) -> tuple[str, dict[str, Any]]:
    return (spec, {}) if isinstance(spec, str) else spec


def _schedules(given: str | Iterable[str] | None) -> list[Any]:
    """Schedules as `compress()` takes them; blocks are lists, as JSON has them."""
    found = []
    for schedule in [] if given is None else many(given):
        blocks = text(schedule).split(",")
        if all(block.strip().isdecimal() for block in blocks):
            schedule = [int(block) for block in blocks]
        check_schedule(schedule)
        found.append(schedule)
    return found


def _scheduled(methods: list[tuple[str, dict]], schedules: list[Any]) -> list[tuple[str, dict]]:
    """Every method with every schedule, or with its own where none is given."""
    found = []
    for name, options in methods:
        own = options.get("schedule") or getattr(get_method(name), "schedule", "constant")
        chosen = [own] if "schedule" in options or not schedules else schedules
        found += [(name, {**options, "schedule": schedule}) for schedule in chosen]
    return found
