"""Models whose decoder looks at pictures through cross-attention: what tests/test_families.py checks of
others, where the memory gets shorter instead of the prompt."""

import copy

import pytest
import torch
from footprint import footprint
from tiny import HOSTS, SUPPRESS, build
from transformers import DynamicCache

import vtc
from vtc.capture import missing
from vtc.hosts import open_host
from vtc.hosts.memory import memory_layout

NAMES = [name for name, host in HOSTS.items() if host.memory]
GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SUPPRESS}
MIXED = {"images": (2, 1), "pads": 2}


@pytest.fixture(params=NAMES, scope="module")
def host(request):
    return build(request.param)


def usable(model):
    names = ("divprune", "tome", "hiprune", "vtc-cls", "random", "uniform", "pool")
    encoder = open_host(model).encoder
    return [m for m in names if not any(missing(encoder, need) for need in vtc.get_method(m).needs)]


def shows(*columns):
    return pytest.mark.shows(*columns)


def forward(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


@shows("images")
def test_keep_one_is_identity(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    logits, tokens = forward(model, inputs).logits, model.generate(**inputs, **GREEDY)
    assert len(usable(model)) == 7
    for method in usable(model):
        with vtc.compress(model, method, keep=1.0) as handle:
            assert torch.equal(forward(model, inputs).logits, logits)
            assert len(handle.last) == 3
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@shows("images")
def test_remove_leaves_nothing(host):
    model, make_inputs = host
    inputs = make_inputs((1,))
    logits = forward(model, inputs).logits
    before = footprint(model)
    for method in usable(model):
        handle = vtc.compress(model, method, keep=0.4)
        assert not torch.equal(forward(model, inputs).logits, logits)
        handle.remove()
        assert footprint(model) == before
        assert torch.equal(forward(model, inputs).logits, logits)


@shows("images")
def test_exact_count(host, record_property):
    """So many tokens stay, the keys of cross-attention are so much fewer, whatever the method."""
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    decoder = open_host(model).decoder
    for method in usable(model):
        with vtc.compress(model, method, keep=0.5) as handle:
            for keep in (0.07, 1 / 3, 0.9, 1, 3):
                handle.keep = keep
                cache = DynamicCache(config=decoder.config)
                forward(model, inputs, use_cache=True, past_key_values=cache)
                for record in handle.last:
                    n = sum(len(tile.slots) for tile in record.tiles)
                    wanted = max(1, int(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)
                    assert len(record.index) == record.entering["decoder"] == wanted
                first, second, third = (len(record.index) for record in handle.last)
                for layer in decoder.cross_attention_layers:
                    assert cache.layers[layer].keys.shape[2] == max(first + second, third)
        record_property("served", method)


@shows("images")
def test_patches_are_behind_their_tokens(host):
    """A change of one patch behind the last block changes the token that it is said to be behind."""
    model, make_inputs = host
    inputs, seen, vision = make_inputs(**MIXED), {}, open_host(model)
    hook = vision.decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    forward(model, inputs)
    before = seen["cross_attention_states"].view(4, -1, 32)  # 2 prompts with 2 places for a picture each
    lengths = (inputs["aspect_ratio_mask"].sum(-1) * (inputs["aspect_ratio_ids"] > 0)).flatten() * 17
    items = [own[:length] for own, length in zip(before, lengths) if length]
    pictures = lengths.nonzero()[:, 0].tolist()
    for picture, layout in zip(pictures, memory_layout(vision, inputs, items)):
        for tile, patches in zip(layout.tiles, layout.patches):
            for token in (0, 7, 15):

                def nudge(module, args, output, patch=int(patches[token, 0])):
                    n = output.shape[1] - 1
                    output[patch // n, 1 + patch % n] += torch.linspace(-1, 1, 32)
                    return output

                last = model.model.vision_model.global_transformer.layers[-1]
                other = last.register_forward_hook(nudge)
                forward(model, inputs)
                other.remove()
                changed = (seen["cross_attention_states"].view(4, -1, 32) - before).abs().amax(-1)
                assert changed.nonzero().tolist() == [[picture, int(tile.slots[token])]]
    hook.remove()


@pytest.mark.parametrize("allocate", ["proportional", "whole", "joint"])
@shows("batches", "tiles")
def test_forward_equals_the_shortened_memory(host, allocate, record_property):
    """The oracle: row by row, what the bare decoder makes of a memory that was shortened by hand."""
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    tile, most = model.model.vision_model.num_patches, inputs["pixel_values"].shape[2]
    counts = inputs["aspect_ratio_mask"].sum(-1) * (inputs["aspect_ratio_ids"] > 0)
    given = {}
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    forward(model, inputs)
    hook.remove()
    for method in ("divprune", "hiprune", "vtc-cls"):  # those that keep tokens as they are
        if allocate == "joint" and vtc.get_method(method).needs_grid:
            continue
        with vtc.compress(model, method, keep=0.3, allocate=allocate) as handle:
            logits, records = forward(model, inputs).logits, iter(handle.last)
            assert any(len(record.tiles) > 1 for record in handle.last)
        for row in range(2):
            columns = [
                place * most * tile + next(records).index
                for place in range(counts.shape[1])
                if counts[row, place]
            ]
            columns, stay = torch.cat(columns), inputs["attention_mask"][row].bool()
            memory = given["cross_attention_states"].view(2, -1, 32)[row]
            with torch.no_grad():
                out = model.model.language_model(
                    input_ids=inputs["input_ids"][row : row + 1, stay],
                    cross_attention_states=memory[None, columns],
                    cross_attention_mask=given["cross_attention_mask"][row : row + 1, :, stay][..., columns],
                    full_text_row_masked_out_mask=given["full_text_row_masked_out_mask"][
                        row : row + 1, :, stay
                    ],
                    position_ids=torch.arange(int(stay.sum()))[None],
                    use_cache=False,
                ).last_hidden_state
                torch.testing.assert_close(logits[row, stay], model.lm_head(out)[0], atol=1e-4, rtol=1e-4)
    record_property("positions", "keep")


def test_repacking_a_prompt_that_keeps_its_length_is_refused(host):
    with pytest.raises(ValueError, match="whose prompts keep their length: use positions='keep'"):
        vtc.compress(host[0], "vtc-cls", keep=0.3, positions="repack")


@shows("batches")
def test_batch_equals_single_runs(host):
    model, make_inputs = host
    inputs = make_inputs((1, 1), pads=1)
    for method in usable(model):
        with vtc.compress(model, method, keep=0.4) as handle:
            both, records = forward(model, inputs).logits, handle.last
            for row in range(2):
                single = forward(model, make_inputs((1,), first=row)).logits
                (record,) = handle.last
                assert torch.equal(record.index, records[row].index)
                stay = inputs["attention_mask"][row].bool()
                torch.testing.assert_close(both[row, stay], single[0], atol=2e-4, rtol=2e-4)


@shows("several images")
def test_a_prompt_without_pictures_is_what_it_is_alone(host):
    model, make_inputs = host
    with vtc.compress(model, "divprune", keep=0.4):
        both = forward(model, make_inputs((1, 0))).logits
        alone = forward(model, make_inputs((0,), first=1)).logits
    torch.testing.assert_close(both[1, -alone.shape[1] :], alone[0], atol=1e-4, rtol=1e-4)


CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}, "beams": {"num_beams": 3}}


@pytest.mark.parametrize("cache", CACHES)
@shows("generate")
def test_generating_with_a_cache_equals_generating_without(host, cache):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    beams = CACHES["beams"] if cache == "beams" else {}
    with vtc.compress(model, "divprune", keep=0.3):
        expected = model.generate(**inputs, **GREEDY, **beams, use_cache=False)
        assert torch.equal(model.generate(**inputs, **GREEDY, **CACHES[cache]), expected)


@shows("chats")
def test_chat_goes_on_from_the_cache(host):
    """A second turn over the returned cache equals a prompt that held both turns from the start."""
    model, make_inputs = host
    first = make_inputs(**MIXED)
    extra = torch.randint(3, 90, (2, 4), generator=torch.Generator().manual_seed(1))
    with vtc.compress(model, "divprune", keep=0.3):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, extra], dim=1)
        more = ids.shape[1] - first["input_ids"].shape[1]
        mask = torch.cat([first["attention_mask"], torch.ones(2, more, dtype=torch.long)], dim=1)
        seen = first["cross_attention_mask"]
        seen = torch.cat([seen, seen[:, -1:].expand(-1, more, -1, -1)], dim=1)
        both = {"input_ids": ids, "attention_mask": mask, "cross_attention_mask": seen}
        cache = copy.deepcopy(turn.past_key_values)
        again = model.generate(**both, past_key_values=cache, **GREEDY)
        assert torch.equal(again, model.generate(**{**first, **both}, **GREEDY))
        with pytest.raises(ValueError, match="others cannot be added"):
            model.generate(**{**first, **both}, past_key_values=turn.past_key_values, **GREEDY)


