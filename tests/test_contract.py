"""What holds for every method on hosts of LLaVA. With a method of each kind on all other hosts:
tests/test_families.py; for every method on tensors alone: tests/test_every_method.py."""

import copy

import numpy as np
import pytest
import torch
from footprint import footprint
from oracle import marked_features
from served import KINDS, chooses, form
from tiny import SUPPRESS, build
from tiny.llava import LLAVA

import vtc
from vtc.tokens import count_kept

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SUPPRESS}
MODELS = {name: build(name) for name in LLAVA}
# Every method where a row is a whole picture, with CLS and without, and where it is a tile; a method of each
# kind where CLS is a token as well, and for tiles without CLS.
ALL = ("llava-clip", "llava-siglip", "llava_next-clip")
METHODS = vtc.list_methods("features")


def pairs(hosts=LLAVA, methods=METHODS):
    return [
        (method, host)
        for method in methods
        for host in hosts
        if (host in ALL or method in KINDS) and form(method, MODELS[host][0])
    ]


def on(hosts=LLAVA, methods=METHODS):
    return pytest.mark.parametrize("method, host", pairs(hosts, methods))


def compressed(model, method, keep=0.4, adaptive=False, **more):
    """In a form that this host can serve; unless adaptive with exactly as many tokens as `keep` says."""
    rule, settings = form(method, model, adaptive=adaptive)
    return vtc.compress(model, rule, keep=keep, stage="features", **settings, **more)


@on()
def test_keep_one_is_identity(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((2, 1), pads=1)
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, **GREEDY) if method in KINDS else None
        with compressed(model, method, keep=1.0, adaptive=True) as handle:
            assert torch.equal(model(**inputs).logits, logits)
            assert all(record.entering["decoder"] == record.entering["features"] for record in handle.last)
            if method in KINDS:
                assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@on()
