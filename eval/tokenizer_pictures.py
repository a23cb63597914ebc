"""The pictures about a tokenizer: reconstructions by number of tokens, and the curve of the results.

Run from the repository's root, after eval/tokenizer.py:
    python eval/tokenizer_pictures.py
    python eval/tokenizer_pictures.py --tokenizer my-folder --images my-photos/ --out my-assets
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch
from tokenizer import OUTPUT, TOKENIZER, photos

from vtc.evaluation.reconstruction_plot import plot_curves, reconstructions
from vtc.evaluation.reconstruction_tables import newest
from vtc.evaluation.results import read_rows
from vtc.evaluation.scenes import scene
from vtc.evaluation.textures import KINDS, texture
from vtc.tokenizers import from_pretrained
from vtc.tokenizers.images import load_images

OBJECTS = (1, 2, 3, 4)
TEXTURES = ("ramp", "cells")
PHOTOS = 6


def shown(size: int) -> tuple[torch.Tensor, list[str]]:
    """The first test scene with each number of objects, and the first texture of some kinds."""
    images, names = [], []
    for objects in OBJECTS:
        images.append(next(one.image for i in count() if len((one := scene("test", i)).objects) == objects))
        names.append(f"{objects} object{'s' * (objects > 1)}")
    for kind in TEXTURES:
        images.append(texture("test", KINDS.index(kind)))
        names.append(kind)
    return load_images(images, size), names


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokenizer", default=TOKENIZER, help="a folder, or a name on the Hugging Face Hub")
    parser.add_argument("--images", type=Path, help="a folder of pictures, the first of which are shown")
    parser.add_argument("--rows", type=Path, help="default: eval/results/TOKENIZER.jsonl")
    parser.add_argument("--out", type=Path, default=Path("assets"))
    options = parser.parse_args(arguments)
    rows = options.rows or OUTPUT.with_name(f"{Path(options.tokenizer).name}.jsonl")
    tokenizer = from_pretrained(options.tokenizer)
    size = tokenizer.config.image_size
    if options.images:
        images = photos(options.images, size).images[:PHOTOS]
        names = [""] * len(images)
    else:
        images, names = shown(size)
    options.out.mkdir(parents=True, exist_ok=True)
    reconstructions(tokenizer, images, names).save(options.out / "tokenizer-grid.png", optimize=True)
    own = [row for row in newest(read_rows(rows)[0]) if row["tokenizer"] == options.tokenizer]
    plot_curves(own, options.out / "tokenizer-curve.png")


if __name__ == "__main__":
    main()
