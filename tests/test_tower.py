"""The encoder stage inside of vision-language models: the tower reduces tokens and prompts follow it."""

import copy
import threading

import pytest
import torch
from decoder_oracle import Watch, shortened_rows
from footprint import footprint
from tiny import HOSTS, IMAGE, SUPPRESS, build
from tiny.padded import grid, padded
from tiny.parts import maker, randomise, squares
from transformers import DynamicCache

import vtc
from vtc.hosts import open_host
from vtc.schedule import counts
from vtc.stages.fields import join

WHOLE = (  # a token of the prompt is a patch, a picture is a row of the tower
    "llava-clip",
    "llava-clip-full",
    "llava-siglip",
    "paligemma-gemma",
    "paligemma-gemma2",
    "vipllava",
    "deepseek_vl",
    "deepseek_vl_hybrid",
)
TILED = ("llava_next-clip", "llava_next-siglip", "llava_next_video", "llava_onevision")
SEVERAL = (  # a token of the prompt is made of several patches
    "gemma3",
    "perception_lm",
    "perception_lm-nocls",
    "granite4_vision",
    "lfm2_vl",
    "internvl",
    "aya_vision",
    "cohere2_vision",
)
VIDEOS = ("llava_next_video", "llava_onevision", "perception_lm", "perception_lm-nocls")
SINGLE = {  # as those, with another ratio
    "lfm2_vl": (
        {"downsample_factor": 1},
        maker(padded, lambda i: grid(i)[0] * grid(i)[1]),
    ),
    "aya_vision": (
        {"downsample_factor": 1},
        maker(squares((3, 64, 64)), lambda i: 64, before=(97,), after=(96,)),
    ),
    "perception_lm": ({"projector_pooling_ratio": 1}, maker(squares((2, 3, 64, 64)), lambda i: 128)),
}
# Hidden layer -2 of four blocks is read.
DEPTH = {
    "llava-clip": 3,
    "llava-clip-full": 3,
    "llava_next-clip": 3,
    "llava_next_video": 3,
}
STEPS = 4
GREEDY = {"max_new_tokens": STEPS, "do_sample": False, "suppress_tokens": SUPPRESS}
MIXED = {"images": (2, 1, 0), "pads": 2}
BUDGETS = (
    ("tome", {"keep": 0.5}),
    ("tome", {"keep": [0.8, -3, 5]}),
    ("random", {"keep": 0.4, "schedule": "staged"}),
    ("evit", {"keep": 0.3, "fuse": "none", "attention": "mean"}),
    ("evit", {"keep": 0.3, "fuse": "sum", "attention": "mean"}),
)

over_budgets = pytest.mark.parametrize("method, options", BUDGETS, ids=str)


@pytest.fixture(params=(*WHOLE, *TILED, *SEVERAL), scope="module")
def host(request):
    return request.param, *build(request.param)


@pytest.fixture(params=(*WHOLE, *TILED), scope="module")
def short(request):
    """Prompts get shorter."""
    return request.param, *build(request.param)


@pytest.fixture(params=("llava-clip", "llava_next-clip", "llava_onevision"), scope="module")
def one(request):
    return request.param, *build(request.param)


@pytest.fixture(scope="module")
def llava():
    return build("llava-clip")


