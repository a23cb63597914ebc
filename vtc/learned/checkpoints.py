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

from .adapter import Adapter
from .registry import get_module, make_config

if TYPE_CHECKING:
    from .base import LearnedModule

CONFIG, OWN_WEIGHTS = "config.json", "model.safetensors"
PARTS = {"options": (), "host": ("kind", "widths", "weights"), "adapter": ("layers", "rank", "alpha")}
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")  # under which trainings save weights
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth")


def save(module: LearnedModule, folder: str | Path) -> None:
    from safetensors.torch import save_model

    from .. import __version__

    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a module is saved into a folder")
    if (folder / CONFIG).is_file() and not is_module(folder):
        raise ValueError(f"{folder} holds another model, which would be lost: save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    content = {"module": module.name, "vtc": __version__, "options": dataclasses.asdict(module.config)}
    if module.host is not None:
        content["host"] = module.host
    if module.adapter is not None:
        content["adapter"] = module.adapter.describe()
    save_model(module, str(folder / OWN_WEIGHTS))
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")  # last: with it a folder is a module


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
    if "adapter" in content:
        module.adapter = Adapter(**content["adapter"])
    _check(module, state, name)
    module.load_state_dict(state)
    if "module" in content:
        module.folder, module.host = str(name), content.get("host")
    return module.eval()


def is_module(name: str | Path) -> bool:
    """Whether a folder holds a module that was saved."""
    return (Path(name) / CONFIG).is_file() and "module" in _read_config(Path(name))


def holds(module: LearnedModule, name: str) -> bool:
    """Whether the weights saved there are those that a module has now, to the precision of its dtype; an
    adapter's too."""
    saved = _read(_local(type(module), name, None) / OWN_WEIGHTS)
    own = module.state_dict()
    return saved.keys() == own.keys() and all(torch.equal(saved[key].to(own[key]), own[key]) for key in own)


def check_plan(module: LearnedModule) -> None:
    """Raises ValueError where a plan, which names the folder of a module, would not bring back this one."""
    why = None
    if module.folder is None:
        why = f"this '{module.name}' is in none"
    elif not holds(module, module.folder):
        why = f"the weights of this '{module.name}' are no longer those in {module.folder}"
    if why:
        raise ValueError(
            f"a plan names the folder of a module, and {why}: call its save_pretrained(folder) before"
        )


def _named(cls: type[LearnedModule], saved: str, name: str | Path) -> type[LearnedModule]:
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
    """What config.json says; of a module's, ValueError where a part of it is missing."""
    file = path / CONFIG
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    if not isinstance(content, dict) or "module" not in content:
        return {}
    for name, parts in PARTS.items():
        part = content.get(name, dict.fromkeys(parts))
        if not isinstance(part, dict) or not part.keys() >= set(parts):
            raise ValueError(f"{file} is damaged: its {name!r} is not what save_pretrained() writes")
    return content


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
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(file))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or no file of weights: {error}") from None
    try:
        # never weights_only=False: a pickle may run what it likes
        content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{file} is not read: it is no file of weights, or would run code of its own: {error}"
        ) from None
    except (EOFError, KeyError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged, or no file of weights: {error!r}") from None
    return _tensors(content, file)


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    """The state dict that a file holds, also where that is one entry of a checkpoint of a training."""
    while isinstance(content, dict):
        found = {key: value for key, value in content.items() if isinstance(value, Tensor)}
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:
            return found
        content = inner
    raise ValueError(f"{file} holds {type(content).__name__}, where weights by name were due")


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
