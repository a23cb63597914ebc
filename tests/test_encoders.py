"""What holds for every method in the blocks of every vision encoder."""

import copy

import pytest
import torch
from encoder_oracle import RULES, Watch, bare, close, compressed, equal, run, shared, spied, tensors
from footprint import footprint
from tiny.encoders import ENCODERS, REFUSED, make, randomise, refused
from torch import Tensor

import vtc
from vtc.schedule import counts

BUDGETS = (
    {"keep": 0.5, "schedule": "constant"},
    {"keep": 0.3, "schedule": "staged"},
    {"keep": 0.3, "schedule": "decreasing"},
    {"keep": [0.7, -2, 5]},
)
FEW = ("timm-dinov2", "timm-eva02", "open_clip-pooler", "SiglipVisionModel", "DINOv3ViTModel")
METHODS = [name for name in vtc.list_methods() if "encoder" in vtc.get_method(name).stages]
TRANSFORMERS = [name for name, spec in ENCODERS.items() if spec.library == "transformers"]


def budgets(method):
    """A rule that clusters the grid does so once."""
    return [{"keep": 0.4, "schedule": "once"}] if method.needs_grid else BUDGETS


def serves(method, spec) -> bool:
    kinds = {need.kind for need in method.needs}
    return spec.cls or not kinds & {"cls_attention", "cls_values"}


def pairs(methods, hosts):
    """A name of METHODS or RULES on each host that can serve it."""
    return [(m, h) for m in methods for h in hosts if serves(made(m), ENCODERS[h])]


def made(name):
    return RULES[name]() if name in RULES else vtc.get_method(name)


ON_ALL = pairs(["test-pairs", "test-cls"], ENCODERS) + pairs(
    [name for name in RULES if name not in ("test-pairs", "test-cls")], FEW
)
ON_ALL += pairs(METHODS, ("timm-deit", "timm-siglip"))
over_all = pytest.mark.parametrize("method, host", ON_ALL)
over_hosts = pytest.mark.parametrize("host", ENCODERS)


# -- the oracle itself


@over_hosts
def test_the_oracle_without_a_method_is_the_bare_model(host):
    spec, model = ENCODERS[host], shared(host)
    _, watch = bare(spec, model, spec.images())
    with torch.no_grad():
        steps = run(spec, spec.blocks_of(model), watch.entered[0], watch.given)
    assert len(steps) == len(watch.left) >= 3
    for step, left in zip(steps, watch.left):
        assert left.shape == (2, spec.prefix + spec.n, 32)
        close(step.x, left)
        close(step.full, left)


# -- nothing to reduce


@over_all
def test_keep_one_is_identity(method, host):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    expected, blocks = bare(spec, model, pixels)
    for keep, restore in ((1.0, None), (1.0, "unmerge"), (10_000, None), ([1.0, 1.0], None)):
        found, watch, records = compressed(spec, model, pixels, made(method), keep=keep, restore=restore)
        assert type(found) is type(expected) and equal(found, expected)
        assert equal(watch.left, blocks.left)
        assert [len(record.index) for record in records] == [spec.n] * 2


# -- the oracle


@over_all
def test_equals_the_blocks_step_by_step(method, host):
    spec, model = ENCODERS[host], shared(host)
    pixels, blocks = spec.images(), spec.blocks_of(model)
    _, watch = bare(spec, model, pixels)
    for settings in budgets(made(method)):
        watched, seen = spied(made(method))
        _, found, records = compressed(spec, model, pixels, watched, **settings)
        left = counts(settings["keep"], settings.get("schedule", "once"), spec.n, len(blocks))
        assert len(seen) == sum(k < n for k, n in zip(left, (spec.n, *left)))
        with torch.no_grad():
            steps = run(spec, blocks, watch.entered[0], watch.given, made(method), left, seen[0].lot)
        assert [x.shape[1] - spec.prefix for x in found.left] == list(left)
        for step, x in zip(steps, found.left):
            close(x, step.x)
        check_tokens([step.tokens for step in steps if step.tokens], seen)
        check_records(records, steps, spec, left)


