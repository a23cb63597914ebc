"""`compress()` attaches a method to a model, the `Handle` steers and records it, `restore()` takes it off."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn

from .allocate import Allocation
from .hosts import Vision, features_owner, is_vlm
from .hosts.opening import open_model, unwrap
from .hosts.trunk import STAGE, Trunk, find_tower
from .method import Method
from .record import Record
from .restoring import Nearest
from .schedule import Budget, Schedule
from .steps import Plan, steps_of
from .tokens import Keep

_HANDLE = "_vtc_handle"


class Handle:
    """The switch, budget and record of one compressed model; as a context manager it removes itself."""

    def __init__(self, base: nn.Module, stages: list[Any]):
        self._base, self._stages = base, stages

    @property
    def _on(self) -> bool:
        return vars(self._base).get(_HANDLE) is self

    @property
    def keep(self) -> Budget | dict[str, Budget]:
        """The budget: a fraction in (0, 1], tokens per image, or what leaves each block of an encoder; a dict
        by stage where there are several."""
        budgets = {stage.name: stage.keep for stage in self._stages}
        return budgets if len(budgets) > 1 else next(iter(budgets.values()))

    @keep.setter
    def keep(self, keep: Budget | dict[str, Budget]) -> None:
        if not self._on:
            raise RuntimeError("this handle was removed from its model: call vtc.compress() again")
        names = list(keep) if isinstance(keep, dict) else []
        by_stage = names and all(isinstance(name, str) and not name.isdigit() for name in names)
        budgets = keep if by_stage else {self._stages[-1].name: keep}
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
                kept = [f"{len(record.index)} of {len(record.source)}" for record in stage.last]
                line += f"; tokens kept in the last forward: {', '.join(kept)}"
            lines.append(line)
            if told := getattr(stage, "left_blocks", None):
                lines.append(f"    patch tokens after each block: {told}")
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
        if not self._on:
            raise RuntimeError("this handle was removed from its model: call vtc.compress() again")
        return self

    def __exit__(self, *exception: Any) -> None:
        self.remove()


def compress(
    model: nn.Module,
    method: Plan,
    keep: Keep | None = None,
    *,
    stage: str | None = None,
    positions: str | None = None,
    allocate: str | dict[str, Any] | Allocation | None = None,
    merge: str | dict[str, Any] | Nearest | None = None,
    decoder_layer: int | float | None = None,
    schedule: Schedule | None = None,
    restore: str | None = None,
    carry: str | None = None,
    replace: bool = False,
    **options: Any,
) -> Handle:
    """Makes a model carry fewer vision tokens from now on, in place; its calls stay as they are.

    model      a transformers vision-language model of a known family, or a vision transformer of timm,
               open_clip or transformers, also with a head or beside a text encoder; wrappers of PEFT,
               torch.compile and distributed training around one are opened
    method     a name of `list_methods()`, a Method, a module with weights of its own (`vtc.learned`,
               `vtc.tokenizers.TokenSource`), a folder or a name on the Hugging Face Hub where such a module
               was saved, or a list of (method, {"keep": ..., "stage": ..., options})
    keep       the budget: a float in (0, 1] is the share of patch tokens kept, an int >= 1 the number per
               image or video (one with fewer keeps all of its own). Exactly that many come out. As soon as
               one patch token of an image is dropped, its newline tokens and a CLS token go too. In an
               encoder: what leaves its last block; or by block, as a list or dict of shares and numbers
               (`vtc.schedule.check_budget`). "p:0.9" gives each image a number of its own: the fewest tokens
               whose scores sum to that share of all, for methods that score tokens. A method that chooses its
               own number takes keep as the most; 1.0 is the bare model. A module makes exactly as many as
               that, of each tile or frame its share; None: as many as it can make of each
    stage      where the reduction takes effect: "encoder", inside of the blocks of the vision transformer;
               "features", between it and the language model; "decoder", inside of the language model, while
               it reads the prompt. The method's default where None
    positions  "keep": kept tokens have the positions they had; "repack": positions are counted anew without
               the dropped ones. None: as the method's own code does it, and "keep" where positions have
               several components (M-RoPE), which cannot be counted anew
    allocate   how an image's budget is shared over its tiles, a video's over its frames: "proportional", each
               by its size; "uniform", each the same; "joint", all are one row in which tokens compete;
               "whole", as many whole ones as fit, evenly spread; "thumbnail", the whole view first; "hired",
               "globalcom2" and "attention" by what the encoder attends to; or an `Allocation`, with options.
               The method's own where None
    merge      what becomes of dropped tokens, of methods that only drop: "nearest", each is averaged into the
               most similar kept one of its tile; "restore", and the language model attends to it as to its
               members, see `vtc.restoring`; kept ones are then in the order of their places. None: they are
               gone
    decoder_layer  decoder stage: in front of which layer tokens are dropped, a number from 1 on or a fraction
               of the depth; the method's own where None
    schedule   encoder stage: how the budget is spread over blocks, "constant", "decreasing", "staged", "once"
               or the blocks that reduce tokens (`vtc.schedule.counts`); the method's own where None
    restore    encoder stage: "unmerge", and every block shows all patches to whoever reads its output, a
               merged one as often as it has members, a dropped one as it last was. None: fewer tokens come
               out of the encoder, and its pooling head weighs them by size
    carry      encoder stage: "gap", and the average of each block's tokens is set aside and joins the
               sequence after the next reduction, as in CLCA (arXiv:2501.00243), whose models are trained with
               it; carried averages are never reduced themselves
    replace    True: an earlier compression of this model is removed first
    options    the method's own fields, where it is given by name; those of a module's `as_method`

    While compressed, `get_image_features` and `get_video_features` mark dropped tokens by NaN. What
    torch.compile made of any model is compiled again at its next call, because it does not see hooks that
    come and go.

    Raises ValueError for an unknown method, option, model, stage or setting, a budget out of range, a need
    that the model cannot serve, or a module for other widths or trained on another host; TypeError for a
    budget or model of the wrong type; RuntimeError for a model that is compressed already; OSError for a
    module that is not found. The model is then as it was.
    """
    model = unwrap(model)
    encoder = {"schedule": schedule, "restore": restore, "carry": carry}
    prompt = {"positions": positions, "allocate": allocate, "merge": merge, "decoder_layer": decoder_layer}
    where = {"stage": stage, **prompt, **encoder}
    opened = open_model(model)
    steps = steps_of(method, keep, where, options, opened)
    handle = current(model)
    if handle is not None and not replace:
        raise RuntimeError(
            f"this {type(model).__name__} is compressed already ({handle.describe()}): "
            "call vtc.restore(model) first, or pass replace=True"
        )
    _refuse_twice(opened)
    if len(steps) > 1:
        raise ValueError("stages cannot be combined yet: give one method")
    stages = [_stage(opened, **step) for step in steps]
    # Nothing was touched so far: whatever is refused is refused above.
    if handle is not None:
        handle.remove()
    owner = opened.base if isinstance(opened, Vision) else opened.tower
    handle = Handle(owner, stages)
    setattr(owner, _HANDLE, handle)
    for part in stages:
        part.install()
    _forget_graphs()
    return handle


def current(model: nn.Module) -> Handle | None:
    """The handle of a model that is compressed now, else None."""
    model = unwrap(model)
    found = None if is_vlm(model) else find_tower(model)
    return vars(found[0] if found else features_owner(model)).get(_HANDLE)


def restore(model: nn.Module) -> None:
    """Removes what `compress()` attached to a model. Raises RuntimeError if there is nothing to remove."""
    handle = current(model)
    if handle is None:
        raise RuntimeError(f"this {type(model).__name__} is not compressed, so there is nothing to restore")
    handle.remove()


def _forget_graphs() -> None:
    """Compiled graphs have no guard on hooks: they would go on without new ones, and with removed ones."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


