"""A whole training: the stages of a configuration, one after the other, each a run of `Trainer`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..cost import versions
from ..learned import Resampler
from ..learned.base import LearnedModule
from .config import Config
from .folder import Folder
from .reading import read_config


def train(
    config: str | Path | dict[str, Any] | Config, settings: Iterable[str] = (), resume: bool = False
) -> LearnedModule:
    """Trains a module in a frozen host, and saves it.

    config    a YAML file, a dict of the same form, or a `Config`; see there for the keys
    settings  "key=value" that replace some of it
    resume    goes on where a training into the same folder stopped, from its last checkpoint

    Afterwards the folder `output` holds config.json and model.safetensors, for `vtc.compress(model, output)`,
    and train.json: the configuration, versions, accuracies, of each stage its minutes, pictures and losses.
    Stages are in output/checkpoints; each checkpoint is a folder of the module, too.

    Runs on one device, or on several where it is started by `accelerate launch`.
    Raises ValueError for a configuration that cannot be, data that is empty or cannot be read, a module that
    is of another host or has nothing that a stage makes small, and an output folder that is in use;
    RuntimeError where a loss is no number, which leaves the last checkpoint as it was.
    """
    try:
        import accelerate
    except ImportError as error:
        raise ImportError(
            "training needs accelerate and more: pip install 'vision-token-compression[train]'"
        ) from error
    training = _Training(read_config(config, settings), resume)
    try:
        return training.run()
    finally:  # what is run later may use another precision
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)


class _Training:
    def __init__(self, config: Config, resume: bool):
        from .trainer import arguments_of

        self.config, self.resume = config, resume
        self.folder = Folder(config, resume)
        self.report = self.folder.report
        stages = zip(config.stages, config.names())
        self.arguments = [arguments_of(config, stage, name) for stage, name in stages]
        self.first = self.arguments[0].process_index == 0  # of several processes, the one that writes

    def write(self) -> None:
        if self.first:
            self.folder.write()

    # The run

    def run(self) -> LearnedModule:
        from ..ask import load_model
        from .accuracy import validation
        from .batches import Looked
        from .modules import LOOKED_AT, begin, make_module, widths
        from .pictures import training_pictures

        config = self.config
        self.model, self.processor = load_model(config.model, device=self.arguments[0].device)
        self.model.requires_grad_(False)
        with self.arguments[0].main_process_first(local=False):
            self.pictures = training_pictures(config.data)
        self.batches = validation(self.processor, config.data)
        look = Looked(self.processor, self.pictures, config.data.skip_broken)
        self.found = widths(self.model, self._looked(look, 8)[0])  # the first of them may be broken
        self.module = make_module(config, self.found, self.model)
        self.module.to(self.model.device)
        self._check_host()
        self._check_stages()
        if "name" in config.module and self._in_front():
            begin(self.module, self.model, self._looked(look, LOOKED_AT))
        self.report |= {"versions": versions(), "finished": False}
        self.report["processes"] = self.arguments[0].world_size
        self.write()
        for number in range(len(config.stages)):
            self._stage(number)
        return self._finish()

    def _in_front(self) -> bool:
        """Whether the module is given features that leave the encoder."""
        return isinstance(self.module, Resampler) and self.where["stage"] == "features"

    def _looked(self, look: Any, n: int) -> list[dict[str, torch.Tensor]]:
        from .batches import Visit

        numbers = range(min(n, len(self.pictures)))
        parts = [numbers[start : start + 32] for start in numbers[::32]]
        return [look([Visit(number) for number in part])["vision"] for part in parts]

    def _check_host(self) -> None:
        """Raises ValueError where `compress` refuses the module."""
        from ..api import compress
        from .distill import budget, possible_counts

        self.where = {"stage": self.module.stages[0], **self.config.compress}
        most = possible_counts(self.module, self.found.grid)[-1]
        keep = budget(self.model, self.where, self.found.grid, most)
        compress(self.model, self.module, keep=keep, **self.where).remove()
        self.module.trained_on(self.model)  # checkpoints know it too

    def _check_stages(self) -> None:
        for number, name in enumerate(self.config.names()):
            try:
                self._objective(number)
            except ValueError as error:
                raise ValueError(f"stage {name}: {error}") from None

    def _objective(self, number: int) -> Any:
        from .objectives import objective_of

        stage, seed = self.config.stages[number], (self.config.seed, number)
        kind = objective_of(stage, self.module)
        return kind(self.module, self.model, stage, seed, self.found.grid, self.where)

    def _stage(self, number: int) -> None:
        from .forms import check_form
        from .trainer import (
            Bar,
            Every,
            ModuleTrainer,
            OnSave,
            ProgressCallback,
            Steps,
            last_checkpoint,
            load_weights,
        )

        stage, name = self.config.stages[number], self.config.names()[number]
        arguments = self.arguments[number]
        folder = Path(arguments.output_dir)
        told = self.report["stages"].setdefault(name, {"minutes": 0.0})
        if told.get("done"):
            load_weights(self.module, folder / "module")
            return
        objective = self._objective(number)
        asks = hasattr(objective, "teacher")
        items, collate = self._data(asks)
        if len(items) < stage.batch_size * arguments.world_size:
            arguments.dataloader_drop_last = False
        trainer = ModuleTrainer(objective, arguments, data_collator=collate, train_dataset=items, name=name)
        before, start = told["minutes"], time.perf_counter()

        def note() -> None:
            told["minutes"] = round(before + (time.perf_counter() - start) / 60, 3)
            self.write()

        trainer.remove_callback(ProgressCallback)
        for callback in (Bar(name), Steps(trainer), OnSave(note)):
            trainer.add_callback(callback)
        if stage.evaluate and self.batches:
            trainer.add_callback(Every(stage.evaluate, lambda step: self._evaluate(objective, name, step)))
        last = last_checkpoint(folder) if self.resume else None
        objective.attach()
        try:
            if asks:
                check_form(objective, collate, items)
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            objective.detach()
        note()
        history = [row for row in trainer.state.log_history if "loss" in row]
        told |= {
            "steps": stage.steps,
            "pictures": len(self.pictures),
            "data": dataclasses.asdict(self.config.data),
            "seed": self.config.seed,
            "precision": self.config.precision,
            "first": _losses(history[0]),
            "last": _losses(history[-1]),
            "done": True,
        }
        if self.first:
            self.module.save_pretrained(folder / "module")
        self.write()

    def _data(self, asks: bool) -> tuple[list, Any]:
        from .batches import Asked, Looked, Visit, visits

        data, skip = self.config.data, self.config.data.skip_broken
        if not asks:
            return [Visit(i) for i in range(len(self.pictures))], Looked(self.processor, self.pictures, skip)
        token, end = _image_token(self.model), _end(self.model, self.processor)
        collate = Asked(self.processor, self.pictures, token, end, skip)
        return visits(self.pictures, data.questions), collate

    # Afterwards

    def counts(self) -> list[int] | list[None]:
        """The numbers of tokens that accuracies are told of."""
        from .accuracy import spread
        from .distill import possible_counts

        asked = {k for stage in self.config.stages for k in stage.counts}
        return sorted(asked) or spread(possible_counts(self.module, self.found.grid))

    def _accuracy(self) -> dict[str, float]:
        from .accuracy import accuracy
        from .distill import budget

        keeps = {
            "all" if k is None else str(k): budget(self.model, self.where, self.found.grid, k)
            for k in self.counts()
        }
        return accuracy(self.model, self.module, self.batches, keeps, self.where)

    def _evaluate(self, objective: Any, name: str, step: int) -> None:
        if not self.first:
            return
        objective.detach()
        try:
            found = self._accuracy()
        finally:
            objective.attach()
        self.report["stages"][name].setdefault("accuracy", {})[str(step)] = found
        self.write()
        print(f"{name}, step {step}: {shown(found)}")

    def _finish(self) -> LearnedModule:
        self.module.eval()
        if self.first:
            if self.batches is not None:
                self.report["accuracy"] = self._accuracy()
            self.module.save_pretrained(self.folder.path)
            minutes = sum(told["minutes"] for told in self.report["stages"].values())
            self.report |= {"finished": True, "seconds": round(60 * minutes, 1)}
            self.write()
            print(summary(self.module.name, self.report, self.folder.path))
        return self.module


def _losses(row: dict[str, Any]) -> dict[str, float]:
    other = ("epoch", "learning_rate", "grad_norm")
    return {
        name: round(value, 5) if name != "step" else value for name, value in row.items() if name not in other
    }


def shown(accuracies: dict[str, float]) -> str:
    return ", ".join(f"{k} {share:.1%}" for k, share in accuracies.items())


def summary(name: str, report: dict[str, Any], output: Path) -> str:
    """One line."""
    stages = report["stages"].items()
    parts = [f"{stage} {told['first']['loss']:.3g} -> {told['last']['loss']:.3g}" for stage, told in stages]
    minutes = sum(told["minutes"] for _, told in stages)
    right = f"; right answers by tokens: {shown(report['accuracy'])}" if "accuracy" in report else ""
    return f"{name}: {', '.join(parts)}; {minutes:.1f} minutes{right}; saved in {output}"


def _image_token(model: nn.Module) -> int | None:
    """The placeholder of image tokens in a prompt."""
    names = ("image_token_id", "image_token_index")
    return next((value for name in names if (value := getattr(model.config, name, None)) is not None), None)


def _end(model: nn.Module, processor: Any) -> int:
    """What ends an answer. Raises ValueError where neither tokenizer nor model say."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    own = processor.tokenizer.eos_token_id
    if own is None and not ends:
        raise ValueError("the host's tokenizer has no token that ends an answer: set its eos_token")
    return own if own in ends or not ends else ends[0]
