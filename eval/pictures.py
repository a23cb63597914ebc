"""The pictures of the README: a scene, its kept tokens, and the curves of the results.

Run from the repository's root: python eval/pictures.py
"""

from pathlib import Path

from vtc.ask import ask, load_model
from vtc.draw import contact_sheet, draw
from vtc.evaluation.plot import plot_accuracy
from vtc.evaluation.report import load_boards
from vtc.evaluation.scenes import scene

MODEL, INDEX, METHOD, KEEP = "models/tiny-llava", 126, "vtc-cls", 0.11
# INDEX: of the first 600 test scenes one with four objects, all of which are still seen at this budget
RESULTS = "eval/results/tiny-llava-scenes.jsonl"
QUESTION = "what colour is the circle ?"


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
    plot_accuracy(load_boards(RESULTS)[0], assets / "accuracy.png")


if __name__ == "__main__":
    main()
