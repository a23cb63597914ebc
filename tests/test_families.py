"""What holds on every family of models: a tiny random host of each, every kind of method.

The README's table of families is made of this file's outcomes (see conftest.py): `shows` names the column.
"""

import copy
import inspect

import pytest
import torch
from decoder_oracle import Watch, shortened_rows
from footprint import footprint
from served import KINDS, forms
from support import host_of
from tiny import HOSTS, SUPPRESS, build
from transformers import DynamicCache

import vtc
from vtc.hosts import HOSTS as ENTRIES
from vtc.hosts import REFUSED, open_host

TOKENS = 4
GREEDY = {"max_new_tokens": TOKENS, "do_sample": False, "suppress_tokens": SUPPRESS}
NAMES = [name for name, host in HOSTS.items() if host.works and not host.memory]
VIDEOS = [name for name in NAMES if HOSTS[name].video]
_TILED = {entry.name for entry in ENTRIES if entry.tiled}
TILED = [name for name in NAMES if HOSTS[name].family in _TILED or HOSTS[name].films]
MIXED = {"images": (2, 1, 0), "pads": 2}


@pytest.fixture(params=NAMES, scope="module")
def host(request):
    return build(request.param)


@pytest.fixture(params=VIDEOS, scope="module")
def video_host(request):
    return build(request.param)


@pytest.fixture(params=TILED, scope="module")
def tiled_host(request):
    return build(request.param)


@pytest.fixture(scope="module")
def known(host):
    """What was generated without a cache on this host, for those that have it in common."""
    return {}


@pytest.fixture
def tiny(request):
    """The entry of the host in use: what its bare model lacks."""
    return HOSTS[host_of(request.node)]


def shows(*columns):
    return pytest.mark.shows(*columns)


def forward(model, inputs, **options):
    with torch.no_grad():
        return model(**inputs, **options)


@shows("images")
def test_keep_one_is_identity(host):
    model, make_inputs = host
    inputs = make_inputs((2, 1), pads=1)
    logits, tokens = forward(model, inputs).logits, model.generate(**inputs, **GREEDY)
    for rule, settings in forms(model):
        with vtc.compress(model, rule, keep=1.0, **settings) as handle:
            assert torch.equal(forward(model, inputs).logits, logits)
            assert len(handle.last) >= 3
            assert all(record.entering["decoder"] == record.entering["features"] for record in handle.last)
            if rule.name in ("vtc-cls", "slime"):
                assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@shows("images")
def test_remove_leaves_nothing(host):
    model, make_inputs = host
    inputs = make_inputs((1,))
    logits = forward(model, inputs).logits
    before = footprint(model)
    for rule, settings in forms(model):
        handle = vtc.compress(model, rule, keep=0.4, **settings)
        assert not torch.equal(forward(model, inputs).logits, logits)
        handle.remove()
        assert footprint(model) == before
        assert torch.equal(forward(model, inputs).logits, logits)