def check_tokens(expected, seen):
    for ours, theirs in zip(expected, seen, strict=True):
        close(theirs.x, ours.x)
        close(theirs.size.float(), ours.size)
        assert torch.equal(theirs.place, ours.place)
        for name in ("grid", "prefix", "layer", "depth"):
            assert getattr(theirs, name) == getattr(ours, name), name
        assert theirs.lot.shape == (len(ours.x),)
        assert theirs.extras.keys() == ours.extras.keys()
        for kind, extra in ours.extras.items():
            close(theirs.extras[kind].float(), extra)
        assert not theirs.x.requires_grad


def check_records(records, steps, spec, left):
    assert len(records) == len(steps[0].x)
    for row, record in enumerate(records):
        last = steps[-1]
        order = last.index[row].argsort()  # a record's index ascends, whatever order tokens go on in
        assert torch.equal(record.index, last.index[row][order])
        assert torch.equal(record.source, renumbered(last.source[row], order))
        assert record.grid == spec.grid
        assert record.entering["encoder"] == spec.n and record.entering["out"] == left[-1]
        reduced = [layer for layer, step in enumerate(steps) if step.tokens is not None]
        assert sorted(record.blocks) == reduced
        for layer in reduced:
            index, source = record.blocks[layer]
            order = steps[layer].index[row].argsort()
            assert torch.equal(index, steps[layer].index[row][order])
            assert torch.equal(source, renumbered(steps[layer].source[row], order))


def renumbered(source, order):
    return torch.where(source < 0, -1, order.argsort()[source.clamp_min(0)])


@over_all
def test_unmerge_shows_all_tokens_behind_every_block(method, host):
    spec, model = ENCODERS[host], shared(host)
    pixels, blocks = spec.images(), spec.blocks_of(model)
    before, watch = bare(spec, model, pixels)
    for settings in budgets(made(method))[-2:]:
        watched, seen = spied(made(method))
        output, found, records = compressed(spec, model, pixels, watched, restore="unmerge", **settings)
        left = counts(settings["keep"], settings.get("schedule", "once"), spec.n, len(blocks))
        with torch.no_grad():
            steps = run(spec, blocks, watch.entered[0], watch.given, made(method), left, seen[0].lot)
        for step, x in zip(steps, found.left):
            close(x, step.full)
        check_records(records, steps, spec, left)
        assert [t.shape for t in tensors(output)] == [t.shape for t in tensors(before)]


# -- counts


@over_hosts
def test_exact_count(host):
    """However the budget is given, on the same handle: what leaves each block is what was asked for."""
    spec, model = ENCODERS[host], shared(host)
    pixels, depth, n = spec.images(), len(spec.blocks_of(shared(host))), spec.n
    with vtc.compress(model, RULES["test-pairs"](), keep=0.5) as handle, torch.no_grad():
        for keep in (0.07, 1 / 3, 0.5, 0.9, 1, 2, n - 1, [0.5], [1.0, -1], {1: 0.5, 2: 3}, {0: -4}):
            handle.keep = keep
            with Watch(spec, model) as watch:
                spec.call(model, pixels)
            left = [x.shape[1] - spec.prefix for x in watch.left]
            assert left == list(counts(keep, "constant", n, depth))
            assert all(len(record.index) == left[-1] for record in handle.last)
            for record in handle.last:
                assert (record.index.diff() > 0).all()
                assert torch.equal(record.source[record.index], torch.arange(left[-1]))
        assert handle.keep == {0: -4}


def test_the_counts_of_schedules_in_numbers():
    spec, model = ENCODERS["timm-deit"], shared("timm-deit")  # 24 patches, 4 blocks
    for settings, expected in (
        ({"keep": 0.5, "schedule": "constant"}, [21, 18, 15, 12]),
        ({"keep": 12, "schedule": "decreasing"}, [18, 14, 12, 12]),
        ({"keep": 0.5, "schedule": "once"}, [24, 12, 12, 12]),
        ({"keep": 0.25, "schedule": (0, 2)}, [12, 12, 6, 6]),
        ({"keep": {0: 0.5, 3: 1}}, [12, 12, 12, 1]),
    ):
        _, watch, _ = compressed(spec, model, spec.images(), RULES["test-cls"](), **settings)
        assert [x.shape[1] - 1 for x in watch.left] == expected


def test_the_schedule_is_the_methods_own_where_none_is_given():
    spec, model = ENCODERS["timm-deit"], shared("timm-deit")
    for rule, schedule in (("test-pairs", "constant"), ("test-turned", "staged")):
        _, watch, _ = compressed(spec, model, spec.images(), RULES[rule](), keep=0.25)
        assert [x.shape[1] - 1 for x in watch.left] == list(counts(0.25, schedule, 24, 4))


