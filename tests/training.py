"""A small host with its processor in a folder, questions in a file, and trainings of seconds."""

from __future__ import annotations

import copy
import json
from pathlib import Path

from small import QUESTIONS, small_model, small_processor

from vtc.evaluation.scenes import scene

ORDERED = {
    "name": "ordered", "tokens": 16, "width": 16, "depth": 1, "heads": 2, "order": 4, "decoder_width": 16,
    "decoder_depth": 1, "decoder_heads": 2,
}  # fmt: skip
FEATURES = {"kind": "features", "steps": 4, "batch_size": 4}
DISTILL = {"kind": "distill", "steps": 4, "batch_size": 2, "counts": [1, 4, 16]}
LENGTH = {"kind": "length", "steps": 4, "batch_size": 4, "lengths": 2}


def save_host(folder: Path) -> Path:
    small_model().save_pretrained(folder)
    small_processor().save_pretrained(folder)
    return folder


def write_questions(folder: Path, pictures: int = 6) -> Path:
    """Three questions about each picture, a line each."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(pictures):
        scene("train", i).image.save(folder / f"{i}.png")
        answers = ("red", ("one", "two", "three")[i % 3], str(i % 10))
        lines += [
            {"image": f"{i}.png", "question": question, "answer": answer}
            for question, answer in zip(QUESTIONS, answers)
        ]
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def settings(host: Path, questions: Path, output: Path, *stages: dict, **more) -> dict:
    """A configuration; `more` replaces parts of it."""
    content = {
        "model": str(host), "module": ORDERED, "output": str(output), "stages": stages,
        "data": {"train": f"jsonl:{questions}", "questions": 3},
    }  # fmt: skip
    return copy.deepcopy(content | more)
