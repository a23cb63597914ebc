"""For a handful of questions: what every method kept of the image, and what the model then answered."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import nn

from ..api import compress
from ..cost import recording
from ..draw import draw
from ..views import place as place_records
from .prompts import Batches, encode, place
from .runner import label
from .tasks import Item, Task

if TYPE_CHECKING:
    from PIL.Image import Image

SIDE = 144  # pixels of a picture's long side: a page holds some hundreds of them


@dataclass(frozen=True)
class Picture:
    """An image as the model saw it; `tokens` of it were kept, and what was then answered."""

    url: str
    tokens: int
    answer: str
    right: bool


@dataclass
class Exhibit:
    """A question with the picture of every (method's label, keep)."""

    item: Item
    original: Picture
    kept: dict[tuple[str, float | int], Picture] = field(default_factory=dict)


def gallery(
    model: nn.Module, processor, task: Task, runs: Iterable[tuple[str, dict, float | int]], n: int
) -> list[Exhibit]:
    """Asks n items of different kinds once per run of (method, options, keep) and draws what was kept.

    [] where tokens are queries of a resampler, which cannot be drawn.
    """
    items = _varied(task, n)
    if not items:
        return []
    images = [item.open() for item in items]
    batches = Batches(processor, Task(task.name, items))
    inputs = place(encode(processor, [item.question for item in items], images), model)

    def answers() -> list[str]:
        output = model.generate(**inputs, do_sample=False, max_new_tokens=batches.answer_length())
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]

    with recording(model) as handle:
        given = answers()
        if any(record.latent for record in handle.last):
            return []
        full = place_records(images, handle.last, processor)
    exhibits = [
        Exhibit(
            item,
            Picture(data_url(_fitted(image)), len(record.index), answer, item.matches(answer)),
        )
        for item, image, record, answer in zip(items, images, full, given, strict=True)
    ]
    for method, options, keep in runs:
        with compress(model, method, keep=keep, **options) as handle:
            given = answers()
            records = place_records(images, handle.last, processor)
            for exhibit, image, record, answer in zip(exhibits, images, records, given, strict=True):
                url = data_url(draw(image, record, processor=processor, caption=False, long_side=SIDE))
                right = exhibit.item.matches(answer)
                kept = Picture(url, len(record.index), answer, right)
                exhibit.kept[label(method, options), keep] = kept
    return exhibits


def data_url(image: Image) -> str:
    """The picture as text that an HTML page can hold."""
    file = io.BytesIO()
    image.convert("RGB").save(file, "WEBP", quality=72, method=6)
    return "data:image/webp;base64," + base64.b64encode(file.getvalue()).decode()


def _fitted(image: Image) -> Image:
    from PIL import Image

    scale = SIDE / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.LANCZOS)


def _varied(task: Task, n: int) -> list[Item]:
    """n items that can be opened, one of each kind before a second of any."""
    kinds: dict[str, list[Item]] = {}
    for item in task.items:
        if item.error is None:
            kinds.setdefault(item.kind, []).append(item)
    turns = [(place, item) for found in kinds.values() for place, item in enumerate(found[:n])]
    chosen = []
    for _, item in sorted(turns, key=lambda turn: turn[0]):
        try:
            item.open()
        except (OSError, ValueError):
            continue
        chosen.append(item)
        if len(chosen) == n:
            break
    return chosen
