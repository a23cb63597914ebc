"""Loading a vision-language model and asking it about an image, with and without compression."""

from __future__ import annotations

import statistics
import time
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .api import compress, current
from .cost import recording
from .evaluation.prompts import encode, place
from .images import open_image
from .record import Record


@dataclass
class Answer:
    """What a model said.

    tokens   image tokens that were kept
    seconds  time from the finished inputs to the last generated token
    records  what became of the image's tokens, of each tile that is an image to the model; empty without
             compression
    """

    text: str
    tokens: int
    seconds: float
    records: list[Record] = field(default_factory=list)


def load_model(
    name: str | Path, device: str | torch.device | None = None, dtype: str | torch.dtype | None = None
) -> tuple[nn.Module, Any]:
    """A vision-language model and its processor from a folder or from the Hugging Face Hub.

    device  a GPU where there is one, by default
    dtype   the one the weights are stored in, by default
    Raises ValueError in one sentence where there is no such model, or it does not read images and text.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = Path(name).expanduser()
    source = str(folder) if folder.exists() else str(name)
    try:
        _check_answers_questions(source)
        processor = AutoProcessor.from_pretrained(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype or "auto")
    except (OSError, SafetensorError) as error:
        raise ValueError(_missing(name, folder)) from error
    if getattr(processor, "image_processor", None) is None:
        raise ValueError(f"'{name}' comes without an image processor: add its processor config")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return model.to(device).eval(), processor


def ask(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    method: str | None = None,
    keep: int | float | None = None,
    max_new_tokens: int = 32,
    **options: Any,
) -> Answer:
    """Asks once, greedily. With a method the model is compressed for this answer only, else it runs as it is.

    image    a path or a PIL image
    options  the method's own, and `stage`
    """
    if method is None and (keep is not None or options):
        raise ValueError("keep and options belong to a method: give its name, like method='vtc-cls'")
    inputs = place(encode(processor, [question], [open_image(image)]), model)
    with compress(model, method, keep, **options) if method else nullcontext():
        return _answer(model, processor, inputs, max_new_tokens)


def compare_answers(
    model: nn.Module,
    processor: Any,
    image: Any,
    question: str,
    method: str,
    keep: int | float,
    max_new_tokens: int = 32,
    repeats: int = 3,
    **options: Any,
) -> tuple[Answer, Answer]:
    """The answer of the full model and of the compressed one, each with its median time.

    Both run once unmeasured and then in turn, so that a drifting clock speed hits both alike.
    """
    arguments = (model, processor, image, question)
    settings = ({}, {"method": method, "keep": keep, **options})
    rounds = [
        [ask(*arguments, max_new_tokens=max_new_tokens, **setting) for setting in settings]
        for _ in range(repeats + 1)
    ]
    full, compressed = (
        replace(answers[0], seconds=statistics.median(answer.seconds for answer in answers))
        for answers in zip(*rounds[1:], strict=True)
    )
    return full, compressed


@torch.no_grad()
def _answer(model: nn.Module, processor: Any, inputs: dict[str, Any], max_new_tokens: int) -> Answer:
    with recording(model) as handle:
        start = time.perf_counter()
        output = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        new = output[0, inputs["input_ids"].shape[1] :].tolist()  # the host waits for the last token
        seconds = time.perf_counter() - start
        records = handle.last
    text = processor.decode(new, skip_special_tokens=True).strip()
    tokens = sum(len(record.index) for record in records)
    return Answer(text, tokens, seconds, records if current(model) else [])


def _check_answers_questions(source: str) -> None:
    """Raises ValueError for a model of another kind, before its weights are read, and OSError for none."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    try:
        model_type = AutoConfig.from_pretrained(source).model_type
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"'{source}' is no model that transformers can load: {reason}") from error
    if model_type not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise ValueError(f"'{source}' is a {model_type} model: it does not answer questions about images")


def _missing(name: str | Path, folder: Path) -> str:
    if folder.exists():
        return f"the folder '{name}' holds no complete model: it needs config, weights and processor files"
    if folder.is_absolute() or str(name).startswith((".", "~")) or str(name).count("/") > 1:
        return f"there is no folder '{name}'"
    return f"there is no folder '{name}' here, and the Hugging Face Hub has no such model or is out of reach"
