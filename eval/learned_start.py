"""How near to its host each module with weights starts, before any training: python eval/learned_start.py

Two things are asked of the reference models, with modules that start from the host. Where attention of all
blocks of the tower is replaced: how far its features are from those of the bare tower, over test scenes, and
how many questions (tiny-llava) or pictures (tiny-clip) are answered right. Where tokens are made of tokens,
behind the tower or inside of it: how many questions are, beside the pooled tokens of `pool`. Modules that
start from features see training scenes. One row for each in eval/results/learned-start.jsonl; what is there
already is not measured again. Two replacements of attention stand there after training, too. How
token-slimming starts was settled on the first 200 of the test questions.

    python eval/learned_start.py                     # about a quarter of an hour on two cores
    python eval/learned_start.py --readme README.md  # fills its part <!-- learned-start:begin -->
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vtc
from vtc.cost import versions
from vtc.evaluation.classifiers import open_classifier
from vtc.evaluation.pictures import load_pictures
from vtc.evaluation.prompts import Batches
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Results, Row, read_rows
from vtc.evaluation.runner import ask
from vtc.evaluation.scenes import scene
from vtc.evaluation.tables import markdown
from vtc.evaluation.tasks import load_task
from vtc.learned import build, from_pretrained
from vtc.learned.in_tower import ReplacedAttention
from vtc.tokenizers.manifest import weights_digest

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "eval" / "results" / "learned-start.jsonl"
GRID, KEPT, BEHIND = (12, 12), (6, 6), 2  # reducers make a quarter; in the tower, behind this block
MODELS = ("tiny-llava", "tiny-clip")
LATER = "trained"


@dataclass(frozen=True)
class Case:
    """place: "attention", "features" or "encoder". name: of a module or method; None: the bare model. folder:
    of one that was trained on tiny-llava."""

    place: str
    name: str | None
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    folder: str | None = None


CASES = (
    Case("attention", None),
    Case("attention", "proxy-attention", {"window": 4}),
    Case("attention", "proxy-attention", {"window": 4, "inject": False}, "without what proxies tell"),
    Case("attention", "proxy-attention", {"window": 4, "joint": False}, "as in the paper"),
    Case("attention", "agent-attention", {"agents": 36}),
    Case("attention", "super-token-attention", {"cell": [2, 2]}),
    Case("attention", "agent-attention", note=LATER, folder="models/tiny-llava-agent-attention"),
    Case("attention", "super-token-attention", note=LATER, folder="models/tiny-llava-super-token-attention"),
    Case("features", "pool"),
    Case("features", "token-slimming", {"tokens": 36}, "starts from features"),
    Case("features", "semantic-tokens", {"heads": 4, "window": 4, "sample": 2, "area": 6}),
    Case("features", "super-tokens", {"heads": 4}),
    Case("features", "agent-pooling", {"heads": 4}),
    Case("features", "proxy-projector", {"heads": 4, "window": 4}, "starts from the projector"),
    Case("encoder", "token-slimming", {"tokens": 36}, "starts from features"),
    Case("encoder", "semantic-tokens", {"heads": 4, "window": 4, "sample": 2, "area": 6}),
    Case("encoder", "super-tokens", {"heads": 4}),
)


class Host:
    """A reference model with what it is asked."""

    def __init__(self, name: str, options: argparse.Namespace):
        self.name = name
        if name == "tiny-clip":
            from finetune_encoder import accuracy  # beside this file

            self.classifier = open_classifier(ROOT / "models" / name, "cpu")
            self.model, self.tower = self.classifier.model, self.classifier.model.vision_model
            task = load_pictures("singles", options.questions, "test")
            self.prepare = lambda images: self.classifier.prepare(images)["pixel_values"]
            self.accuracy: Callable[[], float] = lambda: accuracy(self.classifier, task)
        else:
            from transformers import AutoModelForImageTextToText, AutoProcessor

            self.model = AutoModelForImageTextToText.from_pretrained(ROOT / "models" / name).eval()
            processor = AutoProcessor.from_pretrained(ROOT / "models" / name)
            self.tower = self.model.model.vision_tower
            task = load_task("scenes", options.questions)
            batches = Batches(processor, task, 50)
            look = processor.image_processor
            self.prepare = lambda images: look(images, return_tensors="pt")["pixel_values"]
            self.accuracy = lambda: ask(self.model, batches).row()["accuracy"]
        self.fingerprint = task.fingerprint
        self.pixels = self._scenes("test", options.scenes)
        self.training = self._scenes("train", options.training_scenes)

    def _scenes(self, split: str, count: int) -> Tensor:
        return self.prepare([scene(split, i).image for i in range(count)])

    @torch.no_grad()
    def features(self, pixels: Tensor, layer: int = -2) -> Tensor:
        """Patch tokens (B, N, D), by default those that tiny-llava reads: of the last block but one."""
        return self.tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]


def module_of(host: Host, case: Case) -> nn.Module:
    if case.folder:
        return from_pretrained(ROOT / case.folder)
    if case.place == "attention":
        return ReplacedAttention.for_host(host.model, case.name, **case.options)
    widths = {"in_width": host.tower.config.hidden_size}
    if case.name == "proxy-projector":
        widths["out_width"] = host.model.config.text_config.hidden_size
    module = build(case.name, **widths, **case.options).eval()
    features = host.features(host.training, -2 if case.place == "features" else BEHIND + 1)
    module.begin([(features, GRID)], host.model.model.multi_modal_projector)
    return module


def measure(host: Host, case: Case) -> Row:
    """Raises ValueError for what the host cannot do."""
    row: Row = {"tokens": GRID[0] * GRID[1]}
    if case.name is None:
        return row | {"accuracy": host.accuracy()}
    bare = host.features(host.pixels) if case.place == "attention" else None
    torch.manual_seed(0)
    method = case.name if case.name == "pool" else module_of(host, case)
    settings: dict[str, Any] = {}
    if case.place != "attention":
        row["tokens"] = settings["keep"] = KEPT[0] * KEPT[1]
        settings["stage"] = case.place
        settings |= {"schedule": (BEHIND,)} if case.place == "encoder" else {}
    with vtc.compress(host.model, method, **settings):
        if bare is not None:
            found = host.features(host.pixels)
            row["distance"] = float((found - bare).norm() / bare.norm())
            row["operations"] = method.flops(GRID) / method.host_flops(GRID)
        return row | {"accuracy": host.accuracy()}


def block(rows: Sequence[Row]) -> str:
    """Both tables with how they were made, of the rows with the most questions."""
    most = max(row["questions"] for row in rows)
    rows = [row for row in rows if row["questions"] == most]
    parts = [_replaced([row for row in rows if row["place"] == "attention"])]
    parts.append(_reduced([row for row in rows if row["place"] != "attention"]))
    made = {(row["command"], (row["versions"]["commit"] or "no commit")[:10]): None for row in rows}
    by = "; ".join(f"`{command}` at commit {commit}" for command, commit in made)
    one = rows[0]
    parts.append(
        f"Before any training, except of what is marked `{LATER}`: there the blocks that the host reads have "
        "learned its own features (`python eval/train_modules.py`). Accuracy in per cent on "
        f"{one['questions']} questions or pictures (95 % interval up to "
        f"± {196 * math.sqrt(0.25 / one['questions']):.1f}); distances of features relative to their length, "
        f"over {one['scenes']} scenes. Made by {by}."
    )
    return "\n\n".join(part for part in parts if part)


def _replaced(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    names = list(dict.fromkeys(row["model"] for row in rows))
    heading = ["attention of all blocks", "operations of the attention"]
    heading += [f"{name}: {what}" for name in names for what in ("features apart", "accuracy")]
    lines = []
    for what in dict.fromkeys(_what(row) for row in rows):
        by = {row["model"]: row for row in rows if _what(row) == what}
        some = next(iter(by.values()))
        line = [what, f"{some['operations']:.2f} x" if "operations" in some else "1"]
        for name in names:
            row = by.get(name, {})
            line += [f"{row['distance']:.3f}" if "distance" in row else "-"]
            line += [f"{100 * row['accuracy']:.1f}" if "accuracy" in row else "-"]
        lines.append(line)
    return markdown([heading, *lines], "lr" + "rr" * len(names))


def _reduced(rows: Sequence[Row]) -> str:
    if not rows:
        return ""
    rows = sorted(rows, key=lambda row: row["place"] == "encoder")
    heading = ["tokens made", "place", "tokens", "accuracy"]
    places = {"features": "in front of the projector", "encoder": f"behind block {BEHIND} of the tower"}
    lines = [
        [_what(row), places[row["place"]], str(row["tokens"]), f"{100 * row['accuracy']:.1f}"] for row in rows
    ]
    return markdown([heading, *lines], "llrr")


def _what(row: Row) -> str:
    if row["name"] is None:
        return "the host's own"
    return f"`{row['name']}`" + (f" ({row['note']})" if row["note"] else "")


def run(models: Sequence[str], cases: Sequence[Case], options: argparse.Namespace, command: str) -> None:
    with Results(options.out) as results:
        for name in models:
            host = Host(name, options)
            for case in cases:
                if name == "tiny-clip" and (case.place != "attention" or case.folder):
                    continue
                about = [name, case.place, case.name, case.options, host.fingerprint, options.scenes]
                about += [options.training_scenes] if case.name == "token-slimming" else []
                about += [case.folder, weights_digest(module_of(host, case))] if case.folder else []
                key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
                if key in results.rows:
                    continue
                row = {"key": key, "model": name, "place": case.place, "name": case.name}
                row |= {"options": case.options, "note": case.note, **measure(host, case)}
                row |= {"questions": options.questions, "scenes": options.scenes}
                row["date"] = datetime.now(UTC).isoformat(timespec="seconds")
                results.append(row | {"command": command, "versions": versions()})
                near = f"{row['distance']:.3f} apart, " if "distance" in row else ""
                print(f"{name}, {case.place}: {_what(row)} {near}{row['accuracy']:.1%}", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = list(dict.fromkeys(case.name for case in CASES if case.name))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--modules", nargs="+", choices=names, help="only these, and the bare model")
    parser.add_argument("--questions", type=int, default=1000)
    parser.add_argument("--scenes", type=int, default=64)
    parser.add_argument("--training-scenes", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUTPUT)
    parser.add_argument("--readme", type=Path, help="fill this file's part and measure nothing")
    options = parser.parse_args(arguments)
    if options.readme:
        fill_parts(options.readme, {"learned-start": lambda: block(read_rows(options.out)[0])})
        return
    torch.set_num_threads(options.threads)
    cases = [case for case in CASES if not options.modules or case.name in (None, *options.modules)]
    given = sys.argv[1:] if arguments is None else arguments
    run(options.models, cases, options, shlex.join(["python", "eval/learned_start.py", *given]))
    print(block(read_rows(options.out)[0]))


if __name__ == "__main__":
    main()