@shows("images")
def test_exact_count(host, tiny, record_property):
    """So many tokens stay, the cache is so much shorter, whatever the method."""
    model, make_inputs = host
    inputs = make_inputs((2, 1))
    length = inputs["input_ids"].shape[1]
    others = [m for m in vtc.list_methods("features") if m not in (*KINDS, "downsample")]
    for rule, settings in forms(model, (*KINDS, *others), adaptive=False):
        with vtc.compress(model, rule, keep=0.5, stage="features", **settings) as handle:
            keeps = (0.07, 0.9, 3) if rule.name in KINDS else (1 / 3,)
            for keep in (*keeps, 1, 10_000) if rule.name == KINDS[0] else keeps:
                handle.keep = keep
                own = DynamicCache(config=open_host(model).decoder.config) if "cache" in tiny.lacks else None
                cache = forward(model, inputs, use_cache=True, past_key_values=own).past_key_values
                for record in handle.last:
                    n = sum(len(tile.slots) for tile in record.tiles)
                    wanted = max(1, int(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)
                    full = len(record.source) if wanted == n else wanted
                    assert len(record.index) == record.entering["decoder"] == full
                    assert (record.index.diff() > 0).all()
                    assert torch.equal(record.source[record.index], torch.arange(full))
                kept = [len(record.index) for record in handle.last]
                gone = [len(record.source) - len(record.index) for record in handle.last]
                rows = len(handle.last) // 3  # entries of each picture
                first, second = sum(gone[: 2 * rows]), sum(gone[2 * rows :])
                text = inputs["attention_mask"].sum(dim=1).tolist()
                longest = max(text[0] - first, text[1] - second)
                assert longest <= length and sum(kept) > 0
                # Unlimited-OCR's layers hold the prompt apart from what is generated.
                keys = [getattr(x, "prefill_keys", getattr(x, "keys", None)) for x in cache.layers]
                held = {key.shape[2] for key in keys if key is not None}
                window = getattr(open_host(model).decoder.config, "sliding_window", None) or length
                assert max(held) in (longest, min(longest, window - 1), min(longest, window))
        record_property("served", rule.name)


class Alone(vtc.Merge):
    """Keeps every other token as a soft sum of nothing but itself."""

    name = "alone"

    def assign(self, tokens, k):
        index = torch.arange(tokens.n)[:: tokens.n // k][:k].expand(len(tokens.x), k)
        mix = torch.nn.functional.one_hot(index, tokens.n)  # (B, k, N)
        slots = torch.arange(k).expand_as(index)
        return vtc.Reduction(index, torch.full(tokens.x.shape[:2], -1).scatter(1, index, slots), mix=mix)


class AloneInFront(Alone):
    before_projector = True


@shows("images")
def test_what_a_projector_is_given_belongs_to_its_token(host):
    _check_projections(*host, {"images": (2, 1)})


@shows("video")
def test_what_a_projector_is_given_of_videos_belongs_to_its_token(video_host):
    _check_projections(*video_host, {"images": (0, 0), "videos": (2, 1)})


def _check_projections(model, make_inputs, pictures):
    """A token that alone went through the projector once more is what it was."""
    inputs, logits = make_inputs(**pictures), []
    for rule in (Alone(), AloneInFront()):
        with vtc.compress(model, rule, keep=0.4):
            logits.append(forward(model, inputs).logits)
    torch.testing.assert_close(logits[0], logits[1], atol=1e-3, rtol=1e-3)


@shows("images")
def test_patches_are_behind_their_tokens(host, tiny):
    model, make_inputs = host
    _check_patches(model, make_inputs((2,)), open_host(model).encoder, tiny)


@shows("video")
def test_patches_of_videos_are_behind_their_tokens(video_host, tiny):
    model, make_inputs = video_host
    _check_patches(model, make_inputs((0, 0), videos=(2, 1)), open_host(model).video_encoder, tiny)


def _check_patches(model, inputs, encoder, tiny):
    """A change of one patch behind the last blocks changes the token that it is said to be behind."""
    if encoder.latent or not encoder.blocks:
        return
    seen = []
    with vtc.compress(model, "divprune", keep=1.0) as handle:
        stage = handle._stages[0]
        reduce = stage._reduce

        def spy(features, layouts, *rest):
            seen.append((torch.cat(list(features)), layouts))
            return reduce(features, layouts, *rest)

        stage._reduce = spy
        forward(model, inputs)
        features, layouts = seen.pop()
        total = 1 + max(int(p.max()) for layout in layouts for p in layout.patches)
        images = [min(int(p.min()) for p in layout.patches) for layout in layouts]
        for patch in torch.linspace(0, total - 1, 7).long().tolist():
            first, expected = 0, []
            for layout in layouts:
                for tile, patches in zip(layout.tiles, layout.patches):
                    expected += (tile.slots[(patches == patch).any(dim=1)] + first).tolist()
                first += layout.length
            if not expected:  # cut off at an edge, or of a crop that overlaps another
                continue
            changed = []
            for block in reversed(encoder.blocks):  # some hosts do not read the last ones
                hook = block.register_forward_hook(_nudge(patch, encoder, images), prepend=True)
                forward(model, inputs)
                hook.remove()
                changed = (seen.pop()[0] - features).abs().amax(dim=1).nonzero()[:, 0].tolist()
                if changed:
                    break
            assert changed
            if tiny.blurred:
                assert set(expected) <= set(changed)
            else:
                assert sorted(expected) == changed


def _nudge(patch, encoder, images):
    """A forward hook that changes one patch of a block's output, over all rows of all its calls. images: the
    first patch of each image, for rows that hold several, each behind a CLS token of its own."""
    left = patch

    def hook(module, args, output):
        nonlocal left
        x = output[0] if isinstance(output, tuple) else output
        new = x.clone()
        rows = new.unflatten(0, (1, -1)) if new.dim() == 2 else new.flatten(1, -2)  # (rows, N, D)
        n = rows.shape[1] - encoder.prefix - encoder.suffix
        row, column = left // n, encoder.prefix + left % n
        if len(rows) < len(images):
            row, column = 0, left + encoder.prefix * sum(first <= left for first in images)
        if 0 <= row < len(rows) and left >= 0:
            # not the same for all channels: a norm would take that out
            rows[row, column] += torch.linspace(-1, 1, rows.shape[-1])
        left -= len(rows) * n
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("side", ["left", "right"])
@shows("batches")
def test_forward_equals_the_shortened_prompt(host, side, positions, record_property):
    """The oracle: row by row, what the bare decoder makes of a prompt that was shortened by hand."""
    model, make_inputs = host
    if positions == "repack" and open_host(model).mrope:
        with pytest.raises(ValueError, match="positions='repack' is not defined on"):
            vtc.compress(model, "divprune", keep=0.3, positions="repack")
        return
    inputs = make_inputs(**MIXED, side=side)
    for rule, settings in forms(model, KINDS if side == "left" else KINDS[:2]):
        with Watch(model) as watch, vtc.compress(model, rule, keep=0.3, positions=positions, **settings):
            watch.listen()
            logits = forward(model, inputs).logits
            given, hidden = watch.given, watch.hidden
        assert logits.shape[:2] == inputs["input_ids"].shape and not logits.isnan().any()
        for row, expected in enumerate(shortened_rows(model, inputs, given, positions == "repack")):
            torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)
    record_property("positions", positions)


@pytest.mark.parametrize("allocate", ["proportional", "whole", "joint"])
@shows("tiles")
def test_tiles_share_the_budget(tiled_host, allocate):
    model, make_inputs = tiled_host
    inputs = make_inputs((2, 1), pads=1)
    with Watch(model) as watch, vtc.compress(model, "divprune", keep=0.3, allocate=allocate) as handle:
        watch.listen()
        forward(model, inputs)
        given, hidden = watch.given, watch.hidden
    assert any(len(record.tiles) > 1 for record in handle.last)
    for record in handle.last:
        sizes = [len(tile.slots) for tile in record.tiles]
        kept = [int(torch.isin(tile.slots, record.index).sum()) for tile in record.tiles]
        assert sum(kept) == len(record.index) == max(1, int(0.3 * sum(sizes) + 0.5))
        if allocate == "proportional":
            assert all(abs(k - 0.3 * size) <= 1 for k, size in zip(kept, sizes))
        if allocate == "whole":
            assert sum(0 < k < size for k, size in zip(kept, sizes)) <= 1
    for row, expected in enumerate(shortened_rows(model, inputs, given, not open_host(model).mrope)):
        torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)