# -- batches


@over_all
def test_batch_equals_single_runs(method, host):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images(3)
    settings = budgets(made(method))[0]
    _, both, records = compressed(spec, model, pixels, made(method), **settings)
    for row in range(3):
        _, alone, (record,) = compressed(spec, model, pixels[row : row + 1], made(method), **settings)
        for found, expected in zip(both.left, alone.left):
            close(found[row : row + 1], expected)
        assert torch.equal(record.index, records[row].index)
        assert torch.equal(record.source, records[row].source)


@pytest.mark.parametrize("host", ["timm-deit", "open_clip-tok", "Dinov2Model"])
def test_every_picture_draws_its_own_lot(host):
    spec, model = ENCODERS[host], shared(host)
    method, seen = spied(RULES["test-pairs"]())
    compressed(spec, model, spec.images(3), method, keep={0: 3, 2: 2})
    first, second = (tokens.lot for tokens in seen)
    assert torch.equal(first, second) and len(set(first.tolist())) == 3
    compressed(spec, model, spec.images(1, first=2), method, keep={0: 3, 2: 2})
    assert seen[-1].lot.tolist() == first[2:].tolist()


@torch.no_grad()
def test_pictures_of_several_sizes():
    """An encoder that takes any size is reduced by the grid of each call."""
    for host in ("timm-dynamic", "timm-dinov3", "Dinov2Model", "DINOv3ViTModel"):
        spec, model = ENCODERS[host], shared(host)
        with vtc.compress(model, RULES["test-pairs"](), keep=0.5) as handle:
            for height, width in ((32, 32), (48, 32), (16, 64)):
                spec.call(model, torch.randn(1, 3, height, width))
                (record,) = handle.last
                assert record.grid == (height // 8, width // 8)
                assert len(record.source) == height * width // 64 == 2 * len(record.index)


SHAPES = ((4, 6), (2, 4), (4, 4), (2, 4))


def padded(rows=(0, 1, 2, 3), length=24, padding=0.0):
    """SigLIP 2 inputs of pictures of several sizes, each padded to `length` patches."""
    patches, mask = torch.zeros(len(rows), length, 192), torch.zeros(len(rows), length, dtype=torch.long)
    for place, row in enumerate(rows):
        n = SHAPES[row][0] * SHAPES[row][1]
        patches[place, :n] = torch.randn(n, 192, generator=torch.Generator().manual_seed(row))
        patches[place, n:] = padding
        mask[place, :n] = 1
    shapes = torch.tensor([SHAPES[row] for row in rows])
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}


@pytest.mark.parametrize("restore", [None, "unmerge"])
@pytest.mark.parametrize("method", ["test-pairs", "test-turned", "test-behind", "random"])
@pytest.mark.parametrize("keep", [0.5, 10, {1: 0.6, 2: -2}])
@torch.no_grad()
def test_pictures_of_several_sizes_in_one_batch(method, keep, restore):
    """Each is reduced by itself, padding stays padding: the same as one by one."""
    spec, model = ENCODERS["Siglip2VisionModel"], shared("Siglip2VisionModel")
    with vtc.compress(model, made(method), keep=keep, restore=restore) as handle:
        padding = 0.0 if method == "random" else 7.0  # a picture's lot is drawn from all that it is given
        with Watch(spec, model) as both:
            pooled = model(**padded(padding=padding)).pooler_output
        records = handle.last
        for row, (rows, cols) in enumerate(SHAPES):
            with Watch(spec, model) as alone:
                close(pooled[row], model(**padded([row], rows * cols)).pooler_output[0])
            (record,) = handle.last
            assert records[row].grid == record.grid == (rows, cols)
            assert torch.equal(records[row].source, record.source)
            assert torch.equal(records[row].index, record.index)
            for found, expected in zip(both.left, alone.left, strict=True):
                close(found[row, : expected.shape[1]], expected[0])
    before = model(**padded())
    with vtc.compress(model, made(method), keep=1.0, restore=restore):
        assert equal(model(**padded()), before)
        assert not torch.equal(pooled, before.pooler_output)


# -- on and off


