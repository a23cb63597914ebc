"""Tokens cut inside of the decoder: every way to run a model gives what the bare one gives where deeper
layers do not see the dropped tokens."""

import copy
import pickle

import pytest
import torch
from footprint import footprint
from layer_oracle import greedy, unseen, watched
from tiny import HOSTS, IMAGE, PAD, SUPPRESS, build

import vtc
from vtc.hosts import open_host
from vtc.method import Need, Select
from vtc.methods.dart import DART

STEPS = 4
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SUPPRESS}
MIXED = {"images": (2, 1, 0), "pads": 2}
ALONE = DART(pivot_text_token=0)  # goes by the image alone, whatever is asked behind it
# what stage='decoder' refuses, by a word of the reason; all others must work
REFUSED = {
    **dict.fromkeys(("paligemma-gemma", "molmo2", "molmo2-video"), "see each other"),
    **dict.fromkeys(
        ("gemma3", "gemma4", "gemma3n", "gemma4_unified", "paligemma-gemma2"), "sliding_attention"
    ),
    **dict.fromkeys(
        ("exaone4_5", "cohere_compass", "idefics2", "mistral3", "aya_vision"), "sliding_attention"
    ),
    **dict.fromkeys(("cohere2_vision", "step3p7", "muse_glimmer", "muse_spark"), "sliding_attention"),
    **dict.fromkeys(
        ("minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "qwen3_5", "qwen3_5_moe"), "linear_attention"
    ),
    **dict.fromkeys(("qwen4_exp", "glm5_next", "dots3_note", "mistral_large4"), "indexed_attention"),
    **dict.fromkeys(("lfm2_vl", "lfm3_vl"), "conv"),
    "llama4": "chunked_attention",
    "minimax_m3_vl": "minimax_m3_sparse",
    "nemotron_h_omni": "linear_attention",
    "inkling2": "hybrid",
    "unlimited_ocr": "reference_sliding_attention",
    "granite4_vision": "features of images",
}
NAMES = [n for n, tiny in HOSTS.items() if tiny.works and not tiny.memory and n not in REFUSED]
DECODERS = (
    "emu3",
    "deepseek_ocr2",
    "ernie4_5_vl_moe",
    "glm4v",
    "hunyuan_vl",
    "kimi_k25",
    "qwen3_vl",
    "smolvlm",
)
FEW = ("llava-clip", "llava_next-clip", "qwen2_5_vl", "internvl", "mistral3")  # for what takes longer


def made(name):
    """A tiny host; Mistral without its window, as Mistral Small 3.1 comes."""
    model, make_inputs = build(name)
    if name == "mistral3":
        model.config.text_config.sliding_window = None
        for layer in model.model.language_model.layers:
            layer.self_attn.sliding_window = None
    return model, make_inputs


@pytest.fixture(params=NAMES, scope="module")
def host(request):
    return made(request.param)


@pytest.fixture(params=FEW, scope="module")
def few(request):
    return made(request.param)


@pytest.fixture(scope="module")
def llava():
    return made("llava-clip")


def compressed(model, keep=0.4, method=None, **settings):
    depth = len(open_host(model).decoder.layers)
    settings = {"decoder_layer": min(2, depth - 1), **settings}
    return vtc.compress(model, method or DART(), keep=keep, stage="decoder", **settings)


def first_layer(handle):
    (stage,) = handle._stages
    return stage._first


def positions_of(mask):
    return (mask.cumsum(1) - 1).clamp_min(0)


def forward(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def check_generate(model, inputs, method=None, **options):
    """Greedy tokens and logits of generate() against the bare model with tokens unseen."""
    with compressed(model, method=method) as handle, watched(handle) as dropped:
        out = model.generate(**inputs, **GREEDY, **options, return_dict_in_generate=True, output_logits=True)
    length = inputs["input_ids"].shape[1]
    tokens, logits = greedy(model, inputs, first_layer(handle), dropped[0], STEPS)
    assert torch.equal(out.sequences[:, :length], inputs["input_ids"])
    assert torch.equal(out.sequences[:, length:], tokens)
    close(torch.stack(out.logits, dim=1), logits)
    return out, inputs["attention_mask"].bool() & ~dropped[0][: len(inputs["input_ids"])]


# -- on every host


def test_forward_equals_the_bare_model_that_does_not_see_dropped_tokens(host):
    model, make_inputs = host
    inputs = make_inputs(**MIXED)
    bare = forward(model, inputs).logits
    with compressed(model) as handle, watched(handle) as dropped:
        out = forward(model, inputs)
        layer = first_layer(handle)
        model.set_attn_implementation("eager")
        eager = forward(model, inputs).logits
        model.set_attn_implementation("sdpa")
        assert len(handle.last) >= 3
    assert torch.equal(*dropped)
    stay = inputs["attention_mask"].bool() & ~dropped[0]
    with unseen(model, layer, dropped[0]):
        expected = forward(model, inputs).logits
    close(out.logits[stay], expected[stay])
    close(eager[stay], out.logits[stay])
    assert (bare - out.logits)[stay].abs().max() > 1e-3
    before = (stay.long().cumsum(1) - 1).clamp_min(0)
    for row, gone in enumerate(dropped[0]):  # a dropped position repeats the last one before it
        assert torch.equal(out.logits[row, gone], out.logits[row, stay[row]][before[row, gone]])
    cache = out.past_key_values
    if cache is not None:
        held = [layer.keys.shape[2] for layer in cache.layers[: len(open_host(model).decoder.layers)]]
        length = inputs["input_ids"].shape[1]
        assert held[:layer] == [length] * layer and set(held[layer:]) == {int(stay.sum(1).max())}


def test_keep_one_is_identity_and_remove_leaves_nothing(host):
    model, make_inputs = host
    inputs = make_inputs((2, 1), pads=1)
    logits, tokens = forward(model, inputs).logits, model.generate(**inputs, **GREEDY)
    before = footprint(model)
    with compressed(model, keep=1.0) as handle:
        assert torch.equal(forward(model, inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
        handle.keep = 10_000
        assert torch.equal(forward(model, inputs).logits, logits)
        assert all(len(record.index) == len(record.source) for record in handle.last)
        handle.keep = 0.4
        assert not torch.equal(forward(model, inputs).logits, logits)
    assert footprint(model) == before
    assert torch.equal(forward(model, inputs).logits, logits)


@pytest.mark.parametrize("name", DECODERS)
def test_generate_equals_the_bare_model_that_does_not_see_dropped_tokens(name):
    model, make_inputs = build(name)
    out, stay = check_generate(model, make_inputs((2, 1), pads=1))
    held = out.past_key_values.layers[len(open_host(model).decoder.layers) - 1].keys.shape[2]
    assert held == int(stay.sum(1).max()) + STEPS - 1


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_is_touched(name):
    model, _ = build(name)
    before = footprint(model)
    with pytest.raises(ValueError, match=REFUSED[name]) as error:
        compressed(model, decoder_layer=1)
    assert "stage='features'" in str(error.value)
    assert footprint(model) == before


# -- by hand: a loop over the layers, with states and positions that are cut in between


@torch.no_grad()
def by_hand(model, inputs, layer, dropped, row):
    """The last hidden states of the tokens of one prompt that stay: (K, D)."""
    decoder, seen = open_host(model).decoder, {}

    def note(module, args, kwargs):
        seen.update(kwargs, hidden=args[0])

    hook = decoder.layers[layer].register_forward_pre_hook(note, with_kwargs=True)
    forward(model, inputs)
    hook.remove()
    stay = inputs["attention_mask"][row].bool() & ~dropped[row]
    hidden = seen["hidden"][row, stay][None]
    cos, sin = (x.expand(*x.shape[:-3], len(dropped), -1, -1) for x in seen["position_embeddings"])
    for each in decoder.layers[layer:]:
        hidden = each(
            hidden,
            attention_mask=torch.full((1, 1, len(stay), len(stay)), -1e30).triu(1)[..., stay, :][..., stay],
            position_embeddings=(cos[..., row : row + 1, stay, :], sin[..., row : row + 1, stay, :]),
            position_ids=None,
            past_key_values=None,
        )
    return decoder.norm(hidden)[0], stay


@pytest.mark.parametrize("layer", [1, 2])
def test_forward_equals_a_loop_over_layers(few, layer):
    model, make_inputs = few
    inputs = make_inputs(**MIXED)
    with compressed(model, decoder_layer=layer) as handle, watched(handle) as dropped:
        found = forward(model, inputs).logits
    for row in range(3):
        hidden, stay = by_hand(model, inputs, layer, dropped[0], row)
        close(found[row, stay], model.lm_head(hidden))


# -- records and budgets


def test_exact_count_and_records(few):
    model, make_inputs = few
    inputs = make_inputs((2, 1), pads=1)
    with compressed(model) as handle, watched(handle) as dropped:
        for keep in (0.07, 1 / 3, 0.5, 0.9, 1, 3, 7, 13, 10_000):
            handle.keep = keep
            forward(model, inputs)
            for record in handle.last:
                n = sum(len(tile.slots) for tile in record.tiles)
                wanted = max(1, int(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)
                full = len(record.source) if wanted == n else wanted  # with newline tokens
                assert len(record.index) == full and (record.index.diff() > 0).all()
                length = len(record.source)
                assert record.entering == {"features": length, "decoder": length, "layer 2": full}
                assert torch.equal(record.source[record.index], torch.arange(full))
            gone = [len(record.source) - len(record.index) for record in handle.last]
            assert dropped[-1].sum(1).tolist() == [gone[0] + gone[1], gone[2]]
            images = (inputs["input_ids"] == IMAGE).nonzero()  # (tokens of all images, 2)
            start = 0
            for record in handle.last:
                rows, columns = images[start : start + len(record.source)].unbind(1)
                assert torch.equal(~dropped[-1][rows, columns], _kept(record))
                start += len(record.source)
        assert "decoder: DART" in handle.describe() and handle.spent > 0


def _kept(record):
    return torch.zeros(len(record.source), dtype=torch.bool).index_fill(0, record.index, True)


def test_batch_equals_single_runs(few):
    """With positions as generate() counts them: lengths of keys depend on positions."""
    model, make_inputs = few
    inputs = make_inputs((1, 1))
    mask = inputs["attention_mask"]
    more = {} if open_host(model).mrope else {"position_ids": positions_of(mask)}
    with compressed(model) as handle:
        both, records = forward(model, inputs, **more).logits, handle.last
        for row in range(2):
            single = forward(model, make_inputs((1,), first=row)).logits[0]
            close(both[row, mask[row].bool()], single)
            assert torch.equal(handle.last[0].index, records[row].index)
            assert torch.equal(handle.last[0].source, records[row].source)


# -- what a method is shown


class Spy(Select):
    """Keeps the first tokens, and what it was shown."""

    name = "spy"
    decoder_needs = (Need("keys"), Need("all_keys"), Need("text"), Need("text_keys"))

    def __init__(self, stages=("decoder",)):
        self.stages, self.seen = stages, []

    def select(self, tokens, k):
        self.seen.append(tokens)
        return torch.arange(k).expand(len(tokens.x), k)


@torch.no_grad()
def test_a_method_sees_states_and_keys_of_the_layer_before(few):
    model, make_inputs = few
    decoder, inputs, noted = open_host(model).decoder, make_inputs((2, 0, 1), pads=1), {}
    spy = Spy()
    with compressed(model, method=spy, keep=2) as handle, watched(handle):
        hook = decoder.layers[2].register_forward_pre_hook(
            lambda module, args, kwargs: noted.update(hidden=args[0]), with_kwargs=True
        )
        decoder.layers[2]._forward_pre_hooks.move_to_end(hook.id, last=False)  # in front of the cut
        keys = forward(model, inputs).past_key_values.layers[1].keys  # (B, heads, L, d), rotated
        hook.remove()
        lengths = [len(record.source) for record in handle.last]
        slots = [torch.cat([tile.slots for tile in record.tiles]) for record in handle.last]
    normed = decoder.norm(noted["hidden"])
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()
    columns = [ids[row].eq(IMAGE).nonzero()[:, 0] for row in range(3)]
    where = [columns[0][: lengths[0]], columns[0][lengths[0] :], columns[2]]
    shown = 0
    for tokens in spy.seen:
        assert (tokens.layer, tokens.depth) == (2, len(decoder.layers))
        for i, image in enumerate(tokens.group.tolist()):
            row, own = (0, 0, 2)[image], where[image][slots[image]]
            assert torch.equal(tokens.x[i], normed[row, own])
            wide = keys[row].transpose(0, 1)  # (L, heads, d)
            assert torch.equal(tokens.all_keys[i, 0], wide[own].flatten(1))
            close(tokens.keys[i, 0], wide[own].mean(1))
            text = (mask[row] & ids[row].ne(IMAGE)).nonzero()[:, 0]
            real = tokens.text_mask[i]
            assert torch.equal(tokens.text[i, real], normed[row, text])
            assert torch.equal(tokens.text_keys[i, 0, real], wide[text].flatten(1))
            assert torch.equal(tokens.text_after[i, real], text > where[image][-1])
            assert not tokens.text[i, ~real].any() and not tokens.text_after[i, ~real].any()
            shown += 1
    assert shown == 3


@torch.no_grad()
def test_where_no_text_is_behind_the_image_all_of_it_counts(llava):
    model, make_inputs = llava
    inputs = make_inputs((1,))
    end = int(inputs["input_ids"].eq(IMAGE).nonzero()[-1, 1]) + 1
    inputs = {n: x[:, :end] if n in ("input_ids", "attention_mask") else x for n, x in inputs.items()}
    spy = Spy()
    with compressed(model, method=spy):
        forward(model, inputs)
    (tokens,) = spy.seen
    assert tokens.text_mask.all() and tokens.text_after.all() and tokens.text.shape[1] == end - 16


def test_a_method_that_merges_inside_the_decoder(llava):
    """Kept tokens become means of their groups' hidden states, and deeper layers go on with these."""

    class Halves(Spy):
        decoder_needs = ()

        def reduce(self, tokens, k):
            every = torch.arange(tokens.n)[None].expand(len(tokens.x), -1)
            return vtc.Reduction.merge(every[:, ::2], every // 2 * 2)

    model, make_inputs = llava
    inputs, decoder = make_inputs((1,)), model.model.language_model
    noted = []
    hook = decoder.layers[2].register_forward_pre_hook(lambda module, args: noted.append(args[0]))
    forward(model, inputs)
    with compressed(model, method=Halves(), keep=0.5):
        hook.remove()
        hook = decoder.layers[2].register_forward_pre_hook(lambda module, args: noted.append(args[0]))
        forward(model, inputs)
        hook.remove()
    bare, cut = (each[0].detach() for each in noted)
    first = int(inputs["input_ids"].eq(IMAGE).nonzero()[0, 1])
    expected = [bare[:first], bare[first : first + 16].view(8, 2, -1).mean(1), bare[first + 16 :]]
    close(cut, torch.cat(expected))


# -- ways to run


@pytest.mark.parametrize("batch", [{"images": (1,)}, {"images": (1, 1)}, MIXED], ids=["one", "two", "mixed"])
def test_generate_equals_the_oracle(few, batch):
    model, make_inputs = few
    check_generate(model, make_inputs(**batch))


@pytest.mark.parametrize(
    "options",
    [{"cache_implementation": "static"}, {"use_cache": False}, {"prompt_lookup_num_tokens": 2}],
    ids=str,
)
def test_other_caches_and_loops_equal_the_oracle(few, options):
    model, make_inputs = few
    inputs = make_inputs((1,)) if "prompt_lookup_num_tokens" in options else make_inputs(**MIXED)
    method = ALONE if options == {"use_cache": False} else None  # each step asks the method anew
    out, stay = check_generate(model, inputs, method, **options)
    if "cache_implementation" in options:
        held = [layer.keys.shape[2] for layer in out.past_key_values.layers]
        assert held[1] == stay.shape[1] + STEPS - 1 and held[2] == int(stay.sum(1).max()) + STEPS - 1


def test_beams_and_sampling_are_the_same_with_any_cache(few):
    model, make_inputs = few
    inputs = make_inputs(**MIXED)
    for ways in ({"num_beams": 3, "num_return_sequences": 2}, {"do_sample": True, "num_return_sequences": 2}):
        results = []
        with compressed(model, method=ALONE) as handle:
            for cache in ({"use_cache": False}, {}, {"cache_implementation": "static"}):
                torch.manual_seed(3)
                results.append(model.generate(**inputs, **{**GREEDY, **ways}, **cache))
            assert len(handle.last) == 3
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
        assert not torch.equal(results[0], model.generate(**inputs, **{**GREEDY, **ways}))


@pytest.mark.parametrize("static", [False, True])
def test_chat_goes_on_from_the_cache(few, static):
    """A second turn over the returned cache equals a prompt that held both turns from the start."""
    from transformers import StaticCache

    model, make_inputs = few
    first, extra = make_inputs(**MIXED), torch.randint(3, 90, (3, 4))
    size = first["input_ids"].shape[1] + 30
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=size) if static else None
    with compressed(model, method=ALONE):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True, past_key_values=cache)
        cache = turn.past_key_values if static else copy.deepcopy(turn.past_key_values)
        ids = torch.cat([turn.sequences, extra], dim=1)
        mask = torch.cat([first["attention_mask"], torch.ones(3, STEPS + 4, dtype=torch.long)], dim=1)
        again = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
        more = _typed(first, ids)
        whole = model.generate(**{**first, "input_ids": ids, "attention_mask": mask, **more}, **GREEDY)
    assert torch.equal(again, whole)


def _typed(inputs, ids):
    """Kinds of tokens for a longer prompt, all new ones text."""
    types = inputs.get("mm_token_type_ids")
    if types is None:
        return {}
    more = torch.zeros(len(ids), ids.shape[1] - types.shape[1], dtype=types.dtype)
    return {"mm_token_type_ids": torch.cat([types, more], dim=1)}


@pytest.mark.parametrize("rows", [1, 2])
def test_chat_goes_on_with_a_new_image(llava, rows):
    """Also where one prompt of the batch has none, so that rows are padded again behind the cache."""
    model, make_inputs = llava
    first, second = make_inputs((1,) * rows), make_inputs((1, 0)[:rows], seed=5)
    with compressed(model, method=ALONE):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"]], dim=1)
        mask = torch.ones_like(turn.sequences)
        mask = torch.cat([mask, second["attention_mask"]], dim=1)
        again = model.generate(
            **{**second, "input_ids": ids, "attention_mask": mask},
            past_key_values=turn.past_key_values,
            **GREEDY,
        )
        pictures = [first["pixel_values"][:1], second["pixel_values"], first["pixel_values"][1:]]
        whole = model.generate(pixel_values=torch.cat(pictures), input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(again, whole)


@pytest.mark.parametrize("static", [False, True])
def test_a_chat_of_three_turns_with_padding_in_each(llava, static):
    """Images, then text of different lengths, then an image in one row only: each turn is what all of it at
    once gives."""
    from transformers import StaticCache

    model, make_inputs = llava
    turns = [make_inputs((1, 1), pads=1), make_inputs((0, 0), seed=3), make_inputs((1, 0), seed=5)]
    turns[1]["attention_mask"][1, :2] = 0
    ids, mask = turns[0]["input_ids"][:, :0], turns[0]["attention_mask"][:, :0]
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=100) if static else None
    pictures = [[], []]  # of each row
    ask = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
    with compressed(model, method=ALONE, decoder_layer=1):
        for turn in turns:
            own = list(turn.get("pixel_values", []))
            for row in range(len(own)):
                pictures[row].append(own[row])
            pixels = {"pixel_values": torch.stack(own)} if own else {}
            ids = torch.cat([ids, turn["input_ids"]], dim=1)
            mask = torch.cat([mask, turn["attention_mask"]], dim=1)
            chat = {"input_ids": ids, "attention_mask": mask}
            found = model.generate(**chat, **pixels, **ask, past_key_values=cache)
            whole = model.generate(**chat, **ask, pixel_values=torch.stack([*pictures[0], *pictures[1]]))
            assert torch.equal(found.sequences, whole.sequences)
            close(torch.stack(found.logits), torch.stack(whole.logits))
            cache, ids = found.past_key_values, found.sequences
            mask = torch.cat([mask, torch.ones(2, STEPS, dtype=torch.long)], dim=1)


@pytest.mark.parametrize("turns", [1, 2])
@torch.no_grad()
def test_cropping_the_text_behind_the_images_of_a_batch(llava, turns):
    """Rows of one cache lost different numbers of tokens, but none behind the last image of any. What comes
    next begins with padding, which the mask of the deeper layers must not take for the text that is gone."""
    model, make_inputs = llava
    cache, mask = None, torch.ones(3, 0, dtype=torch.long)
    with compressed(model):
        for seed in range(turns):
            inputs = make_inputs(**MIXED, seed=seed)
            mask = torch.cat([mask, inputs["attention_mask"]], dim=1)
            length = inputs["input_ids"].shape[1]
            given = {**inputs, "attention_mask": mask, "position_ids": positions_of(mask)[:, -length:]}
            out = model(**given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
        cache.crop(-2)
        pad = torch.zeros(3, 1, dtype=torch.long)
        ids = torch.cat([pad, inputs["input_ids"][:, -2:]], dim=1)
        mask = torch.cat([mask[:, :-2], pad, mask[:, -2:]], dim=1)
        found = model(
            input_ids=ids, attention_mask=mask, position_ids=positions_of(mask)[:, -3:], past_key_values=cache
        )
    close(found.logits[:, -2:], out.logits[:, -2:])


def test_a_turn_that_begins_with_dropped_tokens(llava):
    """They repeat the last token of the turn before."""
    model, make_inputs = llava
    first, second = make_inputs((0,)), make_inputs((1,), seed=5)
    start = int(second["input_ids"].eq(IMAGE).nonzero()[0, 1])
    second = {n: x[:, start:] if n in ("input_ids", "attention_mask") else x for n, x in second.items()}
    with compressed(model, method=ALONE, keep=1) as handle:
        before = forward(model, first)
        cache, last = before.past_key_values, before.logits[:, -1]
        mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
        found = forward(model, {**second, "attention_mask": mask}, past_key_values=cache).logits
        kept = int(handle.last[0].index[0])
    assert kept > 0 and torch.equal(found[:, :kept], last[:, None].expand(-1, kept, -1))
    assert not torch.equal(found[:, kept], last)


@pytest.mark.parametrize("static", [False, True])
def test_a_first_turn_without_images(llava, static):
    """Its padding is in a cache that is not shorter yet."""
    from transformers import StaticCache

    model, make_inputs = llava
    first, second = make_inputs((0, 0)), make_inputs((1, 0), seed=5)
    first["attention_mask"][1, :2] = 0
    ids, mask = (torch.cat([first[n], second[n]], dim=1) for n in ("input_ids", "attention_mask"))
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=60) if static else None
    with compressed(model, method=ALONE, decoder_layer=1):
        given = {**first, "position_ids": positions_of(first["attention_mask"])}
        cache = forward(model, given, use_cache=True, past_key_values=cache).past_key_values
        ask = {**GREEDY, "return_dict_in_generate": True, "output_logits": True}
        ask |= {"input_ids": ids, "attention_mask": mask, "pixel_values": second["pixel_values"]}
        whole, found = model.generate(**ask), model.generate(**ask, past_key_values=cache)
    close(torch.stack(found.logits), torch.stack(whole.logits))


def test_a_manual_decoding_loop_works(few):
    model, make_inputs = few
    if open_host(model).mrope:
        return  # the bare model needs positions of several components for it
    inputs = make_inputs(**MIXED)
    mask, tokens = inputs["attention_mask"], []
    with compressed(model):
        expected = model.generate(**inputs, **GREEDY)
        out = forward(model, {**inputs, "position_ids": positions_of(mask)}, use_cache=True)
        for _ in range(STEPS):
            last = out.logits[:, -1].clone()
            last[:, SUPPRESS] = -torch.inf
            tokens.append(last.argmax(-1, keepdim=True))
            mask = torch.cat([mask, torch.ones_like(tokens[-1])], dim=1)
            step = {"attention_mask": mask, "position_ids": positions_of(mask)[:, -1:]}
            step["past_key_values"] = out.past_key_values
            out = forward(model, {**step, "input_ids": tokens[-1]})
    assert torch.equal(torch.cat(tokens, dim=1), expected[:, -STEPS:])


def test_text_only_calls_pass_through(few):
    model, make_inputs = few
    inputs = make_inputs((0, 0), pads=1)
    expected = model.generate(**inputs, **GREEDY)
    with compressed(model):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_loss_and_gradient_equal_those_of_the_oracle(few, side):
    model, make_inputs = few
    inputs = make_inputs((2, 1), pads=2, side=side)
    ids = inputs["input_ids"]
    labels = ids.masked_fill((ids == IMAGE) | (ids == PAD), -100)
    labels[torch.arange(2), inputs["attention_mask"].long().argmax(dim=1)] = -100
    chosen = [model.lm_head.weight, next(open_host(model).encoder.tower.parameters())]
    with compressed(model) as handle, watched(handle) as dropped:
        out = model(**inputs, labels=labels)
        found = torch.autograd.grad(out.loss, chosen)
    stay = inputs["attention_mask"].bool() & ~dropped[0]
    with unseen(model, 2, dropped[0]):
        logits, total, count = model(**inputs).logits, 0, 0
    for row in range(2):
        targets = labels[row, stay[row]][1:]
        own = logits[row, stay[row]][:-1]
        total = total + torch.nn.functional.cross_entropy(own, targets, reduction="sum", ignore_index=-100)
        count += int((targets != -100).sum())
    close(out.loss, total / count)
    for one, other in zip(found, torch.autograd.grad(total / count, chosen)):
        close(one, other)
        assert other.abs().sum() > 0


def test_half_precision_and_gradient_checkpointing(llava):
    model, make_inputs = llava
    inputs = make_inputs((1, 1), pads=1)
    half = copy.deepcopy(model).to(torch.bfloat16)
    with compressed(half) as handle:
        out = forward(half, {**inputs, "pixel_values": inputs["pixel_values"].bfloat16()})
        assert out.logits.dtype == torch.bfloat16 and out.logits.isfinite().all()
        assert all(len(record.index) < len(record.source) for record in handle.last)
    training, gradients = copy.deepcopy(model).train(), []
    with compressed(training):
        for checkpointing in (False, True):
            if checkpointing:
                training.gradient_checkpointing_enable()
            training.zero_grad()
            training(**inputs).logits.square().mean().backward()
            gradients.append([p.grad.clone() for p in training.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        close(one, other)


def test_compiled_decoding_over_a_static_cache(llava):
    from transformers import CompileConfig

    model, make_inputs = llava
    inputs = make_inputs((2, 1), pads=1)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU only, unless it is told to
    with compressed(model):
        expected = model.generate(**inputs, **GREEDY)
        torch._dynamo.utils.counters.clear()
        found = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        frames = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch.compiler.reset()
    assert torch.equal(found, expected) and frames >= 1


def test_routers_of_experts_are_heard_at_full_length():
    """Their loss masks padding by the prompt's own mask."""
    model, make_inputs = build("qwen3_vl_moe")
    inputs = make_inputs((2, 1), pads=1)
    bare = forward(model, inputs, output_router_logits=True).router_logits
    with compressed(model) as handle, watched(handle) as dropped:
        found = model(**inputs, labels=inputs["input_ids"], output_router_logits=True)
    stay = (inputs["attention_mask"].bool() & ~dropped[0]).flatten()
    assert [x.shape for x in found.router_logits] == [x.shape for x in bare] and found.loss.isfinite()
    close(found.router_logits[0], bare[0])
    with unseen(model, 2, dropped[0]):
        expected = forward(model, inputs, output_router_logits=True).router_logits
    close(found.router_logits[2][stay], expected[2][stay])


# -- caches


@torch.no_grad()
def test_a_cache_may_be_reordered_selected_repeated_and_pickled(few):
    model, make_inputs = few
    if open_host(model).mrope:
        return  # its positions are of the rows that the model saw last
    inputs, more = make_inputs((1, 2)), torch.randint(3, 90, (2, 3))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 3, dtype=torch.long)], dim=1)
    flip = torch.tensor([1, 0])
    with compressed(model):
        cache = model(**inputs).past_key_values
        copies = [pickle.loads(pickle.dumps(cache)) for _ in range(3)]
        expected = model(input_ids=more, attention_mask=mask, past_key_values=cache).logits
        copies[0].reorder_cache(flip)
        copies[1].batch_select_indices(flip)
        copies[2].batch_repeat_interleave(2)
        for moved in copies[:2]:
            found = model(input_ids=more[flip], attention_mask=mask[flip], past_key_values=moved).logits
            close(found[flip], expected)
        twice = [tensor.repeat_interleave(2, dim=0) for tensor in (more, mask)]
        found = model(input_ids=twice[0], attention_mask=twice[1], past_key_values=copies[2]).logits
        close(found[::2], expected)


@torch.no_grad()
def test_cropping_text_works_and_cropping_into_the_image_is_refused(llava):
    model, make_inputs = llava
    inputs, more = make_inputs((1, 0), pads=1), torch.randint(3, 90, (2, 4))
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.long)], dim=1)
    with compressed(model):
        cache = model(**inputs).past_key_values
        after = {"input_ids": more, "attention_mask": mask[:, :-2]}
        expected = model(**after, past_key_values=copy.deepcopy(cache)).logits
        model(input_ids=torch.randint(3, 90, (2, 6)), attention_mask=mask, past_key_values=cache)
        cache.crop(-6)
        close(model(**after, past_key_values=cache).logits, expected)
        with pytest.raises(ValueError, match="cannot crop 10 tokens"):
            cache.crop(-10)


