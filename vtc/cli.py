"""The command `vtc`."""

from __future__ import annotations

import argparse
import ast
import shlex
import sys
import textwrap
import warnings
from collections.abc import Sequence
from importlib.util import find_spec
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import ENCODER_KEEPS, KEEPS, METHODS, parser
from .commands_tokenize import detokenize, tokenize, tokenizers
from .commands_train import modules, train

if TYPE_CHECKING:
    from PIL.Image import Image

    from .evaluation.board import Board
    from .evaluation.gallery import Exhibit
    from .record import Record

REFERENCE = Path(__file__).parents[1] / "models" / "tiny-llava"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser(COMMANDS).parse_args(arguments)
    options.command = shlex.join(["vtc", *arguments])
    warnings.showwarning = lambda message, *_: print(f"vtc: warning: {_one_line(message)}", file=sys.stderr)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, RuntimeError, ImportError) as error:
        if options.debug:
            raise
        print(f"vtc: error: {_one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        again = "a demo, sweep or tokenize goes on when it is started again, a train with --resume"
        print(f"vtc: stopped; {again}", file=sys.stderr)
        return 130
    return 0


def _methods(options: argparse.Namespace) -> None:
    """list the methods"""
    from .method import doc, get_method, list_methods

    rows = [("method", "stages", "options", "what it does")]
    for name in list_methods():
        method = get_method(name)
        shown = " ".join(f"{option}={value}" for option, value in method.to_dict()["options"].items())
        rows.append((name, " ".join(method.stages), shown, doc(type(method))))
    _print_columns(rows)


def _hosts(options: argparse.Namespace) -> None:
    """list the families of models"""
    from .hosts.support import MEANING, refused, rows
    from .hosts.trunk import FAMILIES

    _print_columns(rows())
    print()
    _print_columns(MEANING.items())
    print("\nVision transformers, by themselves or with a head or a text encoder, at stage 'encoder':")
    _print_columns([(family.name,) for family in FAMILIES])
    print("\nNot served:")
    _print_columns(refused())


def _ask(options: argparse.Namespace) -> None:
    """answer a question about an image with and without compression"""
    from .ask import compare_answers

    model, processor = _load(options.model)
    _choose_method(options, model)
    answers = compare_answers(
        model, processor, options.image, options.question, options.method, options.keep, **_settings(options)
    )
    lines = zip_longest(
        *(textwrap.wrap(answer.text, 40) or ["(nothing)"] for answer in answers), fillvalue=""
    )
    rows = [("", "all tokens", _shown(options)), *(("", *line) for line in lines)]
    rows[1] = ("answer", *rows[1][1:])
    rows.append(("image tokens", *(str(answer.tokens) for answer in answers)))
    rows.append(("seconds", *(f"{answer.seconds:.4f}" for answer in answers)))
    _print_columns(rows)


def _draw(options: argparse.Namespace) -> None:
    """draw the kept and merged tokens on an image"""
    from .draw import draw
    from .images import open_image
    from .views import after

    image = open_image(options.image)
    records, processor = _answered(options, image) if options.host is None else _classified(options, image)
    shown = [after(record, options.block) if isinstance(options.block, int) else record for record in records]
    kept, given = (sum(len(getattr(record, part)) for record in shown) for part in ("index", "source"))
    where = f"  ·  block {options.block}" if isinstance(options.block, int) else ""
    caption = f"{_shown(options)}{where}  ·  {kept} of {given} tokens"
    output = options.output or f"{Path(options.image).stem}-{Path(options.method).name}.png"
    draw(image, records, processor=processor, block=options.block, caption=caption).save(output)
    print(output)


def _answered(options: argparse.Namespace, image: Image) -> tuple[list[Record], Any]:
    from .ask import ask

    model, processor = _load(options.model)
    _choose_method(options, model)
    how = {"method": options.method, "keep": options.keep, **_settings(options)}
    return ask(model, processor, image, options.question, max_new_tokens=1, **how).records, processor


def _classified(options: argparse.Namespace, image: Image) -> tuple[list[Record], Any]:
    import torch

    from .api import compress
    from .evaluation.classifiers import open_classifier
    from .evaluation.prompts import place

    if options.model is not None:
        raise ValueError("give a --model that answers or a --host that classifies, not both")
    _quiet()
    classifier = open_classifier(options.host)
    options.method = options.method or "tome"
    _choose_keep(options)
    inputs = place(classifier.prepare([image]), classifier)
    how = {"keep": options.keep, **_settings(options)}
    with torch.no_grad(), compress(classifier.model, options.method, **how) as handle:
        classifier.forward(classifier.model, inputs)
    return handle.last, lambda picture: next(iter(classifier.prepare([picture]).values()))[0]


def _profile(options: argparse.Namespace) -> None:
    """measure a prefill with and without compression"""
    from .api import compress
    from .cost import profile
    from .evaluation.prompts import encode, place
    from .images import open_image

    image = open_image(options.image)
    model, processor = _load(options.model)
    _choose_method(options, model)
    inputs = place(encode(processor, [options.question], [image]), model)
    full = profile(model, inputs)
    with compress(model, options.method, keep=options.keep, **_settings(options)):
        compressed = profile(model, inputs)
    full.pop("plan")
    rows = [(name, _figure(value), _figure(compressed[name])) for name, value in full.items()]
    _print_columns([("", "all tokens", _shown(options)), *rows])


def _sweep(options: argparse.Namespace) -> None:
    """measure methods at several budgets; goes on where it was stopped"""
    from .evaluation.board import boards

    how = {
        "n": options.questions, "split": options.split, "seeds": options.seeds, "output": options.output,
        "batch_size": options.batch_size, "command": options.command,
    }  # fmt: skip
    rows = _sweep_answers(options, how) if options.host is None else _sweep_classes(options, how)
    _print_boards(boards(rows))
    print(options.output)


def _sweep_answers(options: argparse.Namespace, how: dict[str, Any]) -> list[dict[str, Any]]:
    from .evaluation.sweep import sweep

    if options.schedule:
        raise ValueError("--schedule is for encoders: give one by --host")
    model, processor = _load(options.model)
    baselines = ["random", "downsample"] if options.baselines is None else options.baselines
    # What was not asked for by name runs as baselines do: where the model serves it.
    baselines = baselines if options.methods else [*METHODS, *baselines]
    keeps, tasks = options.keeps or KEEPS, options.tasks or ["scenes"]
    return sweep(
        model, processor, options.methods or (), keeps, tasks, baselines=dict.fromkeys(baselines), **how
    )


def _sweep_classes(options: argparse.Namespace, how: dict[str, Any]) -> list[dict[str, Any]]:
    from .evaluation.classifiers import open_classifier
    from .evaluation.classify import sweep_encoder

    _quiet()
    classifier = open_classifier(options.host)
    baselines = ["random", "pool"] if options.baselines is None else options.baselines
    keeps, tasks = options.keeps or ENCODER_KEEPS, options.tasks or ["singles"]
    return sweep_encoder(
        classifier, options.methods, keeps, tasks, schedules=options.schedule, baselines=baselines, **how
    )


def _demo(options: argparse.Namespace) -> None:
    """measure six methods at five budgets on the reference model and write a report"""
    import torch

    from .evaluation.board import boards
    from .evaluation.report import write_report
    from .evaluation.sweep import sweep

    # So small a model gains little from threads, and is many times slower where they fight for busy cores.
    torch.set_num_threads(1)
    _check_plots()
    model, processor = _load(None)
    output = options.out / "results.jsonl"
    rows = sweep(
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


def _report(options: argparse.Namespace) -> None:
    """write tables, plots and a page from results, or fill in a README"""
    from .evaluation.chance import below_random
    from .evaluation.report import load_boards, update_readme, write_report

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
            exhibits = _exhibits(found, *_load(None if name == REFERENCE.name else name), options.pictures)
        print(write_report(found, options.out or "vtc-report", exhibits))


def _check_plots() -> None:
    """Says so before the work rather than after it."""
    if find_spec("matplotlib") is None:
        raise ImportError("plots need matplotlib: pip install 'vision-token-compression[eval]'")


def _exhibits(found: list[Board], model: Any, processor: Any, n: int) -> list[list[Exhibit]]:
    from .evaluation.gallery import gallery
    from .evaluation.sweep import identify
    from .evaluation.tasks import load_task

    own = identify(model)
    others = dict.fromkeys(board.model for board in found if board.model != own and not board.classes)
    if others:
        warnings.warn(f"the pictures are of {own}, there are none of {', '.join(others)}", stacklevel=2)

    def exhibits(board: Board) -> list[Exhibit]:
        return gallery(model, processor, load_task(board.task, split=board.split or "test"), board.runs, n)

    return [exhibits(board) if board.model == own else [] for board in found]


def _load(name: str | None) -> tuple[Any, Any]:
    from .ask import load_model

    _quiet()
    if name is None and not (REFERENCE / "config.json").is_file():
        raise ValueError(
            "the reference model is not here; the source checkout of vtc has it in models/tiny-llava: "
            "give --model a folder or a name on the Hugging Face Hub"
        )
    return load_model(name or REFERENCE)


def _quiet() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """The method's options given as --set name=value."""
    settings = {}
    for setting in options.set:
        name, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"--set takes name=value, not {setting!r}")
        try:
            settings[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            settings[name] = value
    return settings


def _choose_method(options: argparse.Namespace, model: Any) -> None:
    from .api import compress

    if options.method is None:
        options.method = "vtc-cls"
        try:
            compress(model, options.method, keep=1.0).remove()
        except ValueError:
            options.method = "divprune"
    _choose_keep(options)


def _choose_keep(options: argparse.Namespace) -> None:
    """A quarter of the tokens; of a module that was saved what it makes at most."""
    from .method import list_methods

    if options.keep is None and options.method in list_methods():
        options.keep = 0.25


def _shown(options: argparse.Namespace) -> str:
    keep = f"{options.keep:g}" if isinstance(options.keep, (int, float)) else options.keep
    keep = "" if keep is None else f", keep {keep}"
    return " ".join([f"{Path(options.method).name}{keep}", *options.set])


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _print_boards(found: list[Board]) -> None:
    from .evaluation.hard import hard_legend, hard_lines
    from .evaluation.tables import accuracy_lines, bounds, encoder_lines, left_blocks, legend
    from .evaluation.varying import varying_legend, varying_lines

    for board in found:
        if board.classes:
            print(f"{board.task}, accuracy in % / GFLOPs / speed")
            _print_columns(encoder_lines(board))
            print(f"{legend(board, costs=True)} {bounds(board)}\n\nPatch tokens that leave each block:")
            _print_columns(left_blocks(board))
            print()
            continue
        title = f"{board.task}, accuracy in %"
        if board.keeps:
            _print_columns(accuracy_lines(board, title))
        print(f"{legend(board)} {bounds(board)}\n")
        for lines, told in ((hard_lines(board, title), hard_legend), (varying_lines(board), varying_legend)):
            if lines:
                _print_columns(lines)
                print(f"{told(board)}\n")


def _print_columns(rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _one_line(message: object) -> str:
    if isinstance(message, OSError) and message.filename:
        return f"{message.filename}: {message.strerror.lower()}"
    return " ".join(str(message).split()) or type(message).__name__


COMMANDS = {
    "methods": _methods, "hosts": _hosts, "ask": _ask, "draw": _draw, "profile": _profile, "demo": _demo,
    "sweep": _sweep, "report": _report, "tokenizers": tokenizers, "tokenize": tokenize,
    "detokenize": detokenize, "modules": modules, "train": train,
}  # fmt: skip

if __name__ == "__main__":  # accelerate launch -m vtc.cli train CONFIG
    sys.exit(main())
