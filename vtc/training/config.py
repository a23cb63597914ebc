"""What `vtc train` is told: a YAML file, or a dict of the same form."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

PRECISIONS = ("no", "bf16", "fp16")
ERRORS = ("features", "answers")
OWN = {
    "features": (),
    "distill": ("kl", "ce", "temperature", "counts", "full"),
    "length": ("lengths", "errors", "counts"),
}
SHARED = ("kind", "steps", "batch_size", "learning_rate", "muon", "evaluate")
SETTINGS = ("stage", "schedule", "restore", "carry", "positions", "allocate")  # of `vtc.compress()`
# What else `TrainingArguments` has that a stage cannot say.
SET_HERE = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed", "bf16", "fp16",
    "use_cpu", "remove_unused_columns", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "label_names", "eval_strategy", "load_best_model_at_end", "save_only_model", "auto_find_batch_size",
    "gradient_checkpointing", "logging_first_step", "logging_strategy", "torch_compile",
)  # fmt: skip


@dataclass(frozen=True)
class Data:
    """train        "scenes"; "jsonl:PATH", lines of {"image", "question", "answer"} or LLaVA's {"image",
                 "conversations"}; or "datasets:NAME[:split]", a folder or a name on the Hub with the columns
                 image, question and answer
    split        of scenes
    n            how many pictures; None: all of a file, 20,000 scenes
    questions    about one picture in a step
    validation   as `train`, with a split and `n_validation` questions of its own; None: accuracy is not told
    cache        folder that drawn scenes are kept in
    skip_broken  leave out what cannot be read, with a warning
    """

    train: str
    split: str = "train"
    n: int | None = None
    questions: int = 4
    validation: str | None = None
    validation_split: str = "validation"
    n_validation: int | None = 256
    cache: str = "~/.cache/vtc"
    skip_broken: bool = False


@dataclass(frozen=True)
class Stage:
    """kind         "features", images only: the module's `training_loss`, or with replaced attention the
                 host's own features; "distill", the answers of the host with all its tokens; "length", the
                 module's `halting_loss`
    steps        of the optimizer
    batch_size   pictures in a forward of one process
    muon         the rate of Muon for the module's matrices, such as 2e-3; AdamW for all weights where None
    evaluate     accuracy on the validation data every so many steps
    kl, ce       weights of the divergence from the teacher's answers, and of the cross-entropy of the data's
    temperature  by which both logits are divided in the divergence
    counts       numbers of tokens to draw from; where empty, all that the module makes, by its `draw`
    full         also the most of them in every step
    errors       length: of "features", what the module's decoder leaves; of "answers", how far they
                 are from the teacher's
    lengths      drawn for each picture in a step
    arguments    anything else, for transformers' `TrainingArguments`; "warmup" is its warmup_steps
    """

    kind: str
    steps: int
    batch_size: int = 32
    learning_rate: float = 1e-3
    muon: float | None = None
    evaluate: int | None = None
    kl: float = 1.0
    ce: float = 0.5
    temperature: float = 1.0
    counts: tuple[int, ...] = ()
    full: bool = True
    lengths: int = 8
    errors: str = "features"
    arguments: dict[str, Any] = field(default_factory=dict)

    def shown(self) -> dict[str, Any]:
        """As the YAML has it."""
        own = {name: getattr(self, name) for name in (*SHARED, *OWN[self.kind])}
        return {name: _plain(value) for name, value in own.items() if value is not None} | self.arguments


@dataclass(frozen=True)
class Config:
    """model      the host: a folder or a name on the Hugging Face Hub
    module     {"name": ..., options}, widths as the host's where left out; or {"from": folder}
    compress   what else `vtc.compress()` is told in training: {"stage": "encoder", "schedule": [2]}, say
    adapter    low-rank updates of the language model that are learned along, {"rank": 16}; none where None
    output     folder of the finished module, with checkpoints/ of the stages in it
    precision  "no", "bf16" or "fp16": of products, by autocast
    """

    model: str
    module: dict[str, Any]
    output: str
    data: Data
    stages: tuple[Stage, ...]
    adapter: dict[str, Any] | None = None
    compress: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    precision: str = "no"

    def shown(self) -> dict[str, Any]:
        """As the YAML has it."""
        rest = {
            name: getattr(self, name)
            for name in ("model", "module", "compress", "adapter", "output", "seed", "precision")
            if name != "compress" or self.compress
        }
        stages = [stage.shown() for stage in self.stages]
        return rest | {"data": dataclasses.asdict(self.data), "stages": stages}

    def names(self) -> list[str]:
        """Of the stages, and of the folders of their checkpoints."""
        return [f"{number}-{stage.kind}" for number, stage in enumerate(self.stages, 1)]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