def test_a_reused_static_cache_starts_anew(llava):
    from transformers import StaticCache

    model, make_inputs = llava
    inputs, text = make_inputs((1,)), make_inputs((0,))
    size = inputs["input_ids"].shape[1] + 8
    expected = model.generate(**text, **GREEDY)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=size)
    with compressed(model):
        model.generate(**inputs, **GREEDY, cache_implementation="static")
        assert torch.equal(model.generate(**text, **GREEDY, cache_implementation="static"), expected)
        model.generate(**inputs, **GREEDY, past_key_values=cache)
        assert cache.layers[2].keys.shape[2] < cache.layers[1].keys.shape[2] == size
        cache.reset()
        assert torch.equal(model.generate(**text, **GREEDY, past_key_values=cache), expected)
    assert [layer.keys.shape[2] for layer in cache.layers] == [size] * 3


def test_other_models_refuse_the_cache(llava):
    model, make_inputs = llava
    text = torch.randint(3, 90, (1, 3))
    with compressed(model):
        cache = forward(model, make_inputs((1,))).past_key_values
    step = {"input_ids": text, "past_key_values": cache}
    with pytest.raises(RuntimeError, match="deeper layers of this cache hold fewer tokens"):
        forward(model, step)
    with compressed(model, decoder_layer=1), pytest.raises(ValueError, match="shortened by another"):
        forward(model, step)
    with vtc.compress(model, "divprune", keep=0.5), pytest.raises(RuntimeError, match="deeper layers"):
        forward(model, step)
    with vtc.compress(model, "divprune", keep=0.5):
        cache = forward(model, make_inputs((1,))).past_key_values
    with compressed(model), pytest.raises(ValueError, match="shortened by another"):
        forward(model, {"input_ids": text, "past_key_values": cache})


