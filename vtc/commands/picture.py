"""The commands that show what compression does with one picture."""

from __future__ import annotations

import argparse
import ast
import textwrap
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .columns import print_columns
from .reference_model import model_named, quiet

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..record import Record


def ask(options: argparse.Namespace) -> None:
    """answer a question about an image with and without compression"""
    from ..ask import compare_answers

    model, processor = model_named(options.model)
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
    print_columns(rows)


def draw(options: argparse.Namespace) -> None:
    """draw the kept and merged tokens on an image"""
    from ..draw import draw as drawn
    from ..images import open_image
    from ..views import after

    image = open_image(options.image)
    records, processor = _answered(options, image) if options.host is None else _classified(options, image)
    shown = [after(record, options.block) if isinstance(options.block, int) else record for record in records]
    kept, given = (sum(len(getattr(record, part)) for record in shown) for part in ("index", "source"))
    where = f"  ·  block {options.block}" if isinstance(options.block, int) else ""
    caption = f"{_shown(options)}{where}  ·  {kept} of {given} tokens"
    output = options.output or f"{Path(options.image).stem}-{Path(options.method).name}.png"
    drawn(image, records, processor=processor, block=options.block, caption=caption).save(output)
    print(output)


def _answered(options: argparse.Namespace, image: Image) -> tuple[list[Record], Any]:
    from ..ask import ask as answer

    model, processor = model_named(options.model)
    _choose_method(options, model)
    how = {"method": options.method, "keep": options.keep, **_settings(options)}
    return answer(model, processor, image, options.question, max_new_tokens=1, **how).records, processor


def _classified(options: argparse.Namespace, image: Image) -> tuple[list[Record], Any]:
    import torch

    from ..api import compress
    from ..evaluation.classifiers import open_classifier
    from ..evaluation.prompts import place

    if options.model is not None:
        raise ValueError("give a --model that answers or a --host that classifies, not both")
    quiet()
    classifier = open_classifier(options.host)
    options.method = options.method or "tome"
    _choose_keep(options)
    inputs = place(classifier.prepare([image]), classifier)
    how = {"keep": options.keep, **_settings(options)}
    with torch.no_grad(), compress(classifier.model, options.method, **how) as handle:
        classifier.forward(classifier.model, inputs)
    return handle.last, lambda picture: next(iter(classifier.prepare([picture]).values()))[0]


def profile(options: argparse.Namespace) -> None:
    """measure a prefill with and without compression"""
    from ..api import compress
    from ..cost import profile as measure
    from ..evaluation.prompts import encode, place
    from ..images import open_image

    image = open_image(options.image)
    model, processor = model_named(options.model)
    _choose_method(options, model)
    inputs = place(encode(processor, [options.question], [image]), model)
    full = measure(model, inputs)
    with compress(model, options.method, keep=options.keep, **_settings(options)):
        compressed = measure(model, inputs)
    full.pop("plan")
    rows = [(name, _figure(value), _figure(compressed[name])) for name, value in full.items()]
    print_columns([("", "all tokens", _shown(options)), *rows])


def _choose_method(options: argparse.Namespace, model: Any) -> None:
    from ..api import compress

    if options.method is None:
        options.method = "vtc-cls"
        try:
            compress(model, options.method, keep=1.0).remove()
        except ValueError:
            options.method = "divprune"
    _choose_keep(options)


def _choose_keep(options: argparse.Namespace) -> None:
    """A quarter of the tokens; of a module that was saved what it makes at most."""
    from ..method import list_methods

    if options.keep is None and options.method in list_methods():
        options.keep = 0.25


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


def _shown(options: argparse.Namespace) -> str:
    keep = f"{options.keep:g}" if isinstance(options.keep, (int, float)) else options.keep
    keep = "" if keep is None else f", keep {keep}"
    return " ".join([f"{Path(options.method).name}{keep}", *options.set])


def _figure(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_figure(part)}" for name, part in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
