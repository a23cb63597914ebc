"""What `vtc train` is told: a YAML file, or a dict of the same form."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRECISIONS = ("no", "bf16", "fp16")
ERRORS = ("features", "answers")
OWN = {
    "features": (),
    "distill": ("kl", "ce", "temperature", "counts", "full"),
    "length": ("lengths", "errors", "counts"),
}
SHARED = ("kind", "steps", "batch_size", "learning_rate", "muon", "evaluate")
# What else `TrainingArguments` has that a stage cannot say.
SET_HERE = (
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "seed", "bf16", "fp16",
    "use_cpu", "remove_unused_columns", "do_train", "do_eval", "do_predict", "resume_from_checkpoint",
    "label_names", "eval_strategy", "load_best_model_at_end", "save_only_model", "auto_find_batch_size",
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
    """kind         "features", images only: the module's `training_loss`; "distill", the answers of the host
                 with all its tokens; "length", the module's `halting_loss`
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
    seed: int = 0
    precision: str = "no"

    def shown(self) -> dict[str, Any]:
        """As the YAML has it."""
        rest = {
            name: getattr(self, name)
            for name in ("model", "module", "adapter", "output", "seed", "precision")
        }
        stages = [stage.shown() for stage in self.stages]
        return rest | {"data": dataclasses.asdict(self.data), "stages": stages}

    def names(self) -> list[str]:
        """Of the stages, and of the folders of their checkpoints."""
        return [f"{number}-{stage.kind}" for number, stage in enumerate(self.stages, 1)]


def read_config(source: str | Path | dict[str, Any] | Config, settings: Iterable[str] = ()) -> Config:
    """A checked configuration.

    source    a YAML file, what is in one, or a Config
    settings  "key=value" with keys like "stages.0.steps", which replace what it says
    Raises ValueError in one sentence for an unknown key and a value that cannot be, OSError for no file.
    """
    if isinstance(source, Config):
        source = source.shown()
    content = _copied(source if isinstance(source, dict) else _loaded(Path(source)))
    for setting in settings:
        _put(content, setting)
    _check_names("the configuration", content, [f.name for f in dataclasses.fields(Config)])
    for name in ("model", "module", "output", "data", "stages"):
        if not content.get(name):
            raise ValueError(f"the configuration has no {name!r}")
    if content.get("precision") is False:  # `no` of YAML 1.1
        content["precision"] = "no"
    config = _made(Config, "", content, data=_data(content["data"]), stages=_stages(content["stages"]))
    if config.precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {config.precision!r}")
    _check_module(config.module)
    if config.adapter is not None:
        _check_mapping("adapter", config.adapter)
        _check_names("adapter", config.adapter, ("rank", "alpha"))
        for name, value in config.adapter.items():
            _checked(f"adapter.{name}", "int" if name == "rank" else "float | None", value)
    if not 0 <= config.seed < 2**32:
        raise ValueError(f"seed is a number from 0 to {2**32 - 1}, not {config.seed}")
    return config


def _loaded(path: Path) -> Any:
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no settings: give model, module, output, data and stages")
    return content


def _put(content: dict[str, Any], setting: str) -> None:
    import yaml

    key, equals, text = setting.partition("=")
    if not equals:
        raise ValueError(f"--set takes key=value, not {setting!r}")
    *path, last = key.split(".")
    inner: Any = content
    for step in path:
        inner = _inside(inner, step, key)
    if isinstance(inner, list):
        _inside(inner, last, key)
    elif not isinstance(inner, dict):
        raise ValueError(f"--set {key}: there is nothing inside of {'.'.join(path)}")
    try:
        inner[int(last) if isinstance(inner, list) else last] = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ValueError(f"--set {key}: {text!r} is no value of YAML") from None


def _inside(content: Any, step: str, key: str) -> Any:
    if isinstance(content, list) and step.isdecimal() and int(step) < len(content):
        return content[int(step)]
    if isinstance(content, dict):
        return content.setdefault(step, {})
    raise ValueError(f"--set {key}: there is no {step!r}; stages are counted from 0")


def _data(content: Any) -> Data:
    _check_mapping("data", content)
    _check_names("data", content, [f.name for f in dataclasses.fields(Data)])
    if not content.get("train"):
        raise ValueError("data has no 'train': scenes, jsonl:PATH or datasets:NAME")
    data = _made(Data, "data.", content)
    for name in ("questions", "n", "n_validation"):
        if (value := getattr(data, name)) is not None and value < 1:
            raise ValueError(f"data.{name} is at least 1, not {value}")
    return data