def test_every_type_of_transformers_is_served_or_refused():
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as TYPES

    served = {name for entry in ENTRIES for name in entry.model_types}
    assert not served & REFUSED.keys() and set(TYPES) <= served | REFUSED.keys()


@shows("batches")
def test_batch_equals_single_runs(host, tiny):
    model, make_inputs = host
    inputs = make_inputs((1, 1))
    if "rows" in tiny.lacks:
        bare, stay = forward(model, inputs).logits[1], inputs["attention_mask"][1].bool()
        assert not torch.allclose(bare[stay], forward(model, make_inputs((1,), first=1)).logits[0], atol=1e-3)
    for rule, settings in forms(model):
        with vtc.compress(model, rule, keep=0.4, **settings) as handle:
            both, records = forward(model, inputs).logits, handle.last
            for row in range(2):
                alone = make_inputs((1,), first=row)
                single, (record, *_) = forward(model, alone).logits, handle.last
                twin = records[row * (len(records) // 2)]
                assert torch.equal(record.index, twin.index) and torch.equal(record.source, twin.source)
                stay = inputs["attention_mask"][row].bool()
                if "rows" not in tiny.lacks or row == 0:
                    torch.testing.assert_close(both[row, stay], single[0], atol=2e-4, rtol=2e-4)


@shows("several images")
def test_prompts_of_five_images_and_of_none(host):
    model, make_inputs = host
    inputs = make_inputs((5, 0), pads=1)
    with Watch(model) as watch, vtc.compress(model, "divprune", keep=0.2) as handle:
        watch.listen()
        forward(model, inputs)
        assert len(handle.last) % 5 == 0
        given, hidden = watch.given, watch.hidden
    for row, expected in enumerate(shortened_rows(model, inputs, given, not open_host(model).mrope)):
        torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)


CACHES = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "chunked": {"prefill_chunk_size": 9},
    "beams": {"num_beams": 3},
}


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("cache", CACHES)
@shows("generate")
def test_generating_with_a_cache_equals_generating_without(host, tiny, known, cache, positions):
    """And without a cache every step is a forward, which the oracle has judged."""
    model, make_inputs = host
    if positions == "repack" and open_host(model).mrope:  # the oracle's test shows that it is refused
        return
    inputs = make_inputs((1,)) if cache == "chunked" else make_inputs(**MIXED)
    if positions == "keep" and (cache in tiny.lacks or (cache == "dynamic" and "uncached" in tiny.lacks)):
        _lacks(model, inputs, cache)  # the bare model, whose positions no option changes
    if cache in tiny.lacks:
        return
    beams = CACHES["beams"] if cache == "beams" else {}
    # Forwards in the place of generate() read what was generated as part of the question.
    reads = cache == "dynamic" and "uncached" not in tiny.lacks
    for rule, settings in forms(model, ("divprune", "slime") if reads else ("divprune",)):
        with vtc.compress(model, rule, keep=0.3, positions=positions, **settings):
            asked = (rule.name, positions, cache if cache in ("chunked", "beams") else "greedy")
            if asked not in known:
                known[asked] = _uncached(model, inputs, tiny, **beams)
            assert torch.equal(model.generate(**inputs, **GREEDY, **CACHES[cache]), known[asked])


