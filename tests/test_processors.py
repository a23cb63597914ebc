"""Asking, drawing, measuring and sweeping work with the processors of other families than LLaVA's."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from processors import FAMILIES, save

import vtc
from vtc import cli, views
from vtc.ask import ask, compare_answers, load_model
from vtc.evaluation.board import boards
from vtc.evaluation.prompts import Batches, encode, place
from vtc.evaluation.sweep import sweep
from vtc.evaluation.tasks import load_task
from vtc.method import Select, _methods

QUESTION = "what colour is the star ?"
DARK, BRIGHT = (20, 30, 90), (255, 230, 40)
SQUARE = (113, 13, 136, 36)  # off the diagonal, less than half of any tile
VIEWS = {"internvl": 7, "idefics3": 7}  # of that picture, each an image to the model


def picture(size=(150, 100), square=SQUARE):
    image = Image.new("RGB", size, DARK)
    image.paste(BRIGHT, square)
    return image


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Checkpoints by the name of their family: (folder, model, processor), made and loaded once."""
    loaded = {}

    def get(name):
        if name not in loaded:
            folder = save(name, tmp_path_factory.mktemp(name))
            loaded[name] = folder, *load_model(folder, device="cpu")
        return loaded[name]

    return get


@pytest.fixture
def odd(monkeypatch):
    @dataclass
    class Odd(Select):
        """Keeps what is least like the usual token of the picture."""

        name = "odd"

        def score(self, tokens):
            usual = tokens.x.median(dim=1, keepdim=True).values
            return (tokens.x - usual).norm(dim=-1)

    monkeypatch.setitem(_methods.all(), "odd", Odd)


def bright(image):
    """(H, W): where a drawn picture shows the square, not faded."""
    return (np.abs(np.asarray(image).astype(int) - BRIGHT) < 60).all(axis=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_kept_tokens_are_drawn_where_they_are(name, load, odd):
    _, model, processor = load(name)
    image = picture()
    answer = ask(model, processor, image, QUESTION, "odd", 0.25, max_new_tokens=1)
    assert len(answer.records) == VIEWS.get(name, 1)
    drawn = vtc.draw(image, answer.records, processor=processor, caption=False, long_side=600)
    shown = bright(drawn)[:, :608]  # without the thumbnail
    rows, cols = np.nonzero(shown)
    boxes = [tile.box for tile in views.place([image], answer.records, processor)[0].tiles]
    left, top = (min(0, *(box[side] for box in boxes)) for side in (0, 1))  # padding is drawn, too
    bottom = max(1, *(box[3] for box in boxes))
    scale = drawn.height / (bottom - top) / image.height
    found = np.array([cols.min(), rows.min(), cols.max(), rows.max()]) / scale
    found += np.array([left * image.width, top * image.height] * 2)
    assert np.abs(found - SQUARE).max() < 5  # all of it, at its place; tokens are larger
    assert shown[rows.min() : rows.max(), cols.min() : cols.max()].mean() > 0.85  # grid lines are lighter
    assert (np.asarray(drawn)[..., 0] > 150).mean() > 0.5  # and most is faded


@pytest.mark.parametrize("name", FAMILIES)
def test_both_answers_and_their_tokens(name, load):
    _, model, processor = load(name)
    full, few = compare_answers(model, processor, picture(), QUESTION, "divprune", 0.3, 3, repeats=1)
    inputs = place(encode(processor, [QUESTION], [picture()]), model)
    output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    text = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert full.text == text != "" and full.records == []
    assert full.tokens == int((inputs["input_ids"] == model.config.image_token_id).sum())
    assert few.tokens == sum(len(record.index) for record in few.records) < 0.35 * full.tokens


def write_task(folder, model, processor):
    """Three questions about pictures of three shapes, with the answers that the model gives."""
    lines = []
    for number, size in enumerate([(150, 100), (100, 140), (96, 96)]):
        image = picture(size, (10 + 20 * number, 10, 60, 50))
        image.save(folder / f"{number}.png")
        answer = ask(model, processor, image, QUESTION, max_new_tokens=5).text
        lines.append({"image": f"{number}.png", "question": QUESTION, "answer": answer})
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return f"jsonl:{folder / 'task.jsonl'}"


@pytest.mark.filterwarnings("ignore:the run of blind")  # PaliGemma asks nothing without a picture
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"qwen3_vl", "llava_next"}))  # like two others
def test_sweep_in_batches_of_pictures_of_different_shapes(name, load, tmp_path):
    _, model, processor = load(name)
    task = write_task(tmp_path, model, processor)
    how = {"baselines": (), "repeats": 1, "progress": False, "output": tmp_path / "results.jsonl"}
    full, blind, half = sweep(model, processor, "divprune", 0.5, task, batch_size=2, **how)
    assert full["accuracy"] == 1.0 and full["items"] == 3 and full["errors"] == []
    assert ("images` are expected" in blind["error"]) if name == "paligemma" else blind["tokens"] == 0
    assert 0.4 < half["tokens"] / full["tokens"] < 0.55  # newline tokens leave beside the half
    assert half["cost"]["tflops_total"] < full["cost"]["tflops_total"]
    assert half["cost"]["physical_length"] < full["cost"]["physical_length"]


