"""Where the weights of a module come from and go to: folders, files and the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import weights
from ..named import make_config
from ..weights import CONFIG, OWN, PATTERNS, check, local, read, read_json
from .adapter import Adapter
from .registry import get_module

if TYPE_CHECKING:
    from .base import LearnedModule

PARTS = {"options": (), "host": ("kind", "widths", "weights"), "adapter": ("layers", "rank", "alpha")}


def save(module: LearnedModule, folder: str | Path) -> None:
    content = {"options": dataclasses.asdict(module.config)}
    if module.host is not None:
        content["host"] = module.host
    if module.adapter is not None:
        content["adapter"] = module.adapter.describe()
    weights.save(module, folder, "module", content)


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
        state = read(path / OWN)
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
    check(module, state, name)
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
    saved = read(_local(type(module), name, None) / OWN)
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
    try:
        found = get_module(saved)
    except ValueError as error:
        raise ValueError(
            f"{name}: {error}; if it is your own, import the file that registers it (the command line finds "
            "those in vtc/learned/)"
        ) from None
    if not issubclass(found, cls):
        raise ValueError(f"{name} is a module '{saved}', not '{getattr(cls, 'name', cls.__name__)}'")
    return found


def _local(cls: type[LearnedModule], name: str | Path, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [CONFIG, OWN, *(PATTERNS if hasattr(cls, "name") else ())]
    return local(name, lambda name: snapshot_download(name, revision=revision, allow_patterns=patterns))


def _read_config(path: Path) -> dict[str, Any]:
    """What config.json says; of a module's, ValueError where a part of it is missing."""
    file = path / CONFIG
    if not file.is_file():
        return {}
    content = read_json(file)
    if "module" not in content:
        return {}
    for name, parts in PARTS.items():
        part = content.get(name, dict.fromkeys(parts))
        if not isinstance(part, dict) or not part.keys() >= set(parts):
            raise ValueError(f"{file} is damaged: its {name!r} is not what save_pretrained() writes")
    return content


def _published(cls: type[LearnedModule], path: Path) -> dict[str, Tensor]:
    """The module's own weights out of one file, or out of the files of a model that it is a part of."""
    if path.is_file():
        return cls.rename(read(path))
    files = next((found for pattern in PATTERNS if (found := sorted(path.glob(pattern)))), [])
    if not files:
        raise OSError(f"{path} holds no weights ({', '.join(PATTERNS)})")
    if len(files) == 1:
        return cls.rename(read(files[0]))
    state: dict[str, Tensor] = {}
    for file in files:  # one after the other: together they may be larger than the memory
        part = read(file)
        state |= {key: part[key] for key in part if key.startswith(cls.prefixes)}
    return cls.rename(state)
