"""Modules with weights in a host: what the language model is given, with gradients, caches and batches."""

import copy

import pytest
import torch
from small import QUESTIONS, small_model, small_processor

import vtc
from vtc.evaluation.prompts import encode
from vtc.evaluation.scenes import scene
from vtc.learned import build
from vtc.learned.grids import pool

WIDTH, GRID = 32, (12, 12)  # of the small model, whose encoder and language model are as wide
KINDS = {
    "ordered": {
        "in_width": WIDTH, "tokens": 64, "width": 32, "heads": 2, "decoder_width": 32, "decoder_heads": 2,
        "error": "answers",
    },
    "super-tokens": {"in_width": WIDTH, "heads": 2},
    "semantic-tokens": {"in_width": WIDTH, "heads": 2},
    "token-slimming": {"in_width": WIDTH, "tokens": 9},
    "learned-scorer": {"in_width": WIDTH},
    "reconstructing-selector": {"in_width": WIDTH, "width": 32, "depth": 1, "heads": 2},
    "agent-pooling": {"in_width": WIDTH, "heads": 2},
    "m3": {"width": WIDTH},
    "tokenpacker": {"in_width": WIDTH, "out_width": WIDTH, "width": 32, "heads": 2, "layers": (0, 2, -1)},
    "tokenflex": {"in_width": WIDTH, "out_width": WIDTH},
    "mqt": {"in_width": WIDTH, "out_width": WIDTH, "queries": 64, "heads": 2},
    "ldpv2": {"in_width": WIDTH, "out_width": WIDTH, "shapes": ((6, 6), (3, 3))},
    "c-abstractor": {"in_width": WIDTH, "out_width": WIDTH, "width": 16, "positions": 144},
    "pixel-unshuffle": {"in_width": WIDTH, "out_width": WIDTH},
    "token-shuffle": {"in_width": WIDTH, "out_width": WIDTH},
    "proxy-projector": {"in_width": WIDTH, "out_width": WIDTH, "heads": 2},
}  # fmt: skip
COUNTS = {"ordered": (1, 7, 64), "mqt": (1, 7, 64), "m3": (1, 9, 36, 144), "ldpv2": (9, 36)}


def made(name, seed=0, **options):
    """A module with random weights, so that nothing in it is invisible."""
    torch.manual_seed(seed)
    module = build(name, **KINDS[name] | options)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return module.eval()


def prompt(n=3, first=0):
    images = [scene("test", first + i).image for i in range(n)]
    return encode(small_processor(), [QUESTIONS[i % 3] for i in range(first, first + n)], images)


@torch.no_grad()
def vision(model, pixels):
    """What the projector is given, (B, 144, D), and all hidden states of the encoder without CLS."""
    found = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return found[model.config.vision_feature_layer][:, 1:], [states[:, 1:] for states in found]


def tokens_of(model, module, pixels, k):
    """What the language model should get: (B, k, D)."""
    x, states = vision(model, pixels)
    projector = model.model.multi_modal_projector
    if module.place == "before":
        return projector(module(x, GRID, k))
    if module.place == "behind":
        return module(projector(x), GRID, k)
    return module(x, GRID, k, [states[layer] for layer in module.layers])


def native(model, tokens, ids, mask):
    """Logits of the last word of one prompt that had these tokens (k, D) from the start."""
    ids = ids[mask.bool()]
    image = ids == model.config.image_token_id
    first = int(image.nonzero()[0])
    words = model.get_input_embeddings()(ids)
    x = torch.cat([words[:first], tokens, words[first:][~image[first:]]])
    return model.lm_head(model.model.language_model(inputs_embeds=x[None]).last_hidden_state[0, -1])


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"token-slimming"}))
def test_it_is_a_prompt_with_the_modules_tokens(name):
    model, module, inputs = small_model(), made(name), prompt()
    bare = model(**inputs).logits
    for k in COUNTS.get(name, module.counts_for(GRID)[-1:]):
        with torch.no_grad():
            tokens = tokens_of(model, module, inputs["pixel_values"], k)
            prompts = zip(tokens, inputs["input_ids"], inputs["attention_mask"])
            wanted = [native(model, *row) for row in prompts]
            with vtc.compress(model, module, keep=k) as handle:
                logits = model(**inputs).logits
                assert [len(record.index) for record in handle.last] == [k] * 3
        torch.testing.assert_close(logits[:, -1], torch.stack(wanted), atol=2e-4, rtol=1e-4)
        assert not torch.allclose(logits[:, -1], bare[:, -1], atol=1e-2) or k == 144
    assert torch.equal(model(**inputs).logits, bare)


