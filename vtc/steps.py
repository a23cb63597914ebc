"""What `compress()` was told, checked and completed: the method, its stage and settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .allocate import Allocation, get_allocation
from .hosts import Vision
from .hosts.trunk import Trunk
from .method import Method, Select, get_method, is_saved, list_methods
from .restoring import Nearest, get_merge
from .schedule import check_schedule
from .tokens import check_keep

_STAGES = ("encoder", "features", "decoder")

Step = str | Path | Method | nn.Module
Plan = Step | list[tuple[Step, dict[str, Any]]]


# The stages at which settings mean something; all are None where nothing is said.
_OF_STAGE = {
    "encoder": ("schedule", "restore", "carry"),
    "features": ("positions", "allocate", "merge"),
    "decoder": ("decoder_layer",),
}
_DEFAULTS = dict.fromkeys(name for own in _OF_STAGE.values() for name in own)


def steps_of(plan: Plan, keep: Any, where: dict, options: dict, opened: Vision | Trunk) -> list[dict]:
    """What to run, one dict of _stage()'s arguments for each step."""
    if isinstance(plan, list):
        if keep is not None or where != {"stage": None, **_DEFAULTS} or options:
            raise ValueError(
                "with a list of methods, give keep, stage and options in the list: ('tome', {'keep': 0.5})"
            )
        for step in plan:
            if not (isinstance(step, (tuple, list)) and len(step) == 2 and isinstance(step[1], dict)):
                raise ValueError(
                    f"a list of methods holds pairs like ('tome', {{'keep': 0.5}}), not {step!r}"
                )
        steps = [_step(opened, method, **settings) for method, settings in plan]
    else:
        steps = [_step(opened, plan, keep, **where, **options)]
    names = [step["stage"] for step in steps]
    if not steps or len(set(names)) < len(names):
        raise ValueError(f"give one method for each stage, at least one: got {names}")
    return steps


def _step(
    opened: Vision | Trunk,
    method: str | Path | Method | nn.Module,
    keep: Any = None,
    stage: str | None = None,
    positions: str | None = None,
    allocate: Any = None,
    merge: Any = None,
    decoder_layer: Any = None,
    schedule: Any = None,
    restore: str | None = None,
    carry: str | None = None,
    **options: Any,
) -> dict[str, Any]:
    settings = {
        "positions": positions, "allocate": allocate, "merge": merge, "decoder_layer": decoder_layer,
        "schedule": schedule, "restore": restore, "carry": carry,
    }  # fmt: skip
    if isinstance(method, (str, Path)) and method not in list_methods() and is_saved(method):
        method = _load(method, opened)
    elif isinstance(method, str) and Path(method).is_file():
        raise ValueError(f"{method} is a file: give the folder of the module, {Path(method).parent}")
    if hasattr(method, "as_stage"):
        stage = None if stage == "attention" else stage
        return _own_stage(opened, method, {"keep": keep, "stage": stage, **settings, **options})
    if isinstance(method, nn.Module):
        if not hasattr(method, "as_method"):
            kind = getattr(method, "name", type(method).__name__)
            raise ValueError(
                f"'{kind}' is a module that makes no fewer tokens: give one of vtc.learned that does"
            )
        from .learned.method import method_of

        method = method_of(method, options)
    elif isinstance(method, Method):
        if options:
            raise ValueError(f"options {sorted(options)} belong in the method: {type(method).__name__}(...)")
    else:
        method = get_method(method, **options)
    if keep is None and method.module is None:
        raise ValueError(
            f"give '{method.name}' a budget: keep=0.25 for a quarter of the tokens, keep=64 for 64 per image"
        )
    if method.module is not None:
        _check_host(method.module, opened)
    offered = _STAGES if isinstance(opened, Vision) else ("encoder",)
    usable = [name for name in method.stages if name in offered]
    stage = stage or next(iter(usable), method.stages[0])
    if stage not in usable:
        others = next((f"; {name!r} has {', '.join(list_methods(name))}" for name in offered), "")
        raise ValueError(
            f"method '{method.name}' does not run at stage {stage!r} of this model: it runs at "
            f"{', '.join(usable) or 'none that this model has' + others}"
        )
    own = _OF_STAGE[stage]
    for name, value in settings.items():
        if name not in own and value != _DEFAULTS[name]:
            raise ValueError(f"{name}={value!r} means nothing at stage {stage!r}: leave it out")
    if stage == "encoder":
        if schedule is not None and isinstance(keep, (list, dict)):
            raise ValueError("a budget by block says itself where tokens are reduced: leave schedule out")
        settings["schedule"] = check_schedule(method.schedule if schedule is None else schedule)
    elif stage == "decoder":
        keep = check_keep(keep)
    else:
        keep = None if keep is None else check_keep(keep)
        settings["allocate"] = get_allocation(method.allocate if allocate is None else allocate)
        settings["merge"] = None if merge is None else _merge(method, merge)
        _check_prompt(method, positions, settings["allocate"])
    return {"method": method, "stage": stage, "keep": keep, **{name: settings[name] for name in own}}


def _load(name: str | Path, opened: Vision | Trunk) -> nn.Module:
    """The module saved there, where the encoder is."""
    from .learned.method import load_module

    tower = opened.encoder.tower if isinstance(opened, Vision) else opened.tower
    device = next(tower.parameters()).device
    module = load_module(name)
    return module if device.type == "meta" else module.to(device)


def _check_host(module: nn.Module, opened: Vision | Trunk) -> None:
    if getattr(module, "host", None) is not None:
        from .learned.fingerprint import check_host

        check_host(module, opened)


def _own_stage(opened: Vision | Trunk, module: nn.Module, settings: dict[str, Any]) -> dict[str, Any]:
    """The step of a module that is a stage by itself, of which nothing can be set."""
    if given := [name for name, value in settings.items() if value is not None]:
        raise ValueError(f"'{module.name}' keeps all tokens and has no {', '.join(given)}: leave it out")
    _check_host(module, opened)
    return {"method": module, "stage": "attention"}


def _merge(method: Method, merge: Any) -> Nearest:
    if not isinstance(method, Select):
        does = "merges" if method.module is None else "is a module with weights"
        raise ValueError(
            f"merge={merge!r} takes what a method drops, and '{method.name}' {does}: leave it out"
        )
    return get_merge(merge)


def _check_prompt(method: Method, positions: str | None, allocate: Allocation) -> None:
    if positions not in (None, "keep", "repack"):
        raise ValueError(f"positions must be 'keep' or 'repack', not {positions!r}")
    if allocate.name in ("joint", "thumbnail") and method.needs_grid:
        raise ValueError(
            f"'{method.name}' reads the rows and columns of one picture, which tiles or frames taken "
            "together have not: use allocate='proportional'"
        )
