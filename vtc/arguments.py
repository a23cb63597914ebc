"""The arguments of the command `vtc`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

METHODS = ("vtc-cls", "hiprune", "divprune", "tome", "random", "downsample")
KEEPS = (0.5, 0.33, 0.22, 0.11, 0.05)
QUESTION = "Describe this picture."

Run = Callable[[argparse.Namespace], None]


def parser(runs: dict[str, Run]) -> argparse.ArgumentParser:
    """A parser whose result has as `run` what `runs` gives for the command, whose docstring is its help."""
    top = argparse.ArgumentParser(prog="vtc", description="Fewer vision tokens for vision-language models.")
    top.add_argument("--debug", action="store_true", help="show where an error comes from")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, run in runs.items():
        command = commands.add_parser(name, help=run.__doc__, description=run.__doc__)
        command.set_defaults(run=run)
        if name in _ARGUMENTS:
            _ARGUMENTS[name](command)
    return top


def _demo(command: argparse.ArgumentParser) -> None:
    command.add_argument("--out", type=Path, default=Path("vtc-demo"), help="folder for results and report")
    command.add_argument("--questions", type=int, default=350, help="how many, over seven kinds")
    command.add_argument("--open", action="store_true", help="show the report in the browser")
    _pictures(command)


def _sweep(command: argparse.ArgumentParser) -> None:
    text = f"default: those of {', '.join(METHODS)} that the model serves"
    command.add_argument("--methods", nargs="+", metavar="METHOD", help=text)
    command.add_argument(
        "--baselines", nargs="*", default=["random", "downsample"], metavar="METHOD", help="run beside them"
    )
    command.add_argument("--keeps", nargs="+", type=_budget, default=list(KEEPS), metavar="KEEP")
    command.add_argument(
        "--tasks", nargs="+", default=["scenes"], metavar="TASK", help="scenes or jsonl:PATH"
    )
    command.add_argument("--questions", type=int, help="how many of each task")
    command.add_argument("--split", default="test")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--output", default="results.jsonl", metavar="FILE")
    _model(command)


def _report(command: argparse.ArgumentParser) -> None:
    command.add_argument("results", metavar="RESULTS", help="a file that a sweep wrote")
    command.add_argument("--out", metavar="FOLDER", help="default: vtc-report, unless a README is given")
    command.add_argument("--readme", metavar="FILE", help="fill the marked parts of this Markdown file")
    _pictures(command)
    _model(command)


def _ask(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("question", metavar="QUESTION")
    _compression(command)


def _draw(command: argparse.ArgumentParser) -> None:
    command.add_argument("-o", "--output", metavar="FILE", help="default: IMAGE-METHOD.png in this folder")
    _profile(command)


def _profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("--question", default=QUESTION)
    _compression(command)


def _compression(command: argparse.ArgumentParser) -> None:
    text = "one of `vtc methods`; default: vtc-cls, or divprune where the encoder has no CLS token"
    command.add_argument("--method", help=text)
    command.add_argument("--keep", type=_budget, default=0.25, help="a fraction, or a whole number of tokens")
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the method"
    )
    _model(command)


def _model(command: argparse.ArgumentParser) -> None:
    text = "a folder or a name on the Hugging Face Hub; default: the reference model"
    command.add_argument("--model", help=text)


def _pictures(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pictures", type=int, default=6, metavar="N", help="questions with drawn tokens")


def _budget(text: str) -> int | float:
    try:
        return int(text) if text.isdigit() else float(text)
    except ValueError:
        message = f"{text!r} is neither a fraction such as 0.25 nor a whole number of tokens"
        raise argparse.ArgumentTypeError(message) from None


_ARGUMENTS = {
    "demo": _demo, "sweep": _sweep, "report": _report, "ask": _ask, "draw": _draw, "profile": _profile,
}  # fmt: skip
