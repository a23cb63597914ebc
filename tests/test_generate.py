"""Every way to run a compressed model gives what the bare model gives on the shortened prompt."""

import copy
import pickle

import pytest
import torch
from oracle import greedy, marked_features, next_logits, shortened
from tiny import IMAGE, PAD, SUPPRESS, build
from tiny.llava import LLAVA
from transformers import StaticCache

import vtc

STEPS = 5
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SUPPRESS}
# prompts that hold 2, 1 and 0 images, with columns of padding
MIXED = {"images": (2, 1, 0), "pads": 2}


@pytest.fixture(params=LLAVA, scope="module")
def host(request):
    return build(request.param)


def rows_of(model, inputs):
    return shortened(model, inputs, marked_features(model, inputs))


def check_against_oracle(model, inputs, **options):
    """Greedy tokens, logits and lengths of generate() against the oracle, row by row."""
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        rows = rows_of(model, inputs)
        out = model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    for row, (x, positions, _) in enumerate(rows):
        tokens, logits = greedy(model, x, positions, STEPS)
        assert out.sequences[row, length:].tolist() == tokens
        torch.testing.assert_close(
            torch.stack([step[row] for step in out.logits]), logits, atol=1e-4, rtol=1e-4
        )
    return out, rows


@pytest.mark.parametrize("batch", [{"images": (1,)}, {"images": (1, 1)}, MIXED], ids=["one", "two", "mixed"])
def test_generate_equals_shortened_prompt(host, batch):
    model, make_inputs = host
    out, rows = check_against_oracle(model, make_inputs(**batch))
    kept = max(x.shape[1] for x, _, _ in rows)
    assert out.past_key_values.layers[0].keys.shape[2] == kept + STEPS - 1  # physically shorter


def test_static_cache_equals_shortened_prompt(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    out, rows = check_against_oracle(model, inputs, cache_implementation="static")
    allocated = out.past_key_values.layers[0].keys.shape[2]
    assert allocated == max(x.shape[1] for x, _, _ in rows) + STEPS - 1 < inputs["input_ids"].shape[1]


@pytest.mark.parametrize(
    "options", [{"use_cache": False}, {"prefill_chunk_size": 7}, {"prompt_lookup_num_tokens": 2}], ids=str
)
def test_other_decoding_loops_equal_shortened_prompt(host, options):
    model, make_inputs = host
    check_against_oracle(model, make_inputs((1,)), **options)


def test_beam_search_is_the_same_with_any_cache(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    beams = {**GREEDY, "num_beams": 3, "num_return_sequences": 2}
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        expected = model.generate(**inputs, **beams, use_cache=False)
        assert torch.equal(model.generate(**inputs, **beams), expected)
        assert torch.equal(model.generate(**inputs, **beams, cache_implementation="static"), expected)


def test_sampling_is_the_same_with_any_cache(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    sampling = {**GREEDY, "do_sample": True, "num_return_sequences": 2, "top_k": 20}
    results = []
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
            torch.manual_seed(3)
            results.append(model.generate(**inputs, **sampling, **cache))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_forward_keeps_its_shape_and_equals_the_oracle(host):
    model, make_inputs = host
    inputs = make_inputs((1, 2), pads=1)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"), torch.no_grad():
        rows = rows_of(model, inputs)
        out = model(**inputs, position_ids=positions)
        last = model(**inputs, position_ids=positions, logits_to_keep=1).logits
    assert out.logits.shape[:2] == inputs["input_ids"].shape
    assert not out.logits.isnan().any() and not out.image_hidden_states.isnan().any()
    torch.testing.assert_close(last, out.logits[:, -1:])
    for row, (x, row_positions, stay) in enumerate(rows):
        expected = next_logits(model, x, row_positions)
        torch.testing.assert_close(out.logits[row, stay], expected, atol=1e-4, rtol=1e-4)
        # a dropped position repeats the last kept one before it
        dropped = inputs["attention_mask"][row].bool() & ~stay
        before = stay.cumsum(0)[dropped] - 1
        torch.testing.assert_close(out.logits[row, dropped], expected[before], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradient_equal_those_of_the_shortened_prompt(host, side):
    model, make_inputs = host
    inputs = make_inputs((2, 1), pads=2, side=side)
    labels = inputs["input_ids"].masked_fill(
        (inputs["input_ids"] == IMAGE) | (inputs["input_ids"] == PAD), -100
    )
    first = inputs["attention_mask"].long().argmax(dim=1)
    labels[torch.arange(2), first] = -100  # left padding would be asked to predict the first token
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    weight = model.lm_head.weight
    with vtc.compress(model, "tome", keep=0.3):
        rows = rows_of(model, inputs)
        loss = model(**inputs, position_ids=positions, labels=labels).loss
        (gradient, tower) = torch.autograd.grad(loss, [weight, next(model.model.vision_tower.parameters())])
    total, count = torch.zeros(()), 0
    for row, (x, row_positions, stay) in enumerate(rows):
        targets = labels[row][stay][1:]
        hidden = model.model.language_model(inputs_embeds=x, position_ids=row_positions).last_hidden_state
        total = total + torch.nn.functional.cross_entropy(
            model.lm_head(hidden)[0, :-1], targets, reduction="sum"
        )
        count += int((targets != -100).sum())
    expected = total / count
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight)[0], atol=1e-4, rtol=1e-4)
    assert tower.isfinite().all() and tower.abs().sum() > 0


def test_chat_goes_on_from_the_cache(host):
    """A second turn over the returned cache equals a prompt that held both turns from the start."""
    model, make_inputs = host
    first, extra = make_inputs(**MIXED), torch.randint(3, 90, (3, 4))
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, extra], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(3, STEPS + 4, dtype=torch.long)], dim=1)
        again = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=copy.deepcopy(turn.past_key_values), **GREEDY
        )
        whole = model.generate(**{**first, "input_ids": ids, "attention_mask": mask}, **GREEDY)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("static", [False, True])
