"""Modules with weights beside training-free methods on a model, and what lengths per image are worth.

Runs what the results do not have yet: every method of the config at every number of tokens, every module
found (`modules` in the config) at those numbers that it can make, all tokens and no image; and, of those
whose halting head was trained (`halting`), lengths of a few means beside the same lengths shuffled over the
pictures. A module that was trained anew is run anew.

Run from the repository's root:
    python eval/learned.py                         # all
    python eval/learned.py --part methods          # or modules, or lengths
    python eval/learned.py --table                 # the rows as Markdown
    python eval/learned.py --readme README.md      # fills its parts learned and learned-lengths
    python eval/learned.py --pictures              # draws assets/learned.png and assets/learned-lengths.png
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from vtc.ask import load_model
from vtc.evaluation import learned
from vtc.evaluation.board import boards
from vtc.evaluation.learned_lengths import sweep_lengths
from vtc.evaluation.learned_lengths_tables import choices, lengths_block
from vtc.evaluation.learned_plot import plot_learned, plot_lengths
from vtc.evaluation.learned_tables import Contest, block
from vtc.evaluation.report import fill_parts
from vtc.evaluation.results import Row, read_rows
from vtc.evaluation.sweep import sweep

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "eval/configs/learned.json"
OUTPUT, LENGTHS = ROOT / "eval/results/learned.jsonl", ROOT / "eval/results/learned-lengths.jsonl"
COMMAND = "python eval/learned.py"
PARTS = ("methods", "modules", "lengths")


def main(arguments: Sequence[str] | None = None) -> None:
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    parser.add_argument("--config", type=Path, default=CONFIG)
    parser.add_argument("--part", choices=PARTS, nargs="+", default=PARTS, help="what is run; default: all")
    parser.add_argument("--threads", type=int, default=1, help="of torch on the CPU")
    parser.add_argument("--table", action="store_true", help="print the rows as Markdown and run nothing")
    parser.add_argument("--readme", type=Path, help="fill this file's parts and run nothing")
    parser.add_argument("--pictures", action="store_true", help="draw the pictures and run nothing")
    options = parser.parse_args(arguments)
    config = json.loads(options.config.read_text())
    output, lengths = (ROOT / config[name] for name in ("output", "lengths"))
    if options.readme:
        blocks = {
            "learned": lambda: block(rows(output)),
            "learned-lengths": lambda: lengths_block(rows(lengths)),
        }
        print(f"{options.readme}: {', '.join(fill_parts(options.readme, blocks))}")
    if options.pictures:
        draw(output, lengths, ROOT / "assets")
    if not (options.readme or options.pictures or options.table):
        torch.set_num_threads(options.threads)
        measure(config, output, lengths, options.part)
    if not (options.readme or options.pictures):
        print("\n\n".join([block(rows(output)), lengths_block(rows(lengths))]))


def measure(config: dict[str, Any], output: Path, lengths: Path, parts: Sequence[str]) -> None:
    """Runs what is missing. Modules are named by their folders as seen from the repository's root."""
    os.chdir(ROOT)
    model, processor = load_model(config["model"])
    folders = learned.folders(config["modules"], ROOT)
    methods = config["methods"] if "methods" in parts else []
    methods = [method if isinstance(method, str) else tuple(method) for method in methods]
    methods += folders if "modules" in parts else []
    if methods:
        sweep(
            model, processor, methods, config["keeps"], "scenes", n=config["n"], seeds=config["seeds"],
            baselines=(), output=output, command=COMMAND,
        )  # fmt: skip
    for folder in config["halting"] if "lengths" in parts else []:
        sweep_lengths(
            model, processor, folder, config["means"], shuffles=config["shuffles"], n=config["n"],
            sample=config["sample"], output=lengths, command=COMMAND,
        )  # fmt: skip


def draw(output: Path, lengths: Path, folder: Path) -> None:
    for board in boards(rows(output)):
        plot_learned(Contest(board), folder / "learned.png")
    for found in choices(rows(lengths)).values():
        plot_lengths(found, folder / "learned-lengths.png")


def rows(path: Path) -> list[Row]:
    return read_rows(path)[0] if path.exists() else []


if __name__ == "__main__":
    main()