def test_slimmed_tokens_are_the_same_in_the_order_of_their_places():
    model, module, inputs = small_model(), made("token-slimming"), prompt()
    with torch.no_grad():
        wanted = tokens_of(model, module, inputs["pixel_values"], 9)
        with vtc.compress(model, module):
            found = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    for own, tokens in zip(found, wanted):
        kept = own[~own[:, 0].isnan()]
        order = torch.cdist(kept, tokens).argmin(1)
        assert sorted(order.tolist()) == [*range(9)]
        torch.testing.assert_close(kept, tokens[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(KINDS))
def test_without_a_budget_it_gives_what_it_can(name):
    model, module, inputs = small_model(), made(name), prompt(1)
    with vtc.compress(model, module) as handle, torch.no_grad():
        assert handle.keep is None
        model(**inputs)
        (record,) = handle.last
    assert len(record.index) == module.counts_for(GRID)[-1]
    assert record.index.tolist() == sorted(set(record.index.tolist()))
    assert int(record.source.max()) < len(record.index)


def test_nested_pooling_is_average_pooling_of_what_the_projector_made():
    model, inputs = small_model(), prompt()
    x, _ = vision(model, inputs["pixel_values"])
    with torch.no_grad():
        projected = model.model.multi_modal_projector(x)
        for k in build("m3", width=WIDTH).counts_for(GRID):
            side = round((144 / k) ** 0.5)
            maps = projected.unflatten(1, GRID).permute(0, 3, 1, 2)
            wanted = torch.nn.functional.avg_pool2d(maps, side).flatten(2).transpose(1, 2)
            with vtc.compress(model, build("m3", width=WIDTH), keep=k):
                found = model.model.get_image_features(inputs["pixel_values"]).pooler_output
            kept = torch.stack([own[~own[:, 0].isnan()] for own in found])
            torch.testing.assert_close(kept, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("k, start", [(1, "residual"), (1, "mean"), (2, "mean")])
def test_a_fresh_ordered_module_gives_averages_through_the_projector(k, start):
    model, inputs = small_model(), prompt()
    module = build("ordered", **KINDS["ordered"] | {"start": start})
    x, _ = vision(model, inputs["pixel_values"])
    with torch.no_grad():
        wanted = model.model.multi_modal_projector(pool(x, GRID, 1))
        with vtc.compress(model, module, keep=k):
            found = model.model.get_image_features(inputs["pixel_values"]).pooler_output
    kept = torch.stack([own[~own[:, 0].isnan()] for own in found])
    torch.testing.assert_close(kept, wanted.expand(-1, k, -1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ordered", "m3", "tokenflex"])
@pytest.mark.parametrize("share", [0.25, 0.0625])
def test_a_budget_may_be_a_share(name, share):
    model, module, inputs = small_model(), made(name), prompt()
    with vtc.compress(model, module, keep=share) as handle, torch.no_grad():
        by_share = model(**inputs).logits
        handle.keep = round(share * 144)
        assert torch.equal(model(**inputs).logits, by_share)
        handle.keep = None
        model(**inputs)
        assert len(handle.last[0].index) == module.counts_for(GRID)[-1]


def test_all_tokens_are_the_bare_model():
    """As with methods that choose themselves: nothing else could be measured against."""
    model, inputs = small_model(), prompt()
    with torch.no_grad():
        bare = model(**inputs).logits
        for name in ("ordered", "tokenpacker"):
            with vtc.compress(model, made(name), keep=1.0) as handle:
                assert torch.equal(model(**inputs).logits, bare)
                assert len(handle.last[0].index) == 144


@pytest.mark.parametrize("name, keep", [("ordered", 16), ("mqt", 16), ("m3", 16), ("learned-scorer", 16)])
def test_batches_are_their_rows(name, keep):
    model, module, inputs = small_model(), made(name), prompt(5)
    with vtc.compress(model, module, keep=keep), torch.no_grad():
        together = model(**inputs).logits[:, -1]
        for i in range(5):
            alone = model(**prompt(1, first=i)).logits[0, -1]
            torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=1e-4)


def halting(seed=0):
    """An ordered module whose head tells very different errors of different pictures."""
    module = made("ordered", seed)
    with torch.no_grad():
        module.halting[-1].weight.mul_(3)
    return module


def test_each_image_gets_its_own_number():
    model, module, inputs = small_model(), halting(), prompt(6)
    x, _ = vision(model, inputs["pixel_values"])
    with torch.no_grad():
        location, _ = module.foretell(*module.read(x, GRID, 64)[1:])
        epsilon = float(location.min(1).values.median().exp())  # which about half of them reach
        lengths = module.halt(x, GRID, epsilon).lengths.tolist()
        assert len(set(lengths)) > 2 and min(lengths) < 64
        with vtc.compress(model, module, keep=64, epsilon=epsilon) as handle:
            together = model(**inputs).logits[:, -1]
            assert [len(record.index) for record in handle.last] == lengths
            for i, length in enumerate(lengths):
                alone = model(**prompt(1, first=i)).logits[0, -1]
                assert [len(record.index) for record in handle.last] == [length]
                torch.testing.assert_close(together[i], alone, atol=2e-4, rtol=1e-4)
            handle.keep = 20
            model(**inputs)
            assert [len(record.index) for record in handle.last] == [min(20, k) for k in lengths]
        for i, length in enumerate(lengths):
            with vtc.compress(model, module, keep=length):
                alone = model(**prompt(1, first=i)).logits[0, -1]
            torch.testing.assert_close(together[i], alone, atol=2e-4, rtol=1e-4)


def test_a_smaller_error_or_more_confidence_never_gives_fewer_tokens():
    model, module, inputs = small_model(), halting(), prompt(6)
    x, _ = vision(model, inputs["pixel_values"])
    before = None
    for how in ({"epsilon": 3.0}, {"epsilon": 1.0}, {"epsilon": 0.3}, {"epsilon": 0.3, "confidence": 0.9}):
        with vtc.compress(model, module, **how) as handle, torch.no_grad():
            model(**inputs)
            lengths = torch.tensor([len(record.index) for record in handle.last])
        with torch.no_grad():
            assert lengths.tolist() == module.halt(x, GRID, **how).lengths.tolist()
        assert before is None or bool((lengths >= before).all())
        before = lengths


@pytest.mark.parametrize("name, keep", [("ordered", 9), ("tokenpacker", None), ("m3", 4)])
def test_generating_with_a_cache_is_generating_without(name, keep):
    model, module, inputs = small_model(), made(name), prompt()
    model.generation_config.eos_token_id = None
    with vtc.compress(model, module, keep=keep), torch.no_grad():
        with_cache = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        without = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
        (beams,) = [model.generate(**inputs, max_new_tokens=3, do_sample=False, num_beams=2)]
    assert torch.equal(with_cache, without) and beams.shape[0] == 3


@pytest.mark.parametrize("name", sorted(set(KINDS) - {"m3", "learned-scorer", "reconstructing-selector"}))
def test_gradients_reach_the_module(name):
    model, module, inputs = small_model(), made(name), prompt(2)
    model.requires_grad_(False)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    with vtc.compress(model, module):
        model(**inputs, labels=labels).loss.backward()
    # what decodes and halts, and what queries of one place ask, has no part in the tokens
    silent = ("decoder.", "halting.", "ln_halting.", "mixture", "tail")
    for key, parameter in module.named_parameters():
        if not key.startswith(silent):
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all() and parameter.requires_grad, key
    assert any(p.grad is not None and float(p.grad.abs().sum()) > 0 for p in module.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_gradients_reach_the_encoder_where_it_is_trained():
    model, module, inputs = small_model(), made("ordered"), prompt(2)
    for trained in (True, False):
        model.zero_grad(set_to_none=True)
        model.model.vision_tower.requires_grad_(trained)
        with vtc.compress(model, module, keep=4):
            model(**inputs).logits.square().mean().backward()
        grads = [p.grad for p in model.model.vision_tower.parameters() if p.grad is not None]
        assert bool(grads) == trained and all(grad.isfinite().all() for grad in grads)


def test_what_inference_has_left_behind_does_not_hinder_training():
    model, module, inputs = small_model(), made("ordered"), prompt(1)
    with vtc.compress(model, module, keep=11):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits.square().mean().backward()
    assert float(module.out_proj.weight.grad.abs().sum()) > 0


@pytest.mark.parametrize("name", ["ordered", "mqt", "tokenpacker"])
def test_training_it_lowers_the_loss(name):
    model, module, inputs = small_model(), made(name), prompt()
    model.requires_grad_(False)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    optimiser, losses = torch.optim.Adam(module.parameters(), 3e-3), []
    with vtc.compress(model, module.train(), keep=36 if name == "tokenpacker" else 16):
        for _ in range(12):
            loss = model(**inputs, labels=labels).loss
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05


@pytest.mark.parametrize("name, keep", [("ordered", 16), ("mqt", 16), ("m3", 36), ("tokenpacker", None)])
def test_half_precision(name, keep):
    """A module in single precision in a host of half precision, and autocast around both."""
    model, module, inputs = small_model(), made(name), prompt(2)
    with torch.no_grad(), vtc.compress(model, module, keep=keep):
        wanted = model(**inputs).logits[:, -1]
        with torch.autocast("cpu", torch.bfloat16):
            cast = model(**inputs).logits[:, -1]
        halves = model.to(torch.bfloat16)(
            **inputs | {"pixel_values": inputs["pixel_values"].bfloat16()}
        ).logits[:, -1]
    assert halves.dtype == torch.bfloat16
    for found in (cast, halves):
        off = (found.float() - wanted).norm() / wanted.norm()
        assert 0 < float(off) < 0.1


def test_the_host_stays_as_it_was():
    model, module, inputs = small_model(), made("tokenpacker"), prompt(1)
    with torch.no_grad():
        bare = model(**inputs).logits
        state, hooks = model.state_dict(), hooks_of(model)
        handle = vtc.compress(model, module)
        assert model.state_dict().keys() == state.keys()
        assert {*map(id, model.parameters())}.isdisjoint(map(id, module.parameters()))
        compressed = model(**inputs).logits
        twin = copy.deepcopy(model)
        handle.remove()
        assert torch.equal(model(**inputs).logits, bare) and hooks_of(model) == hooks
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
        assert torch.equal(twin(**inputs).logits, compressed)
        vtc.restore(twin)
        assert torch.equal(twin(**inputs).logits, bare)


def hooks_of(model):
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


IMPOSSIBLE = {
    "ordered": (65, "1 to 64 tokens, not 65"),
    "m3": (5, "1, 4, 9, 16, 36 or 144 tokens, not 5"),
    "pixel-unshuffle": (9, "36 tokens, not 9"),
    "ldpv2": (0.5, "9 or 36 tokens, not 72"),
}


@pytest.mark.parametrize("name", sorted(IMPOSSIBLE))
def test_a_number_that_it_cannot_give_is_told(name):
    model, inputs, (keep, message) = small_model(), prompt(1), IMPOSSIBLE[name]
    with torch.no_grad():
        bare = model(**inputs).logits
        with vtc.compress(model, made(name), keep=keep) as handle:
            with pytest.raises(ValueError, match=message):
                model(**inputs)
            handle.keep = None
            model(**inputs)
        assert torch.equal(model(**inputs).logits, bare)


def test_what_does_not_fit_is_refused_before_anything_is_touched():
    model, inputs = small_model(), prompt(1)
    bare = model(**inputs).logits
    cases = [
        (build("ordered", in_width=48), {}, "'ordered' reads 48 numbers .* is given 32"),
        (build("mqt", in_width=48, out_width=32), {}, "'mqt' reads 48 numbers"),
        (build("mqt", in_width=32, out_width=64), {}, "makes tokens of 64 numbers, .* takes 32"),
        (build("m3", width=64), {}, "'m3' reads 64 numbers"),
        (made("tokenpacker", layers=(9,)), {}, r"reads the layers \(9,\) .* has 3 blocks"),
        (made("ordered"), {"epsilon": -1.0}, "epsilon is positive"),
        (made("ordered"), {"epsilon": "much"}, "epsilon is positive .* not 'much'"),
        (made("ordered"), {"eps": 1.0}, "no option 'eps'; its options: epsilon, confidence"),
        (made("m3"), {"epsilon": 1.0}, "no option 'epsilon'; its options: none"),
        (made("ordered"), {"stage": "decoder"}, "does not run at stage 'decoder'"),
        (made("ordered"), {"merge": "nearest"}, "'ordered' is a module with weights: leave it out"),
        (made("ordered"), {"keep": 0}, "would leave no token"),
        (made("ordered"), {"keep": "p:0.9"}, "does not choose by scores"),
        (made("ordered"), {"allocate": "joint"}, "use allocate='proportional'"),
        (build("token-unshuffle"), {}, "'token-unshuffle' is a module that makes no fewer tokens"),
    ]
    for module, how, message in cases:
        with pytest.raises(ValueError, match=message):
            vtc.compress(model, module, **how)
        assert vtc.api.current(model) is None
    assert torch.equal(model(**inputs).logits, bare)


def test_several_images_in_a_prompt():
    """Each is resampled by itself."""
    model, module = small_model(), made("ordered")
    processor = small_processor()
    pictures = [scene("test", i).image for i in range(3)]
    one, two = "<image> what colour is the star ?", "<image> how many ? <image> which digit ?"
    inputs = processor(images=pictures, text=[one, two], padding=True, return_tensors="pt")
    with vtc.compress(model, module, keep=5) as handle, torch.no_grad():
        logits = model(**inputs).logits
        assert [len(record.index) for record in handle.last] == [5, 5, 5]
        alone = processor(images=pictures[1:], text=[two], return_tensors="pt")
        torch.testing.assert_close(logits[1, -1], model(**alone).logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["ordered", "mqt", "m3", "pixel-unshuffle", "learned-scorer"])
def test_pictures_of_it(name):
    model, module, inputs = small_model(), made(name), prompt(2)
    with vtc.compress(model, module, keep=36) as handle, torch.no_grad():
        model(**inputs)
        drawn = vtc.draw([scene("test", i).image for i in range(2)], handle)
        assert drawn.width > 500 and name in handle.describe()
        handle.keep = None if name != "ordered" else 1
        model(**inputs)
        assert vtc.draw([scene("test", i).image for i in range(2)], handle).width > 500
    for record in handle.last:
        assert record.source.shape == (144,)


@pytest.mark.parametrize("name", ["m3", "tokenflex", "pixel-unshuffle", "ldpv2", "c-abstractor"])
def test_pictures_show_the_cells_that_are_averaged(name):
    module = made(name)
    k = 36
    wanted = (torch.arange(12)[:, None] // 2 * 6 + torch.arange(12) // 2).flatten()
    assert torch.equal(module.owners(torch.zeros(1, 144, WIDTH), GRID, k)[0], wanted)
    if name == "pixel-unshuffle":
        turned = made(name, transposed=True).owners(torch.zeros(1, 144, WIDTH), GRID, k)[0]
        assert torch.equal(turned.view(GRID), wanted.view(GRID).T.contiguous()) and k == 36


def test_pictures_of_ordered_tokens_show_the_finest_average():
    module = made("ordered")
    for k in (1, 2, 3, 5, 16, 64):
        source = module.owners(torch.zeros(1, 144, WIDTH), GRID, k)[0]
        assert int(source.max()) == max(0, k - 1) if k != 2 else True
        # a place belongs to a coarser token only where no finer one of the k covers it
        finest = [j for j in range(k) if bool((source == j).any())]
        assert finest[-1] == k - 1
    assert module.owners(torch.zeros(1, 144, WIDTH), GRID, 2)[0].eq(1).all()