def _refuse_twice(opened: Vision | Trunk) -> None:
    """Raises RuntimeError where a model and the vision tower in it would both be compressed."""
    if isinstance(opened, Vision):
        found = find_tower(opened.encoder.tower)
        if found and _HANDLE in vars(found[0]):
            raise RuntimeError(
                f"the vision tower of this {type(opened.model).__name__} is compressed by itself already: "
                "restore it, and compress the whole model with stage='encoder'"
            )
    elif _HANDLE not in vars(opened.tower) and STAGE in vars(opened.tower):
        raise RuntimeError(
            f"this {type(opened.tower).__name__} belongs to a model that is compressed at stage 'encoder' "
            "already: restore that one before"
        )


def _stage(opened: Vision | Trunk, method: Method | nn.Module, stage: str, **settings: Any) -> Any:
    if isinstance(method, nn.Module):
        return method.as_stage(opened)
    # The stages bring dynamo along, which takes a second to import.
    if isinstance(opened, Trunk):
        from .stages.encoder import EncoderStage

        return EncoderStage(opened, method, **settings)
    if stage == "encoder":
        from .stages.tower import TowerStage

        return TowerStage(opened, method, **settings)
    if stage == "decoder":
        from .stages.decoder import DecoderStage

        return DecoderStage(opened, method, **settings)
    positions = _positions(opened, method, settings["merge"], settings.pop("positions"))
    from .stages.features import FeaturesStage
    from .stages.memory import MemoryStage

    made = MemoryStage if opened.host.memory else FeaturesStage
    return made(opened, method, positions=positions, **settings)


def _positions(vision: Vision, method: Method, merge: Nearest | None, positions: str | None) -> str:
    fixed = "whose positions are grids of several components" if vision.mrope else None
    fixed = "whose prompts keep their length" if vision.host.memory else fixed
    if positions == "repack" and fixed:
        raise ValueError(
            f"positions='repack' is not defined on {vision.host.name}, {fixed}: use positions='keep'"
        )
    return positions or ("keep" if fixed else (merge and merge.positions) or method.positions)
