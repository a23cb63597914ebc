"""Pictures with questions to learn from: drawn scenes, files of lines, and data sets."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import Data

if TYPE_CHECKING:
    from PIL.Image import Image

SCENES = 20_000  # where it is not said how many
PLACE = "<image>"  # of a picture in a text
ASKED, ANSWERED = ("human", "user"), ("gpt", "assistant")  # what conversations call the two


@dataclass(frozen=True)
class Picture:
    """`open` returns it as RGB, or raises OSError or ValueError; `where` names it in errors."""

    open: Callable[[], Image]
    where: str
    questions: list[tuple[str, str]] = field(repr=False)  # with their answers


def training_pictures(data: Data) -> list[Picture]:
    """What is trained on. Raises ValueError where there is nothing, and for what cannot be read."""
    return load_pictures(data.train, data.n, data.split, Path(data.cache).expanduser(), data.skip_broken)


def load_pictures(
    name: str, n: int | None, split: str, cache: Path, skip_broken: bool = False
) -> list[Picture]:
    """The pictures of "scenes", "jsonl:PATH" or "datasets:NAME[:split]"; the first n."""
    kind, _, path = name.partition(":")
    if name == "scenes":
        pictures = _scenes(n or SCENES, split, cache)
    elif kind == "jsonl" and path:
        pictures = _lines(Path(path).expanduser(), n, skip_broken)
    elif kind == "datasets" and path:
        pictures = _dataset(path, n, skip_broken)
    else:
        raise ValueError(f"there is no data {name!r}; known: scenes, jsonl:PATH, datasets:NAME[:split]")
    if not pictures:
        raise ValueError(f"{name} holds no picture with a question")
    return pictures


def _scenes(n: int, split: str, cache: Path) -> list[Picture]:
    from .scenes import Drawn

    drawn = Drawn.of(cache, split, n)
    return [Picture(partial(drawn.open, i), f"{split} scene {i}", drawn.questions[i]) for i in range(n)]


def _lines(path: Path, n: int | None, skip_broken: bool) -> list[Picture]:
    """One picture for all the lines that name the same file."""
    path = _file(path)
    found: dict[str, Picture] = {}
    broken: list[str] = []
    for number, line in _rows(path):
        where = f"{path}:{number}"
        try:
            row = json.loads(line) if isinstance(line, bytes) else line
            if not isinstance(row, dict):
                raise ValueError("it is no object with image, question and answer")
            if not isinstance(image := row.get("image"), str) or not image:
                raise ValueError(f"its image is {image!r}, which names no file")
            pairs = _pairs(row)
            if not (path.parent / image).is_file():
                raise ValueError(f"there is no image file '{path.parent / image}'")
        except ValueError as error:
            reason = f"it is no JSON: {error}" if isinstance(error, json.JSONDecodeError) else error
            if not skip_broken:
                raise ValueError(_unusable(where, reason)) from None
            broken.append(where)
            continue
        if image not in found and n is not None and len(found) == n:
            continue
        opener = partial(_opened, path.parent / image)
        found.setdefault(image, Picture(opener, where, [])).questions.extend(pairs)
    _tell(broken)
    return [picture for picture in found.values() if picture.questions]


def _unusable(where: str, reason: object) -> str:
    return f"{where} cannot be learned from ({reason}): mend it, or set data.skip_broken"


def _file(path: Path) -> Path:
    """The file of lines itself, or the only one in a folder."""
    if path.is_dir():
        files = sorted(path.glob("*.jsonl"))
        if len(files) != 1:
            raise ValueError(f"{path} is a folder with {len(files)} files of lines: give one, jsonl:PATH")
        return files[0]
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}: give one of lines, jsonl:PATH")
    return path


def _rows(path: Path) -> list[tuple[int, Any]]:
    """Numbered lines, not yet read, or the entries of a file that is one list, as LLaVA's are."""
    content = path.read_bytes()
    if content.lstrip().startswith(b"["):
        try:
            return list(enumerate(json.loads(content), 1))
        except ValueError as error:
            raise ValueError(
                f"{path} begins like a list of JSON and is none ({error}): give one list, or lines of objects"
            ) from None
    return [(number, line) for number, line in enumerate(content.splitlines(), 1) if line.strip()]