@over_hosts
@pytest.mark.parametrize("restore", [None, "unmerge"])
def test_remove_leaves_nothing(host, restore):
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    expected, blocks = bare(spec, model, pixels)
    before = footprint(model)
    handle = vtc.compress(model, RULES["test-pairs"](), keep=0.4, restore=restore)
    with torch.no_grad():
        assert not equal(tensors(spec.call(model, pixels))[-1], tensors(expected)[-1])
    handle.remove()
    assert footprint(model) == before
    found, after = bare(spec, model, pixels)
    assert equal(found, expected) and equal(after.left, blocks.left)
    assert vtc.api.current(model) is None


@pytest.mark.parametrize("host", FEW)
def test_compressing_twice(host):
    spec, model = ENCODERS[host], shared(host)
    before = footprint(model)
    with vtc.compress(model, RULES["test-pairs"](), keep=0.4):
        with pytest.raises(RuntimeError, match="compressed already"):
            vtc.compress(model, RULES["test-pairs"](), keep=0.5)
        vtc.compress(model, RULES["test-behind"](), keep=0.5, replace=True)
        with torch.no_grad():
            spec.call(model, spec.images())
        vtc.restore(model)
        assert footprint(model) == before
        with pytest.raises(RuntimeError, match="not compressed"):
            vtc.restore(model)


class Stop(Exception):
    pass


def called(spec, model, block, pixels):
    """The modules of a block that run in a forward."""
    found = []
    hooks = [m.register_forward_pre_hook(lambda m, args: found.append(m)) for m in block.modules()]
    bare(spec, model, pixels)
    for hook in hooks:
        hook.remove()
    return found


@over_hosts
def test_an_exception_in_the_middle_leaves_nothing(host):
    spec, model = ENCODERS[host], shared(host)
    pixels, blocks = spec.images(), spec.blocks_of(shared(host))
    expected, _ = bare(spec, model, pixels)
    before = footprint(model)
    settings = {"keep": 0.4, "schedule": "constant"}
    short = compressed(spec, model, pixels, RULES["test-pairs"](), **settings)[0]

    def fail(*_):
        raise Stop

    handle = vtc.compress(model, RULES["test-pairs"](), **settings)
    for where in (blocks[2], *called(spec, model, blocks[1], pixels)):
        trap = where.register_forward_pre_hook(fail)
        with pytest.raises(Stop), torch.no_grad():
            spec.call(model, pixels)
        trap.remove()
        with torch.no_grad():
            assert equal(spec.call(model, pixels), short)
    trap = blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(Stop), torch.no_grad():
        spec.call(model, pixels)
    trap.remove()
    handle.remove()
    assert footprint(model) == before
    with torch.no_grad():
        assert equal(spec.call(model, pixels), expected)
        q = torch.randn(1, 2, 3, 4)  # nothing watches attention any more
        torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert torch.overrides._get_current_function_mode_stack() == []


# -- precision and attention implementations


@pytest.mark.parametrize(
    "host, dtype", [(h, torch.bfloat16) for h in ENCODERS] + [(h, torch.float16) for h in FEW], ids=str
)
def test_half_precision_runs(host, dtype):
    spec, model = ENCODERS[host], copy.deepcopy(shared(host)).to(dtype)
    for restore in (None, "unmerge"):
        output, watch, records = compressed(
            spec, model, spec.images().to(dtype), RULES["test-pairs"](), keep=0.4, restore=restore
        )
        assert all(t.isfinite().all() for t in tensors(output))
        assert all(x.dtype == dtype for x in watch.left)
        k = counts(0.4, "constant", spec.n, len(watch.left))[-1]
        assert [len(record.index) for record in records] == [k, k]
        assert watch.left[-1].shape[1] == spec.prefix + (k if restore is None else spec.n)


@pytest.mark.parametrize("host", FEW)
def test_autocast(host):
    spec, model = ENCODERS[host], shared(host)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _, records = compressed(spec, model, spec.images(), RULES["test-pairs"](), keep=0.4)
    _, _, expected = compressed(spec, model, spec.images(), RULES["test-pairs"](), keep=0.4)
    assert all(t.isfinite().all() for t in tensors(output))
    assert [len(r.index) for r in records] == [len(r.index) for r in expected]