@shows("images")
def test_text_only_and_ready_made_memories(host):
    model, make_inputs = host
    inputs = make_inputs((0, 0), pads=1)
    expected = model.generate(**inputs, **GREEDY)
    with vtc.compress(model, "divprune", keep=0.3):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)
        with pytest.raises(RuntimeError, match="nothing was compressed"):
            forward(model, {**inputs, "cross_attention_states": torch.zeros(2, 34, 32)})
        forward(model, make_inputs((1,)))  # an error leaves no trace


@shows("attention")
def test_sdpa_and_eager_agree_and_copies_are_compressed(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for method in usable(model):
        found = []
        for each in (model, eager):
            with vtc.compress(each, method, keep=0.4) as handle:
                found.append(forward(each, inputs).logits)
                assert torch.equal(forward(copy.deepcopy(each), inputs).logits, found[-1])
                assert all(len(record.index) < len(record.source) for record in handle.last)
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(*(logits[real] for logits in found), atol=2e-4, rtol=2e-4)


@shows("half precision", "training")
def test_half_precision_and_gradients(host):
    model, make_inputs = host
    half, inputs = copy.deepcopy(model).to(torch.bfloat16), make_inputs((1, 1))
    with vtc.compress(half, "hiprune", keep=0.4):
        cast = {**inputs, "pixel_values": inputs["pixel_values"].to(torch.bfloat16)}
        assert forward(half, cast).logits.isfinite().all()
        assert half.generate(**cast, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4
    with vtc.compress(model, "tome", keep=0.4):
        model(**inputs).logits.float().square().mean().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    assert model.model.vision_model.patch_embedding.weight.grad.abs().sum() > 0
    model.zero_grad()
