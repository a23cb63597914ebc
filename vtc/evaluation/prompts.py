"""A task as the batches that a model's `generate` takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .tasks import Item, Task

if TYPE_CHECKING:
    from PIL.Image import Image

CACHE = 1 << 29  # bytes of encoded batches kept for the next run over the same task


@dataclass
class Batch:
    """Items with the inputs that ask them, padded on the left; `errors` names items that cannot be asked."""

    items: list[Item]
    inputs: dict[str, Tensor]
    errors: list[dict[str, str]] = field(default_factory=list)


class Batches:
    """The batches of a task; a second pass finds those that fit into CACHE ready."""

    def __init__(self, processor, task: Task, size: int = 64):
        self.processor, self.task, self.size = processor, task, size
        self._ready: dict[int, Batch] = {}
        self._bytes = 0

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.task.items), self.size):
            batch = self._ready.get(start) or self._encode(self.task.items[start : start + self.size])
            weight = sum(tensor.nbytes for tensor in batch.inputs.values())
            if start not in self._ready and self._bytes + weight <= CACHE:
                self._ready[start] = batch
                self._bytes += weight
            yield batch

    def first(self) -> Batch:
        """The first item that can be asked, alone. Raises ValueError if there is none."""
        for item in self.task.items:
            batch = self._encode([item])
            if batch.items:
                return batch
        raise ValueError(f"no item of task '{self.task.name}' can be asked: {batch.errors[0]['error']}")

    def answer_length(self) -> int:
        """Tokens that hold the longest answer, with room for a full stop and the end of the text."""
        answers = [item.answer for item in self.task.items]
        tokens = self.processor.tokenizer(answers, add_special_tokens=False).input_ids
        return max(map(len, tokens)) + 4

    def _encode(self, items: list[Item]) -> Batch:
        opened, images, errors = [], [], []
        for item in items:
            try:
                image = self._open(item)
            except (OSError, ValueError) as error:
                errors.append({"item": item.where, "error": str(error)})
            else:
                opened.append(item)
                images.append(image)
        return Batch(opened, self._inputs(opened, images) if opened else {}, errors)

    def _inputs(self, items: list[Item], images: list[Image]) -> dict[str, Tensor]:
        return encode(self.processor, [item.question for item in items], images)

    def _open(self, item: Item) -> Image:
        if item.error:
            raise ValueError(item.error)
        if (token := getattr(self.processor, "image_token", None)) and token in item.question:
            raise ValueError(f"the question holds {token!r}, which stands for an image")
        return item.open()


def encode(processor, questions: list[str], images: list[Image] | None) -> dict[str, Tensor]:
    """One prompt per question, by the processor's chat template if it has one; without images where None."""
    how = {"padding": True, "padding_side": "left", "return_tensors": "pt"}
    # A list for each prompt: several processors take a flat list for the images of one.
    each = [[] if images is None else [images[i]] for i in range(len(questions))]
    if getattr(processor, "chat_template", None):
        chats = [
            [{"role": "user", "content": [*map(_image, own), {"type": "text", "text": question}]}]
            for own, question in zip(each, questions, strict=True)
        ]
        # The template itself, because the processor looks at what it begins with: the text begins once only.
        inputs = processor.apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True, processor_kwargs=how
        )
    else:
        image = "" if images is None else f"{getattr(processor, 'image_token', '<image>')}\n"
        given = {} if images is None else {"images": each}
        inputs = processor(text=[image + question for question in questions], **how, **given)
    return {name: value for name, value in inputs.items() if name != "labels"}  # PaliGemma's, for training


def _image(image: Image) -> dict[str, Any]:
    return {"type": "image", "image": image}


def place(inputs: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """The inputs on the model's device, pixels in its dtype."""
    return {
        name: tensor.to(model.device, model.dtype if tensor.is_floating_point() else None)
        for name, tensor in inputs.items()
    }
