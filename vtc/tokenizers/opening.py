"""What a run over a corpus opens: a tokenizer, a device, and a folder for itself."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from . import manifest
from .base import Tokenizer
from .registry import from_pretrained, get_tokenizer, list_tokenizers

REFERENCE = Path(__file__).parents[2] / "models" / "tiny-tokenizer"


def open_tokenizer(tokenizer: str | Path | Tokenizer, device: torch.device | str) -> Tokenizer:
    """A tokenizer on a device, in evaluation mode: itself, or from a folder, or by its name on the Hub;
    "tiny-tokenizer" is the one of the source checkout.
    """
    if not isinstance(tokenizer, Tokenizer):
        tokenizer = from_pretrained(_located(str(tokenizer)))
    return tokenizer.eval().to(device)


def _located(name: str) -> str | Path:
    if Path(name).exists():
        return name
    if name == REFERENCE.name:
        if REFERENCE.is_dir():
            return REFERENCE
        raise ValueError(
            "the reference tokenizer is not here; the source checkout of vtc has it in "
            "models/tiny-tokenizer: give --tokenizer a folder or a name on the Hugging Face Hub"
        )
    if name in list_tokenizers():
        known = list(get_tokenizer(name).published)
        raise ValueError(
            f"'{name}' is a system, not the weights of one: give a folder that holds some"
            + (f", or a name on the Hugging Face Hub such as {known[0]}" if known else "")
        )
    return name


def pick_device(device: str | torch.device | None) -> torch.device:
    """The device of that name, or the best there is. Raises ValueError where there is none of the name."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # unknown, or PyTorch was built without it
        raise ValueError(f"there is no device {str(device)!r} here: {str(error).splitlines()[0]}") from error


def progress_bar(total: int, progress: bool, what: str) -> Any:
    """Shown on a terminal only."""
    from tqdm import tqdm

    return tqdm(total=total, disable=None if progress else True, unit="image", desc=what)


@contextmanager
def held(out: Path, overwrite: bool) -> Iterator[None]:
    """The output folder, made or emptied of what such a run writes, and kept from other processes."""
    out.mkdir(parents=True, exist_ok=True)
    begun = manifest.read(out) is not None
    foreign = [
        file.name for file in out.iterdir() if not file.name.startswith(".") and not manifest.own(file)
    ]
    if foreign and not begun:
        raise ValueError(f"{out} holds other files, such as {min(foreign)}: give a folder of its own")
    handle = _locked(out)
    try:
        for file in [file for file in out.iterdir() if manifest.own(file)]:
            if file.suffix == ".tmp" or overwrite:
                file.unlink()
        yield
    finally:
        if handle is not None:
            os.close(handle)


def _locked(out: Path) -> int | None:
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    handle = os.open(out, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise RuntimeError(f"another process is writing to {out}: wait or give another folder") from None
    except OSError:  # a file system without locks
        pass
    return handle
