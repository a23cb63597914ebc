"""A configuration of `vtc train` out of a YAML file, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import ERRORS, OWN, PRECISIONS, SET_HERE, SETTINGS, SHARED, Config, Data, Stage
from .values import check_mapping, check_names, checked, made


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
    check_names("the configuration", content, [f.name for f in dataclasses.fields(Config)])
    for name in ("model", "module", "output", "data", "stages"):
        if not content.get(name):
            raise ValueError(f"the configuration has no {name!r}")
    if content.get("precision") is False:  # `no` of YAML 1.1
        content["precision"] = "no"
    config = made(Config, "", content, data=_data(content["data"]), stages=_stages(content["stages"]))
    if config.precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {config.precision!r}")
    _check_module(config.module)
    if config.adapter is not None:
        check_mapping("adapter", config.adapter)
        check_names("adapter", config.adapter, ("rank", "alpha"))
        for name, value in config.adapter.items():
            checked(f"adapter.{name}", "int" if name == "rank" else "float | None", value)
    check_mapping("compress", config.compress)
    check_names("compress", config.compress, SETTINGS)
    if config.data.validation is None and any(stage.evaluate for stage in config.stages):
        raise ValueError("a stage with 'evaluate' needs questions: give data.validation")
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
    check_mapping("data", content)
    check_names("data", content, [f.name for f in dataclasses.fields(Data)])
    if not content.get("train"):
        raise ValueError("data has no 'train': scenes, jsonl:PATH or datasets:NAME")
    data = made(Data, "data.", content)
    for name in ("questions", "n", "n_validation"):
        if (value := getattr(data, name)) is not None and value < 1:
            raise ValueError(f"data.{name} is at least 1, not {value}")
    return data


def _stages(content: Any) -> tuple[Stage, ...]:
    if not isinstance(content, list):
        raise ValueError("stages is a list, like [{kind: features, steps: 500}]")
    stages = tuple(_stage(number, one) for number, one in enumerate(content))
    kinds = [stage.kind for stage in stages]
    if "length" in kinds and kinds[-1] != "length":
        raise ValueError(
            f"stage {len(kinds)}-{kinds[-1]} changes the tokens that the stage of kind length learned to "
            "count: put that one last"
        )
    return stages


def _stage(number: int, content: Any) -> Stage:
    where = f"stages.{number}"
    check_mapping(where, content)
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
    check_names(f"{where}, of kind {kind},", rest, [*SHARED, *OWN[kind], *known], told=(*SHARED, *OWN[kind]))
    if refused := sorted(set(rest) & set(SET_HERE)):
        raise ValueError(
            f"{where}: {', '.join(refused)} cannot be set here: `vtc train` sets what it needs itself"
        )
    stage = made(Stage, f"{where}.", own, arguments=rest)
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
    check_mapping("module", module)
    if ("name" in module) == ("from" in module):
        raise ValueError("module has either a 'name', with options, or 'from', the folder of one")
    if "from" in module and len(module) > 1:
        raise ValueError("a module 'from' a folder has the options it was saved with: leave the others out")


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_copied(part) for part in value]
    return str(value) if isinstance(value, Path) else value