def forward(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


def compress(model, method="tome", keep=0.5, **options):
    return vtc.compress(model, method, keep=keep, stage="encoder", **options)


def single(name):
    """A host whose tokens are made of several patches, of one."""
    facts, make_inputs = SINGLE[name]
    config = build(name)[0].config
    for fact, value in facts.items():
        setattr(config, fact, value)
    torch.manual_seed(0)
    return randomise(HOSTS[name].build()[0].__class__(config)), make_inputs


# -- what is to be expected, from the tower alone


def features(model, inputs, source="get_image_features"):
    """All tokens of all pictures, one behind the other: (tokens, D)."""
    host = open_host(model).host
    given = {n: v for n, v in inputs.items() if "pixel" in n or n.startswith(("image_", "spatial"))}
    output = getattr(open_host(model).base, source)(**given, return_dict=True)
    return join(output, host.features, host.deep)[0]


@torch.no_grad()
def tower_alone(model, inputs, method, options, depth=None, source="get_image_features"):
    """The features of all patches where only the tower is compressed, and what became of its tokens."""
    tower = open_host(model).encoder.tower
    if depth and not isinstance(options["keep"], list):  # nothing is reduced behind the layer that is read
        name = options.get("schedule") or vtc.get_method(method).schedule
        left = counts(options["keep"], name, 16, depth)
        options = {**{n: v for n, v in options.items() if n != "schedule"}, "keep": list(left)}
    with vtc.compress(tower, method, restore="unmerge", **options) as handle:
        return features(model, inputs, source), handle.last


def followed(layout, rows, n):
    """What a prompt must keep of one image, by hand: index (K,) and source (N,)."""
    if any(patches.shape[1] > 1 for patches in layout.patches):
        return list(range(layout.length)), list(range(layout.length))
    groups = {}  # (tower row, token of it) -> (slot in the image's tokens, whether its place) of each member
    for tile, patches in zip(layout.tiles, layout.patches):
        for slot, patch in zip(tile.slots.tolist(), patches[:, 0].tolist()):
            record, place = rows[patch // n], patch % n
            token = int(record.source[place])
            if token >= 0:
                stands = int(record.index[token]) == place
                groups.setdefault((patch // n, token), []).append((slot, stands))
    if len(groups) == layout.n:
        return list(range(layout.length)), list(range(layout.length))
    chosen = [next((s for s, stands in g if stands), g[0][0]) for g in groups.values()]
    index, source = sorted(chosen), [-1] * layout.length
    for slot, members in zip(chosen, groups.values()):
        for member, _ in members:
            source[member] = index.index(slot)
    return index, source


def spied(handle):
    """The layouts of each call that makes features."""
    following, seen = handle._stages[0].following, []
    rows = following._rows

    def spy(layouts, *rest):
        seen.append(layouts)
        return rows(layouts, *rest)

    following._rows = spy
    return seen


def check_features(model, inputs, method, options, depth=None, n=None, source="get_image_features"):
    """Records, counts and marked features against the tower alone. Returns the records."""
    full, rows = tower_alone(model, inputs, method, options, depth, source)
    assert any(len(row.index) < len(row.source) for row in rows)
    with torch.no_grad(), compress(model, method, **options) as handle:
        seen = spied(handle)
        marked, records = features(model, inputs, source), handle.last
    (layouts,) = seen
    assert len(layouts) == len(records)
    start, n = 0, n or len(rows[0].source)
    for layout, record in zip(layouts, records):
        index, source = followed(layout, rows, n)
        assert record.index.tolist() == index and record.source.tolist() == source
        assert record.entering == {"features": layout.length, "decoder": len(index)}
        own, bare = marked[start : start + layout.length], full[start : start + layout.length]
        assert torch.equal(own[record.index], bare[record.index])
        assert (~own.isnan().any(dim=1)).nonzero()[:, 0].tolist() == index
        start += layout.length
    assert start == len(marked) == len(full)
    if len(rows) == len(records):
        check_blocks(records, rows)
    return records


def check_blocks(records, rows):
    for record, row in zip(records, rows):
        assert record.blocks.keys() == row.blocks.keys()
        for block, (index, source) in row.blocks.items():
            assert torch.equal(record.blocks[block][0], index) and torch.equal(
                record.blocks[block][1], source
            )


# -- counts, records, features


@over_budgets
def test_prompts_follow_the_tower(short, method, options):
    name, model, make_inputs = short
    records = check_features(model, make_inputs((2, 2)), method, options, DEPTH.get(name))
    assert len(records) == 4
    if name in WHOLE:
        keep = options["keep"]
        k = counts(keep, "once", 16, 4)[-1] if isinstance(keep, list) else max(1, int(16 * keep + 0.5))
        assert [len(record.index) for record in records] == [k] * 4


@over_budgets
def test_tokens_of_several_patches_stay(host, method, options):
    """And are made of un-merged ones."""
    name, model, make_inputs = host
    if name in SEVERAL:
        inputs = make_inputs((2, 1))
        n = inputs["pixel_values"].shape[1] if name == "lfm2_vl" else None
        records = check_features(model, inputs, method, options, n=n)
        assert all(len(record.index) == len(record.source) for record in records)


@pytest.mark.parametrize("name", SINGLE)
@pytest.mark.parametrize("method", ["tome", "random"])
def test_ratios_of_one_shorten_the_prompt(name, method):
    """Pictures of different sizes in padded rows are among them."""
    model, make_inputs = single(name)
    inputs = make_inputs((2, 1))
    n = inputs["pixel_values"].shape[1] if name == "lfm2_vl" else None
    records = check_features(model, inputs, method, {"keep": 0.5}, n=n)
    assert [len(record.index) * 2 for record in records] == [len(record.source) for record in records]
    check_oracle(model, make_inputs((1, 2), pads=1), method, {"keep": 0.5})


def test_an_image_is_reduced_alike_in_any_batch():
    """Of LLaVA-OneVision some images are interpolated behind the tower, and stay whole, and some are not."""
    model, make_inputs = build("llava_onevision")
    with torch.no_grad(), compress(model) as handle:
        features(model, make_inputs((4,)))
        together = handle.last
        assert len({len(record.index) < len(record.source) for record in together}) == 2
        for number, record in enumerate(together):
            features(model, make_inputs((1,), first=number))
            (alone,) = handle.last
            assert torch.equal(alone.index, record.index) and torch.equal(alone.source, record.source)


def test_tokens_behind_the_layer_that_is_read_decide():
    """LLaVA reads hidden layer -2: the last block has nothing to reduce, and what it makes is not read."""
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((1,))
    with compress(model, keep=8) as handle:
        forward(model, inputs)
        assert sorted(handle.last[0].blocks) == [0, 1, 2]
        index, source = handle.last[0].blocks[2]
        assert torch.equal(handle.last[0].index, index) and torch.equal(handle.last[0].source, source)
        for wrong in ({3: 0.5}, [0.9, 0.9, 0.9, 0.9]):
            with pytest.raises(ValueError, match="no block 3"):
                handle.keep = wrong
        logits = forward(model, inputs).logits
        torch.nn.init.zeros_(model.model.vision_tower.encoder.layers[3].mlp.fc2.weight)
        assert torch.equal(forward(model, inputs).logits, logits)
    with pytest.raises(ValueError, match="no block 3"):
        compress(model, schedule=(1, 3))


# -- the prompt


def check_oracle(model, inputs, method, options):
    """Logits against the bare decoder over prompts cut by hand, and the length of prompt and cache."""
    lengths = []
    with Watch(model) as watch, compress(model, method, **options) as handle:
        hook = watch.decoder.register_forward_pre_hook(
            lambda module, args, kwargs: lengths.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        watch.listen()
        cache = DynamicCache(config=watch.decoder.config)
        out = forward(model, inputs, use_cache=True, past_key_values=cache)
        hook.remove()
        given, hidden, records = watch.given, watch.hidden, handle.last
    rows = shortened_rows(model, inputs, given)
    longest = max(int(row.stay.sum()) for row in rows)
    dropped = any(len(record.index) < len(record.source) for record in records)
    if dropped:
        assert lengths[0].shape[1] == longest
        assert not lengths[0].isnan().any()
    held = max(layer.keys.shape[2] for layer in cache.layers if hasattr(layer, "keys"))
    window = getattr(watch.decoder.config, "sliding_window", None) or longest
    length = longest if dropped else inputs["input_ids"].shape[1]
    assert held in (length, min(length, window), min(length, window - 1))
    stays = sum(int(row.stay.sum()) for row in rows)
    text = int(((inputs["input_ids"] != IMAGE) & inputs["attention_mask"].bool()).sum())
    assert stays - text == sum(len(record.index) for record in records)
    head = model.get_output_embeddings()
    for row, expected in enumerate(rows):
        torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)
        logits = head(expected.hidden)
        if name_of(model) not in ("gemma", "cohere", "granite"):
            torch.testing.assert_close(out.logits[row, expected.stay], logits, atol=1e-4, rtol=1e-4)
    return rows


def name_of(model):
    """Families that scale or cap their logits."""
    kind = open_host(model).decoder.config.model_type
    return next((name for name in ("gemma", "cohere", "granite") if name in kind), kind)


@pytest.mark.parametrize(
    "method, options, side",
    [(*budget, ("left", "right")[i % 2]) for i, budget in enumerate((*BUDGETS, BUDGETS[0]))],
    ids=str,
)
@pytest.mark.shows("encoder stage")
def test_forward_equals_the_shortened_prompt(host, method, options, side, record_property):
    name, model, make_inputs = host
    check_oracle(model, make_inputs(**MIXED, side=side), method, options)
    record_property("encoder", "tower" if name in SEVERAL else "tower and prompt")


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 9},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("cache", CACHES)
def test_generating_with_a_cache_equals_generating_without(host, cache):
    """And without a cache every step is a forward, which the oracle has judged."""
    name, model, make_inputs = host
    if cache in HOSTS[name].lacks:
        return
    inputs = make_inputs((1,)) if cache == "chunked" else make_inputs(**MIXED)
    beams = CACHES["beams"] if cache == "beams" else {}
    with compress(model, "tome", keep=0.4):
        expected = model.generate(**inputs, **GREEDY, **beams, use_cache=False)
        assert torch.equal(model.generate(**inputs, **GREEDY, **CACHES[cache]), expected)


def test_greedy_tokens_are_those_of_the_shortened_prompt(short):
    """Each from the bare decoder over the prompt so far, cut by hand."""
    _, model, make_inputs = short
    inputs, steps = make_inputs((2,)), []
    note = open_host(model).decoder.register_forward_pre_hook(
        lambda module, args, kwargs: steps.append({**kwargs}), with_kwargs=True
    )
    with compress(model, keep=0.4):
        found = model.generate(**inputs, **GREEDY, use_cache=False)[0, inputs["input_ids"].shape[1] :]
    note.remove()
    assert len(steps) == STEPS
    for given, token in zip(steps, found):
        prompt = {"attention_mask": torch.ones(given["inputs_embeds"].shape[:2], dtype=torch.long)}
        (row,) = shortened_rows(model, prompt, given)
        assert row.stay.sum() < len(row.stay)
        logits = model.get_output_embeddings()(row.hidden[-1])
        assert int(logits.index_fill(0, torch.tensor(SUPPRESS), -torch.inf).argmax()) == token


def test_batch_equals_single_runs(host):
    _, model, make_inputs = host
    inputs = make_inputs((1, 1))
    with compress(model, keep=0.4) as handle:
        both, records = forward(model, inputs).logits, handle.last
        for row in range(2):
            single, (record,) = forward(model, make_inputs((1,), first=row)).logits, handle.last
            assert torch.equal(record.index, records[row].index)
            assert torch.equal(record.source, records[row].source)
            stay = inputs["attention_mask"][row].bool()
            torch.testing.assert_close(both[row, stay], single[0], atol=2e-4, rtol=2e-4)


def test_prompts_without_pictures_pass_through(host):
    _, model, make_inputs = host
    inputs = make_inputs((0, 0), pads=1)
    logits, tokens = forward(model, inputs).logits, model.generate(**inputs, **GREEDY)
    with compress(model, keep=0.3) as handle:
        assert torch.equal(forward(model, inputs).logits, logits)
        assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
        assert handle.last == [] and handle.describe().count("\n") == 0


@pytest.mark.parametrize("method", ["random", "evit"])
def test_dropped_tokens_never_reach_the_prompt(method):
    """What stands in their places in front of the tower's end changes nothing behind it."""
    model, make_inputs = build("llava-siglip")
    inputs = make_inputs((2, 1), pads=1)
    fuse = {"fuse": "none", "attention": "mean"} if method == "evit" else {}
    last, passed = model.model.vision_tower.encoder.layers[3], []
    with compress(model, method, keep={1: 0.5}, **fuse) as handle:
        bare = forward(model, inputs).logits
        gone = torch.stack([record.source < 0 for record in handle.last])
        assert gone.sum(dim=1).tolist() == [8] * 3

        def spoil(module, args, output):
            passed.append(output.shape)
            return output.masked_fill(gone[..., None], 1e4)

        hook = last.register_forward_hook(spoil)
        assert torch.equal(forward(model, inputs).logits, bare)
        hook.remove()
    assert passed == [(3, 16, 32)]


# -- on and off


def test_keep_one_is_identity(host):
    _, model, make_inputs = host
    inputs = make_inputs((2, 1), pads=1)
    logits, tokens = forward(model, inputs).logits, model.generate(**inputs, **GREEDY)
    for keep in (1.0, [1.0, 1.0] if open_host(model).host.tiled else 10_000):
        with compress(model, keep=keep) as handle:
            assert torch.equal(forward(model, inputs).logits, logits)
            assert len(handle.last) == 3
            assert all(record.entering["decoder"] == record.entering["features"] for record in handle.last)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@pytest.mark.parametrize("ran", [True, False])
def test_remove_leaves_nothing(host, ran):
    """Also where the model had run before, so that transformers' own hooks were there first."""
    name, _, make_inputs = host
    model, _ = build(name)
    inputs = make_inputs((1, 1), pads=1)
    expected = forward(build(name)[0], inputs).logits
    if ran:
        assert torch.equal(forward(model, inputs).logits, expected)
    before = footprint(model)
    for method, options in BUDGETS[:3]:
        handle = compress(model, method, **options)
        found = forward(model, inputs).logits
        assert not torch.equal(found, expected)
        with compress(build(name)[0], method, **options) as other:
            assert torch.equal(forward(other._stages[0].vision.model, inputs).logits, found)
        handle.remove()
        if ran:
            assert footprint(model) == before
        assert torch.equal(forward(model, inputs).logits, expected)


def test_everything_else_is_refused_and_left_alone():
    for name in HOSTS:
        if name in (*WHOLE, *TILED, *SEVERAL):
            continue
        model, _ = build(name)
        before = footprint(model)
        with pytest.raises(ValueError) as raised:
            compress(model)
        told = str(raised.value)
        assert "\n" not in told and ". " not in told.replace("e.g. ", "") and len(told) < 300
        assert footprint(model) == before
    assert "stage='features'" in refused("video_llava")


def refused(name):
    with pytest.raises(ValueError) as raised:
        compress(build(name)[0])
    return str(raised.value)


@pytest.mark.parametrize(
    "options, told",
    [
        ({"restore": "unmerge"}, "restore='unmerge' is for an encoder alone"),
        ({"carry": "gap"}, "carry='gap' is for an encoder alone"),
        ({"positions": "keep"}, "positions='keep' means nothing at stage 'encoder'"),
        ({"positions": "repack"}, "positions='repack' means nothing at stage 'encoder'"),
        ({"allocate": "joint"}, "allocate='joint' means nothing at stage 'encoder'"),
        ({"schedule": (0, 9)}, "no block 9"),
        ({"keep": 0.0}, "not a fraction"),
        ({"keep": {7: 0.5}}, "no block 7"),
    ],
    ids=str,
)
def test_what_means_nothing_here_is_refused(one, options, told):
    _, model, _ = one
    before = footprint(model)
    with pytest.raises(ValueError, match=told) as raised:
        compress(model, **options)
    assert "\n" not in str(raised.value) and footprint(model) == before


@pytest.mark.parametrize("name", [*TILED, "granite4_vision", "perception_lm"])
def test_tiles_have_no_common_number_of_tokens(name):
    model, make_inputs = build(name)
    before = footprint(model)
    with pytest.raises(ValueError, match="keep as a fraction"):
        compress(model, keep=8)
    assert footprint(model) == before
    with compress(model) as handle:
        with pytest.raises(ValueError, match="keep as a fraction"):
            handle.keep = 8
        assert handle.keep == 0.5
        handle.keep = [0.9, 5]  # of each tile
        forward(model, make_inputs((1,)))
        assert "5 x" in handle.describe()


def test_keep_can_be_set_anew(one):
    _, model, make_inputs = one
    inputs = make_inputs((1, 1))
    budgets = [0.5, 0.2, 1.0, [0.5, 0.5], {1: -4}]
    fresh = []
    for keep in budgets:
        with compress(model, keep=keep):
            fresh.append(forward(model, inputs).logits)
    with compress(model, keep=0.9) as handle:
        for keep, expected in zip(budgets, fresh):
            handle.keep = keep
            assert handle.keep == keep
            assert torch.equal(forward(model, inputs).logits, expected)
        for wrong in (0, 1.5, "half", {9: 0.5}, []):
            with pytest.raises((ValueError, TypeError)):
                handle.keep = wrong
        handle.keep = {"encoder": 0.5}
        assert torch.equal(forward(model, inputs).logits, fresh[0])
    assert not torch.equal(fresh[0], fresh[1])


def test_describe_tells_the_tokens_behind_each_block(llava):
    model, make_inputs = llava
    with compress(model) as handle:
        forward(model, make_inputs((1, 1)))
        first, second = handle.describe().split("\n")
        assert first.startswith("encoder: ToMe(") and "keep=0.5 schedule=constant" in first
        assert first.endswith("tokens kept in the last forward: 8 of 16, 8 of 16")
        assert second == "    patch tokens after each block: 13, 11, 8 x 2"
        assert handle.spent > 0


def test_describe_tells_of_every_size():
    model, make_inputs = build("lfm2_vl")
    with compress(model) as handle:
        forward(model, make_inputs((1, 1)))
        assert handle.describe().endswith("each block: 53, 43, 32; 27, 21, 16")


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0.4, "schedule": (0, 2)},
        {"keep": 0.4, "schedule": "decreasing", "order": "spatial"},
        {"keep": [0.9, -3, 0.5]},
        {"keep": {2: 5, 0: 0.9}},
    ],
    ids=str,
)
def test_a_plan_survives_json(one, settings, tmp_path):
    _, model, make_inputs = one
    inputs, results, plans = make_inputs((1,)), [], []
    with compress(model, **settings) as handle:
        results.append(forward(model, inputs).logits)
        plans.append(handle.plan)
        vtc.save(handle.plan, tmp_path / "plan.json")
    loaded = vtc.load(tmp_path / "plan.json")
    for plan in (plans[0], loaded):
        with vtc.compress(model, plan) as handle:
            results.append(forward(model, inputs).logits)
            plans.append(handle.plan)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert plans[0] == plans[1] == plans[2]
    assert plans[0][0][1]["keep"] == settings["keep"]


