"""`compress()` attaches a method to a model, the `Handle` steers and records it, `restore()` takes it off."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .allocate import ALLOCATIONS
from .hosts import Vision, features_owner, open_host
from .method import Method, get_method
from .record import Record
from .tokens import check_keep

_STAGES = ("features",)
_HANDLE = "_vtc_handle"

Plan = str | Method | list[tuple[str | Method, dict[str, Any]]]


class Handle:
    """The switch, budget and record of one compressed model; as a context manager it removes itself."""

    def __init__(self, base: nn.Module, stages: list[Any]):
        self._base, self._stages = base, stages

    @property
    def _on(self) -> bool:
        return vars(self._base).get(_HANDLE) is self

    @property
    def keep(self) -> int | float | dict[str, int | float]:
        """The budget: a fraction in (0, 1] or tokens per image; a dict by stage where there are several."""
        budgets = {stage.name: stage.keep for stage in self._stages}
        return budgets if len(budgets) > 1 else next(iter(budgets.values()))

    @keep.setter
    def keep(self, keep: int | float | dict[str, int | float]) -> None:
        if not self._on:
            raise RuntimeError("this handle was removed from its model: call vtc.compress() again")
        budgets = keep if isinstance(keep, dict) else {self._stages[-1].name: keep}
        stages = {stage.name: stage for stage in self._stages}
        if unknown := set(budgets) - set(stages):
            raise ValueError(f"no stage {sorted(unknown)} is in use here: {sorted(stages)}")
        checked = {name: stages[name].check(budget) for name, budget in budgets.items()}
        for name, budget in checked.items():
            stages[name].keep = budget

    @property
    def plan(self) -> list[tuple[Method, dict[str, Any]]]:
        """What runs, as a list that `compress()` and `save()` take."""
        return [(stage.method, {"stage": stage.name, **stage.settings}) for stage in self._stages]

    @property
    def last(self) -> list[Record]:
        """One record per image of the last forward that had images, in the order they were given."""
        return self._stages[-1].last

    @property
    def spent(self) -> float:
        """Seconds of host time that capturing, scoring and reducing took in the last forward."""
        return sum(stage.spent for stage in self._stages)

    def describe(self) -> str:
        """One line per stage: what runs where, with which budget and options, and what it last did."""
        lines = [] if self._on else ["removed from its model; it was:"]
        for stage in self._stages:
            line = f"{stage.name}: {stage.method} "
            line += " ".join(f"{name}={value}" for name, value in stage.settings.items())
            if stage.last:
                counts = [f"{r.entering['decoder']} of {r.entering['features']}" for r in stage.last]
                line += f"; tokens kept in the last forward: {', '.join(counts)}"
            lines.append(line)
        return "\n".join(lines)

    def remove(self) -> None:
        """Takes everything off again. Calling it twice does no harm."""
        if not self._on:
            return
        delattr(self._base, _HANDLE)
        for stage in reversed(self._stages):
            stage.remove()
        _forget_graphs()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


def compress(
    model: nn.Module,
    method: Plan,
    keep: int | float | None = None,
    *,
    stage: str | None = None,
    positions: str | None = None,
    allocate: str = "proportional",
    replace: bool = False,
    **options: Any,
) -> Handle:
    """Makes a model carry fewer vision tokens from now on, in place; its calls stay as they are.

    model      a transformers vision-language model of a known family; wrappers of PEFT, torch.compile and
               distributed training around one are opened
    method     a name of `list_methods()`, a Method, or a list of (method, {"keep": ..., "stage": ...,
               options})
    keep       the budget: a float in (0, 1] is the share of patch tokens kept, an int >= 1 the number per
               image or video (one with fewer keeps all of its own). Exactly that many come out. As soon as
               one patch token of an image is dropped, its newline tokens and a CLS token go too
    stage      where the reduction takes effect; the method's default where None
    positions  "keep": kept tokens have the positions they had; "repack": positions are counted anew without
               the dropped ones. None: as the method's own code does it, and "keep" where positions have
               several components (M-RoPE), which cannot be counted anew
    allocate   how an image's budget is shared over its tiles, a video's over its frames: "proportional", each
               by its size; "joint", all are one row in which tokens compete; "whole", as many whole ones as
               fit, evenly spread
    replace    True: an earlier compression of this model is removed first
    options    the method's own fields, where it is given by name

    While compressed, `get_image_features` and `get_video_features` mark dropped tokens by NaN. What
    torch.compile made of any model is compiled again at its next call, because it does not see hooks that
    come and go.

    Raises ValueError for an unknown method, option, model, stage or setting, a budget out of range, or a need
    that the model cannot serve; TypeError for a budget or model of the wrong type; RuntimeError for a model
    that is compressed already. The model is then as it was.
    """
    model = unwrap(model)
    steps = _steps(method, keep, stage, positions, allocate, options)
    handle = current(model)
    if handle is not None and not replace:
        raise RuntimeError(
            f"this {type(model).__name__} is compressed already ({handle.describe()}): "
            "call vtc.restore(model) first, or pass replace=True"
        )
    vision = open_host(model)
    stages = [_stage(vision, **step) for step in steps]
    # Nothing was touched so far: whatever is refused is refused above.
    if handle is not None:
        handle.remove()
    handle = Handle(vision.base, stages)
    setattr(vision.base, _HANDLE, handle)
    for part in stages:
        part.install()
    _forget_graphs()
    return handle


def current(model: nn.Module) -> Handle | None:
    """The handle of a model that is compressed now, else None."""
    model = unwrap(model)
    return vars(features_owner(model)).get(_HANDLE)


def restore(model: nn.Module) -> None:
    """Removes what `compress()` attached to a model. Raises RuntimeError if there is nothing to remove."""
    handle = current(model)
    if handle is None:
        raise RuntimeError(f"this {type(model).__name__} is not compressed, so there is nothing to restore")
    handle.remove()


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside wrappers of torch.compile, PEFT and distributed training. TypeError for no model."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"compress() takes a loaded model, not {type(model).__name__}")
    inner = getattr(model, "_orig_mod", None)  # torch.compile
    if inner is None and hasattr(model, "get_base_model"):  # PEFT
        inner = model.get_base_model()
    if inner is None:
        inner = getattr(model, "module", None)  # DistributedDataParallel, FSDP, DeepSpeed
    return unwrap(inner) if isinstance(inner, nn.Module) else model


def _forget_graphs() -> None:
    """Compiled graphs have no guard on hooks: they would go on without new ones, and with removed ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _stage(
    vision: Vision, method: Method, stage: str, keep: Any, positions: str | None, allocate: str
) -> Any:
    fixed = "whose positions are grids of several components" if vision.mrope else None
    fixed = "whose prompts keep their length" if vision.host.memory else fixed
    if positions == "repack" and fixed:
        raise ValueError(
            f"positions='repack' is not defined on {vision.host.name}, {fixed}: use positions='keep'"
        )
    if positions is None:
        positions = "keep" if fixed else method.positions
    from .stages.features import FeaturesStage  # brings dynamo along, which takes a second to import
    from .stages.memory import MemoryStage

    made = MemoryStage if vision.host.memory else FeaturesStage
    return made(vision, method, keep, positions, allocate)


