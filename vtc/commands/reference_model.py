"""The model that a command runs: the one it is given, or the reference model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

REFERENCE = Path(__file__).parents[2] / "models" / "tiny-llava"


def model_named(name: str | None) -> tuple[Any, Any]:
    """A model and its processor."""
    from ..ask import load_model

    quiet()
    if name is None and not (REFERENCE / "config.json").is_file():
        raise ValueError(
            "the reference model is not here; the source checkout of vtc has it in models/tiny-llava: "
            "give --model a folder or a name on the Hugging Face Hub"
        )
    return load_model(name or REFERENCE)


def quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
