"""Assisted decoding, where a pass runs over candidates and the cache is cropped to those accepted."""

import pytest
import torch
from tiny import SUPPRESS, build

import vtc

GREEDY = {"max_new_tokens": 6, "do_sample": False, "suppress_tokens": SUPPRESS}


@pytest.fixture(params=["llava-clip", "qwen2_5_vl", "gemma3"])
def name(request):
    return request.param


@pytest.fixture
def crops(monkeypatch):
    """By how many tokens caches were cropped."""
    from transformers import DynamicCache

    seen, crop = [], DynamicCache.crop
    monkeypatch.setattr(DynamicCache, "crop", lambda self, by: (seen.append(-by), crop(self, by))[1])
    return seen


def repeating(inputs):
    """The prompt with an end that looks up its own beginning, so that there are candidates at once."""
    length, tail = inputs["input_ids"].shape[1], torch.tensor([[11, 12, 13, 14, 15, 11, 12]])
    ends = {"input_ids": tail, "attention_mask": torch.ones_like(tail)}
    return {
        key: torch.cat([value, ends.get(key, torch.zeros_like(tail))], dim=1)
        if value.dim() == 2 and value.shape[1] == length
        else value
        for key, value in inputs.items()
    }


@pytest.mark.parametrize("pads", [0, 2])
@pytest.mark.parametrize("compressed", ["model", "both"])
def test_assistant_whose_candidates_are_rejected(name, compressed, pads, crops):
    model, make_inputs = build(name)
    assistant, _ = build(name, seed=2)
    inputs = make_inputs((1,), pads=pads)
    options = {"keep": 0.3, "positions": "keep"}
    if compressed == "both":
        vtc.compress(assistant, "divprune", **options)
    with vtc.compress(model, "divprune", **options):
        expected = model.generate(**inputs, **GREEDY)
        found = model.generate(**inputs, **GREEDY, assistant_model=assistant)
    assert torch.equal(found, expected)
    assert max(crops) > 0


@pytest.mark.parametrize("pads", [0, 2])
def test_prompt_lookup_whose_candidates_are_rejected(name, pads, crops):
    model, make_inputs = build(name)
    inputs = repeating(make_inputs((1,), pads=pads))
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        expected = model.generate(**inputs, **GREEDY)
        found = model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=3)
    assert torch.equal(found, expected)
    assert max(crops) > 0
