"""Where a tokenizer's weights come from and go to: folders, files and the Hugging Face Hub."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Tokenizer

CONFIGS = ("config.json", "config.yaml")
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")


def load(cls: type[Tokenizer], name: str | Path, revision: str | None, options: dict[str, Any]) -> Tokenizer:
    path = _local(name, revision)
    weights = _weights(path)
    found, config = _configuration(cls, str(name), path if path.is_dir() else path.parent, options)
    state = _state(weights) if _own(weights.parent) else found.rename(_state(weights))
    tokenizer = found(config)
    _check(tokenizer, state, name)
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    from safetensors.torch import save_model

    from .. import __version__

    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a tokenizer is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "tokenizer": tokenizer.name, "vtc": __version__, "options": dataclasses.asdict(tokenizer.config)
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n")
    save_model(tokenizer, str(folder / "model.safetensors"))


def _local(name: str | Path, revision: str | None) -> Path:
    path = Path(name)
    if path.exists():
        return path
    if str(name).count("/") != 1 or path.is_absolute() or str(name).startswith("."):
        raise OSError(f"there is no folder or file {name}, and it is no name on the Hugging Face Hub")
    from huggingface_hub import hf_hub_download, snapshot_download

    file = _published_file(str(name))
    try:
        if file:
            return Path(hf_hub_download(str(name), file, revision=revision))
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[*CONFIGS, *WEIGHTS]))
    except Exception as error:  # offline, unknown, gated: the library has a class for each
        raise OSError(f"{name} is no folder here and could not be fetched from the Hub: {error}") from error


def _published_file(name: str) -> str | None:
    """The file of the tokenizer, where a repository on the Hub holds other models too."""
    from .registry import get_tokenizer, list_tokenizers

    classes = map(get_tokenizer, list_tokenizers())
    return next((cls.published_file for cls in classes if name in cls.published), None)


def _weights(path: Path) -> Path:
    if path.is_file():
        return path
    for pattern in WEIGHTS:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds several files of weights ({names}): give the path of one")
        if found:
            return found[0]
    raise OSError(f"{path} holds no weights ({', '.join(WEIGHTS)})")


def _own(folder: Path) -> bool:
    return "tokenizer" in (_read_config(folder) or {})


def _configuration(
    cls: type[Tokenizer], name: str, folder: Path, options: dict[str, Any]
) -> tuple[type[Tokenizer], Any]:
    from .registry import get_tokenizer, list_tokenizers, make_config

    candidates = [cls] if hasattr(cls, "name") else [get_tokenizer(known) for known in list_tokenizers()]
    content = _read_config(folder) or {}
    if "tokenizer" in content:
        found = get_tokenizer(content["tokenizer"])
        if found not in candidates:
            raise ValueError(
                f"{name} is a '{found.name}' tokenizer, not '{cls.name}': use vtc.tokenizers.from_pretrained"
            )
        return found, make_config(found, content["options"] | options)
    for candidate in candidates:
        # what lies beside the weights knows them best
        config = candidate.config_from(content) if content else None
        # files that are no Hub repositories are known by their own name
        config = config or candidate.published.get(name) or candidate.published.get(Path(name).name)
        if config is not None:
            return candidate, dataclasses.replace(config, **options)
    if len(candidates) == 1 and options:  # a bare file of weights
        return cls, make_config(cls, options)
    raise ValueError(
        f"{name} does not say which tokenizer it is: use the class, like "
        "TiTok.from_pretrained(path, **options), with the options of its Config"
    )


def _read_config(folder: Path) -> dict[str, Any] | None:
    for name in CONFIGS:
        file = folder / name
        if not file.is_file():
            continue
        if file.suffix == ".json":
            return json.loads(file.read_text())
        import yaml

        return yaml.safe_load(file.read_text())
    return None


def _state(file: Path) -> dict[str, Tensor]:
    """The weights of a file, out of whatever a trainer wrapped them in."""
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(file))
    # Never weights_only=False: a pickle may run what it likes.
    with torch.serialization.safe_globals([argparse.Namespace]):  # trainers keep their arguments beside
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file} is not read: it is no file of weights, or would run code of its own: {error}"
            ) from None
    # where there is a running average of the weights, it is what the authors evaluate
    for key in ("ema", "state_dict", "model", "model_state_dict"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {
        name.removeprefix("module."): value for name, value in content.items() if isinstance(value, Tensor)
    }


def _check(tokenizer: Tokenizer, state: dict[str, Tensor], name: str | Path) -> None:
    wanted = tokenizer.state_dict()
    missing, unknown = sorted(set(wanted) - set(state)), sorted(set(state) - set(wanted))
    shapes = [key for key in wanted if key in state and wanted[key].shape != state[key].shape]
    found = {"without": missing, "with unknown": unknown, "of another shape": shapes}
    problems = [
        f"{what} {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''} ({len(keys)})"
        for what, keys in found.items()
        if keys
    ]
    if problems:
        raise ValueError(f"the weights of {name} are not of this {tokenizer.name}: {'; '.join(problems)}")
