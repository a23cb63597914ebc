"""Trains the tower of models/tiny-clip through its reduced tokens: python eval/finetune_encoder.py

Accuracy on the same test pictures with all tokens (full), with fewer before the training (before) and with
fewer after it (after); and, because any more training may help, with fewer after as much training with all
tokens (control). The words' side is frozen; the tower learns on pictures of the training split. One row per
method in eval/results/finetune-encoder.jsonl; a method that is there already is not trained again.
"""

import argparse
import hashlib
import shlex
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import trange

import vtc
from vtc.cost import versions
from vtc.evaluation.classifiers import Classifier, open_classifier
from vtc.evaluation.pictures import load_pictures
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Results, Row, read_rows
from vtc.evaluation.tables import markdown

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "eval" / "results" / "finetune-encoder.jsonl"


def accuracy(classifier: Classifier, task, batch: int = 100) -> float:
    judge, labels, right = classifier.judge(task), list(task.classes), 0
    with torch.no_grad():
        for start in range(0, len(task.items), batch):
            items = task.items[start : start + batch]
            inputs = classifier.prepare([item.open() for item in items])
            found = judge(classifier.forward(classifier.model, inputs)).argmax(dim=1)
            right += sum(labels[i] == item.answer for i, item in zip(found.tolist(), items, strict=True))
    return right / len(task.items)


def train(classifier: Classifier, task, steps: int, batch: int, lr: float) -> list[float]:
    """Cross-entropy over the classes' words; returns the losses."""
    model, labels = classifier.model, list(task.classes)
    tower = model.vision_model
    learned = [*tower.parameters(), *model.visual_projection.parameters()]
    optimiser = torch.optim.AdamW(learned, lr=lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    judge, scale, losses = classifier.judge(task), model.logit_scale.exp().detach(), []
    order = torch.Generator().manual_seed(0)
    tower.train()
    for _ in (bar := trange(steps)):
        items = [task.items[i] for i in torch.randint(len(task.items), (batch,), generator=order).tolist()]
        inputs = classifier.prepare([item.open() for item in items])
        logits = scale * judge(classifier.forward(model, inputs))
        loss = F.cross_entropy(logits, torch.tensor([labels.index(item.answer) for item in items]))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{sum(losses[-20:]) / len(losses[-20:]):.3f}")
    tower.eval()
    return losses


def block(rows: list[Row]) -> str:
    """The table with how it was made."""
    names = ("full", "before", "control", "after")
    heading = ["method", "all tokens", "before", "trained with all tokens", "trained through it"]
    lines = [[f"`{row['method']}`", *(f"{100 * row[name]:.1f}" for name in names)] for row in rows]
    made = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    by = "; ".join(f"`{command}` at commit {commit}" for command, commit in made)
    one = rows[0]
    return (
        f"{markdown([heading, *lines], 'lrrrr')}\n\nAccuracy in per cent on {one['items']} test pictures at "
        f"keep {one['keep']}; {one['steps']} steps of {one['batch']} pictures. Made by {by}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=["tome", "evit", "random"])
    parser.add_argument("--keep", type=float, default=0.5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--pictures", type=int, default=2000, help="test pictures")
    parser.add_argument("--training-pictures", type=int, default=8000)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--readme", type=Path, help="fill this file's part 'finetune' and train nothing")
    options = parser.parse_args()
    if options.readme:
        fill_parts(options.readme, {"finetune": lambda: block(read_rows(options.output)[0])})
        return
    torch.set_num_threads(options.threads)
    test = load_pictures("singles", options.pictures, "test")
    training = load_pictures("singles", options.training_pictures, "train")
    control = None
    with Results(options.output) as results:
        for method in options.methods:
            what = [method, options.keep, options.steps, options.batch, options.lr, test.fingerprint]
            key = hashlib.sha256(str([*what, training.fingerprint]).encode()).hexdigest()[:16]
            if key in results.rows:
                continue
            if control is None:
                control = open_classifier(ROOT / "models" / "tiny-clip", "cpu")
                train(control, training, options.steps, options.batch, options.lr)
            start, classifier = time.perf_counter(), open_classifier(ROOT / "models" / "tiny-clip", "cpu")
            row = {"key": key, "method": method, "keep": options.keep, "full": accuracy(classifier, test)}
            with vtc.compress(control.model, method, keep=options.keep):
                row["control"] = accuracy(control, test)
            with vtc.compress(classifier.model, method, keep=options.keep) as handle:
                row["before"] = accuracy(classifier, test)
                losses = train(classifier, training, options.steps, options.batch, options.lr)
                row["after"] = accuracy(classifier, test)
                row["blocks"] = {block: len(index) for block, (index, _) in handle.last[0].blocks.items()}
            row |= {
                "steps": options.steps, "batch": options.batch, "lr": options.lr, "losses": losses,
                "items": options.pictures, "seconds": round(time.perf_counter() - start, 1),
                "threads": options.threads, "command": shlex.join(["python", *sys.argv]),
                "versions": versions(),
            }  # fmt: skip
            results.append(row)
            told = ", ".join(f"{name} {row[name]:.1%}" for name in ("full", "before", "after", "control"))
            print(f"{method} at keep {options.keep}: {told}")


if __name__ == "__main__":
    main()