def _stages(content: Any) -> tuple[Stage, ...]:
    if not isinstance(content, list):
        raise ValueError("stages is a list, like [{kind: features, steps: 500}]")
    return tuple(_stage(number, one) for number, one in enumerate(content))


def _stage(number: int, content: Any) -> Stage:
    where = f"stages.{number}"
    _check_mapping(where, content)
    kind = content.get("kind")
    if kind not in OWN:
        raise ValueError(f"{where}.kind is one of {', '.join(OWN)}, not {kind!r}")
    if "steps" not in content:
        raise ValueError(f"{where} has no 'steps'")
    own = {name: value for name, value in content.items() if name in (*SHARED, *OWN[kind])}
    rest = {name: value for name, value in content.items() if name not in own}
    if "warmup" in rest:
        rest["warmup_steps"] = rest.pop("warmup")
    known = _arguments()
    _check_names(f"{where}, of kind {kind},", rest, [*SHARED, *OWN[kind], *known], told=(*SHARED, *OWN[kind]))
    if refused := sorted(set(rest) & set(SET_HERE)):
        raise ValueError(f"{where}: {', '.join(refused)} cannot be set here: `vtc train` sets it itself")
    stage = _made(Stage, f"{where}.", own, arguments=rest)
    if stage.muon is not None and ("optim" in rest or not stage.muon > 0):
        raise ValueError(f"{where}: muon is a positive rate, and has AdamW beside it: leave optim out")
    least = {"steps": 1, "batch_size": 1, "lengths": 1, "evaluate": 1}
    for name, smallest in least.items():
        if (value := getattr(stage, name)) is not None and value < smallest:
            raise ValueError(f"{where}.{name} is at least {smallest}, not {value}")
    if not 0 <= stage.learning_rate < math.inf:
        raise ValueError(f"{where}.learning_rate is a number from 0 on, not {stage.learning_rate}")
    if stage.errors not in ERRORS:
        raise ValueError(f"{where}.errors is one of {', '.join(ERRORS)}, not {stage.errors!r}")
    if not (stage.temperature > 0 and stage.kl >= 0 and stage.ce >= 0 and stage.kl + stage.ce > 0):
        raise ValueError(f"{where}: temperature is positive, kl and ce are not negative and not both 0")
    return stage


def _arguments() -> list[str]:
    from transformers import TrainingArguments

    return [f.name for f in dataclasses.fields(TrainingArguments)]


def _check_module(module: dict[str, Any]) -> None:
    _check_mapping("module", module)
    if ("name" in module) == ("from" in module):
        raise ValueError("module has either a 'name', with options, or 'from', the folder of one")
    if "from" in module and len(module) > 1:
        raise ValueError("a module 'from' a folder has the options it was saved with: leave the others out")


def _check_mapping(where: str, content: Any) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{where} holds names with values, not {content!r}")


def _check_names(where: str, content: dict, known: Iterable[str], told: Iterable[str] = ()) -> None:
    for name in content:
        if name not in known:
            near = difflib.get_close_matches(str(name), [*known], n=2, cutoff=0.6)
            hint = f"did you mean {' or '.join(near)}?" if near else f"it has {', '.join(told or known)}"
            raise ValueError(f"{where} has no {name!r}; {hint}")


_TYPES = {
    "int": (int, "a whole number"), "float": (float, "a number"), "str": (str, "a word"),
    "bool": (bool, "true or false"),
}  # fmt: skip


def _made(cls: type, where: str, content: dict[str, Any], **ready: Any) -> Any:
    values = {}
    for own in dataclasses.fields(cls):
        if own.name in content and own.name not in ready:
            values[own.name] = _checked(f"{where}{own.name}", str(own.type), content[own.name])
    return cls(**values, **ready)


def _checked(where: str, annotation: str, value: Any) -> Any:
    """The value as its field has it. YAML takes 1e-3, without a point, for a word."""
    name, _, optional = annotation.partition(" | ")
    if value is None and optional:
        return None
    if annotation.startswith("tuple"):
        if not isinstance(value, (list, tuple)) or not all(type(part) is int and part > 0 for part in value):
            raise ValueError(f"{where} is a list of whole numbers, not {value!r}")
        return tuple(value)
    if name not in _TYPES:
        return value
    kind, told = _TYPES[name]
    if kind is float and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError(f"{where} is a number, not {value!r}") from None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(f"{where} is {told}, not {value!r}")
    return value


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(part) for part in value]
    return str(value) if isinstance(value, Path) else value


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
