"""What a folder of token shards was made of: manifest.json, and images.jsonl, the list of pictures."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .images import SUFFIXES

if TYPE_CHECKING:
    from .base import Tokenizer
    from .shards import Shard

MANIFEST, IMAGES = "manifest.json", "images.jsonl"
OWN = r"manifest\.json|images\.jsonl|shard-\d+\.(safetensors|parquet)|\..*\.tmp"
# What decides about the tokens: a folder in which one of these was another is not continued.
DECISIVE = ("tokenizer", "policy_asked", "calibrate", "fit", "format", "dtype", "shard_size")

Listed = list[tuple[str, int]]  # names, with "/", and sizes in bytes


def list_images(folder: Path, leave_out: Path | None = None) -> Listed:
    """The pictures of a folder and its sub-folders by their suffixes, sorted by name.

    Hidden files and folders are left out. Linked folders are followed, each folder once.
    """
    found, seen = [], set()
    if leave_out is not None:
        seen.add(os.path.realpath(leave_out))
    for path, folders, files in os.walk(folder, followlinks=True):
        here = os.path.realpath(path)
        if here in seen:
            folders.clear()
            continue
        seen.add(here)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            file = Path(path, name)
            if file.suffix.lower() in SUFFIXES and not name.startswith(".") and file.is_file():
                found.append((file.relative_to(folder).as_posix(), file.stat().st_size))
    return sorted(found)


def weights_digest(tokenizer: Tokenizer) -> str:
    """The SHA-256 of names, types, shapes and bytes of all weights, whatever file they came in."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def describe(tokenizer: Tokenizer, source: str | None) -> dict[str, Any]:
    return {
        "name": tokenizer.name,
        "source": source,
        "weights_sha256": weights_digest(tokenizer),
        "config": dataclasses.asdict(tokenizer.config),
        "codes": tokenizer.quantize.size,
        "dim": tokenizer.quantize.dim,
        "max_tokens": tokenizer.max_tokens,
        "bits_per_token": tokenizer.bits_per_token,
    }


def check_tokenizer(described: dict[str, Any], tokenizer: Tokenizer) -> None:
    """Raises ValueError where a tokenizer is not the one a manifest describes."""
    if tokenizer.name != described["name"] or weights_digest(tokenizer) != described["weights_sha256"]:
        raise ValueError(
            f"these tokens were made by another tokenizer: a '{described['name']}' with weights of SHA-256 "
            f"{described['weights_sha256'][:12]}…, from {described['source']}"
        )


def begin(folder: Path, settings: dict[str, Any], images: Listed) -> dict[str, Any]:
    """Writes and returns the manifest of a run that has made nothing yet."""
    write(folder / IMAGES, "".join(f"{json.dumps(image)}\n" for image in images))
    write(folder / MANIFEST, settings | {"complete": False})
    return read(folder)


def read(folder: str | Path) -> dict[str, Any] | None:
    """The manifest of a folder, or None. Raises ValueError where it is no such."""
    file = Path(folder) / MANIFEST
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text())
    except ValueError:
        content = None
    if not isinstance(content, dict) or not {"complete", *DECISIVE} <= content.keys():
        raise ValueError(f"{file} is no manifest of tokens: give another folder")
    return content


def finished(folder: str | Path) -> dict[str, Any]:
    """The manifest of a finished run. Raises OSError where there is none, ValueError where it is not done."""
    content = read(folder)
    if content is None:
        raise OSError(f"there are no tokens in {folder}: it has no {MANIFEST}")
    if not content["complete"]:
        raise ValueError(f"{folder} is not finished: run `vtc tokenize` again as before, it goes on")
    return content


def read_images(folder: Path) -> Listed:
    return [tuple(json.loads(line)) for line in (folder / IMAGES).read_text().splitlines()]


def check_same(folder: Path, known: dict[str, Any], settings: dict[str, Any], images: Listed) -> None:
    """Raises ValueError, which says what it is, where a run was begun with other settings or pictures."""
    way_out = "give another output folder, or --overwrite to start anew"
    settings = json.loads(json.dumps(settings))  # tuples are lists there
    told = [
        f"{name.replace('_', ' ')} {_shown(known[name])}, not {_shown(settings[name])}"
        for name in DECISIVE[1:]
        if known[name] != settings[name]
    ]
    other = _another(known["tokenizer"], settings["tokenizer"]) or "".join(told[:1])
    if other:
        raise ValueError(f"{folder} was begun with {other}: {way_out}")
    then, now = dict(read_images(folder)), dict(images)
    changes = {
        "new": sorted(now.keys() - then.keys()),
        "gone": sorted(then.keys() - now.keys()),
        "of another size": [name for name in then if now.get(name, then[name]) != then[name]],
    }
    told = [f"{len(names)} {what} ({_some(names)})" for what, names in changes.items() if names]
    if told:
        raise ValueError(f"pictures have changed since {folder} was begun: {', '.join(told)}; {way_out}")


def finish(folder: Path, settings: dict[str, Any], shards: Iterable[tuple[Path, Shard]]) -> dict[str, Any]:
    """Writes the manifest of a run that is done, and returns it. `shards` may be read one after the other."""
    rows, unreadable, lengths = [], {}, Counter()
    for file, shard in shards:
        digest = hashlib.sha256(content := file.read_bytes()).hexdigest()
        rows.append({
            "file": file.name, "images": len(shard), "tokens": len(shard.tokens), "bytes": len(content),
            "sha256": digest,
        })  # fmt: skip
        unreadable |= shard.unreadable
        lengths.update(shard.lengths.tolist())
    images, tokens = lengths.total(), sum(row["tokens"] for row in rows)
    if not images:
        name, reason = next(iter(unreadable.items()))
        raise ValueError(f"none of the {len(unreadable)} pictures could be read; {_plain(name)}: {reason}")
    content = settings | {
        "complete": True,
        "images": images,
        "tokens": tokens,
        "mean_length": tokens / images,
        "lengths": {str(length): lengths[length] for length in sorted(lengths)},
        "bytes": sum(row["bytes"] for row in rows),
        "unreadable": unreadable,
        "shards": rows,
    }
    write(folder / MANIFEST, content)
    return content


def write(file: Path, content: dict[str, Any] | str) -> None:
    """A whole file or none. Text is ASCII, so that names of any bytes can be in it."""
    text = content if isinstance(content, str) else json.dumps(content, indent=2) + "\n"
    aside = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    aside.write_text(text)
    aside.replace(file)


def versions() -> dict[str, str]:
    import torch

    from .. import __version__

    return {"vtc": __version__, "torch": torch.__version__}


def own(file: Path) -> bool:
    """Whether a file is one that such a run writes."""
    return file.is_file() and bool(re.fullmatch(OWN, file.name))


def _another(then: dict[str, Any], now: dict[str, Any]) -> str:
    """How a described tokenizer differs from another; empty where it does not."""
    if then["name"] != now["name"]:
        return f"a '{then['name']}' tokenizer, not '{now['name']}'"
    for option, value in then["config"].items():
        if now["config"].get(option) != value:
            return f"a tokenizer with {option}={value!r}, not {now['config'].get(option)!r}"
    if then["weights_sha256"] != now["weights_sha256"]:
        return f"other weights of the tokenizer, of SHA-256 {then['weights_sha256'][:12]}"
    return ""


def _shown(value: Any) -> str:
    return json.dumps(value).replace('"', "")


def _some(names: list[str]) -> str:
    return ", ".join(map(_plain, names[:3])) + (", ..." if len(names) > 3 else "")


def _plain(name: str) -> str:
    return name.encode(errors="replace").decode()
