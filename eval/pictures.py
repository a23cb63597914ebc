"""The pictures of the README: a scene, its kept tokens, what encoders merge, and the curves of the results.

Run from the repository's root: python eval/pictures.py
"""

from pathlib import Path

import torch
from PIL import Image

from vtc import compress
from vtc.ask import ask, load_model
from vtc.draw import contact_sheet, draw
from vtc.evaluation.board import Board
from vtc.evaluation.classifiers import open_classifier
from vtc.evaluation.plot import plot_accuracy
from vtc.evaluation.prompts import encode, place
from vtc.evaluation.report import load_boards
from vtc.evaluation.runner import label
from vtc.evaluation.scenes import scene
from vtc.sheet import PAPER

MODEL, INDEX, METHOD, KEEP = "models/tiny-llava", 126, "vtc-cls", 0.11
# INDEX: of the first 600 test scenes one with four objects, all of which are still seen at this budget
RESULTS = "eval/results/tiny-llava-scenes.jsonl"
QUESTION = "what colour is the circle ?"

ENCODER, SCENE, SHARE = "models/tiny-clip", 31, 0.25  # SCENE: large objects on a dark background
MERGERS, LAYERS = ("tome", "pitome", "atc", "evit"), "atc"  # LAYERS: shown block by block
SIDE = 228  # pixels of a map

EXHIBITS, COLUMNS = (31, 126, 5, 17, 58), 3  # EXHIBITS: test scenes with few and many objects
SMALL = 84  # pixels of a picture in the gallery


def main() -> None:
    assets = Path("assets")
    model, processor = load_model(MODEL)
    image = scene("test", INDEX).image
    image.save(assets / "scene.png")
    every = ask(model, processor, image, QUESTION, "uniform", keep=1.0)
    kept = ask(model, processor, image, QUESTION, METHOD, keep=KEEP)
    panels = [draw(image, answer.records, processor=processor, caption=False) for answer in (every, kept)]
    captions = [f"{answer.tokens} tokens: “{answer.text}”" for answer in (every, kept)]
    contact_sheet(panels, captions, columns=2).save(assets / "kept.png")
    merge_maps(assets)
    (board,) = load_boards(RESULTS)
    plot_accuracy(board, assets / "accuracy.png")
    sheet = gallery(model, processor, board).quantize(256, dither=Image.Dither.NONE)
    sheet.save(assets / "gallery.png", optimize=True)


def gallery(model: torch.nn.Module, processor, board: Board) -> Image.Image:
    """The same pictures under every method of the results, at the budget by which the table is sorted."""
    images = [scene("test", index).image for index in EXHIBITS]
    inputs = place(encode(processor, [QUESTION] * len(images), images), model)
    runs = [("uniform", {}, 1.0), *(run for run in board.runs if run[2] == board.reference)]
    strips, captions = [], []
    for method, options, keep in runs:
        with torch.no_grad(), compress(model, method, keep=keep, **options) as handle:
            model(**inputs)
            drawn = [
                draw(image, record, processor=processor, caption=False, long_side=SMALL)
                for image, record in zip(images, handle.last, strict=True)
            ]
        strips.append(_strip(drawn))
        name = label(method, options)
        accuracy = board.full["accuracy"] if keep == 1 else board.cells[name, keep].accuracy
        captions.append(f"{'all tokens' if keep == 1 else name}: {100 * accuracy:.1f} %")
    return contact_sheet(strips, captions, COLUMNS)


def _strip(images: list[Image.Image], gap: int = 4) -> Image.Image:
    strip = Image.new("RGB", (sum(image.width + gap for image in images) - gap, images[0].height), PAPER)
    left = 0
    for image in images:
        strip.paste(image, (left, 0))
        left += image.width + gap
    return strip


def merge_maps(assets: Path) -> None:
    """What methods merge inside of an encoder, in the end and block by block."""
    classifier = open_classifier(ENCODER, device="cpu")
    image = scene("test", SCENE).image
    inputs = classifier.prepare([image])
    maps, captions = [], []
    for name, keep in [("uniform", 1.0), *((name, SHARE) for name in MERGERS)]:
        with torch.no_grad(), compress(classifier.model, name, keep=keep) as handle:
            classifier.forward(classifier.model, inputs)
        maps.append(draw(image, handle, caption=False, long_side=SIDE))
        title = "the picture" if keep == 1 else name
        captions.append(f"{title}: {len(handle.last[0].index)} tokens")
        if name == LAYERS:
            draw(image, handle, block="all").save(assets / "merge-layers.png")
    contact_sheet(maps, captions, len(maps)).save(assets / "merge-maps.png")


if __name__ == "__main__":
    main()