def test_a_cache_goes_when_its_user_lets_go(llava):
    import gc
    import weakref

    model, make_inputs = llava
    gc.disable()
    try:
        with compressed(model):
            out = forward(model, make_inputs((1,)), use_cache=True)
            keys = weakref.ref(out.past_key_values.layers[0].keys)
            del out
        assert keys() is None
    finally:
        gc.enable()


# -- what is refused, and what goes wrong


def test_an_exception_in_the_middle_leaves_nothing(llava):
    model, make_inputs = llava
    inputs, decoder = make_inputs((1,)), model.model.language_model
    logits, before = forward(model, inputs).logits, footprint(model)

    def fail(*_):
        raise KeyboardInterrupt

    for where in (decoder.layers[0], decoder.layers[2], model.model.vision_tower):
        handle = compressed(model)
        trap = where.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            model.generate(**inputs, **GREEDY)
        trap.remove()
        text = model.get_input_embeddings()(torch.arange(3, 8)[None])
        assert decoder(inputs_embeds=text).last_hidden_state.shape == text.shape
        assert not torch.equal(forward(model, inputs).logits, logits)  # and it still works
        handle.remove()
        assert footprint(model) == before
        assert torch.equal(forward(model, inputs).logits, logits)


def test_a_copy_of_a_compressed_model_is_compressed_by_itself(llava):
    model, make_inputs = llava
    inputs = make_inputs((1,))
    bare = forward(model, inputs).logits
    with compressed(model):
        twin = copy.deepcopy(model)
        expected = forward(model, inputs).logits
    assert torch.equal(forward(twin, inputs).logits, expected)
    assert torch.equal(forward(model, inputs).logits, bare)


