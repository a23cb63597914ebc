"""Where the weights of a module come from and go to: folders, files and the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import LearnedModule

CONFIG, OWN_WEIGHTS = "config.json", "model.safetensors"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def save(module: LearnedModule, folder: str | Path) -> None:
    from safetensors.torch import save_model

    from .. import __version__

    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a module is saved into a folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"module": module.name, "vtc": __version__, "options": dataclasses.asdict(module.config)}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    save_model(module, str(folder / OWN_WEIGHTS))


def push(module: LearnedModule, name: str, private: bool | None) -> str:
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, private=private, exist_ok=True)
    with TemporaryDirectory() as folder:
        save(module, folder)
        api.upload_folder(
            repo_id=name, folder_path=folder, commit_message=f"The weights of a {module.name} module"
        )
    return f"https://huggingface.co/{name}"


def load(
    cls: type[LearnedModule], name: str | Path, revision: str | None, options: dict[str, Any]
) -> LearnedModule:
    from .base import make_config

    path = _local(cls, name, revision)
    content = _read_config(path)
    if "module" in content:
        found = _named(cls, content["module"], name)
        config = make_config(found, content.get("options", {}) | options)
        state = _read(path / OWN_WEIGHTS)
    elif hasattr(cls, "name"):
        found, config, state = cls, make_config(cls, options), _published(cls, path)
    else:
        raise ValueError(
            f"{name} does not say which module it is: use the class of the module, like "
            "get_module('mqt').from_pretrained(path, **options)"
        )
    module = found(config)
    _check(module, state, name)
    module.load_state_dict(state)
    return module.eval()


def _named(cls: type[LearnedModule], saved: str, name: str | Path) -> type[LearnedModule]:
    from .base import get_module

    found = get_module(saved)
    if not issubclass(found, cls):
        raise ValueError(f"{name} is a module '{saved}', not '{getattr(cls, 'name', cls.__name__)}'")
    return found


def _local(cls: type[LearnedModule], name: str | Path, revision: str | None) -> Path:
    path = Path(name)
    if path.exists():
        return path
    if str(name).count("/") != 1 or path.is_absolute() or str(name).startswith("."):
        raise OSError(f"there is no folder or file {name}, and it is no name on the Hugging Face Hub")
    from huggingface_hub import snapshot_download

    published = WEIGHTS if hasattr(cls, "name") else ()
    try:
        return Path(
            snapshot_download(str(name), revision=revision, allow_patterns=[CONFIG, OWN_WEIGHTS, *published])
        )
    except Exception as error:  # offline, unknown, gated: the library has a class for each
        raise OSError(f"{name} is no folder here and could not be fetched from the Hub: {error}") from error


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG
    return json.loads(file.read_text()) if file.is_file() else {}


def _published(cls: type[LearnedModule], path: Path) -> dict[str, Tensor]:
    """The module's own weights out of one file, or out of the files of a model that it is a part of."""
    if path.is_file():
        return cls.rename(_read(path))
    files = next((found for pattern in WEIGHTS if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise OSError(f"{path} holds no weights ({', '.join(WEIGHTS)})")
    if len(files) == 1:
        return cls.rename(_read(files[0]))
    state: dict[str, Tensor] = {}
    for file in files:  # one after the other: together they may be larger than the memory
        part = _read(file)
        state |= {key: part[key] for key in part if key.startswith(cls.prefixes)}
    return cls.rename(state)


def _read(file: Path) -> dict[str, Tensor]:
    if not file.is_file():
        raise OSError(f"there is no file {file}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(str(file))
    try:
        # never weights_only=False: a pickle may run what it likes
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is not read: it is no file of weights, or would run code of its own: {error}"
        ) from None
    return {key: value for key, value in content.items() if isinstance(value, Tensor)}


def _check(module: LearnedModule, state: dict[str, Tensor], name: str | Path) -> None:
    wanted = module.state_dict()
    found = {
        "without": sorted(set(wanted) - set(state)),
        "with unknown": sorted(set(state) - set(wanted)),
        "of another shape": [key for key in wanted if key in state and wanted[key].shape != state[key].shape],
    }
    problems = [
        f"{what} {', '.join(keys[:4])}{' ...' if len(keys) > 4 else ''} ({len(keys)})"
        for what, keys in found.items()
        if keys
    ]
    if problems:
        raise ValueError(f"the weights of {name} are not of this {module.name}: {'; '.join(problems)}")
