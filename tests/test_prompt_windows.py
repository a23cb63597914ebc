"""Unlimited-OCR keeps the prompt in its cache for good and lets go of what it generated long ago."""

import pytest
import torch
from decoder_oracle import Watch
from tiny import SUPPRESS, build

import vtc

LONG = {"max_new_tokens": 20, "do_sample": False, "suppress_tokens": SUPPRESS}  # the window holds 8


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_the_window_starts_behind_the_shortened_prompt(cache):
    model, make_inputs = build("unlimited_ocr")
    inputs = make_inputs((1,))
    with Watch(model) as watch, vtc.compress(model, "divprune", keep=0.3, positions="repack"):
        model(**inputs)
        given = watch.given["inputs_embeds"]
        tokens = model.generate(**inputs, **LONG, cache_implementation=cache)
    short = given[:, ~given[0, :, 0].isnan()].detach()
    mask = torch.ones(short.shape[:2], dtype=torch.long)
    expected = model.generate(inputs_embeds=short, attention_mask=mask, **LONG, cache_implementation=cache)
    assert torch.equal(tokens[:, inputs["input_ids"].shape[1] :], expected)