@pytest.mark.parametrize("layer", [0, 3, -1, True, 0.1, 1.0, "2"])
def test_a_layer_that_is_none(llava, layer):
    with pytest.raises(ValueError, match="a layer from 1 to 2"):
        compressed(llava[0], decoder_layer=layer)


def test_a_layer_may_be_a_fraction_of_the_depth(llava):
    with compressed(llava[0], decoder_layer=2 / 3) as handle:
        assert first_layer(handle) == 2 and handle.plan[0][1]["decoder_layer"] == 2 / 3
    with vtc.compress(llava[0], "dart", keep=0.5) as handle:
        assert handle.plan[0][1] == {"stage": "decoder", "keep": 0.5, "decoder_layer": 2}


def test_early_layers_that_are_given_features_stay_whole():
    model, _ = build("qwen3_vl")
    deep = len(model.config.vision_config.deepstack_visual_indexes)
    with pytest.raises(ValueError, match=f"decoder_layer={deep} is the first"):
        compressed(model, decoder_layer=deep - 1)


def test_needs_that_a_decoder_has_not(llava):
    class Reader(Spy):
        decoder_needs = (Need("cls_attention", (-1,)),)

    with pytest.raises(ValueError, match="needs cls_attention, which does not exist inside of a decoder"):
        compressed(llava[0], method=Reader())