def test_remove_leaves_nothing(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((1,))
    with torch.no_grad():
        logits = model(**inputs).logits
        before = footprint(model)
        handle = compressed(model, method)
        assert not torch.equal(model(**inputs).logits, logits)
        handle.remove()
        assert footprint(model) == before
        assert torch.equal(model(**inputs).logits, logits)


@on()
def test_exact_count(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((2, 1))
    text = inputs["attention_mask"].sum(1) - (inputs["input_ids"] == 99).sum(1)
    counts = [] if method == "downsample" and "image_sizes" in inputs else [1, 11, 10_000]
    with compressed(model, method, keep=0.5) as handle, torch.no_grad():
        for keep in (0.07, 0.9, *counts):
            handle.keep = keep
            out = model(**inputs, use_cache=True)
            for record in handle.last:
                n = sum(len(tile.slots) for tile in record.tiles)
                wanted = max(1, int(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)
                full = len(record.source) if wanted == n else wanted
                assert len(record.index) == record.entering["decoder"] == full
                assert (record.index.diff() > 0).all()
                assert torch.equal(record.source[record.index], torch.arange(full))
            kept = [sum(len(r.index) for r in handle.last[:2]), len(handle.last[2].index)]
            longest = max(int(t) + k for t, k in zip(text, kept))
            assert out.past_key_values.layers[0].keys.shape[2] == longest


@on(methods=[method for method in METHODS if chooses(vtc.get_method(method))])
def test_a_number_of_its_own_stays_below_keep(method, host):
    model, make_inputs = MODELS[host]
    inputs, found = make_inputs((2, 1)), []
    with compressed(model, method, keep=0.9, adaptive=True) as handle, torch.no_grad():
        for keep in (0.9, 5, 1):
            handle.keep = keep
            model(**inputs)
            sizes = [sum(len(tile.slots) for tile in record.tiles) for record in handle.last]
            for record, n in zip(handle.last, sizes):
                assert 1 <= len(record.index) <= count_kept(keep, n)
                assert torch.equal(record.source[record.index], torch.arange(len(record.index)))
            found.append([len(record.index) for record in handle.last])
        assert found[-1] == [1, 1, 1] and sum(found[0]) > 3


@on()
def test_batch_equals_single_runs(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((1, 1), pads=0)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with compressed(model, method, adaptive=True) as handle, torch.no_grad():
        both = model(**inputs, position_ids=positions).logits
        records = handle.last
        tiles = 0
        for row in range(2):
            stay = inputs["attention_mask"][row].bool()
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            for name in ("input_ids", "attention_mask"):
                alone[name] = alone[name][:, stay]
            single = model(**alone, position_ids=positions[row : row + 1, stay]).logits
            torch.testing.assert_close(both[row : row + 1, stay], single, atol=1e-4, rtol=1e-4)
            assert torch.equal(handle.last[0].index, records[row].index)
            assert torch.equal(handle.last[0].source, records[row].source)
            tiles += len(records[row].tiles)
        assert tiles >= 2


@on(hosts=("llava-clip", "llava-siglip"))
def test_sdpa_and_eager_agree(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((1, 2), pads=1)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.model.vision_tower.config._attn_implementation == "eager"
    results = []
    for each in (model, eager):
        with compressed(each, method) as handle, torch.no_grad():
            results.append((each(**inputs).logits, [record.index for record in handle.last]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@on()
def test_half_precision_runs(method, host, dtype):
    if dtype == torch.float16 and method not in KINDS:
        return
    model, make_inputs = MODELS[host]
    inputs = make_inputs((1, 1), pads=1)
    half = copy.deepcopy(model).to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with compressed(half, method) as handle, torch.no_grad():
        logits = half(**inputs).logits
        assert logits.dtype == dtype and logits.isfinite().all()
        assert all(len(record.index) < len(record.source) for record in handle.last)
        if method in KINDS:
            assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4


@on(hosts=("llava-clip", "llava_next-clip"))
def test_gradients_flow(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((1, 1), pads=1)
    pixels = inputs["pixel_values"].requires_grad_()
    with compressed(model, method):
        model(**inputs).logits.square().mean().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
    model.zero_grad()


@on(methods=[method for method in METHODS if method != "downsample"])
def test_the_features_are_what_the_reduction_says(method, host, monkeypatch):
    model, make_inputs = MODELS[host]
    calls, positions, kept = [], "repack" if method in KINDS else "keep", 0
    with compressed(model, method, positions=positions) as handle, torch.no_grad():
        rule = handle.plan[0][0]
        reduce = type(rule).reduce

        def spy(self, tokens, k):
            calls.append((tokens, reduce(self, tokens, k)))
            return calls[-1][1]

        monkeypatch.setattr(type(rule), "reduce", spy)
        marked = seen_features(model, make_inputs((1, 1)))
        for tokens, reduction in calls:
            for row, image in enumerate(tokens.group.tolist()):
                expected = restated(reduction, row, tokens.x[row])  # (k, D)
                if rule.before_projector:
                    expected = model.model.multi_modal_projector(expected.float()[None])[0].double()
                features, index = marked[image].double(), reduction.index[row]
                stays, tiles = ~features[:, 0].isnan(), handle.last[image].tiles
                if len(tiles) == 1:  # in their places, or in their order in these places
                    ordered, index = reduction.ordered and positions == "repack", tiles[0].slots[index]
                    index = index.sort().values if ordered else index
                    torch.testing.assert_close(features[index], expected, atol=1e-4, rtol=1e-4)
                distance = torch.cdist(expected, features[stays], compute_mode=EXACT)
                assert distance.amin(dim=1).max() < 1e-4
                kept += len(expected)
    everything = sum(int((~features[:, 0].isnan()).sum()) for features in marked)
    assert 0 < kept <= everything  # tiles that keep all of theirs are not reduced
    assert kept == everything or len(handle.last[0].tiles) > 1


EXACT = "donot_use_mm_for_euclid_dist"


def seen_features(model, inputs):
    """What the decoder is to be given in a forward, dropped tokens marked, for each image (n, D)."""
    base, found = model.model, []
    run = base.get_image_features

    def get_image_features(*args, **kwargs):
        found.append(run(*args, **kwargs))
        return found[-1]

    base.get_image_features = get_image_features
    model(**inputs)
    base.get_image_features = run  # as compress() left it
    return [features.clone() for features in found[0].pooler_output]


def restated(reduction, row, x):
    """What becomes of tokens x (N, D), slot by slot, in float64: (k, D)."""
    x = x.double()
    if reduction.mix is not None:
        return reduction.mix[row].double() @ x
    weight = torch.ones(len(x)) if reduction.weight is None else reduction.weight[row]
    slots = []
    for slot in range(reduction.k):
        members = reduction.source[row] == slot
        assert members.sum() == 1 or not reduction.pruned
        own, shares = x[members], weight[members].double()[:, None]
        if reduction.combine == "mlerp":
            mean = own.mean(dim=0)
            slots.append(mean / mean.norm() * own.norm(dim=1).max())
        else:
            total = (own * shares).sum(dim=0)
            slots.append(total if reduction.combine == "sum" else total / shares.sum())
    return torch.stack(slots)


@on(methods=["downsample"])
def test_downsample_shows_the_encoder_a_smaller_picture(method, host):
    """The kept tokens are what the bare encoder and projector make of it."""
    from torch.nn.functional import interpolate

    model, make_inputs = MODELS[host]
    inputs = make_inputs((1, 1))
    pixels = inputs["pixel_values"]
    tiles = pixels if pixels.dim() == 4 else pixels.flatten(0, 1)
    small = interpolate(tiles, (16, 16), mode="bicubic", antialias=True)  # 2 x 2 patches of 8 pixels
    config = model.config
    with torch.no_grad():
        hidden = model.model.vision_tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
        hidden = hidden.hidden_states[config.vision_feature_layer]
        hidden = hidden[:, hidden.shape[1] - 4 :]  # without CLS
        low = model.model.multi_modal_projector(hidden).flatten(0, 1)
        with vtc.compress(model, "downsample", keep=0.25):
            marked = marked_features(model, inputs)
    kept = marked[~marked[:, 0].isnan()]
    distance = torch.cdist(kept, low, compute_mode=EXACT).amin(dim=1)
    assert distance.max() < 1e-3
    first_image = kept[:4] if pixels.dim() == 4 else None
    if first_image is not None:
        torch.testing.assert_close(first_image, low[:4], atol=1e-5, rtol=1e-5)


@on(methods=["tome", "slime", "visionzip"])
def test_an_exception_in_the_middle_leaves_nothing(method, host):
    model, make_inputs = MODELS[host]
    inputs = make_inputs((1,))
    with torch.no_grad():
        logits = model(**inputs).logits
        before = footprint(model)
        for where in (model.model.language_model.layers[1], model.model.vision_tower):
            handle = compressed(model, method)

            def fail(*_):
                raise KeyboardInterrupt

            trap = where.register_forward_pre_hook(fail)
            with pytest.raises(KeyboardInterrupt):
                model.generate(**inputs, **GREEDY)
            trap.remove()
            text = model.get_input_embeddings()(torch.arange(3, 8)[None])
            decoder = model.model.get_decoder()
            assert decoder(inputs_embeds=text).last_hidden_state.shape == text.shape
            shortened = model(**inputs).logits  # and it still works
            assert shortened.shape == logits.shape and not torch.equal(shortened, logits)
            handle.remove()
            assert footprint(model) == before
            assert torch.equal(model(**inputs).logits, logits)


def test_handle_is_switch_budget_and_record():
    model, make_inputs = MODELS["llava-clip"]
    inputs = make_inputs((1, 2))
    handle = vtc.compress(model, "tome", keep=0.5)
    with torch.no_grad():
        model(**inputs)
        assert [len(record.index) for record in handle.last] == [8, 8, 8]
        assert "8 of 16" in handle.describe() and "ToMe" in handle.describe()
        assert handle.spent > 0
        handle.keep = 4
        model(**inputs)
    assert handle.keep == 4
    assert [len(record.index) for record in handle.last] == [4, 4, 4]
    assert handle.last[0].grid == (4, 4) and len(handle.last[0].tiles) == 1
    vtc.restore(model)
    handle.remove()  # a second time does no harm


def test_every_picture_draws_its_own_lot():
    for name in ("llava-clip", "llava_next-clip"):
        model, make_inputs = MODELS[name]
        with vtc.compress(model, "random", keep=0.3) as handle, torch.no_grad():
            model(**make_inputs((2, 2)))
            thumbnails = [record.source[record.tiles[0].slots] >= 0 for record in handle.last]
            assert len({tuple(kept.tolist()) for kept in thumbnails}) == 4


def test_a_plan_survives_json(tmp_path):
    model, make_inputs = MODELS["llava-clip"]
    inputs = make_inputs((1,))
    results = []
    with vtc.compress(model, "vtc-cls", keep=0.3, layers=(0, -2)) as handle, torch.no_grad():
        results.append(model(**inputs).logits)
        vtc.save(handle.plan, tmp_path / "plan.json")
    with vtc.compress(model, vtc.load(tmp_path / "plan.json")), torch.no_grad():
        results.append(model(**inputs).logits)
    assert torch.equal(*results)


def test_tiles_cover_the_picture():
    """The boxes of LLaVA-NeXT's tiles fill a rectangle without gaps: the image and, since un-padding cuts
    whole tokens only, less than a token of padding on each side. The thumbnail shows all of the image."""
    model, make_inputs = MODELS["llava_next-clip"]
    with vtc.compress(model, "uniform", keep=0.5) as handle, torch.no_grad():
        model(**make_inputs((2, 2)))
    for record in handle.last:
        thumbnail, *crops = record.tiles
        assert thumbnail.thumbnail and thumbnail.box == (0, 0, 1, 1) and thumbnail.grid == record.grid
        left, top, right, bottom = boxes = np.array([tile.box for tile in crops]).T
        rows, cols = np.array([tile.grid for tile in crops]).T
        width, height = right - left, bottom - top  # each (tiles,)
        for start, end, token in ((left, right, width / cols), (top, bottom, height / rows)):
            assert token.max() == pytest.approx(token.min())  # all tokens are of one size
            before, behind = -start.min(), end.max() - 1
            assert before == pytest.approx(behind)  # padding is the same on both sides
            assert -1e-9 < before < token[0]
        area = (boxes[2].max() - boxes[0].min()) * (boxes[3].max() - boxes[1].min())
        assert (width * height).sum() == pytest.approx(area)
        assert all(rows * cols == len(tile.slots) for tile in crops for rows, cols in [tile.grid])
