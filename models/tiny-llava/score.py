"""Measures both models on held-out test scenes and fills in their cards: python models/tiny-llava/score.py"""

import json
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

import vtc
from vtc.cost import versions
from vtc.evaluation.questions import KINDS, dataset
from vtc.evaluation.scenes import CLASSES, GRID, scene, singles

KEPT = 16  # image tokens that the baselines keep


def answers(folder: Path, n: int) -> dict[str, dict[str, float]]:
    """Share of right answers, overall and per kind: all tokens, no picture, baselines at KEPT tokens."""
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    with TemporaryDirectory() as scratch:
        rows = vtc.sweep(
            model,
            processor,
            ["random", "uniform"],
            [KEPT],
            n=n,
            baselines=(),
            output=Path(scratch) / "rows.jsonl",
        )
    return {
        row["method"]: {"overall": row["accuracy"]} | {kind: row["kinds"][kind]["accuracy"] for kind in KINDS}
        for row in rows
    }


@torch.no_grad()
def zero_shot(folder: Path, n: int, split: str = "test") -> dict[str, float]:
    """Accuracy of tiny-clip on scenes with one object, over all colour and shape combinations."""
    processor, model = AutoProcessor.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    chosen = singles(split, n)
    lines = [f"a photo of a {name} ." for name in CLASSES]
    logits = []
    for start in range(0, n, 100):
        images = [scene(split, i).image for i, _ in chosen[start : start + 100]]
        inputs = processor(images=images, text=lines, padding=True, return_tensors="pt")
        logits.append(model(**inputs).logits_per_image)  # (100, 56)
    order = torch.cat(logits).argsort(1, descending=True)  # (n, 56)
    target = torch.tensor([CLASSES.index(name) for _, name in chosen])[:, None]
    hit = order == target
    return {
        "classes": len(CLASSES),
        "top1": hit[:, 0].float().mean().item(),
        "top5": hit[:, :5].any(1).float().mean().item(),
    }


def chance(split: str, n: int) -> dict[str, float]:
    """Per kind the share of its commonest answer, which needs no picture."""
    answers = {kind: [q.answer for _, q in dataset(split, n) if q.kind == kind] for kind in KINDS}
    return {kind: max(map(a.count, a)) / len(a) for kind, a in answers.items()}


def measure(llava: Path, clip: Path, n: int = 2000) -> dict:
    ways, guess = answers(llava, n), chance("test", n)
    ways["chance"] = {"overall": float(np.mean(list(guess.values())))} | guess
    weights = load_file(llava / "model.safetensors")
    return {
        "questions": n, "kept_tokens": KEPT, "image_tokens": GRID * GRID, "scores": ways,
        "zero_shot": zero_shot(clip, n),
        "parameters": sum(weight.numel() for weight in weights.values()),
        "megabytes": (llava / "model.safetensors").stat().st_size / 1e6,
        "date": str(date.today()), "torch": torch.__version__, "transformers": transformers.__version__,
        "hardware": f"{torch.get_num_threads()} cores of {versions()['cpu']}",
    }  # fmt: skip


if __name__ == "__main__":
    import card

    here = Path(__file__).resolve().parent
    clip = here.parent / "tiny-clip"
    card.write(json.loads((here / "scores.json").read_text()) | measure(here, clip), here, clip)