# -- videos


@pytest.mark.parametrize("name", VIDEOS)
@pytest.mark.parametrize("method", ["tome", "random"])
def test_frames_go_through_the_tower_as_images_do(name, method):
    """Their tokens are pools of several patches, so that prompts keep their length."""
    model, make_inputs = build(name)
    inputs = make_inputs((0, 0), videos=(1, 2), pads=1)
    bare = forward(model, inputs).logits
    with Watch(model) as watch, compress(model, method, keep=0.5) as handle:
        watch.listen()
        logits = forward(model, inputs).logits
        given, hidden = watch.given, watch.hidden
        assert len(handle.last) == 3 and not torch.equal(logits, bare)
        assert all(len(record.index) == len(record.source) for record in handle.last)
        assert "patch tokens after each block" in handle.describe()
        tokens = model.generate(**inputs, **GREEDY)
        assert torch.equal(tokens, model.generate(**inputs, **GREEDY, use_cache=False))
    for row, expected in enumerate(shortened_rows(model, inputs, given)):
        torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)
    if "perception" not in name:
        films = {"pixel_values_videos": inputs["pixel_values_videos"]}
        source = {"depth": DEPTH.get(name), "source": "get_video_features"}
        check_features(model, films, method, {"keep": 0.5}, **source)