def _uncached(model, inputs, tiny, **beams):
    """generate() without a cache; where it needs one, its greedy steps as forwards, its beams on another."""
    if "uncached" not in tiny.lacks:
        return model.generate(**inputs, **GREEDY, **beams, use_cache=False)
    if beams:
        return model.generate(**inputs, **GREEDY, **beams, cache_implementation="static")
    inputs = dict(inputs)
    for _ in range(TOKENS):
        logits = forward(model, inputs).logits[:, -1].index_fill(1, torch.tensor(SUPPRESS), -torch.inf)
        new = {"input_ids": logits.argmax(dim=1, keepdim=True), "attention_mask": 1}
        for name in [n for n in inputs if n in new or n.endswith("token_type_ids")]:
            column = torch.zeros_like(inputs[name][:, :1]) + new.get(name, 0)
            inputs[name] = torch.cat([inputs[name], column], dim=1)
    return inputs["input_ids"]


@shows("generate")
def test_a_padded_prompt_alone_with_a_static_cache(host, tiny):
    """Its padding goes with the dropped tokens, and the mask that generate() made ahead still has it."""
    model, make_inputs = host
    if "static" in tiny.lacks:
        return
    inputs = make_inputs((1,), pads=3)
    with vtc.compress(model, "divprune", keep=0.3):
        expected = _uncached(model, inputs, tiny)
        assert torch.equal(model.generate(**inputs, **GREEDY, **CACHES["static"]), expected)


def _lacks(model, inputs, cache):
    """The bare model cannot do it, or does not give the same with a cache and without."""
    logits = {"return_dict_in_generate": True, "output_logits": True}
    try:
        found = model.generate(**inputs, **GREEDY, **CACHES[cache], **logits)
        beams = CACHES["beams"] if cache == "beams" else {}
        expected = model.generate(**inputs, **GREEDY, **beams, **logits, use_cache=False)
    except Exception:
        return
    same = all(torch.allclose(a, b, atol=1e-3) for a, b in zip(found.logits, expected.logits))
    assert not same, "the bare model can do it by now: drop this from `lacks`"


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@shows("generate")
def test_a_padded_batch_in_chunks(host, tiny, known, cache):
    """Of which some rows lose more tokens than others; refused where layers would count their padding."""
    model, make_inputs = host
    inputs, chunks = make_inputs(**MIXED), {"prefill_chunk_size": 9, **CACHES[cache]}
    if {"chunked", "uncached", cache} & set(tiny.lacks) or not _bare_can(model, inputs, chunks, known):
        return
    with vtc.compress(model, "divprune", keep=0.3):
        if "compressed" not in known:
            known["compressed"] = model.generate(**inputs, **GREEDY, use_cache=False)
        try:
            assert torch.equal(model.generate(**inputs, **GREEDY, **chunks), known["compressed"])
        except ValueError as error:
            config = open_host(model).decoder.config
            assert "cannot share a batch here" in str(error)
            assert getattr(config, "sliding_window", None) or set(config.layer_types) - {"full_attention"}