def test_budgets_of_scores_are_for_another_stage(llava):
    with pytest.raises(ValueError, match="for stage 'features'"):
        compressed(llava[0], keep="p:0.9")


def test_other_kernels_are_refused(llava, monkeypatch):
    model, make_inputs = llava
    config = model.model.language_model.config
    with compressed(model):
        monkeypatch.setattr(config, "_attn_implementation_internal", "flash_attention_2")
        with pytest.raises(ValueError, match="does not work with flash_attention_2"):
            forward(model, make_inputs((1,)))
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        compressed(model)


def test_prompts_in_pieces_are_refused(llava):
    model, make_inputs = llava
    with compressed(model), pytest.raises(RuntimeError, match="leave out prefill_chunk_size"):
        model.generate(**make_inputs((1,)), **GREEDY, prefill_chunk_size=7)


def test_features_from_before_are_refused(llava):
    model, make_inputs = llava
    inputs = make_inputs((1,))
    features = model.model.get_image_features(inputs.pop("pixel_values"), return_dict=True)
    with compressed(model), pytest.raises(RuntimeError, match="encoded after compress"):
        forward(model, inputs, mm_encoder_outputs={"image": features})


def test_embeddings_without_ids_are_refused(llava):
    model, make_inputs = llava
    inputs = make_inputs((1,))
    embeds = model.get_input_embeddings()(inputs.pop("input_ids")).detach()
    with compressed(model), pytest.raises(ValueError, match="input_ids"):
        forward(model, inputs, inputs_embeds=embeds)