@pytest.mark.parametrize("name", VIDEOS)
def test_images_and_videos_in_one_call(name):
    """Two images and a video of two frames: no record is given the blocks of another's rows."""
    model, make_inputs = build(name)
    inputs = make_inputs((1, 0), videos=(0, 1), pads=1)
    with compress(model) as handle:
        forward(model, inputs)
        assert len(handle.last) == 2
        assert not any(record.blocks for record in handle.last)
    with Watch(model) as watch, compress(model):
        watch.listen()
        forward(model, inputs)
        given, hidden = watch.given, watch.hidden
    for row, expected in enumerate(shortened_rows(model, inputs, given)):
        torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)


# -- training


def test_losses_and_gradients(host):
    """Of the un-merged features at kept places, through tower, projector and decoder."""
    _, model, make_inputs = host
    inputs = make_inputs((1, 1), pads=1)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    tower = [p for p in open_host(model).encoder.tower.parameters() if p.ndim > 1]
    bare = forward(model, inputs, labels=labels).loss
    with compress(model, keep=0.4):
        expected = forward(model, inputs, labels=labels).loss
        loss = model(**inputs, labels=labels).loss
        assert loss != bare
        torch.testing.assert_close(loss.detach(), expected)
        loss.backward()
    grads = [p.grad for p in tower if p.grad is not None]
    model.zero_grad()
    assert grads and all(grad.isfinite().all() for grad in grads)
    assert any(grad.abs().sum() > 0 for grad in grads)