def _bare_can(model, inputs, options, known):
    """Some bare models do not run these, or give other tokens than without a cache."""
    try:
        found = model.generate(**inputs, **GREEDY, **options)
    except (RuntimeError, ValueError, IndexError):
        return False
    if "bare" not in known:
        known["bare"] = model.generate(**inputs, **GREEDY, use_cache=False)
    return torch.equal(found, known["bare"])


@shows("training")
def test_losses_are_finite_and_keep_the_prompts_labels(host, tiny):
    model, make_inputs = host
    inputs = make_inputs((1, 1), pads=1)
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    bare = forward(model, inputs, labels=labels).loss
    with vtc.compress(model, "divprune", keep=0.4):
        loss = forward(model, inputs, labels=labels).loss
    assert bare.isfinite() and loss.isfinite() and loss != bare


@shows("images")
def test_the_base_model_alone_can_be_compressed(host):
    model, make_inputs = host
    if model.base_model is model:
        return
    inputs = make_inputs(**MIXED)
    with vtc.compress(model, "divprune", keep=0.4):
        expected = forward(model.base_model, inputs)[0]
    with vtc.compress(model.base_model, "divprune", keep=0.4):
        torch.testing.assert_close(forward(model.base_model, inputs)[0], expected, atol=1e-5, rtol=1e-5)


@shows("chats")
def test_chat_goes_on_from_the_cache(host, tiny):
    """A second turn over the returned cache equals a prompt that held both turns from the start."""
    model, make_inputs = host
    first = make_inputs(**MIXED)
    extra = torch.randint(3, 90, (3, 4), generator=torch.Generator().manual_seed(1))

    def turns(positions):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, extra], dim=1)
        more = ids.shape[1] - first["input_ids"].shape[1]
        kinds = {n: v for n, v in first.items() if n.endswith("token_type_ids")}
        kinds = {n: torch.cat([v, v[:, -1:].expand(-1, more)], dim=1) for n, v in kinds.items()}
        mask = torch.cat([first["attention_mask"], torch.ones(3, more, dtype=torch.long)], dim=1)
        both = {"input_ids": ids, "attention_mask": mask, **kinds}
        again = model.generate(**both, past_key_values=copy.deepcopy(turn.past_key_values), **GREEDY)
        return again, model.generate(**{**first, **both}, **GREEDY)

    if "chats" in tiny.lacks:
        try:
            again, whole = turns("keep")
        except Exception:
            return
        assert not torch.equal(again, whole), "the bare model can do it by now: drop this from `lacks`"
        return
    for positions in ("keep",) if open_host(model).mrope else ("keep", "repack"):
        with vtc.compress(model, "divprune", keep=0.3, positions=positions):
            again, whole = turns(positions)
            assert torch.equal(again, whole)


@shows("attention")
def test_sdpa_and_eager_agree(host, tiny):
    model, make_inputs = host
    inputs = make_inputs((1, 2), pads=1)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for rule, settings in forms(model, ("tome", "hiprune", "vtc-cls", "prumerge", "globalcom2")):
        found = []
        for each in (model, eager):
            with vtc.compress(each, rule, keep=0.4, **settings) as handle:
                found.append((forward(each, inputs).logits, [record.index for record in handle.last]))
        torch.testing.assert_close(found[0][0], found[1][0], atol=2e-4, rtol=2e-4)
        assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1]))


@shows("half precision")
def test_half_precision_runs(host, tiny):
    model, make_inputs = host
    half = copy.deepcopy(model).to(torch.bfloat16)
    inputs = {
        name: value.to(torch.bfloat16) if torch.is_tensor(value) and value.is_floating_point() else value
        for name, value in make_inputs((1, 1)).items()
    }
    if "half" in tiny.lacks:
        with pytest.raises(RuntimeError, match="dtype"):
            forward(half, inputs)
        return
    for rule, settings in forms(model):
        with vtc.compress(half, rule, keep=0.4, **settings) as handle:
            logits = forward(half, inputs).logits
            assert logits.dtype in (torch.bfloat16, torch.float32) and logits.isfinite().all()
            if rule.name == "divprune":
                assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + TOKENS
            assert all(len(record.index) < len(record.source) for record in handle.last)


