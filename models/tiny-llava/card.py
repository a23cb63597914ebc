"""Writes the two model cards from scores.json: no number in them is typed by hand."""

import json
from pathlib import Path

HERE = Path(__file__).resolve().parent

LLAVA = """# tiny-llava

A complete `LlavaForConditionalGeneration` of {parameters:.1f} million parameters ({megabytes:.1f} MB): a
CLIP tower with a class token (6 layers, width 128, {image_tokens} patches of 8 pixels), a projector of two
layers and a Llama decoder (4 layers, width 128). It loads, and is compressed, exactly like a 7B checkpoint,
and needs no download.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

processor = AutoProcessor.from_pretrained("models/tiny-llava")
model = AutoModelForImageTextToText.from_pretrained("models/tiny-llava")
parts = [{{"type": "image"}}, {{"type": "text", "text": "What colour is the circle?"}}]
prompt = processor.apply_chat_template([{{"role": "user", "content": parts}}], add_generation_prompt=True)
inputs = processor(images=image, text=prompt, return_tensors="pt")
processor.decode(model.generate(**inputs, max_new_tokens=4)[0], skip_special_tokens=True)
```

## Scores

{questions:,} test questions, the kinds in equal parts; greedy `generate`; right when equal to the answer.
*Random* and *uniform* keep {kept_tokens} of the {image_tokens} image tokens in front of the decoder
(uniform: a regular sub-grid; one seed). *Blind* is the same model without the picture,
*commonest* the share of each kind's most frequent answer.

{table}

[tiny-clip](../tiny-clip/README.md), the same tower with its text tower, names {top1} of single objects
right among {classes} combinations of colour and shape.

## What it can be asked

{asked}

Upper case and missing spaces do not matter. The vocabulary is {vocabulary} whole words and marks, any other
word becomes `<unk>`. Other questions and two pictures in a prompt are outside its training: they run, but
the answers mean little.

## Data

Pictures of 96 x 96 pixels from `vtc.evaluation.scenes`: a textured background with dots and lines, 1 to 4
objects (7 shapes, 8 colours, 14 to 27 pixels) that do not overlap, and one black digit of 10 x 14 pixels.
Training, validation and test scenes come from different random streams. Everything is generated, nothing
was downloaded.

## Training

`python models/tiny-llava/train.py --seed {seed}` on {hardware},
shared with other jobs; torch {torch}, transformers {transformers}.

{stages}

* **tower**: each patch's feature (last layer but one, behind the projector) must name shape, colour, size,
  digit and place of the object under it *in the decoder's own word vectors*, so that a word finds its patch
  by a dot product; at the same time CLIP's loss between class token and free captions of the scene.
* **decoder**: eight questions per picture, side by side behind it under a mask that hides them from each
  other; three pictures of ten must also be described; and behind its second layer the place of every object
  named must be readable at the name's last word. The tower rests.
* **joint**: everything on all losses.
* **thin**: the decoder again, with some, few or (one step in twenty) none of each picture's patches, chosen
  among sets that still show something of every object, mostly of objects in some pictures and mostly of
  background in others. Without it the decoder leans on background patches being there, and answers worst
  from the sixteen patches that show most. Kept patches always hold the answers, so nothing is learnt about
  guessing what was dropped, except by the steps without any patch, which make *blind* a fair guess.

{training_pictures:,} pictures drawn in advance, no augmentation, AdamW, bfloat16 products. {history}

## Limits

An instrument for measuring compression, not a model of the world: it knows these pictures only, and unlike a
7B checkpoint its decoder has met shortened pictures in training (stage *thin*). The digit stands on a 4-pixel
raster, in one font, once in every picture. Scores at few tokens depend on how small and
how few the objects are: compare them with each other, do not quote them.
"""

CLIP = """# tiny-clip

`CLIPModel`: the vision tower of [tiny-llava](../tiny-llava/README.md), bit for bit, and the text tower it
was trained with (3 layers, width 128). {megabytes:.1f} MB.

Zero-shot on {questions:,} test scenes with one object, `a photo of a red circle .` for all {classes}
combinations of colour and shape: **{top1}** right, {top5} among the first five; chance is {chance}.

```python
from transformers import AutoModel, AutoProcessor

processor, model = (kind.from_pretrained("models/tiny-clip") for kind in (AutoProcessor, AutoModel))
texts = ["a photo of a red circle .", "a photo of a blue star ."]
model(**processor(images=image, text=texts, padding=True, return_tensors="pt")).logits_per_image
```

Classes: `vtc.evaluation.scenes.CLASSES`; pictures: `vtc.evaluation.scenes.singles`. Data, recipe and time:
the card of tiny-llava. Measured with torch {torch}, transformers {transformers}, on {hardware}.
"""

ASKED = {
    "colour": "what colour is the circle ?", "shape": "what shape is the red object ?",
    "count": "how many objects are there ?", "existence": "is there a red circle ?",
    "relation": "where is the red circle relative to the blue star ?", "digit": "which digit is written ?",
    "quadrant": "in which corner is the red circle ?",
}  # fmt: skip
ANSWERS = {
    "count": "one to four", "existence": "yes, no", "relation": "left, right, above, below",
    "digit": "0 to 9", "quadrant": "top left, ...", "colour": "one of 8 colours", "shape": "one of 7 shapes",
}  # fmt: skip


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def write(facts: dict, llava: Path = HERE, clip: Path = HERE.parent / "tiny-clip") -> None:
    ways = facts["scores"]
    titles = {
        "full": "all tokens",
        "random": "random",
        "uniform": "uniform",
        "blind": "blind",
        "chance": "commonest",
    }
    lines = ["| questions | " + " | ".join(titles.values()) + " |", "|---|" + "---:|" * len(titles)]
    for kind in ways["full"]:
        name = f"**{kind}**" if kind == "overall" else kind
        lines.append(f"| {name} | " + " | ".join(percent(ways[way][kind]) for way in titles) + " |")
    stages = ["| stage | steps | pictures | minutes |", "|---|---:|---:|---:|"]
    for name, s in facts["stages"].items():
        stages.append(f"| {name} | {s['steps']:,} | {s['steps'] * s['batch']:,} | {s['minutes']:.0f} |")
    shot = facts["zero_shot"]
    shared = {
        k: facts[k]
        for k in ("questions", "kept_tokens", "image_tokens", "hardware", "torch", "transformers", "seed")
    }
    shared |= {"top1": percent(shot["top1"]), "top5": percent(shot["top5"]), "classes": shot["classes"]}
    text = LLAVA.format(
        **shared, parameters=facts["parameters"] / 1e6, megabytes=facts["megabytes"], table="\n".join(lines),
        stages="\n".join(stages), training_pictures=facts["pictures"], vocabulary=facts["vocabulary"],
        history=facts.get("history", ""),
        asked="\n".join(f"* {kind}: *{text}* ({ANSWERS[kind]})" for kind, text in ASKED.items()),
    )  # fmt: skip
    (llava / "README.md").write_text(text)
    size = (clip / "model.safetensors").stat().st_size / 1e6
    (clip / "README.md").write_text(
        CLIP.format(**shared, megabytes=size, chance=percent(1 / shot["classes"]))
    )
    for folder in (llava, clip):
        (folder / "scores.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    write(json.loads((HERE / "scores.json").read_text()))
