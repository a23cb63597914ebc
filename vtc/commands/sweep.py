"""The commands that measure methods over many questions and report what they found."""

from __future__ import annotations

import argparse
import warnings
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .arguments import ENCODER_KEEPS, KEEPS, METHODS
from .columns import print_columns
from .reference_model import REFERENCE, model_named, quiet

if TYPE_CHECKING:
    from ..evaluation.board import Board
    from ..evaluation.gallery import Exhibit


def sweep(options: argparse.Namespace) -> None:
    """measure methods at several budgets; goes on where it was stopped"""
    from ..evaluation.board import boards

    how = {
        "n": options.questions, "split": options.split, "seeds": options.seeds, "output": options.output,
        "batch_size": options.batch_size, "command": options.command,
    }  # fmt: skip
    rows = _sweep_answers(options, how) if options.host is None else _sweep_classes(options, how)
    _print_boards(boards(rows))
    print(options.output)


def _sweep_answers(options: argparse.Namespace, how: dict[str, Any]) -> list[dict[str, Any]]:
    from ..evaluation.sweep import sweep as run

    if options.schedule:
        raise ValueError("--schedule is for encoders: give one by --host")
    model, processor = model_named(options.model)
    baselines = ["random", "downsample"] if options.baselines is None else options.baselines
    # What was not asked for by name runs as baselines do: where the model serves it.
    baselines = baselines if options.methods else [*METHODS, *baselines]
    keeps, tasks = options.keeps or KEEPS, options.tasks or ["scenes"]
    return run(
        model, processor, options.methods or (), keeps, tasks, baselines=dict.fromkeys(baselines), **how
    )


def _sweep_classes(options: argparse.Namespace, how: dict[str, Any]) -> list[dict[str, Any]]:
    from ..evaluation.classifiers import open_classifier
    from ..evaluation.classify import sweep_encoder

    quiet()
    classifier = open_classifier(options.host)
    baselines = ["random", "pool"] if options.baselines is None else options.baselines
    keeps, tasks = options.keeps or ENCODER_KEEPS, options.tasks or ["singles"]
    return sweep_encoder(
        classifier, options.methods, keeps, tasks, schedules=options.schedule, baselines=baselines, **how
    )


def demo(options: argparse.Namespace) -> None:
    """measure six methods at five budgets on the reference model and write a report"""
    import torch

    from ..evaluation.board import boards
    from ..evaluation.report import write_report
    from ..evaluation.sweep import sweep as run

    # So small a model gains little from threads, and is many times slower where they fight for busy cores.
    torch.set_num_threads(1)
    _check_plots()
    model, processor = model_named(None)
    output = options.out / "results.jsonl"
    rows = run(
        model,
        processor,
        METHODS,
        KEEPS,
        n=options.questions,
        baselines=(),
        output=output,
        command=options.command,
    )
    found = boards(rows)
    _print_boards(found)
    page = write_report(found, options.out, _exhibits(found, model, processor, options.pictures))
    if options.open:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
    print(page)


def report(options: argparse.Namespace) -> None:
    """write tables, plots and a page from results, or fill in a README"""
    from ..evaluation.chance import below_random
    from ..evaluation.report import load_boards, update_readme, write_report

    _check_plots()
    found = load_boards(options.results)
    for board in found:
        for line in below_random(board) if not board.classes else []:
            print(line)
    if options.readme:
        print(f"{options.readme}: {', '.join(update_readme(options.readme, found))}")
    if options.out or not options.readme:
        exhibits, asked = None, [board for board in found if not board.classes]
        if options.pictures and asked:
            name = options.model or asked[0].model.split("@")[0]
            exhibits = _exhibits(
                found, *model_named(None if name == REFERENCE.name else name), options.pictures
            )
        print(write_report(found, options.out or "vtc-report", exhibits))


def _check_plots() -> None:
    """Says so before the work rather than after it."""
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'vision-token-compression[eval]'")


def _exhibits(found: list[Board], model: Any, processor: Any, n: int) -> list[list[Exhibit]]:
    from ..evaluation.gallery import gallery
    from ..evaluation.sweep import identify
    from ..evaluation.tasks import load_task

    own = identify(model)
    others = dict.fromkeys(board.model for board in found if board.model != own and not board.classes)
    if others:
        warnings.warn(f"the pictures are of {own}, there are none of {', '.join(others)}", stacklevel=2)

    def exhibits(board: Board) -> list[Exhibit]:
        return gallery(model, processor, load_task(board.task, split=board.split or "test"), board.runs, n)

    return [exhibits(board) if board.model == own else [] for board in found]


def _print_boards(found: list[Board]) -> None:
    from ..evaluation.hard import hard_legend, hard_lines
    from ..evaluation.tables import accuracy_lines, bounds, encoder_lines, left_blocks, legend
    from ..evaluation.varying import varying_legend, varying_lines

    for board in found:
        if board.classes:
            print(f"{board.task}, accuracy in % / GFLOPs / speed")
            print_columns(encoder_lines(board))
            print(f"{legend(board, costs=True)} {bounds(board)}\n\nPatch tokens that leave each block:")
            print_columns(left_blocks(board))
            print()
            continue
        title = f"{board.task}, accuracy in %"
        if board.keeps:
            print_columns(accuracy_lines(board, title))
        print(f"{legend(board)} {bounds(board)}\n")
        for lines, told in ((hard_lines(board, title), hard_legend), (varying_lines(board), varying_legend)):
            if lines:
                print_columns(lines)
                print(f"{told(board)}\n")