@shows("training")
def test_gradients_flow(host, tiny):
    model, make_inputs = host
    inputs = make_inputs((1, 1), pads=1)
    tower = [p for p in open_host(model).encoder.tower.parameters() if p.ndim > 1 and p.requires_grad]
    for rule, settings in forms(model, ("divprune", "tome", "visionzip", "slime")):
        with vtc.compress(model, rule, keep=0.4, **settings):
            model(**inputs).logits.float().square().mean().backward()
        grads = [p.grad for p in tower if p.grad is not None]
        assert bool(grads) != ("gradients" in tiny.lacks)
        if grads:
            assert all(g.isfinite().all() for g in grads) and any(g.abs().sum() > 0 for g in grads)
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
        model.zero_grad()


@shows("training")
def test_losses_of_experts_run(host):
    """They mask what the routers say of each token by the mask of the whole prompt."""
    model, make_inputs = host
    if "output_router_logits" not in inspect.signature(type(model).forward).parameters:
        return
    inputs = make_inputs((2, 1), pads=1)
    with vtc.compress(model, "divprune", keep=0.4):
        out = forward(model, inputs, output_router_logits=True)
    assert out.aux_loss.isfinite() and out.router_logits
    assert all(len(logits) == inputs["input_ids"].numel() for logits in out.router_logits)


@shows("images")
def test_text_only_calls_pass_through(host, tiny):
    model, make_inputs = host
    inputs = make_inputs((0, 0), pads=1)
    expected = model.generate(**inputs, **GREEDY)
    with vtc.compress(model, "divprune", keep=0.3):
        assert torch.equal(model.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("allocate", ["proportional", "whole", "joint"])
@shows("video")
def test_video(video_host, tiny, allocate):
    model, make_inputs = video_host
    inputs = make_inputs((1, 0), videos=(0, 1), pads=1)
    if "mixed" in tiny.lacks:  # images and videos in one call
        with pytest.raises(ValueError, match="do not match"):
            forward(model, inputs)
        inputs = make_inputs((0, 0), videos=(0, 1), pads=1)
    kinds = KINDS if allocate == "proportional" else ("divprune", "tome")
    logits = forward(model, inputs).logits
    with vtc.compress(model, "divprune", keep=1.0):
        assert torch.equal(forward(model, inputs).logits, logits)
    for rule, _ in forms(model, kinds, video=True, adaptive=False):
        options = {"keep": 0.3, "allocate": allocate, "positions": "keep"}
        with Watch(model) as watch, vtc.compress(model, rule, **options) as handle:
            watch.listen()
            forward(model, inputs)
            given, hidden = watch.given, watch.hidden
            film = handle.last[-1]
            assert len(handle.last) > 1 or "mixed" in tiny.lacks  # the picture's record is there, too
            n = sum(len(tile.slots) for tile in film.tiles)
            assert len(film.index) == max(1, int(0.3 * n + 0.5))
            counts = [int((film.source[tile.slots] >= 0).sum()) for tile in film.tiles]
            kept = [int(torch.isin(tile.slots, film.index).sum()) for tile in film.tiles]
            if allocate == "whole" and len(kept) > 1:
                sizes = [len(tile.slots) for tile in film.tiles]
                assert sum(0 < k < size for k, size in zip(kept, sizes)) <= 1
            if allocate == "proportional" and len(kept) > 1:
                assert max(kept) - min(kept) <= 1 and min(counts) >= min(kept)
            if rule.name == "divprune" or (rule.name == "slime" and "uncached" not in tiny.lacks):
                tokens = model.generate(**inputs, **GREEDY)
                assert torch.equal(tokens, _uncached(model, inputs, tiny))
        for row, expected in enumerate(shortened_rows(model, inputs, given)):
            torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", [name for name, host in HOSTS.items() if not host.works])
def test_families_that_cannot_be_served_say_why(name):
    model, _ = build(name)
    before = footprint(model)
    with pytest.raises(ValueError, match="cannot be compressed: ") as raised:
        vtc.compress(model, "divprune", keep=0.5)
    assert "\n" not in str(raised.value) and model.config.model_type in REFUSED
    assert footprint(model) == before