@pytest.mark.parametrize("name", ["llava-clip", "llava-siglip", "llava_next-clip"])
def test_the_gradient_is_that_of_the_prompt_cut_by_hand(name):
    """With and without gradient checkpointing."""
    model, make_inputs = build(name)
    inputs = make_inputs((1, 1))
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] >= 90, -100)
    weight = next(p for n, p in model.named_parameters() if "layers.0.mlp.fc1.weight" in n and "vision" in n)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        with compress(model):
            found.append(torch.autograd.grad(model(**inputs, labels=labels).loss, weight)[0])
    model.gradient_checkpointing_disable()
    model.eval()
    torch.testing.assert_close(found[0], found[1])
    step = 1e-3 * found[0] / found[0].norm()  # along the gradient the loss grows by its length
    with compress(model), torch.no_grad():
        losses = []
        for sign in (1, -2):
            weight += sign * step
            losses.append(model(**inputs, labels=labels).loss)
        weight += step
    slope = (losses[0] - losses[1]) / 2e-3
    torch.testing.assert_close(slope, found[0].norm(), atol=1e-3, rtol=0.03)


# -- calls of other kinds


def test_hidden_layers_of_a_call(llava):
    """A layer whose output has fewer tokens is refused, the last is shown in any case."""
    model, make_inputs = llava
    inputs = make_inputs((1,))
    with compress(model) as handle:
        with pytest.raises(ValueError, match="vision_feature_layer=1 is not what") as raised:
            forward(model, inputs, vision_feature_layer=1)
        assert "\n" not in str(raised.value)
        assert forward(model, inputs, vision_feature_layer=-1).logits.isfinite().all()
        assert [len(record.index) for record in handle.last] == [8]
        model.config.vision_feature_layer = 2
        with pytest.raises(ValueError, match="vision_feature_layer=2 is not what"):
            forward(model, inputs)
        with compress(model, replace=True) as handle:
            forward(model, inputs)
            assert handle._stages[0].left_blocks == "12, 8 x 3"
    model.config.vision_feature_layer = -2