@pytest.mark.parametrize("method, host", pairs(["test-pairs", "test-turned", "test-cls"], TRANSFORMERS))
def test_sdpa_and_eager_agree(host, method):
    spec, model = ENCODERS[host], shared(host)
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    results = [
        compressed(spec, each, spec.images(), made(method), keep=0.4, schedule="constant")
        for each in (model, eager)
    ]
    for found, expected in zip(results[0][1].left, results[1][1].left):
        close(found, expected)
    for found, expected in zip(results[0][2], results[1][2]):
        assert torch.equal(found.source, expected.source)


# -- merging


@pytest.mark.parametrize("host", [host for host, spec in ENCODERS.items() if spec.prefix])
def test_prefix_tokens_are_left_alone(host):
    """CLS, distillation and register tokens come out of the first reduction as they went in, bit for bit."""
    spec, model = ENCODERS[host], shared(host)
    norm2 = next(
        module
        for name, module in spec.blocks_of(model)[0].named_children()
        if name in ("norm2", "layer_norm2", "layernorm_after", "ln_2")
    )
    inputs = []
    hook = norm2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
    bare(spec, model, spec.images())
    hook.remove()
    with vtc.compress(model, RULES["test-pairs"](), keep={0: 0.3}), torch.no_grad():
        hook = norm2.register_forward_pre_hook(lambda module, args: inputs.append(args[0].clone()))
        spec.call(model, spec.images())
        hook.remove()
    full, short = inputs
    assert short.shape[1] == spec.prefix + int(0.3 * spec.n)
    assert torch.equal(short[:, : spec.prefix], full[:, : spec.prefix])


class Twins(vtc.Merge):
    """Patches 0..5 show one thing, all others another: each kind becomes one token."""

    name = "test-twins"
    stages = ("encoder",)
    proportional = True

    def assign(self, tokens, k):
        source = (tokens.place >= 6).long()
        return vtc.Reduction(torch.tensor([0, 6]).expand(len(source), 2), source)


@pytest.mark.parametrize(
    "host",
    [
        "timm-deit",
        "timm-distilled",
        "timm-avg",
        "timm-avg-all",
        "timm-siglip",
        "timm-map-cls",
        "open_clip-tok",
        "open_clip-avg",
        "open_clip-pooler",
        "CLIPVisionModel",
        "SiglipVisionModel",
        "Siglip2VisionModel",
        "Dinov2ForImageClassification",
        "ViTForImageClassification",
        "InternVLVisionModel",
    ],
)
@torch.no_grad()
def test_a_merged_token_counts_like_its_members(host):
    """Where merged tokens are alike, attention biased by size, and heads that pool by size, change nothing:
    as if the duplicates were still there."""
    spec, model = ENCODERS[host], make(host)
    for name, parameter in model.named_parameters():
        if "pos" in name and "embed" in name:
            parameter.zero_()  # so that patches that show the same are the same
    patches = torch.randn(2, 2, 3, 8, 8)[:, (torch.arange(spec.n) >= 6).long()]  # (B, N, 3, 8, 8)
    rows, cols = spec.grid
    pixels = patches.unflatten(1, (rows, cols)).permute(0, 3, 1, 4, 2, 5).reshape(2, 3, *spec.size)
    pooled = only_pooled(spec, spec.call(model, pixels))
    found, watch, _ = compressed(spec, model, pixels, Twins(), keep=2, schedule=(1,))
    assert watch.left[-1].shape[1] == spec.prefix + 2
    for a, b in zip(only_pooled(spec, found), pooled, strict=True):
        close(a, b, atol=1e-4)
    if host not in ("timm-avg", "open_clip-avg"):
        plain = Twins()
        plain.proportional = False
        found, _, _ = compressed(spec, model, pixels, plain, keep=2, schedule=(1,))
        assert not torch.allclose(only_pooled(spec, found)[0], pooled[0], atol=1e-3)


def only_pooled(spec, output):
    if spec.pooled:
        return [output[name] for name in spec.pooled]
    return [output] if isinstance(output, Tensor) else [output.last_hidden_state[:, : spec.prefix]]


# -- averages that are carried over reductions


