"""The command that trains modules with weights."""

from __future__ import annotations

import argparse

from .reference_model import quiet


def train(options: argparse.Namespace) -> None:
    """train a module with weights in a host; goes on where it was stopped with --resume"""
    from ..training import train as run

    quiet()
    run(options.config, options.set, resume=options.resume)


def arguments_train(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "config", metavar="CONFIG", help="a YAML file: model, module, output, data and stages"
    )
    text = "replaces a setting of the file, like stages.0.steps=10"
    command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help=text)
    text = "go on from the last checkpoint of a training into the same folder"
    command.add_argument("--resume", action="store_true", help=text)