def test_features_alone_are_marked(llava):
    model, make_inputs = llava
    with compress(model), torch.no_grad():
        marked = model.get_image_features(pixel_values=make_inputs((2,))["pixel_values"]).pooler_output
    assert [int((~x[:, 0].isnan()).sum()) for x in marked] == [8, 8]


def test_blocks_are_those_of_the_models_call(llava):
    """Not of what the tower saw by itself afterwards."""
    model, make_inputs = llava
    inputs = make_inputs((1,))
    with compress(model) as handle, torch.no_grad():
        model(**inputs)
        blocks = {block: [part.clone() for part in parts] for block, parts in handle.last[0].blocks.items()}
        model(**inputs)
        model.model.vision_tower(torch.randn(1, 3, 32, 32))
        for block, (index, source) in handle.last[0].blocks.items():
            assert torch.equal(index, blocks[block][0]) and torch.equal(source, blocks[block][1])


def test_rows_of_several_calls_of_the_tower_are_counted_on(llava):
    """As a family may call it once for each picture."""
    model, make_inputs = llava
    pixels = make_inputs((2, 1))["pixel_values"]
    found = []
    with compress(model, "random", keep=0.4) as handle, torch.no_grad():
        following, encoder = handle._stages[0].following, handle._stages[0].encoder
        for calls in ([pixels], [pixels[:1], pixels[1:]]):
            with encoder.collecting() as passages:
                for call in calls:
                    model.model.vision_tower(call)
            assert len(passages) == len(calls)
            following._passages.set(passages)
            found.append(following._places())
            following._passages.pop()
    assert torch.equal(found[0], found[1]) and found[0].max() > 32 and found[0].min() == -1