@pytest.mark.parametrize(
    "method, host",
    pairs(
        ["test-pairs", "test-cls", "test-turned", "test-behind"],
        ["timm-dinov2", "timm-siglip", "open_clip-tok", "CLIPVisionModel"],
    ),
)
def test_carried_averages(host, method):
    """carry="gap": behind each reducing block and the last but one, the averages of the blocks since the one
    before join the sequence; they are never reduced, and do not leave the encoder."""
    spec, model = ENCODERS[host], shared(host)
    pixels, blocks = spec.images(), spec.blocks_of(model)
    _, watch = bare(spec, model, pixels)
    for keep in ({1: 0.6}, {0: 0.7, 1: -2, 3: 5}, {2: 0.5}):
        rule, seen = spied(made(method))
        _, found, records = compressed(spec, model, pixels, rule, keep=keep, carry="gap")
        left = counts(keep, "once", spec.n, len(blocks))
        with torch.no_grad():
            given = watch.entered[0], watch.given, made(method), left, seen[0].lot
            steps = run(spec, blocks, *given, carry=True)
        for step, x in zip(steps, found.left):
            close(x, step.x)
        assert max(x.shape[1] - spec.prefix - k for x, k in zip(found.left, left)) >= 1
        assert found.left[-1].shape[1] == spec.prefix + left[-1] == spec.prefix + len(records[0].index)
        check_tokens([step.tokens for step in steps if step.tokens], seen)


@pytest.mark.parametrize("host", ["timm-dinov2", "SiglipVisionModel"])
def test_keep_one_with_carry_is_identity(host):
    spec, model = ENCODERS[host], shared(host)
    expected, watch = bare(spec, model, spec.images())
    found, blocks, _ = compressed(spec, model, spec.images(), RULES["test-pairs"](), keep=1.0, carry="gap")
    assert equal(found, expected) and equal(blocks.left, watch.left)


@pytest.mark.parametrize("host", ["timm-eva02", "DINOv3ViTModel"])
def test_carried_averages_have_no_place(host):
    """Encoders that turn keys by places have none for them."""
    with pytest.raises(ValueError, match="carry") as error:
        vtc.compress(shared(host), RULES["test-pairs"](), keep={1: 0.5}, carry="gap")
    one_sentence(error)


# -- refusals


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_compressed_is_refused(name):
    model = refused(name)
    before = footprint(model)
    with pytest.raises(ValueError) as error:
        vtc.compress(model, RULES["test-pairs"](), keep=0.5)
    one_sentence(error)
    assert footprint(model) == before


def one_sentence(error):
    message = str(error.value)
    assert 20 < len(message) < 500 and "\n" not in message and not message.endswith(".")


@pytest.mark.parametrize("host", FEW)
def test_needs_that_an_encoder_cannot_serve(host):
    spec, model = ENCODERS[host], shared(host)
    before = footprint(model)
    if not spec.cls:
        with pytest.raises(ValueError, match="CLS") as error:
            vtc.compress(model, RULES["test-cls"](), keep=0.5)
        one_sentence(error)

    class Shift(RULES["test-behind"]):
        after_block = False

    with pytest.raises(ValueError, match="shift") as error:
        vtc.compress(model, Shift(), keep=0.5)
    one_sentence(error)
    assert footprint(model) == before


@pytest.mark.parametrize(
    "settings",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"keep": -0.5},
        {"keep": float("nan")},
        {"keep": []},
        {"keep": {}},
        {"keep": [1.5]},
        {"keep": {9: 0.5}},
        {"keep": [0.5] * 5},
        {"keep": {-1: 0.5}},
        {"keep": 0.5, "schedule": "sometimes"},
        {"keep": 0.5, "schedule": (2, 1)},
        {"keep": 0.5, "schedule": (9,)},
        {"keep": 0.5, "schedule": ()},
        {"keep": 0.5, "restore": "everything"},
        {"keep": 0.5, "restore": True},
        {"keep": 0.5, "carry": "cls"},
        {"keep": 0.5, "carry": "gap", "restore": "unmerge"},
        {"keep": 0.5, "stage": "features"},
        {"keep": 0.5, "stage": "decoder"},
        {"keep": 0.5, "positions": "repack"},
        {"keep": 0.5, "allocate": "joint"},
        {"keep": 0.5, "speed": 3},
        {},
    ],
    ids=str,
)
def test_settings_that_make_no_sense_raise(settings):
    model = shared("timm-deit")
    before = footprint(model)
    method = "tome" if "speed" in settings else RULES["test-pairs"]()
    with pytest.raises(ValueError) as error:
        vtc.compress(model, method, **settings)
    one_sentence(error)
    assert footprint(model) == before


