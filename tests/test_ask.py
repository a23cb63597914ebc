"""Questions are asked as the model's own chat template wants, and a comparison leaves the model bare."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import vtc
from vtc.ask import ask, compare_answers, load_model
from vtc.evaluation.scenes import scene

REFERENCE = Path(__file__).parents[1] / "models" / "tiny-llava"
QUESTION = "how many objects are there ?"


@pytest.fixture(scope="module")
def loaded():
    return load_model(REFERENCE, device="cpu")


@pytest.fixture(scope="module")
def image():
    return scene("test", 3).image


def test_answer_is_what_generate_says_to_the_chat_template(loaded, image):
    model, processor = loaded
    answer = ask(model, processor, image, QUESTION, max_new_tokens=4)
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert answer.text == processor.decode(ids, skip_special_tokens=True).strip() != ""
    assert answer.tokens == 144 and answer.records == [] and answer.seconds > 0


def test_compressed_answer_carries_its_record_and_leaves_the_model_bare(loaded, image):
    answer = ask(*loaded, image, QUESTION, "random", 0.25, max_new_tokens=2, seed=5)
    assert answer.tokens == len(answer.records[0].index) == 36
    other = ask(*loaded, image, QUESTION, "random", 0.25, max_new_tokens=2, seed=6)
    assert not torch.equal(answer.records[0].index, other.records[0].index)  # options reach the method
    with pytest.raises(RuntimeError, match="not compressed"):
        vtc.restore(loaded[0])


def test_model_is_bare_after_an_error(loaded, image):
    with pytest.raises(ValueError):
        ask(*loaded, image, QUESTION, "uniform", 0.25, max_new_tokens=-1)
    with pytest.raises(RuntimeError, match="not compressed"):
        vtc.restore(loaded[0])


def test_comparison_gives_both_answers(loaded, image):
    full, compressed = compare_answers(*loaded, image, QUESTION, "vtc-cls", 0.25, max_new_tokens=3, repeats=1)
    assert (full.tokens, compressed.tokens) == (144, 36)
    assert full.text == ask(*loaded, image, QUESTION, max_new_tokens=3).text
    assert compressed.text == ask(*loaded, image, QUESTION, "vtc-cls", 0.25, max_new_tokens=3).text
    assert full.seconds > 0 and compressed.seconds > 0


def test_paths_are_opened(loaded, image, tmp_path):
    image.save(tmp_path / "scene.png")
    assert (
        ask(*loaded, tmp_path / "scene.png", QUESTION, max_new_tokens=3).text
        == ask(*loaded, image, QUESTION, max_new_tokens=3).text
    )


def test_processor_without_a_chat_template(loaded, image):
    model, processor = loaded
    processor = copy.copy(processor)
    processor.chat_template = None
    assert ask(model, processor, image, QUESTION, max_new_tokens=2).tokens == 144


def test_nothing_is_told_to_stdout(image, capfd):
    model, processor = load_model(REFERENCE, device="cpu", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    ask(model, processor, image, QUESTION, "uniform", 8, max_new_tokens=2)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_missing_folder(name):
    with pytest.raises(ValueError, match=f"^there is no folder '{name}'$"):
        load_model(name)


def test_unknown_or_unreachable_hub_model():
    with pytest.raises(
        ValueError, match="there is no folder 'nobody/nothing' here, and the Hugging Face Hub"
    ):
        load_model("nobody/nothing")


def test_folder_without_a_model(tmp_path):
    with pytest.raises(ValueError, match="no model that transformers can load"):
        load_model(tmp_path)


def test_folder_with_half_a_model(tmp_path):
    (tmp_path / "config.json").write_text((REFERENCE / "config.json").read_text())
    with pytest.raises(ValueError, match="no complete model"):
        load_model(tmp_path)


def test_text_models_are_refused(tmp_path):
    LlamaConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a llama model: it does not answer questions about images"):
        load_model(tmp_path)


def test_a_budget_without_a_method_is_refused(loaded, image):
    with pytest.raises(ValueError, match="belong to a method"):
        ask(*loaded, image, QUESTION, keep=0.1)


def test_a_compressed_model_answers_as_it_is(loaded, image):
    with vtc.compress(loaded[0], "uniform", keep=16):
        answer = ask(*loaded, image, QUESTION, max_new_tokens=2)
    assert answer.tokens == len(answer.records[0].index) == 16