def _pairs(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The questions and answers of a line. Turns of a conversation are asked one by one."""
    turns = row.get("conversations")
    if turns is None:
        return [(_asked(_text(row, "question")), _answered(_text(row, "answer")))]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "from" in turn for turn in turns):
        raise ValueError("its conversations are no list of turns with 'from' and 'value'")
    turns = [(turn["from"], _text(turn, "value")) for turn in turns]
    pairs = [
        (_asked(asked), _answered(answered))
        for (who, asked), (other, answered) in zip(turns[::2], turns[1::2])
        if who in ASKED and other in ANSWERED
    ]
    if len(pairs) * 2 != len(turns) or not pairs:
        raise ValueError(f"a conversation has turns of {ASKED[0]} and {ANSWERED[0]} in turn")
    return pairs


def _asked(question: str) -> str:
    """Without the place of the picture, which is in front of every question."""
    return question.replace(PLACE, "").strip()


def _answered(answer: str) -> str:
    if PLACE in answer:
        raise ValueError(f"its answer holds {PLACE}, the place of a picture")
    return answer


def _text(row: dict[str, Any], name: str) -> str:
    if name not in row:
        raise ValueError(f"it has no {name}")
    value = row[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {value!r}, which is no text")
    if not value.strip():
        raise ValueError(f"its {name} is empty")
    if value.encode(errors="replace").decode() != value:
        raise ValueError(f"its {name} has half a character, {value!r}")
    return value


def _dataset(name: str, n: int | None, skip_broken: bool) -> list[Picture]:
    """Each row is a picture with a question: rows of a data set do not tell which pictures are the same."""
    try:
        import datasets
    except ImportError as error:
        raise ImportError("data sets need datasets: pip install 'vision-token-compression[train]'") from error
    folder, _, split = name.rpartition(":") if not Path(name).expanduser().exists() else (name, "", "")
    if not folder:
        folder, split = name, ""
    path = Path(folder).expanduser()
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        rows = datasets.load_from_disk(str(path))
    else:
        try:
            rows = datasets.load_dataset(str(path) if path.exists() else folder)
        except datasets.exceptions.DatasetsError as error:
            raise ValueError(
                f"{folder} cannot be read as a data set ({error}): give a folder or a name on the Hub with "
                "the columns image, question and answer, or jsonl:PATH"
            ) from error
    if isinstance(rows, dict):
        split = split or ("train" if "train" in rows else next(iter(rows)))
        if split not in rows:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(rows)}")
        rows = rows[split]
    if missing := [column for column in ("image", "question", "answer") if column not in rows.column_names]:
        raise ValueError(
            f"{name} has no column {', '.join(missing)}; it has {', '.join(rows.column_names)}: rename them "
            "to image, question and answer"
        )
    rows = rows if n is None else rows.select(range(min(n, len(rows))))
    texts = zip(rows["question"], rows["answer"])
    pictures, broken = [], []
    for number, (question, answer) in enumerate(texts):
        where = f"row {number} of {name}"
        try:
            pairs = _pairs({"question": question, "answer": answer})
        except ValueError as error:
            if not skip_broken:
                raise ValueError(_unusable(where, error)) from None
            broken.append(where)
            continue
        pictures.append(Picture(partial(_of_row, rows, number), where, pairs))
    _tell(broken)
    return pictures


def _of_row(rows: Any, number: int) -> Image:
    from ..images import open_image

    image = rows[number]["image"]
    if isinstance(image, dict):
        raise ValueError("its image is not decoded: cast the column to datasets.Image()")
    if image is None:
        raise ValueError("it has no image")
    return open_image(image)


def _opened(path: Path) -> Image:
    from ..images import open_image

    return open_image(path)


def _tell(broken: list[str]) -> None:
    if broken:
        shown = ", ".join(broken[:3]) + (" ..." if len(broken) > 3 else "")
        warnings.warn(f"{len(broken)} of the data cannot be read and were left out: {shown}", stacklevel=3)