def test_masks_of_a_caller_and_packed_prompts_are_refused(llava):
    model, make_inputs = llava
    inputs = make_inputs((1,))
    length = inputs["input_ids"].shape[1]
    square = torch.zeros(1, 1, length, length)
    with compressed(model), pytest.raises(ValueError, match="more than two dimensions"):
        forward(model, {**inputs, "attention_mask": square})
    positions = torch.cat([torch.arange(5), torch.arange(length - 5)])[None]
    packed = {**inputs, "position_ids": positions}
    del packed["attention_mask"]
    with compressed(model), pytest.raises(ValueError, match="packed into one row"):
        forward(model, packed, use_cache=False)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "video_llava", "glm4v"])
def test_videos(name):
    """All frames of a video are one row."""
    model, make_inputs = build(name)
    inputs = make_inputs((0, 0), videos=(1, 2))
    with compressed(model, keep=3) as handle, watched(handle) as dropped:
        found = forward(model, inputs).logits
        kept = [len(record.index) for record in handle.last]
        first = model.generate(**inputs, **GREEDY)
    assert len(kept) == 3 and kept == [3] * 3
    assert first.shape[1] == inputs["input_ids"].shape[1] + STEPS
    stay = inputs["attention_mask"].bool() & ~dropped[0]
    with unseen(model, 2, dropped[0]):
        close(found[stay], forward(model, inputs).logits[stay])


def test_images_and_videos_of_one_prompt():
    model, make_inputs = build("qwen2_5_vl")
    inputs = make_inputs((1, 1), videos=(1, 0))
    with compressed(model, keep=2) as handle, watched(handle) as dropped:
        found = forward(model, inputs).logits
        assert [len(record.index) for record in handle.last] == [2] * 3
    stay = inputs["attention_mask"].bool() & ~dropped[0]
    with unseen(model, 2, dropped[0]):
        close(found[stay], forward(model, inputs).logits[stay])