def test_threads_do_not_mix(one):
    _, model, make_inputs = one
    inputs = [make_inputs((1, 1), seed=seed) for seed in range(3)]
    with compress(model):
        expected, found = [forward(model, given).logits for given in inputs], {}

        def run(number):
            found[number] = [forward(model, inputs[number]).logits for _ in range(4)]

        threads = [threading.Thread(target=run, args=(number,)) for number in range(3)]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    for number, logits in enumerate(expected):
        assert all(torch.equal(again, logits) for again in found[number])


def test_a_copy_goes_on_by_itself(one):
    _, model, make_inputs = one
    inputs = make_inputs((1, 1))
    bare = forward(model, inputs).logits
    with compress(model) as handle:
        expected = forward(model, inputs).logits
        twin = copy.deepcopy(model)
        assert torch.equal(forward(twin, inputs).logits, expected)
        vtc.restore(twin)
        assert torch.equal(forward(twin, inputs).logits, bare)
        assert torch.equal(forward(model, inputs).logits, expected)
        assert handle.last


def test_an_exception_in_the_middle_leaves_nothing(one):
    _, model, make_inputs = one
    inputs = make_inputs((1,))
    bare, before = forward(model, inputs).logits, footprint(model)
    layers = model.model.vision_tower.encoder.layers
    for where in (layers[1].mlp, layers[2], model.model.multi_modal_projector, model.model.language_model):
        handle = compress(model)
        expected = forward(model, inputs).logits

        def fail(*_):
            raise KeyboardInterrupt

        trap = where.register_forward_pre_hook(fail)
        with pytest.raises(KeyboardInterrupt):
            forward(model, inputs)
        trap.remove()
        assert torch.equal(forward(model, inputs).logits, expected)
        handle.remove()
        assert footprint(model) == before and torch.equal(forward(model, inputs).logits, bare)


@pytest.mark.parametrize("kind", ["half", "eager"])
def test_half_precision_and_eager_attention(host, kind):
    _, model, make_inputs = host
    inputs = make_inputs((1, 1), pads=1)
    other = copy.deepcopy(model)
    if kind == "half":
        other = other.to(torch.bfloat16)
        cast = {n: v.to(torch.bfloat16) if v.is_floating_point() else v for n, v in inputs.items()}
    else:
        other.set_attn_implementation("eager")
        cast = inputs
    with compress(model, keep=0.4) as handle:
        logits, records = forward(model, inputs).logits, handle.last
    with compress(other, keep=0.4) as handle:
        found = forward(other, cast).logits
        assert [len(record.index) for record in handle.last] == [len(record.index) for record in records]
    assert found.isfinite().all()
    if kind == "eager":
        real = inputs["attention_mask"].bool()
        torch.testing.assert_close(found[real], logits[real], atol=2e-4, rtol=2e-4)
