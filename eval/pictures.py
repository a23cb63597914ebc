"""The pictures of the README, from the reference model: assets/scene.png and assets/kept.png.

Run from the repository's root: python eval/pictures.py
"""

from pathlib import Path

from vtc.ask import ask, load_model
from vtc.draw import contact_sheet, draw
from vtc.evaluation.scenes import scene

MODEL, INDEX, METHOD, KEEP = "models/tiny-llava", 4, "vtc-cls", 0.11
QUESTION = "where is the red ring relative to the red circle ?"


def main() -> None:
    assets = Path("assets")
    model, processor = load_model(MODEL)
    image = scene("test", INDEX).image
    image.save(assets / "scene.png")
    every = ask(model, processor, image, QUESTION, "uniform", keep=1.0)
    kept = ask(model, processor, image, QUESTION, METHOD, keep=KEEP)
    panels = [draw(image, answer.record, processor=processor, caption=False) for answer in (every, kept)]
    captions = [f"{answer.tokens} tokens: “{answer.text}”" for answer in (every, kept)]
    contact_sheet(panels, captions, columns=2).save(assets / "kept.png")


if __name__ == "__main__":
    main()
