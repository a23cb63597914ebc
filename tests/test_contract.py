"""What holds for every method on every host."""

import copy

import numpy as np
import pytest
import torch
from footprint import footprint
from oracle import marked_features
from tiny import SUPPRESS, build
from tiny.llava import LLAVA

import vtc

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SUPPRESS}


def works(method: str, host: str) -> bool:
    return method != "vtc-cls" or "siglip" not in host


PAIRS = [(method, host) for method in vtc.list_methods("features") for host in LLAVA if works(method, host)]


@pytest.fixture(scope="module")
def hosts():
    return {name: build(name) for name in LLAVA}


@pytest.fixture
def pair(request, hosts):
    method, host = request.param
    return method, *hosts[host]


def methods_on_hosts(function):
    return pytest.mark.parametrize("pair", PAIRS, indirect=True, ids="-".join)(function)


@methods_on_hosts
def test_keep_one_is_identity(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((2, 1), pads=1)
    with torch.no_grad():
        logits, tokens = model(**inputs).logits, model.generate(**inputs, **GREEDY)
        with vtc.compress(model, method, keep=1.0, stage="features") as handle:
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)
            assert all(record.entering["decoder"] == record.entering["features"] for record in handle.last)


@methods_on_hosts
def test_remove_leaves_nothing(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((1,))
    with torch.no_grad():
        logits = model(**inputs).logits
        before = footprint(model)
        handle = vtc.compress(model, method, keep=0.4, stage="features")
        assert not torch.equal(model(**inputs).logits, logits)
        handle.remove()
        assert footprint(model) == before
        assert torch.equal(model(**inputs).logits, logits)


@methods_on_hosts
def test_exact_count(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((2, 1))
    fractions = [0.07, 1 / 3, 0.5, 0.9]
    with vtc.compress(model, method, keep=0.5, stage="features") as handle, torch.no_grad():
        tiled = "image_sizes" in inputs
        counts = [] if method == "downsample" and tiled else [1, 5, 11, 10_000]
        for keep in fractions + counts:
            handle.keep = keep
            out = model(**inputs, use_cache=True)
            features = marked_features(model, inputs)
            for record in handle.last:
                n = sum(len(tile.slots) for tile in record.tiles)
                wanted = max(1, int(keep * n + 0.5)) if isinstance(keep, float) else min(keep, n)
                full = len(record.source) if wanted == n else wanted
                assert len(record.index) == record.entering["decoder"] == full
                assert (record.index.diff() > 0).all()
                assert torch.equal(record.source[record.index], torch.arange(full))
            total = sum(len(record.index) for record in handle.last)
            assert int((~features[:, 0].isnan()).sum()) == total
            text = inputs["attention_mask"].sum(1) - (inputs["input_ids"] == 99).sum(1)
            kept = [sum(len(r.index) for r in handle.last[:2]), len(handle.last[2].index)]
            longest = max(int(t) + k for t, k in zip(text, kept))
            assert out.past_key_values.layers[0].keys.shape[2] == longest


@methods_on_hosts
def test_batch_equals_single_runs(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((1, 1), pads=0)
    positions = (inputs["attention_mask"].cumsum(1) - 1).clamp_min(0)
    with vtc.compress(model, method, keep=0.4, stage="features") as handle, torch.no_grad():
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


@methods_on_hosts
def test_sdpa_and_eager_agree(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((1, 2), pads=1)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    assert eager.model.vision_tower.config._attn_implementation == "eager"
    results = []
    for host in (model, eager):
        with vtc.compress(host, method, keep=0.4, stage="features") as handle, torch.no_grad():
            results.append((host(**inputs).logits, [record.index for record in handle.last]))
    torch.testing.assert_close(results[0][0], results[1][0], atol=1e-4, rtol=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@methods_on_hosts
def test_half_precision_runs(pair, dtype):
    method, model, make_inputs = pair
    inputs = make_inputs((1, 1), pads=1)
    half = copy.deepcopy(model).to(dtype)
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    with vtc.compress(half, method, keep=0.4, stage="features") as handle, torch.no_grad():
        logits = half(**inputs).logits
        assert logits.dtype == dtype and logits.isfinite().all()
        assert half.generate(**inputs, **GREEDY).shape[1] == inputs["input_ids"].shape[1] + 4
        assert all(len(record.index) < len(record.source) for record in handle.last)


@methods_on_hosts
def test_gradients_flow(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((1, 1), pads=1)
    pixels = inputs["pixel_values"].requires_grad_()
    with vtc.compress(model, method, keep=0.4, stage="features"):
        model(**inputs).logits.square().mean().backward()
    assert pixels.grad.isfinite().all() and pixels.grad.abs().sum() > 0
    model.zero_grad()


@pytest.mark.parametrize(
    "pair", [p for p in PAIRS if p[0] != "tofu"], indirect=True, ids="-".join
)  # whose groups are no means: tests/test_encoder_merges.py
def test_merging_keeps_the_weighted_mean_and_pruning_copies(pair):
    method, model, make_inputs = pair
    inputs = make_inputs((1, 1))
    if method == "downsample":
        return check_downsample(model, inputs)
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes") if name in inputs}
    with torch.no_grad():
        bare = model.model.get_image_features(**vision, return_dict=True).pooler_output
        with vtc.compress(model, method, keep=0.4, stage="features") as handle:
            marked = model.model.get_image_features(**vision, return_dict=True).pooler_output
    for old, new, record in zip(bare, marked, handle.last):
        for slot, position in enumerate(record.index):
            members = old[record.source == slot]
            torch.testing.assert_close(new[position], members.mean(0), atol=1e-5, rtol=1e-5)
            if len(members) == 1:
                assert torch.equal(new[position], old[position])
        if isinstance(vtc.get_method(method), vtc.Merge):
            patches = torch.cat([tile.slots for tile in record.tiles])
            counts = torch.bincount(record.source[patches], minlength=len(record.index))
            mean = (new[record.index] * counts[:, None]).sum(0) / counts.sum()
            torch.testing.assert_close(mean, old[patches].mean(0), atol=1e-4, rtol=1e-4)


def check_downsample(model, inputs):
    """The kept tokens are what the bare encoder and projector make of the smaller picture."""
    from torch.nn.functional import interpolate

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
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(kept, low, compute_mode=exact).amin(dim=1)
    assert distance.max() < 1e-3
    first_image = kept[:4] if pixels.dim() == 4 else None
    if first_image is not None:
        torch.testing.assert_close(first_image, low[:4], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", LLAVA)
def test_an_exception_in_the_middle_leaves_nothing(name, hosts):
    model, make_inputs = hosts[name]
    inputs = make_inputs((1,))
    with torch.no_grad():
        logits = model(**inputs).logits
        before = footprint(model)
        for where in (model.model.language_model.layers[1], model.model.vision_tower):
            handle = vtc.compress(model, "tome", keep=0.4)

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


def test_handle_is_switch_budget_and_record(hosts):
    model, make_inputs = hosts["llava-clip"]
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


def test_every_picture_draws_its_own_lot(hosts):
    for name in ("llava-clip", "llava_next-clip"):
        model, make_inputs = hosts[name]
        with vtc.compress(model, "random", keep=0.3) as handle, torch.no_grad():
            model(**make_inputs((2, 2)))
            thumbnails = [record.source[record.tiles[0].slots] >= 0 for record in handle.last]
            assert len({tuple(kept.tolist()) for kept in thumbnails}) == 4


def test_a_plan_survives_json(hosts, tmp_path):
    model, make_inputs = hosts["llava-clip"]
    inputs = make_inputs((1,))
    results = []
    with vtc.compress(model, "vtc-cls", keep=0.3, layers=(0, -2)) as handle, torch.no_grad():
        results.append(model(**inputs).logits)
        vtc.save(handle.plan, tmp_path / "plan.json")
    with vtc.compress(model, vtc.load(tmp_path / "plan.json")), torch.no_grad():
        results.append(model(**inputs).logits)
    assert torch.equal(*results)


def test_tiles_cover_the_picture(hosts):
    """The boxes of LLaVA-NeXT's tiles fill a rectangle without gaps: the image and, since un-padding cuts
    whole tokens only, less than a token of padding on each side. The thumbnail shows all of the image."""
    model, make_inputs = hosts["llava_next-clip"]
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