def test_types_that_make_no_sense_raise():
    model = shared("timm-deit")
    for keep in (True, "half", None):
        with pytest.raises((TypeError, ValueError)):
            vtc.compress(model, RULES["test-pairs"](), keep=keep)
    handle = vtc.compress(model, RULES["test-pairs"](), keep=0.5)
    with handle:
        for keep in (0, 1.5, {9: 0.5}, "half"):
            with pytest.raises((TypeError, ValueError)):
                handle.keep = keep
        assert handle.keep == 0.5
    with pytest.raises(RuntimeError, match="removed"):
        handle.keep = 0.3


@torch.no_grad()
def test_a_method_that_returns_the_wrong_thing():
    spec, model = ENCODERS["timm-deit"], shared("timm-deit")

    class Wrong(RULES["test-pairs"]):
        def assign(self, tokens, k):
            return super().assign(tokens, k + 1)

    with vtc.compress(model, Wrong(), keep={0: 0.5}), pytest.raises(RuntimeError, match="test-pairs"):
        spec.call(model, spec.images())


def test_describe_says_what_runs():
    spec, model = ENCODERS["timm-deit"], shared("timm-deit")
    with vtc.compress(model, RULES["test-pairs"](), keep=0.5) as handle, torch.no_grad():
        spec.call(model, spec.images())
        text = handle.describe()
    assert "encoder" in text and "Pairs" in text and "12 of 24" in text


@torch.no_grad()
def test_a_plan_survives_json(tmp_path):
    spec, model = ENCODERS["timm-deit"], shared("timm-deit")
    results = []
    settings = {"keep": {1: 0.5, 2: -3}, "restore": "unmerge", "stage": "encoder"}
    with vtc.compress(model, "random", **settings) as handle:
        results.append(spec.call(model, spec.images()))
        vtc.save(handle.plan, tmp_path / "plan.json")
    with vtc.compress(model, vtc.load(tmp_path / "plan.json")):
        results.append(spec.call(model, spec.images()))
    assert torch.equal(*results)


# -- ways of calling


@pytest.mark.parametrize("host", ["timm-deit", "ViTModel", "Dinov2Model"])
@torch.no_grad()
def test_a_mask_of_attention_is_no_silent_mistake(host):
    """A mask that a caller gives is for all patches: without a reduction it works, with one it is refused."""
    spec, model = ENCODERS[host], shared(host)
    pixels = spec.images()
    if spec.library == "timm":
        given = {"attn_mask": torch.rand(2, 1, spec.n + 1, spec.n + 1) > 0.3}
    else:
        given = {"attention_mask": (torch.rand(2, spec.n + 1) > 0.3).long()}
    expected = spec.call(model, pixels, **given)
    with vtc.compress(model, RULES["test-pairs"](), keep=1.0) as handle:
        assert equal(spec.call(model, pixels, **given), expected)
        handle.keep = 0.5
        with pytest.raises(RuntimeError, match="mask"):
            spec.call(model, pixels, **given)
        spec.call(model, pixels)  # and it still works
        assert len(handle.last[0].index) == spec.n // 2


def test_patches_that_are_dropped_before_the_blocks():
    spec = ENCODERS["timm-deit"]
    from timm.models.vision_transformer import VisionTransformer

    model = randomise(
        VisionTransformer(
            img_size=(32, 48), patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5,
            patch_drop_rate=0.5,
        )
    )  # fmt: skip
    with vtc.compress(model, RULES["test-pairs"](), keep=0.5) as handle:
        model.train()
        with pytest.raises(RuntimeError, match="dropped") as error:
            model(spec.images())
        one_sentence(error)
        model.eval()
        model(spec.images())
        assert len(handle.last[0].index) == 12


@torch.no_grad()
def test_inference_mode_and_channels_last():
    spec, model = ENCODERS["timm-deit"], make("timm-deit")
    with vtc.compress(model, RULES["test-pairs"](), keep=0.5):
        expected = spec.call(model, spec.images())
        with torch.inference_mode():
            assert equal(spec.call(model, spec.images()), expected)
        model.to(memory_format=torch.channels_last)
        close(spec.call(model, spec.images().contiguous(memory_format=torch.channels_last)), expected)
        with torch.enable_grad():
            spec.call(model, spec.images()).sum().backward()
        assert model.patch_embed.proj.weight.grad.isfinite().all()