def test_padding_of_a_second_turn_is_remembered(host, static):
    """Masks of later steps over a static cache do not tell of it."""
    model, make_inputs = host
    first, extra = make_inputs((1, 1), pads=1), torch.randint(3, 90, (2, 4))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=200) if static else None
    follow = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        turn = model.generate(**first, **GREEDY, past_key_values=cache, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, extra], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(2, STEPS + 4, dtype=torch.long)], dim=1)
        mask[1, -4:-2] = 0
        text = {"input_ids": ids, "attention_mask": mask}
        again = model.generate(**text, past_key_values=turn.past_key_values, **follow)
        whole = model.generate(**{**first, **text}, **follow)
    assert torch.equal(again.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(again.logits), torch.stack(whole.logits), atol=1e-4, rtol=1e-4)


def test_chat_goes_on_with_a_new_image(host):
    model, make_inputs = host
    first, second = make_inputs((1,)), make_inputs((1,), seed=5)
    both = {
        name: torch.cat([first[name], second[name]])
        for name in first
        if "ids" not in name and "mask" not in name
    }
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"]], dim=1)
        mask = torch.ones_like(ids)
        again = model.generate(
            **{**second, "input_ids": ids, "attention_mask": mask},
            past_key_values=turn.past_key_values,
            **GREEDY,
        )
        whole = model.generate(**both, input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(again, whole)


def test_flash_attention_refuses_a_new_image_behind_a_cache(host, monkeypatch):
    """It would read the gaps between positions as borders of packed prompts, and answer wrongly."""
    model, make_inputs = host
    first, second = make_inputs((1,)), make_inputs((1,), seed=5)
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"), torch.no_grad():
        cache = model(**first, use_cache=True).past_key_values
        text = model.model.language_model.config
        monkeypatch.setattr(text, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(ValueError, match="load with attn_implementation='sdpa'"):
            model(**{**second, "attention_mask": None}, past_key_values=cache)


def test_a_manual_decoding_loop_works(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"), torch.no_grad():
        expected = model.generate(**inputs, **GREEDY)
        out = model(**inputs, position_ids=positions, use_cache=True)
        mask, tokens = inputs["attention_mask"], []
        for _ in range(STEPS):
            last = out.logits[:, -1].clone()
            last[:, SUPPRESS] = -float("inf")
            tokens.append(last.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            positions = positions[:, -1:] + 1
            out = model(
                input_ids=tokens[-1],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=out.past_key_values,
            )
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, -STEPS:])


def test_text_only_calls_pass_through(host):
    model, make_inputs = host
    inputs = make_inputs((0, 0), pads=1)
    expected = model.generate(**inputs, **GREEDY)
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


def test_reused_static_cache_starts_anew(host):
    """generate() keeps a static cache on the model and resets it: a text-only call after an image."""
    model, make_inputs = host
    text = make_inputs((0,))
    expected = model.generate(**text, **GREEDY)
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        model.generate(**make_inputs((1,)), **GREEDY, cache_implementation="static")
        assert torch.equal(model.generate(**text, **GREEDY, cache_implementation="static"), expected)


def test_a_cache_goes_when_its_user_lets_go(host):
    """Without waiting for the garbage collector: on a GPU, caches of earlier calls would pile up."""
    import gc
    import weakref

    model, make_inputs = host
    gc.disable()
    try:
        with vtc.compress(model, "divprune", keep=0.3, positions="keep"), torch.no_grad():
            out = model(**make_inputs((1,)), use_cache=True)
            keys = weakref.ref(out.past_key_values.layers[0].keys)
            del out
        assert keys() is None
    finally:
        gc.enable()


def test_embeddings_that_a_caller_mixed_are_shortened(host):
    model, make_inputs = host
    inputs = make_inputs((1,))
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"), torch.no_grad():
        expected = model(**inputs).logits
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        image = (inputs["input_ids"] == IMAGE)[..., None].expand_as(embeds)
        embeds = embeds.masked_scatter(image, marked_features(model, inputs))
        found = model(inputs_embeds=embeds, attention_mask=inputs["attention_mask"]).logits
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_a_cache_may_be_reordered_selected_repeated_and_pickled(host):
    model, make_inputs = host
    inputs, more = make_inputs((1, 2)), torch.randint(3, 90, (2, 3))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    flip = torch.tensor([1, 0])
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        cache = model(**inputs).past_key_values
        copies = [pickle.loads(pickle.dumps(cache)) for _ in range(3)]
        expected = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        copies[0].reorder_cache(flip)
        copies[1].batch_select_indices(flip)
        copies[2].batch_repeat_interleave(2)
        for moved in copies[:2]:
            found = model(input_ids=more[flip], attention_mask=mask[flip], past_key_values=moved).logits
            torch.testing.assert_close(found[flip], expected, atol=1e-4, rtol=1e-4)
        twice = [tensor.repeat_interleave(2, dim=0) for tensor in (more, mask)]
        found = model(input_ids=twice[0], attention_mask=twice[1], past_key_values=copies[2]).logits
        torch.testing.assert_close(found[::2], expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_cropping_text_works_and_cropping_into_the_image_is_refused(host):
    model, make_inputs = host
    inputs, more = make_inputs((1,)), torch.randint(3, 90, (1, 4))
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        cache = model(**inputs).past_key_values
        expected = model(input_ids=more, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=torch.randint(3, 90, (1, 6)), past_key_values=cache)
        cache.crop(-6)
        torch.testing.assert_close(model(input_ids=more, past_key_values=cache).logits, expected)
        with pytest.raises(ValueError, match="cannot crop 10 tokens"):
            cache.crop(-10)


@torch.no_grad()
def test_cropping_the_text_behind_the_images_of_a_batch(host):
    """Rows of one cache lost different numbers of tokens, but none behind the last image of any."""
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    ids, mask = inputs["input_ids"][:, -2:], inputs["attention_mask"]
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        out = model(**inputs)
        cache = out.past_key_values
        cache.crop(-2)
        again = model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits
    torch.testing.assert_close(again, out.logits[:, -2:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "batch, positions", [({"images": (1,), "pads": 2}, "keep"), (MIXED, "keep"), ({"images": (1,)}, "repack")]
)
def test_a_bare_model_refuses_a_cache_that_it_would_misread(host, batch, positions):
    model, make_inputs = host
    inputs = make_inputs(**batch)
    handle = vtc.compress(model, "divprune", keep=0.3, positions=positions)
    turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
    ids = torch.cat([turn.sequences, turn.sequences[:, -3:]], dim=1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(len(ids), STEPS + 3, dtype=torch.long)], dim=1)
    chat = {"input_ids": ids, "attention_mask": mask, **GREEDY}
    expected = model.generate(**chat, past_key_values=copy.deepcopy(turn.past_key_values))
    handle.remove()
    with pytest.raises(RuntimeError, match="go on from it with a compressed model"):
        model.generate(**chat, past_key_values=copy.deepcopy(turn.past_key_values))
    with vtc.compress(model, "divprune", keep=0.3, positions=positions):
        assert torch.equal(model.generate(**chat, past_key_values=turn.past_key_values), expected)


def test_a_bare_model_goes_on_from_a_cache_without_padding(host):
    model, make_inputs = host
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        turn = model.generate(**make_inputs((1,)), **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, turn.sequences[:, -3:]], dim=1)
        chat = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
        expected = model.generate(**chat, past_key_values=copy.deepcopy(turn.past_key_values))
    assert torch.equal(model.generate(**chat, past_key_values=turn.past_key_values), expected)


@torch.no_grad()
def test_features_may_be_pickled_and_copied(host):
    model, make_inputs = host
    pictures = {k: v for k, v in make_inputs((1,)).items() if "ids" not in k and "mask" not in k}
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        features = model.get_image_features(**pictures)
    for again in (pickle.loads(pickle.dumps(features)), copy.deepcopy(features)):
        assert type(again) is type(features)
        for one, other in zip(again.pooler_output, features.pooler_output, strict=True):
            torch.testing.assert_close(one, other, equal_nan=True)


def test_a_users_static_cache_has_its_size_again_after_reset(host):
    from transformers import StaticCache

    model, make_inputs = host
    inputs, text = make_inputs((1,)), torch.randint(3, 90, (1, 20))
    size = inputs["input_ids"].shape[1] + 8
    ask = {"input_ids": text.repeat(1, size // 20)[:, : size - 4], **GREEDY, "max_new_tokens": 4}
    expected = model.generate(**ask)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=size)
    with vtc.compress(model, "divprune", keep=0.3, positions="keep"):
        model.generate(**inputs, **GREEDY, past_key_values=cache)
        assert cache.layers[0].keys.shape[2] < size
        cache.reset()
        assert torch.equal(model.generate(**ask, past_key_values=cache), expected)
