"""One run: a model, a method and a budget on one task, measured and returned as one row."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import pstdev
from typing import Any

import torch
from torch import Tensor, nn

from ..api import compress
from ..cost import profile, recording, versions
from .calibrate import Keep, resolve
from .outcomes import pack
from .prompts import Batch, Batches, encode, place

BASELINES = ("random", "uniform", "pool", "downsample")
FULL, BLIND = "full", "blind"  # in the place of a method's name: all tokens; the question without its image


@dataclass(frozen=True)
class Setting:
    """What is run: `method` is the name of a method, FULL or BLIND; `options` are the method's; `keep` is
    what `calibrate.check()` takes."""

    method: str
    keep: Keep = 1.0
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        if not is_method(self.method):
            return self.method
        return f"{label(self.method, self.options)} keep={self.keep}"


@dataclass
class Tally:
    """What the answers came to."""

    right: Counter = field(default_factory=Counter)  # by kind
    asked: Counter = field(default_factory=Counter)
    outcomes: list[bool] = field(default_factory=list)  # of every item that could be asked
    tokens: list[int] = field(default_factory=list)  # of every image, that entered the language model
    errors: list[dict[str, str]] = field(default_factory=list)

    def row(self) -> dict[str, Any]:
        """Accuracies are fractions of the items that could be asked; the others are listed in `errors`."""
        items = self.asked.total()
        return {
            "accuracy": self.right.total() / items,
            "kinds": {k: {"accuracy": self.right[k] / n, "items": n} for k, n in sorted(self.asked.items())},
            "items": items,
            "outcomes": pack(self.outcomes),
            "errors": self.errors,
            "tokens": sum(self.tokens) / items,
            "tokens_spread": pstdev(self.tokens) if self.tokens else 0.0,
        }


def is_method(name: str) -> bool:
    return name not in (FULL, BLIND)


def label(method: str, options: dict[str, Any]) -> str:
    """The name that tables and legends give to a method with options; seeds are not named, and of the digest
    of a module's weights the beginning."""
    module, at, digest = method.partition("@")
    method = f"{module}@{digest[:4]}" if at else method
    shown = ", ".join(f"{name}={text(value)}" for name, value in sorted(options.items()) if name != "seed")
    return f"{method} ({shown})" if shown else method


def text(value: Any) -> str:
    """An option's value in a word: the blocks 3,6,9 of a schedule."""
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def run(model: nn.Module, batches: Batches, setting: Setting, repeats: int = 3) -> dict[str, Any]:
    """Asks every item, then profiles the first one. Raises ValueError where no item can be asked.

    Accuracy is the share of greedy answers that equal the expected one after `tasks.normalise`. `tokens` is
    the mean over all items and `tokens_spread` the standard deviation over images, `cost` what `vtc.profile`
    says of the first item; None where the model is blind. `outcomes` says which items were answered right
    (see outcomes.py), in the order of the task without those in `errors`; `given` is what `compress()` was
    given where `keep` is a mean.
    """
    made = making()
    attached, given = nullcontext(), {}
    if is_method(setting.method):
        keep = resolve(model, batches, setting.method, setting.keep, setting.options)
        given = {"given": keep} if isinstance(keep, str) and keep != setting.keep else {}
        attached = compress(model, setting.method, keep=keep, **setting.options)
    blind = setting.method == BLIND
    first = batches.first()
    with attached:
        tally = ask(model, batches, blind)
        cost = None if blind else profile(model, place(first.inputs, model), repeats)
    return {**tally.row(), **given, "cost": cost, **made()}


def making() -> Callable[[], dict[str, Any]]:
    """Starts a clock; what is returned says how long a row took, when it was begun and with what."""
    start, date = time.perf_counter(), now()
    return lambda: {
        "seconds": round(time.perf_counter() - start, 3), "date": date, "threads": torch.get_num_threads(),
        "versions": versions(),
    }  # fmt: skip


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def ask(model: nn.Module, batches: Batches, blind: bool = False) -> Tally:
    """Asks every item of the model as it is; without the pictures where it is to be blind."""
    tally, length = Tally(), batches.answer_length()
    with nullcontext() if blind else recording(model) as handle:
        for batch in batches:
            tally.errors += batch.errors
            if batch.items:
                inputs = _inputs(model, batches.processor, batch, blind)
                output = model.generate(**inputs, do_sample=False, max_new_tokens=length)
                new = output[:, inputs["input_ids"].shape[1] :]  # (items, length)
                answers = batches.processor.batch_decode(new, skip_special_tokens=True)
                for item, answer in zip(batch.items, answers, strict=True):
                    right = item.matches(answer)
                    tally.asked[item.kind] += 1
                    tally.right[item.kind] += right
                    tally.outcomes.append(right)
                tally.tokens += [record.entering["decoder"] for record in handle.last] if handle else []
    return tally


def _inputs(model: nn.Module, processor, batch: Batch, blind: bool) -> dict[str, Tensor]:
    inputs = encode(processor, [item.question for item in batch.items], None) if blind else batch.inputs
    return place(inputs, model)
