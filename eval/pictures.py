"""The pictures of the README: a scene, its kept tokens, what encoders merge, and the curves of the results.

Run from the repository's root: python eval/pictures.py
"""

from pathlib import Path

import torch

from vtc import compress
from vtc.ask import ask, load_model
from vtc.draw import contact_sheet, draw
from vtc.evaluation.classifiers import open_classifier
from vtc.evaluation.plot import plot_accuracy
from vtc.evaluation.report import load_boards
from vtc.evaluation.scenes import scene

MODEL, INDEX, METHOD, KEEP = "models/tiny-llava", 126, "vtc-cls", 0.11
# INDEX: of the first 600 test scenes one with four objects, all of which are still seen at this budget
RESULTS = "eval/results/tiny-llava-scenes.jsonl"
QUESTION = "what colour is the circle ?"

ENCODER, SCENE, SHARE = "models/tiny-clip", 31, 0.25  # SCENE: large objects on a dark background
MERGERS, LAYERS = ("tome", "pitome", "atc", "evit"), "atc"  # LAYERS: shown block by block
SIDE = 228  # pixels of a map


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
    plot_accuracy(load_boards(RESULTS)[0], assets / "accuracy.png")


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
