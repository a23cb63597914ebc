"""The arguments of the command `vtc`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from .tokenize import arguments_detokenize, arguments_tokenize
from .train import arguments_train

METHODS = ("vtc-cls", "hiprune", "divprune", "tome", "random", "downsample")
KEEPS = (0.5, 0.33, 0.22, 0.11, 0.05)
ENCODER_KEEPS = (0.7, 0.5, 0.33, 0.25)
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
    text = f"default: those of {', '.join(METHODS)} that the model serves; of a host all that it serves"
    command.add_argument("--methods", nargs="+", metavar="METHOD", help=text)
    text = "run beside them; default: random and downsample, of a host random and pool"
    command.add_argument("--baselines", nargs="*", metavar="METHOD", help=text)
    text = (
        f"default: {' '.join(map(str, KEEPS))}; of a host {' '.join(map(str, ENCODER_KEEPS))}. Also p:0.9, "
    )
    text += "mean:16 or own, of methods that can keep more of one picture than of another"
    command.add_argument("--keeps", nargs="+", type=_budget, metavar="KEEP", help=text)
    text = "scenes (default) or jsonl:PATH; of a host singles (default) or imagefolder:PATH"
    command.add_argument("--tasks", "--task", nargs="+", metavar="TASK", help=text)
    text = "of a host: constant, decreasing, staged, once, or the blocks that reduce, like 3,6,9"
    command.add_argument(
        "--schedule", nargs="+", metavar="SCHEDULE", help=f"{text}; default: the methods' own"
    )
    command.add_argument(
        "--questions", type=int, metavar="N", help="how many questions or pictures of each task"
    )
    command.add_argument("--split", default="test")
    command.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="SEED")
    command.add_argument("--batch-size", type=int, default=64)
    command.add_argument("--output", default="results.jsonl", metavar="FILE")
    models = command.add_mutually_exclusive_group()
    _model(models)
    _host(models)


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
    text = "of an encoder in which tokens are reduced: what leaves this block; all: a panel for each block"
    command.add_argument("--block", type=_block, metavar="BLOCK", help=f"{text}; default: what is left")
    _profile(command)
    _host(command, "; its default method is tome")


def _profile(command: argparse.ArgumentParser) -> None:
    command.add_argument("image", metavar="IMAGE")
    command.add_argument("--question", default=QUESTION)
    _compression(command)


def _compression(command: argparse.ArgumentParser) -> None:
    text = (
        "one of `vtc methods`, or a folder or name on the Hub of a module that was saved; default: vtc-cls, "
    )
    command.add_argument("--method", help=f"{text}or divprune where the encoder has no CLS token")
    text = "a fraction, a number of tokens, or p:0.9; default: 0.25, of a module as many as it makes"
    command.add_argument("--keep", type=_budget, help=text)
    command.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="an option of the method"
    )
    _model(command)


def _model(command: argparse._ActionsContainer) -> None:
    text = "a folder or a name on the Hugging Face Hub; default: the reference model"
    command.add_argument("--model", help=text)


def _host(command: argparse._ActionsContainer, more: str = "") -> None:
    text = "an encoder that classifies: timm:NAME, timm:NAME@FILE, open_clip:ARCH/WEIGHTS, a folder or a name"
    command.add_argument("--host", help=f"{text} on the Hugging Face Hub{more}")


def _pictures(command: argparse.ArgumentParser) -> None:
    command.add_argument("--pictures", type=int, default=5, metavar="N", help="questions with drawn tokens")


def _block(text: str) -> int | str:
    if text == "all" or text.isdecimal():
        return text if text == "all" else int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is neither the number of a block nor 'all'")


def _budget(text: str) -> int | float | str:
    try:
        policy = ":" in text or text == "own"  # checked where it is used
        return text if policy else int(text) if text.isdigit() else float(text)
    except ValueError:
        message = f"{text!r} is neither a fraction such as 0.25 nor a whole number of tokens"
        raise argparse.ArgumentTypeError(message) from None


_ARGUMENTS = {
    "demo": _demo, "sweep": _sweep, "report": _report, "ask": _ask, "draw": _draw, "profile": _profile,
    "tokenize": arguments_tokenize, "detokenize": arguments_detokenize, "train": arguments_train,
}  # fmt: skip
