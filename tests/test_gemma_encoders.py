"""Gemmas that read the prompt in an encoder, and the one that only says yes or no."""

import pytest
import torch
from decoder_oracle import Watch
from footprint import footprint
from served import forms
from test_families import GREEDY, forward
from tiny import gemma_encoders
from transformers import DynamicCache

import vtc

NAMES = ("shieldgemma2", "t5gemma2", "diffusion_gemma")


def built(name):
    torch.manual_seed(0)
    return getattr(gemma_encoders, name)()


@pytest.fixture(params=NAMES)
def host(request):
    return built(request.param)


def test_keep_one_is_identity_and_remove_leaves_nothing(host):
    model, make_inputs = host
    inputs = make_inputs((2, 1), pads=1)
    logits, before = forward(model, inputs).logits, footprint(model)
    for method, settings in forms(model):
        with vtc.compress(model, method, keep=1.0, **settings) as handle:
            assert torch.equal(forward(model, inputs).logits, logits)
            assert len(handle.last) == 3
            handle.keep = 0.4
            shorter = forward(model, inputs).logits
            assert not torch.equal(shorter, logits)
            assert all(len(record.index) < len(record.source) for record in handle.last)
        assert footprint(model) == before
        assert torch.equal(forward(model, inputs).logits, logits)
    with pytest.raises(RuntimeError, match="not compressed"):
        vtc.restore(model)


def test_gradients_flow(host):
    model, make_inputs = host
    with vtc.compress(model, "tome", keep=0.4):
        model(**make_inputs((1, 1), pads=1)).logits.square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert len(grads) > 10 and all(g.isfinite().all() for g in grads)


def test_shieldgemma_is_a_gemma():
    model, make_inputs = built("shieldgemma2")
    inputs = make_inputs((2, 1), pads=1)
    with vtc.compress(model, "divprune", keep=0.3) as handle:
        answers, index = forward(model, inputs).logits, handle.last[0].index
        whole = forward(model.model, inputs).logits
    assert torch.equal(answers, whole[:, -1, [5, 6]]) and len(index) == 5


def cut(given, real, row, repack):
    """The embeddings (1, K, D) and positions (1, K) of one prompt without padding and dropped tokens."""
    x = given["inputs_embeds"]
    stay = real[row] & ~x[row, :, 0].isnan()
    positions = torch.arange(x.shape[1])
    if repack:
        positions = positions - (real[row] & ~stay).long().cumsum(0)
    return x[row : row + 1, stay], positions[stay][None], stay


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_t5gemma_equals_the_shortened_prompt(side, positions):
    model, make_inputs = built("t5gemma2")
    inputs = make_inputs((2, 1, 0), pads=2, side=side)
    real, repack = inputs["attention_mask"].bool(), positions == "repack"
    for method, settings in forms(model):
        with Watch(model) as watch, vtc.compress(model, method, keep=0.3, positions=positions, **settings):
            watch.listen()
            logits, given = model(**inputs).logits, watch.given
        for row in range(3):
            x, places, _ = cut(given, real, row, repack)
            encoded = model.model.encoder.text_model(inputs_embeds=x, position_ids=places)
            alone = model(
                encoder_outputs=encoded,
                attention_mask=torch.ones(places.shape, dtype=torch.long),
                decoder_input_ids=inputs["decoder_input_ids"][row : row + 1],
            ).logits
            torch.testing.assert_close(logits[row], alone[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_t5gemma_with_a_cache_equals_without(beams):
    model, make_inputs = built("t5gemma2")
    inputs = make_inputs((2, 1, 0), pads=2)
    with vtc.compress(model, "divprune", keep=0.3):
        expected = model.generate(**inputs, **GREEDY, num_beams=beams, use_cache=False)
        assert torch.equal(model.generate(**inputs, **GREEDY, num_beams=beams), expected)


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("generating", [False, True])
@torch.no_grad()
def test_diffusion_gemma_equals_the_shortened_prompt(generating, positions):
    """The prompt alone is causal in forward; in generate() the tokens of an image see each other."""
    model, make_inputs = built("diffusion_gemma")
    inputs = make_inputs((2,), pads=3 * generating)
    real, repack = inputs["attention_mask"].bool(), positions == "repack"
    encoder, decoder = model.model.encoder, model.model.decoder
    for method, settings in forms(model):
        seen = []
        with Watch(model) as watch, vtc.compress(model, method, keep=0.3, positions=positions, **settings):
            watch.listen()
            hook = decoder.register_forward_hook(lambda *args: seen.append(args[-1][0]))  # noqa: B023
            if generating:
                model.generate(**inputs, max_new_tokens=8, max_denoising_steps=2)
            else:
                model(**inputs)
            hook.remove()
        x, places, stay = cut(watch.given, real, 0, repack)
        cache = DynamicCache(config=model.config.text_config)
        masks = encoder.create_masks_for_generate(
            config=model.config,
            inputs_embeds=x,
            attention_mask=None,
            past_key_values=cache,
            position_ids=places,
            mm_token_type_ids=inputs["mm_token_type_ids"][:, stay],
        )
        encoder.language_model(
            inputs_embeds=x,
            position_ids=places,
            past_key_values=cache,
            attention_mask=masks if generating else None,
        )
        first = x.shape[1] + int(real[0].logical_not().sum()) if repack else real.shape[1]
        canvas = torch.arange(first, first + gemma_encoders.CANVAS)[None]
        expected = decoder(
            decoder_input_ids=inputs["decoder_input_ids"], past_key_values=cache, decoder_position_ids=canvas
        )
        torch.testing.assert_close(seen[0], expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("cache", [None, "static"])
def test_diffusion_gemma_generates_behind_padding_and_over_canvases(cache):
    model, make_inputs = built("diffusion_gemma")
    options = {"max_new_tokens": 24, "max_denoising_steps": 3, "disable_compile": True}
    if cache:
        options["cache_implementation"] = cache
    found = []
    with vtc.compress(model, "divprune", keep=0.3) as handle:
        for pads in (0, 3):
            inputs = make_inputs((2,), pads=pads)
            torch.manual_seed(0)
            output = model.generate(**inputs, **options)
            found.append(output.sequences[:, inputs["input_ids"].shape[1] :])
            kept = sum(len(record.index) for record in handle.last)
            dropped = sum(len(record.source) for record in handle.last) - kept
            held = output.past_key_values.get_query_offset()
            assert output.past_key_values.get_seq_length() == held + dropped + pads
    assert found[0].shape == (1, 24) and torch.equal(*found)
