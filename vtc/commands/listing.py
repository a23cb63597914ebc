"""The commands that list what there is."""

from __future__ import annotations

import argparse

from .columns import print_columns


def methods(options: argparse.Namespace) -> None:
    """list the methods"""
    from ..method import doc, get_method, list_methods

    rows = [("method", "stages", "options", "what it does")]
    for name in list_methods():
        method = get_method(name)
        shown = " ".join(f"{option}={value}" for option, value in method.to_dict()["options"].items())
        rows.append((name, " ".join(method.stages), shown, doc(type(method))))
    print_columns(rows)


def hosts(options: argparse.Namespace) -> None:
    """list the families of models"""
    from ..hosts.support import MEANING, refused, rows
    from ..hosts.trunk import FAMILIES

    print_columns(rows())
    print()
    print_columns(MEANING.items())
    print("\nVision transformers, by themselves or with a head or a text encoder, at stage 'encoder':")
    print_columns([(family.name,) for family in FAMILIES])
    print("\nNot served:")
    print_columns(refused())


def tokenizers(options: argparse.Namespace) -> None:
    """list the tokenizers"""
    from ..tokenizers.listing import MEANING, rows

    print_columns(rows())
    print()
    print_columns(list(MEANING.items()))


def modules(options: argparse.Namespace) -> None:
    """list the modules with weights"""
    from ..learned.listing import MEANING, rows

    print_columns(rows())
    print()
    print_columns(list(MEANING.items()))
