"""Where a tokenizer's weights come from and go to: folders, files and the Hugging Face Hub."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import weights
from ..named import make_config
from ..weights import PATTERNS, check, local, read, read_json

if TYPE_CHECKING:
    from .base import Tokenizer

CONFIGS = ("config.json", "config.yaml")


def load(cls: type[Tokenizer], name: str | Path, revision: str | None, options: dict[str, Any]) -> Tokenizer:
    path = _local(name, revision)
    file = _weights(path)
    found, config = _configuration(cls, str(name), path if path.is_dir() else path.parent, options)
    state = read(file) if _own(file.parent) else found.rename(read(file))
    tokenizer = found(config)
    check(tokenizer, state, name)
    tokenizer.load_state_dict(state)
    return tokenizer.eval()


def save(tokenizer: Tokenizer, folder: str | Path) -> None:
    weights.save(tokenizer, folder, "tokenizer", {"options": dataclasses.asdict(tokenizer.config)})


def _local(name: str | Path, revision: str | None) -> Path:
    def download(name: str) -> str:
        from huggingface_hub import hf_hub_download, snapshot_download

        if file := _published_file(name):
            return hf_hub_download(name, file, revision=revision)
        return snapshot_download(name, revision=revision, allow_patterns=[*CONFIGS, *PATTERNS])

    return local(name, download)


def _published_file(name: str) -> str | None:
    """The file of the tokenizer, where a repository on the Hub holds other models too."""
    from .registry import get_tokenizer, list_tokenizers

    classes = map(get_tokenizer, list_tokenizers())
    return next((cls.published_file for cls in classes if name in cls.published), None)


def _weights(path: Path) -> Path:
    if path.is_file():
        return path
    for pattern in PATTERNS:
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{path} holds several files of weights ({names}): give the path of one")
        if found:
            return found[0]
    raise OSError(f"{path} holds no weights ({', '.join(PATTERNS)})")


def _own(folder: Path) -> bool:
    return "tokenizer" in (_read_config(folder) or {})


def _configuration(
    cls: type[Tokenizer], name: str, folder: Path, options: dict[str, Any]
) -> tuple[type[Tokenizer], Any]:
    from .registry import get_tokenizer, list_tokenizers

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
            return read_json(file)
        import yaml

        return yaml.safe_load(file.read_text())
    return None
