"""The commands that turn folders of pictures into tokens and back."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

DEFAULT = "tiny-tokenizer"


def tokenize(options: argparse.Namespace) -> None:
    """turn a folder of pictures into shards of tokens; goes on where it was stopped"""
    from ..tokenizers import tokenize_folder

    if options.ray:  # its core warns of what is meant to be so
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    made = tokenize_folder(
        options.folder, options.tokenizer, _policy(options.policy), options.output, format=options.format,
        shard_size=options.shard_size, fit=options.fit, dtype=options.dtype, calibrate=options.calibrate,
        batch_size=options.batch_size, device=options.device, workers=options.workers,
        overwrite=options.overwrite, ray=options.ray, actors=options.actors,
    )  # fmt: skip
    bits = made["tokenizer"]["bits_per_token"]
    print(f"{made['images']} pictures, {made['mean_length']:.4g} tokens of each, {bits:.4g} bits per token")
    print(f"{len(made['shards'])} shards, {made['bytes']} bytes")
    if made["unreadable"]:
        print(f"{len(made['unreadable'])} could not be read; the manifest lists them, with reasons")
    print(Path(options.output) / "manifest.json")


def detokenize(options: argparse.Namespace) -> None:
    """turn shards of tokens into pictures"""
    from ..tokenizers import detokenize_folder

    written = detokenize_folder(
        options.tokens, options.output, options.tokenizer, length=options.length,
        batch_size=options.batch_size, device=options.device, overwrite=options.overwrite,
    )  # fmt: skip
    print(f"{len(written)} pictures in {options.output}")


def arguments_tokenize(command: argparse.ArgumentParser) -> None:
    help_text = command.format_help
    command.format_help = lambda: f"{help_text()}\n{_policies()}"
    command.add_argument("folder", metavar="FOLDER", help="pictures, in sub-folders too")
    _tokenizer(command, f"default: {DEFAULT}, of the source checkout", DEFAULT)
    text = "how many tokens each picture gets: a number, or one of those below; default: all"
    command.add_argument("--policy", help=text)
    _output(command, "folder for the shards and manifest.json")
    command.add_argument("--format", default="safetensors", help="safetensors (default) or parquet")
    command.add_argument("--shard-size", type=int, default=1024, metavar="N", help="pictures in a shard")
    text = "how a picture becomes a square: crop (default), pad with white, or stretch"
    command.add_argument("--fit", default="crop", help=text)
    text = "of continuous tokens: float16 (default) or float32"
    command.add_argument("--dtype", default="float16", help=text)
    text = "pictures that a mean budget is calibrated on, the first by name"
    command.add_argument("--calibrate", type=int, default=256, metavar="N", help=text)
    command.add_argument("--workers", type=int, metavar="N", help="threads that read pictures")
    _running(command, "start anew in a folder that was begun with other settings or pictures")
    command.add_argument("--ray", action="store_true", help="over a Ray cluster, or one on this machine")
    text = "processes of --ray, each with a CPU or GPU; default: as many as there is room for"
    command.add_argument("--actors", type=int, metavar="N", help=text)


def arguments_detokenize(command: argparse.ArgumentParser) -> None:
    command.add_argument("tokens", metavar="TOKENS", help="a folder that `vtc tokenize` wrote")
    _tokenizer(command, "default: the one that made the tokens, where it was")
    _output(command, "folder for PNG files, named as the pictures were")
    command.add_argument("--length", type=int, metavar="K", help="only the first K tokens of each picture")
    _running(command, "write into a folder that holds files already")


def _tokenizer(command: argparse.ArgumentParser, text: str, default: str | None = None) -> None:
    text = f"a folder or a name on the Hugging Face Hub; {text}"
    command.add_argument("--tokenizer", metavar="TOKENIZER", default=default, help=text)


def _output(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("-o", "--output", metavar="FOLDER", required=True, help=text)


def _running(command: argparse.ArgumentParser, text: str) -> None:
    command.add_argument("--batch-size", type=int, default=32)
    command.add_argument("--device", help="default: cuda where there is such a device")
    command.add_argument("--overwrite", action="store_true", help=text)


def _policy(text: str | None) -> str | int | None:
    return int(text) if text is not None and text.isdecimal() else text


def _policies() -> str:
    from ..tokenizers.parse import FORMS

    return "policies:\n" + "".join(f"  {form}\n      {what}\n" for form, what in FORMS.items())
