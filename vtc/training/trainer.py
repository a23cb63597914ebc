"""transformers' `Trainer` for a module, and what it does beside the steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import sort_checkpoints

from ..learned.base import LearnedModule
from .config import Config, Stage
from .objective import Objective
from .optimizers import make_optimizer

STATE = "trainer_state.json"


class ModuleTrainer(Trainer):
    """Checkpoints are folders of the module itself, and a loss that is no number stops the training."""

    model: Objective

    def __init__(self, *args: Any, name: str, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.name = name  # of the stage
        self._parts: dict[str, list[torch.Tensor]] = {}  # of the loss, since they were last told
        self.model.rank = self.args.process_index

    def create_optimizer(self, *args_: Any, **kwargs: Any) -> Any:
        args, muon = self.args, self.model.stage.muon
        if muon is None:
            return super().create_optimizer(*args_, **kwargs)
        if self.optimizer is None:
            betas = (args.adam_beta1, args.adam_beta2)
            self.optimizer = make_optimizer(
                self.model.module, args.learning_rate, muon, args.weight_decay, betas
            )
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Learning rates are those that the stage has now: a checkpoint would bring back its own."""
        now = getattr(self.lr_scheduler, "base_lrs", None)
        super()._load_optimizer_and_scheduler(checkpoint)
        before = getattr(self.lr_scheduler, "base_lrs", None)
        if now == before or now is None:
            return
        self.lr_scheduler.base_lrs = now
        for group, new, old in zip(self.optimizer.param_groups, now, before, strict=True):
            group["lr"] = group["lr"] * new / old if old else new
            group["initial_lr"] = new
        self.lr_scheduler._last_lr = [group["lr"] for group in self.optimizer.param_groups]

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        outputs = model(**inputs)
        self.check("the loss", outputs["loss"].detach())
        for name, value in outputs.items():
            if name != "loss":
                self._parts.setdefault(name, []).append(value.detach())
        return outputs["loss"]

    def check(self, what: str, value: torch.Tensor) -> None:
        """Raises RuntimeError for what is no number, before any weight was changed by it."""
        if math.isfinite(float(value)):
            return
        last = last_checkpoint(Path(self.args.output_dir))
        begin = f"the last good checkpoint is {last}" if last else "there is no checkpoint of this stage yet"
        raise RuntimeError(
            f"{what} is {float(value)} at step {self.state.global_step + 1} of stage {self.name}: {begin}; "
            "lower its learning_rate or use another precision, and go on with --resume; where it comes "
            "again, that checkpoint is spoiled already: delete its folder, to go on with the one before"
        )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and len(self._parts) > 1:
            logs |= {name: float(torch.stack(values).mean()) for name, values in self._parts.items()}
        self._parts.clear()
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.args.should_save:
            self.model.module.save_pretrained(output_dir or self.args.output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_weights(self.model.module, resume_from_checkpoint)


def load_weights(module: LearnedModule, folder: str | Path) -> None:
    """Those of the same module that was saved there, and what its training noted."""
    saved = type(module).from_pretrained(folder)
    module.load_state_dict(saved.state_dict())
    module.config = saved.config


def last_checkpoint(folder: Path) -> Path | None:
    """The last one that was written to its end."""
    if not folder.is_dir():
        return None
    for path in reversed(sort_checkpoints(str(folder))):
        try:
            json.loads((Path(path) / STATE).read_text())  # Trainer writes it last
            return Path(path)
        except (OSError, ValueError):
            continue
    return None


class Steps(TrainerCallback):
    """Tells the objective which step it is in, and looks at gradients before they change a weight."""

    def __init__(self, trainer: ModuleTrainer):
        self.trainer = trainer

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.model.begin(state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.accelerator.scaler is not None:  # which leaves out such steps, and goes on
            return
        gradients = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.trainer.check("the gradient", nn.utils.get_total_norm(gradients))


class Every(TrainerCallback):
    """Calls a function every so many steps, on the first process."""

    def __init__(self, steps: int, function: Callable[[int], None]):
        self.steps, self.function = steps, function

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.steps == 0 and state.global_step < state.max_steps:
            self.function(state.global_step)


class OnSave(TrainerCallback):
    """Calls a function after every checkpoint."""

    def __init__(self, function: Callable[[], None]):
        self.function = function

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.function()


class Bar(ProgressCallback):
    """The usual progress bar, named after its stage."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)


def arguments_of(config: Config, stage: Stage, name: str) -> TrainingArguments:
    """What `Trainer` is told for a stage. Raises ValueError for what it refuses."""
    cuda = torch.cuda.is_available()
    if config.precision == "fp16" and not cuda:  # else it would change nothing
        raise ValueError("precision fp16 needs a GPU, and there is none: use bf16 or no")
    every = max(1, stage.steps // 5)
    usual = {
        "lr_scheduler_type": "cosine", "warmup_steps": 0.05 if stage.steps > 1 else 0,
        "optim": "adamw_torch", "weight_decay": 0.01, "adam_beta2": 0.98,
        "logging_steps": max(1, min(50, stage.steps // 10)),
        "save_strategy": "steps", "save_steps": every, "save_total_limit": 2, "report_to": "none",
        "dataloader_pin_memory": cuda, "logging_nan_inf_filter": False, "disable_tqdm": False,
        "dataloader_drop_last": True,
    }  # fmt: skip
    ours = {
        "output_dir": str(Path(config.output) / "checkpoints" / name), "max_steps": stage.steps,
        "per_device_train_batch_size": stage.batch_size, "learning_rate": stage.learning_rate,
        "seed": config.seed, "bf16": config.precision == "bf16", "fp16": config.precision == "fp16",
        "use_cpu": not cuda, "remove_unused_columns": False, "label_names": [],
        "logging_first_step": True,
    }  # fmt: skip
    if not cuda and int(os.environ.get("WORLD_SIZE", 1)) > 1:  # named, it alone makes a training distributed
        usual["ddp_backend"] = "gloo"
    try:
        return TrainingArguments(**usual | stage.arguments | ours)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise ValueError(f"stage {name}: {error}") from error