def _steps(plan: Plan, keep: Any, stage: Any, positions: Any, allocate: str, options: dict) -> list[dict]:
    """What to run, one dict of _stage()'s arguments for each step."""
    if isinstance(plan, list):
        if (keep, stage, positions, allocate) != (None, None, None, "proportional") or options:
            raise ValueError(
                "with a list of methods, give keep, stage and options in the list: ('tome', {'keep': 0.5})"
            )
        for step in plan:
            if not (isinstance(step, (tuple, list)) and len(step) == 2 and isinstance(step[1], dict)):
                raise ValueError(
                    f"a list of methods holds pairs like ('tome', {{'keep': 0.5}}), not {step!r}"
                )
        steps = [_step(method, **settings) for method, settings in plan]
    else:
        steps = [_step(plan, keep, stage, positions, allocate, **options)]
    names = [step["stage"] for step in steps]
    if not steps or len(set(names)) < len(names):
        raise ValueError(f"give one method for each stage, at least one: got {names}")
    return steps


def _step(
    method: str | Method,
    keep: Any = None,
    stage: str | None = None,
    positions: str | None = None,
    allocate: str = "proportional",
    **options: Any,
) -> dict[str, Any]:
    if isinstance(method, Method):
        if options:
            raise ValueError(f"options {sorted(options)} belong in the method: {type(method).__name__}(...)")
    else:
        method = get_method(method, **options)
    if keep is None:
        raise ValueError(
            f"give '{method.name}' a budget: keep=0.25 for a quarter of the tokens, keep=64 for 64 per image"
        )
    where = stage or method.stages[0]
    if where not in method.stages or where not in _STAGES:
        usable = ", ".join(name for name in method.stages if name in _STAGES) or "none"
        raise ValueError(f"method '{method.name}' does not run at stage {where!r}: it runs at {usable}")
    if positions not in (None, "keep", "repack"):
        raise ValueError(f"positions must be 'keep' or 'repack', not {positions!r}")
    if allocate not in ALLOCATIONS:
        raise ValueError(f"allocate must be one of {', '.join(ALLOCATIONS)}, not {allocate!r}")
    if allocate == "joint" and method.needs_grid:
        raise ValueError(
            f"'{method.name}' reads the rows and columns of one picture, which tiles or frames taken "
            "together have not: use allocate='proportional'"
        )
    return {
        "method": method,
        "stage": where,
        "keep": check_keep(keep),
        "positions": positions,
        "allocate": allocate,
    }
