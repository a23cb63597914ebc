"""Batches of pictures, and of questions about them, as a host's forward takes them."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..evaluation.prompts import encode
from .pictures import Picture

if TYPE_CHECKING:
    from PIL.Image import Image

IGNORED = -100  # in `wanted`: nothing is to be foretold here
QUESTION = "Describe this picture."  # where only the picture is looked at
PROMPTS = 50_000  # tokenised ones that are kept

Row = dict[str, Tensor]  # input_ids and whatever else has one entry for each token, (L,) each


@dataclass(frozen=True)
class Visit:
    """A picture with those of its questions that are asked together."""

    picture: int
    questions: tuple[int, ...] = ()


def visits(pictures: Sequence[Picture], together: int) -> list[Visit]:
    """All pictures, each as often as its questions need that come `together` at a time."""
    return [
        Visit(number, tuple(range(start, min(start + together, len(picture.questions)))))
        for number, picture in enumerate(pictures)
        for start in range(0, len(picture.questions), together)
    ]


class Looked:
    """Collates visits to what the host's encoder is given: {"vision": inputs}."""

    def __init__(self, processor: Any, pictures: Sequence[Picture], skip_broken: bool = False):
        self.processor, self.pictures, self.skip_broken = processor, pictures, skip_broken

    def __call__(self, wanted: Sequence[Visit]) -> dict[str, Any]:
        images = self.opened(wanted)
        inputs = encode(self.processor, [QUESTION] * len(images), list(images.values()))
        return {"vision": self.split(inputs)[0]}

    def opened(self, wanted: Sequence[Visit]) -> dict[int, Image]:
        """By the picture's number. Raises ValueError for one that cannot be read, where it is not skipped."""
        images: dict[int, Image] = {}
        for visit in wanted:
            if visit.picture in images:
                continue
            picture = self.pictures[visit.picture]
            try:
                images[visit.picture] = picture.open()
            except (OSError, ValueError) as error:
                if not self.skip_broken:
                    raise ValueError(f"{picture.where}: {error}; mend it, or set data.skip_broken") from error
                warnings.warn(f"left out {picture.where}: {error}", stacklevel=2)
        if not images:
            raise ValueError(f"none of {len(wanted)} pictures of a step can be read")
        return images

    def split(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What the encoder is given, and what has an entry for each token of a prompt."""
        shape = inputs["input_ids"].shape
        text = {
            name: value
            for name, value in inputs.items()
            if isinstance(value, Tensor) and value.shape == shape and not value.is_floating_point()
        }
        return {name: value for name, value in inputs.items() if name not in text}, text


class Asked(Looked):
    """Collates visits to prompts with answers.

    vision   what the encoder is given for the pictures, or for the picture of each row
    prefix   of each picture (P, C) what all its prompts begin with, the picture in it
    tail     of each question (R, T) the rest of the prompt, and the answer; padded on the right
    rows     in the place of both, where prompts are not of one form: (R, L)
    owner    (R,) the picture of each question
    wanted   (R, T or L) at each place the token of the answer that follows, its end included; else IGNORED
    """

    def __init__(
        self,
        processor: Any,
        pictures: Sequence[Picture],
        image_token: int | None,
        end: int,
        skip_broken: bool = False,
    ):
        super().__init__(processor, pictures, skip_broken)
        self.image_token, self.end = image_token, end
        self.pad = getattr(processor.tokenizer, "pad_token_id", None) or 0
        self.shared = image_token is not None  # whether prompts about one picture are run from a common one
        self._prompts: dict[tuple[str, tuple[int, int]], Row] = {}

    def __call__(self, wanted: Sequence[Visit]) -> dict[str, Any]:
        images = self.opened(wanted)
        order = {number: place for place, number in enumerate(images)}
        asked = [
            (order[visit.picture], *self.pictures[visit.picture].questions[question])
            for visit in wanted
            if visit.picture in images
            for question in visit.questions
        ]
        asked.sort(key=lambda row: row[0])
        return self.batch(list(images.values()), asked, self.shared)

    def batch(self, images: list[Image], asked: list[tuple[int, str, str]], shared: bool) -> dict[str, Any]:
        """asked: the number of the picture, the question and the answer, pictures in order."""
        owner = [picture for picture, _, _ in asked]
        answers = [self._answer(answer) for _, _, answer in asked]
        if shared:
            vision, prompts = self._prompts_of(images, asked)
            common = self._common(prompts, owner)
            if common:
                rows = [self._row(prompt, answer) for prompt, answer in zip(prompts, answers)]
                first = [owner.index(picture) for picture in range(len(images))]
                prefix = [{name: x[:common] for name, x in prompts[row].items()} for row in first]
                tail = [{name: x[common:] for name, x in row.items()} for row in rows]
                wanted = [w[common:] for w in map(self._wanted, prompts, answers)]
                parts = {"prefix": self._stacked(prefix), "tail": self._stacked(tail)}
                return {"vision": vision, **parts, **self._told(owner, wanted)}
        inputs = encode(self.processor, [q for _, q, _ in asked], [images[i] for i in owner])
        vision, text = self.split(inputs)
        prompts = self._unpadded(text)
        rows = [self._row(prompt, answer) for prompt, answer in zip(prompts, answers)]
        wanted = list(map(self._wanted, prompts, answers))
        return {"vision": vision, "rows": self._stacked(rows), **self._told(owner, wanted)}

    def _prompts_of(
        self, images: list[Image], asked: list[tuple[int, str, str]]
    ) -> tuple[dict[str, Tensor], list[Row]]:
        """What the encoder is given for the pictures, and the prompt of each question."""
        first: dict[int, str] = {}
        for picture, question, _ in asked:
            first.setdefault(picture, question)
        inputs = encode(self.processor, list(first.values()), images)
        vision, text = self.split(inputs)
        known = self._prompts
        if len(known) > PROMPTS:
            known.clear()
        keys = [(question, images[picture].size) for picture, question, _ in asked]
        for (picture, question), prompt in zip(first.items(), self._unpadded(text)):
            known[question, images[picture].size] = prompt
        missing = {key: row[0] for key, row in zip(keys, asked) if key not in known}
        if missing:
            pictures = [images[picture] for picture in missing.values()]
            _, text = self.split(encode(self.processor, [key[0] for key in missing], pictures))
            known.update(zip(missing, self._unpadded(text)))
        return vision, [known[key] for key in keys]

    def _common(self, prompts: list[Row], owner: list[int]) -> int:
        """How many tokens all prompts about a picture begin with, the picture among them; 0 where pictures
        differ in that, or their tokens are not all there."""
        found = []
        for picture in range(owner[-1] + 1):
            own = [prompt["input_ids"] for prompt, other in zip(prompts, owner) if other == picture]
            length = min(map(len, own)) - 1  # of the last token an answer is foretold
            same = torch.stack([ids[:length] for ids in own]) == own[0][:length]
            found.append(int(same.all(0).long().cumprod(0).sum()))
        common = min(found)
        behind = [prompt["input_ids"][common:] for prompt in prompts]
        places = [(prompt["input_ids"] == self.image_token).nonzero()[:, 0] for prompt in prompts]
        if (
            any((ids == self.image_token).any() for ids in behind)
            or len({len(place) for place in places}) > 1
        ):
            return 0
        return common

    def _unpadded(self, text: dict[str, Tensor]) -> list[Row]:
        mask = text.get("attention_mask", torch.ones_like(text["input_ids"])).bool()
        names = [name for name in text if name != "attention_mask"]
        return [{name: text[name][row][mask[row]] for name in names} for row in range(len(mask))]

    def _answer(self, answer: str) -> Tensor:
        ids = self.processor.tokenizer(answer, add_special_tokens=False).input_ids
        if self.image_token in ids:
            raise ValueError(f"the answer {answer!r} holds the place of a picture: mend the data")
        return torch.tensor([*ids, self.end])

    def _row(self, prompt: Row, answer: Tensor) -> Row:
        """The prompt and all of the answer but its end; what answers are of else is 0, as text is."""
        given = {name: x.new_zeros(len(answer) - 1) for name, x in prompt.items()}
        given["input_ids"] = answer[:-1]
        return {name: torch.cat([x, given[name]]) for name, x in prompt.items()}

    def _wanted(self, prompt: Row, answer: Tensor) -> Tensor:
        return torch.cat([answer.new_full((len(prompt["input_ids"]) - 1,), IGNORED), answer])

    def _stacked(self, rows: list[Row]) -> dict[str, Tensor]:
        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        fills = {"input_ids": self.pad}
        parts = {
            name: pad_sequence(
                [row[name] for row in rows], batch_first=True, padding_value=fills.get(name, 0)
            )
            for name in rows[0]
        }
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        return parts | {"attention_mask": mask.long()}

    def _told(self, owner: list[int], wanted: list[Tensor]) -> dict[str, Tensor]:
        stacked = pad_sequence(wanted, batch_first=True, padding_value=IGNORED)
        return {"owner": torch.tensor(owner), "wanted": stacked}