def test_tracing_and_exporting_are_no_silent_mistake():
    """The data decide which tokens are merged: a recorded program either does the same for other pictures, or
    is refused."""
    spec, model = ENCODERS["timm-augreg"], make("timm-augreg")
    first, second = spec.images(), spec.images(first=5)
    with torch.no_grad(), vtc.compress(model, RULES["test-pairs"](), keep={1: 0.5}):
        expected = spec.call(model, second)
        for record in (
            lambda: torch.jit.trace(model, first, check_trace=False),
            lambda: torch.export.export(model, (first,)).module(),
        ):
            try:
                recorded = record()
            except RuntimeError as error:
                assert "remove()" in str(error)
            else:
                close(recorded(second), expected)
        close(spec.call(model, second), expected)


@pytest.mark.parametrize(
    "host, target", [("timm-deit", "qkv"), ("ViTModel", "k_proj"), ("Dinov2Model", "k_proj")]
)
@pytest.mark.parametrize("first", ["vtc", "peft"])
@torch.no_grad()
def test_adapters_of_peft(host, target, first):
    """Whichever comes first: methods see the keys that the adapters make."""
    from peft import LoraConfig, get_peft_model

    spec = ENCODERS[host]
    config = LoraConfig(target_modules=[target], init_lora_weights=False, r=4)

    def adapted_by_peft(model):
        torch.manual_seed(1)
        return get_peft_model(model, config)

    merged = adapted_by_peft(make(host)).merge_and_unload()
    settings = {"keep": 0.4, "schedule": "constant"}
    expected, watch, records = compressed(spec, merged, spec.images(), RULES["test-pairs"](), **settings)
    model = make(host)
    if first == "vtc":
        handle = vtc.compress(model, RULES["test-pairs"](), **settings)
        adapted = adapted_by_peft(model)
    else:
        adapted = adapted_by_peft(model)
        handle = vtc.compress(adapted, RULES["test-pairs"](), **settings)
    for found, wanted in zip(tensors(spec.call(adapted, spec.images())), tensors(expected), strict=True):
        close(found, wanted, atol=1e-4)
    for found, wanted in zip(handle.last, records, strict=True):
        assert torch.equal(found.source, wanted.source)
    assert watch.left[-1].shape[1] == spec.prefix + len(records[0].index)
    vtc.restore(adapted)


@torch.no_grad()
def test_the_encoder_inside_of_a_model_is_the_same_host():
    """A two-tower model and its encoder are compressed, asked and restored through each other."""
    for host, tower in (("open_clip-CLIP", "visual"), ("CLIPModel", "vision_model")):
        spec, model = ENCODERS[host], make(host)
        before = footprint(model)
        handle = vtc.compress(model.get_submodule(tower), RULES["test-pairs"](), keep=0.5)
        assert vtc.api.current(model) is handle
        short = spec.call(model, spec.images())
        with pytest.raises(RuntimeError, match="compressed already"):
            vtc.compress(model, RULES["test-pairs"](), keep=0.5)
        vtc.restore(model)
        assert footprint(model) == before
        with vtc.compress(model, RULES["test-pairs"](), keep=0.5):
            assert equal(spec.call(model, spec.images()), short)


@torch.no_grad()
def test_a_timm_encoder_inside_of_open_clip():
    import open_clip

    torch.manual_seed(0)
    model = open_clip.model.CustomTextCLIP(
        16,
        vision_cfg={"timm_model_name": "test_vit", "timm_pool": "", "image_size": 160},
        text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 1},
    )
    trunk, pixels = randomise(model).visual.trunk, torch.randn(2, 3, 160, 160)
    full = model.encode_image(pixels)
    with vtc.compress(trunk, RULES["test-pairs"](), keep=0.3):
        expected = model.visual.head(trunk(pixels))
    with vtc.compress(model, RULES["test-pairs"](), keep=0.3) as handle:
        found = model.encode_image(pixels)
        assert torch.equal(found, expected) and not torch.allclose(found, full, atol=1e-3)
        assert [len(record.index) for record in handle.last] == [30, 30] and handle.last[0].grid == (10, 10)
    assert torch.equal(model.encode_image(pixels), full)