def test_report_of_several_models(load, tmp_path, capsys):
    rows, names, output = [], ("qwen2_5_vl", "internvl"), tmp_path / "all.jsonl"
    how = {"baselines": "random", "repeats": 1, "progress": False, "output": output}
    for name in names:
        folder, model, processor = load(name)
        task = write_task(tmp_path, model, processor)
        rows += sweep(model, processor, "divprune", 0.5, task, **how)
    found = boards(rows)
    assert [board.model.split("@")[0][: len(name)] for board, name in zip(found, names)] == list(names)
    assert {row["cost"]["tflops_by"] for row in rows if row["cost"]} == {"counter"}
    where = ["--out", str(tmp_path / "report"), "--model", str(folder), "--pictures", "2"]
    assert cli.main(["report", str(output), *where]) == 0
    assert f"there are none of {found[0].model}" in capsys.readouterr().err
    text, page = ((tmp_path / "report" / name).read_text() for name in ("report.md", "index.html"))
    every = found[1].full["tokens"]  # of all tiles of a picture
    assert f"| all tokens | {every:.0f} |" in text and f"all {every:.0f} tokens" in text
    first, second = json.loads(page.split('id="data">')[1].split("</script>")[0])
    assert first["exhibits"] == [] and len(second["exhibits"]) == 2
    for exhibit in second["exhibits"]:
        half = {kept["tokens"] for kept in exhibit["kept"]}
        assert half == {exhibit["original"]["tokens"] // 2} and exhibit["original"]["tokens"] > 16


@pytest.mark.parametrize(
    "command, name, shown",
    [
        ("ask", "gemma3", "divprune, keep 0.25"),
        ("draw", "internvl", "a-vtc-cls.png"),
        ("profile", "mistral3", "counter"),
    ],
)
def test_commands_choose_a_method_that_the_model_serves(
    command, name, shown, load, tmp_path, monkeypatch, capsys
):
    folder = load(name)[0]
    monkeypatch.chdir(tmp_path)
    picture().save("a.png")
    question = [QUESTION] if command == "ask" else []
    assert cli.main([command, "a.png", *question, "--model", str(folder)]) == 0
    out, err = capsys.readouterr()
    assert shown in out and err == ""


def test_sweep_of_the_methods_that_a_model_serves(load, tmp_path, capsys):
    folder, model, processor = load("gemma3")
    task = write_task(tmp_path, model, processor)
    where = ["--output", str(tmp_path / "results.jsonl"), "--questions", "1", "--tasks", task]
    assert cli.main(["sweep", "--model", str(folder), "--keeps", "0.5", *where]) == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    served = ["full", "blind", "hiprune", "divprune", "tome", "random"]
    assert [row["method"] for row in rows] == served and not any("error" in row for row in rows)
    assert "without the baseline 'vtc-cls'" in capsys.readouterr().err


def test_half_precision(load):
    model, processor = load_model(load("qwen2_5_vl")[0], device="cpu", dtype=torch.bfloat16)
    placed = place(encode(processor, [QUESTION], [picture()]), model)
    assert placed["pixel_values"].dtype == torch.bfloat16 and placed["image_grid_thw"].dtype == torch.long
    assert ask(model, processor, picture(), QUESTION, "tome", 8, max_new_tokens=2).tokens == 8


def test_a_prompt_begins_once(load):
    """Templates that write the first token themselves, as Gemma's does, get no second one."""
    processor = load("qwen2_5_vl")[2]
    template = processor.chat_template
    try:
        processor.chat_template = "{{ bos_token }}" + template
        again = encode(processor, [QUESTION], [picture()])["input_ids"]
    finally:
        processor.chat_template = template
    assert torch.equal(again, encode(processor, [QUESTION], [picture()])["input_ids"])
    assert (again == processor.tokenizer.bos_token_id).sum() == 1


def test_tiles_need_their_processor(load):
    _, model, processor = load("internvl")
    records = ask(model, processor, picture(), QUESTION, "uniform", 0.5, max_new_tokens=1).records
    with pytest.raises(ValueError, match=r"1 image.* had 7: give each image .* and the processor"):
        vtc.draw(picture(), records)
    with pytest.raises(ValueError, match=r"2 image.* had 7"):
        vtc.draw([picture()] * 2, records, processor=processor)


@pytest.mark.parametrize("size", [(150, 100), (90, 150), (100, 100)])
def test_tiles_lie_where_their_processor_cuts_them(load, size):
    """A tile's tokens are as large as the processor makes them, and none lies outside of what it cuts."""
    _, model, processor = load("llava_next")
    image = picture().resize(size)
    (record,) = ask(model, processor, image, QUESTION, "uniform", 0.5, max_new_tokens=1).records
    seen = views.views(processor, size)
    side = record.tiles[0].grid[0]
    assert len(record.tiles) == len(seen) > 2
    for tile, (left, top, right, bottom) in zip(record.tiles[1:], seen[1:]):
        box, rows, cols = tile.box, *tile.grid
        width, height = (right - left) / side, (bottom - top) / side  # of a token
        assert np.allclose([(box[2] - box[0]) / cols, (box[3] - box[1]) / rows], [width, height], rtol=0.03)
        assert all(np.greater(box[:2], [left - 0.03, top - 0.03]))
        assert all(np.less(box[2:], [right + 0.03, bottom + 0.03]))


def test_views_know_crops_padding_and_pictures_of_parts():
    from transformers import CLIPImageProcessor, Gemma3ImageProcessor, JanusImageProcessor

    cropping = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    assert np.allclose(views.views(cropping, (200, 100)), [(0.25, 0, 0.75, 1)], atol=0.01)
    padding = JanusImageProcessor(size={"height": 64, "width": 64})
    assert np.allclose(views.views(padding, (200, 100)), [(0, -0.5, 1, 1.5)], atol=0.03)
    parts = Gemma3ImageProcessor(
        size={"height": 64, "width": 64},
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=2,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    assert views.views(parts, (200, 100)) == [(0, 0, 1, 1), (0, 0, 0.5, 1), (0.5, 0, 1, 1)]


def test_batches_pad_on_the_left(load):
    _, _, processor = load("gemma3")
    questions = [QUESTION, f"{QUESTION} {QUESTION}"]
    mask = encode(processor, questions, [picture()] * 2)["attention_mask"]
    assert mask[0, 0] == 0 and mask[:, -1].tolist() == [1, 1]
    assert Batches(processor, load_task("scenes", 1)).answer_length() > 4
