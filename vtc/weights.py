"""Files of weights: where they are, what is in them, and whether they are those of a module."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

CONFIG, OWN = "config.json", "model.safetensors"
PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt")
# Under which trainings save weights. A running average comes first: it is what authors evaluate.
WRAPPERS = ("ema", "state_dict", "model", "model_state_dict", "module")


def local(name: str | Path, download: Callable[[str], str]) -> Path:
    """The folder or file of that name; else what `download` fetches from the Hugging Face Hub. OSError for
    neither."""
    path = Path(name)
    if path.exists():
        return path
    if str(name).count("/") != 1 or path.is_absolute() or str(name).startswith("."):
        raise OSError(f"there is no folder or file {name}, and it is no name on the Hugging Face Hub")
    try:
        return Path(download(str(name)))
    except Exception as error:  # offline, unknown, gated: the library has a class for each
        raise OSError(f"{name} is no folder here and could not be fetched from the Hub: {error}") from error


def read(file: Path) -> dict[str, Tensor]:
    """The state dict that a file holds, out of whatever a training wrapped it in. Raises OSError for no file,
    ValueError for one that is damaged or would run code."""
    if not file.is_file():
        raise OSError(f"there is no file {file}")
    if file.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(str(file))
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged, or no file of weights: {error}") from None
    # Never weights_only=False: a pickle may run what it likes.
    with torch.serialization.safe_globals([argparse.Namespace]):  # trainings keep their arguments beside
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{file} is not read: it is no file of weights, or would run code of its own: {error}"
            ) from None
        except (EOFError, KeyError, RuntimeError) as error:
            raise ValueError(f"{file} is damaged, or no file of weights: {error!r}") from None
    return _tensors(content, file)


def check(module: nn.Module, state: dict[str, Tensor], name: str | Path) -> None:
    """Raises ValueError where a state dict is not that of a module, which has a `name` of its own."""
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


def save(module: nn.Module, folder: str | Path, kind: str, content: dict[str, Any]) -> None:
    """Writes weights and what config.json says of them, by which the folder is known as one of a `kind`.
    Raises ValueError for a file, and for a folder that holds anything else."""
    from safetensors.torch import save_model

    from . import __version__

    folder = Path(folder)
    if folder.is_file():
        raise ValueError(f"{folder} is a file: a {kind} is saved into a folder")
    if (folder / CONFIG).is_file() and kind not in read_json(folder / CONFIG):
        raise ValueError(f"{folder} holds another model, which would be lost: save into another folder")
    folder.mkdir(parents=True, exist_ok=True)
    save_model(module, str(folder / OWN))
    content = {kind: module.name, "vtc": __version__, **content}
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")  # last: with it a folder is one


def read_json(file: Path) -> dict[str, Any]:
    """What a file says, {} where that is no object. Raises ValueError for no JSON."""
    try:
        content = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is no JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _tensors(content: Any, file: Path) -> dict[str, Tensor]:
    while isinstance(content, dict):
        inner = next((content[key] for key in WRAPPERS if isinstance(content.get(key), dict)), None)
        if inner is None:  # those of a model that was wrapped for several devices have its name in front
            return {
                key.removeprefix("module."): each for key, each in content.items() if isinstance(each, Tensor)
            }
        content = inner
    raise ValueError(f"{file} holds {type(content).__name__}, where weights by name were due")
