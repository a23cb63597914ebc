"""Projectors against plain restatements, the published names and shapes, and the rules each must keep."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import LayerNorm2d
from timm.models.regnet import RegStage
from torch import nn

from vtc.learned import Resampler, build, from_pretrained, get_module, list_modules
from vtc.learned.grids import from_windows, pool, windows
from vtc.learned.projectors.mqt import sines
from vtc.learned.projectors.pixel_unshuffle import convert_linear_order, shuffle, unshuffle

WIDTHS = {"in_width": 16, "out_width": 24}
# small configurations, and a grid that each can do
SMALL = {
    "tokenpacker": (dict(**WIDTHS, width=12, heads=3, layers=(1, 4)), (4, 6)),
    "tokenflex": (dict(**WIDTHS, hidden=20), (4, 6)),
    "mqt": (dict(**WIDTHS, heads=4, queries=16), (4, 6)),
    "m3": ({"width": 16}, (4, 6)),
    "pixel-unshuffle": (dict(**WIDTHS), (4, 6)),
    "token-shuffle": (dict(**WIDTHS), (4, 6)),
    "ldpv2": (dict(**WIDTHS, shapes=((2, 3), (3, 3))), (4, 6)),
    "c-abstractor": (dict(**WIDTHS, width=20, depth=2, positions=24, prenorm=True), (4, 6)),
}
SMALL_NAMES = pytest.mark.parametrize("name", SMALL)


def make(name, **options):
    """A small module of which all weights, norms and biases too, are random."""
    module = build(name, **(SMALL[name][0] if name in SMALL else {}) | options)
    for tensor in module.state_dict().values():
        nn.init.normal_(tensor, std=0.3)
    return module


def features(grid=(4, 6), batch=3, width=16):
    return torch.randn(batch, grid[0] * grid[1], width)


def levels(module, x):
    return [torch.randn_like(x) for _ in module.layers]


def close(a, b, atol=1e-5):
    assert a.shape == b.shape
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


def shapes(name, **options):
    """Names and shapes of the parameters of a published size."""
    with torch.device("meta"):
        state = build(name, **options).state_dict()
    return {key: tuple(value.shape) for key, value in state.items()}


def attend(module, q, k, v, heads):
    """One sequence of queries, keys and values through the weights of an nn.MultiheadAttention, plainly."""
    state, d = module.state_dict(), q.shape[-1] // heads
    weight, bias = state["in_proj_weight"].chunk(3), state["in_proj_bias"].chunk(3)
    q, k, v = (x @ w.T + b for x, w, b in zip((q, k, v), weight, bias))
    out = []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        maps = (q[:, part] @ k[:, part].T / math.sqrt(d)).softmax(-1)
        out.append(maps @ v[:, part])
    return torch.cat(out, 1) @ state["out_proj.weight"].T + state["out_proj.bias"]


def norm(state, name, x, eps=1e-6):
    centred = x - x.mean(-1, keepdim=True)
    x = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return x * state[f"{name}.weight"] + state[f"{name}.bias"]


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


# -- what all keep


@SMALL_NAMES
def test_shapes_and_counts(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid)
    counts = module.counts_for(grid)
    assert list(counts) == sorted(set(counts)) and counts[-1] <= x.shape[1]
    for k in counts:
        out = module(x, grid, k, levels(module, x))
        assert out.shape == (3, k, module.out_width) and out.isfinite().all()
    for k in {0, -1, x.shape[1] + 1, *range(1, x.shape[1])} - set(counts):
        with pytest.raises(ValueError, match=f"not {k}"):
            module(x, grid, k, levels(module, x))
    with pytest.raises(ValueError, match="takes features"):
        module(x[..., 1:], grid)
    with pytest.raises(ValueError, match="are no grid"):
        module(x, (grid[0] + 1, grid[1]))


@SMALL_NAMES
def test_a_batch_is_its_images(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid)
    further = levels(module, x)
    for k in (module.counts_for(grid)[0], module.counts_for(grid)[-1]):
        apart = [module(x[i : i + 1], grid, k, [y[i : i + 1] for y in further]) for i in range(3)]
        close(module(x, grid, k, further), torch.cat(apart))


@SMALL_NAMES
def test_no_count_means_the_most(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid)
    further = levels(module, x)
    assert torch.equal(module(x, grid, levels=further), module(x, grid, module.counts_for(grid)[-1], further))


@SMALL_NAMES
def test_gradients_reach_features_and_all_weights(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid).requires_grad_()
    out = module(x, grid, module.counts_for(grid)[-1], levels(module, x))
    out.square().sum().backward()
    assert x.grad.abs().sum() > 0
    for key, weight in module.named_parameters():
        assert weight.grad is not None, key
        assert weight.grad.abs().sum() > 0, key


@SMALL_NAMES
def test_half_precision(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid)
    further, k = levels(module, x), module.counts_for(grid)[0]
    full = module(x, grid, k, further)
    half = module.to(torch.bfloat16)(x.bfloat16(), grid, k, [y.bfloat16() for y in further])
    assert half.dtype == torch.bfloat16
    assert (half.float() - full).norm() < 0.03 * full.norm()


@SMALL_NAMES
def test_mixed_precision_trains(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid)
    further, k = levels(module, x), module.counts_for(grid)[0]
    full = module(x, grid, k, further)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = module(x, grid, k, further)
    assert (mixed.float() - full).norm() < 0.03 * full.norm()
    if list(module.parameters()):
        mixed.float().square().sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in module.parameters())


@SMALL_NAMES
def test_the_input_is_left_as_it_is(name):
    module, grid = make(name), SMALL[name][1]
    x = features(grid)
    further, before = levels(module, x), x.clone()
    module(x, grid, module.counts_for(grid)[0], further)
    assert torch.equal(x, before)


@SMALL_NAMES
def test_saved_and_loaded(name, tmp_path):
    module, grid = make(name), SMALL[name][1]
    module.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    x = features(grid)
    further = levels(module, x)
    assert loaded.config == module.config
    assert torch.equal(module(x, grid, levels=further), loaded(x, grid, levels=further))


@SMALL_NAMES
def test_an_ordered_one_has_exact_prefixes(name):
    module, grid = make(name), SMALL[name][1]
    assert module.ordered == (name == "mqt")
    if module.ordered:
        x, counts = features(grid), module.counts_for(grid)
        for k in counts:
            close(module(x, grid, k), module(x, grid, counts[-1])[:, :k])


def test_all_projectors_are_tested_here():
    ours = [name for name in list_modules() if ".projectors." in get_module(name).__module__]
    assert {name for name in ours if issubclass(get_module(name), Resampler)} == set(SMALL)


@pytest.mark.parametrize(
    "name, prefix",
    [
        ("tokenpacker", "model.mm_projector."),
        ("mqt", "mm_projector."),
        ("tokenflex", "projector."),
        ("ldpv2", "model.mm_projector."),
        ("c-abstractor", "abstractor."),
    ],
)
def test_published_weights_load(name, prefix, tmp_path):
    module = make(name)
    state = {prefix + key: value for key, value in module.state_dict().items()}
    torch.save(state | {"model.embed_tokens.weight": torch.ones(2)}, tmp_path / "mm_projector.bin")
    loaded = get_module(name).from_pretrained(tmp_path, **SMALL[name][0])
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in module.state_dict().items())


# -- windows and pooling


def test_windows_and_back():
    for grid, side in (((4, 6), 2), ((6, 3), 3), ((5, 7), 2), ((1, 1), 4)):
        x = features(grid)
        cut = windows(x, grid, side)
        assert cut.shape == (3, -(-grid[0] // side) * -(-grid[1] // side), side * side, 16)
        assert torch.equal(from_windows(cut, grid, side), x)
    x = torch.arange(24.0).view(1, 24, 1)
    assert windows(x, (4, 6), 2)[0, 4, :, 0].tolist() == [14, 15, 20, 21]
    x = torch.arange(1.0, 7).view(1, 6, 1)  # 2 x 3
    assert windows(x, (2, 3), 2)[0, 1, :, 0].tolist() == [3, 3, 6, 6]
    assert windows(x, (2, 3), 2, "zeros")[0, 1, :, 0].tolist() == [3, 0, 6, 0]


def test_pool_is_adaptive_pooling_for_square_numbers():
    x = features((8, 8))
    for n in range(1, 9):
        wanted = F.adaptive_avg_pool2d(x.unflatten(1, (8, 8)).permute(0, 3, 1, 2), n)
        close(pool(x, (8, 8), n * n), wanted.flatten(2).transpose(1, 2))
    assert pool(x, (8, 8), 64) is x


@pytest.mark.parametrize("grid", [(6, 6), (3, 8), (8, 3), (1, 7), (7, 1)])
def test_pool_to_any_number(grid):
    rows, columns = grid
    x = features(grid)
    for k in range(1, rows * columns + 1):
        square = round(math.sqrt(k * rows / columns))  # bands as high as cells are wide
        bands = min(max(square, math.ceil(k / columns), 1), rows, k)
        cells, cover = [], np.zeros(grid)
        for i in range(bands):
            up, down = i * rows // bands, -(-(i + 1) * rows // bands)
            n = (i + 1) * k // bands - i * k // bands
            for j in range(n):
                left, right = j * columns // n, -(-(j + 1) * columns // n)
                cover[up:down, left:right] += 1
                cells.append(x.unflatten(1, grid)[:, up:down, left:right].mean((1, 2)))
        assert cover.min() >= 1 and len(cells) == k
        close(pool(x, grid, k), torch.stack(cells, 1))


def test_the_mean_of_equal_cells_is_the_mean_and_of_unequal_ones_is_not():
    x = features((8, 8))
    close(pool(x, (8, 8), 16).mean(1), x.mean(1))
    assert (pool(x, (8, 8), 9).mean(1) - x.mean(1)).abs().max() > 1e-3


def test_half_precision_is_summed_in_full():
    x = features((32, 32), width=4) + 8
    wanted = x.bfloat16().float().mean(1, keepdim=True).bfloat16()
    assert torch.equal(pool(x.bfloat16(), (32, 32), 1), wanted)
    wanted = pool(x.bfloat16().float(), (32, 32), 5).bfloat16()  # rows first, then columns
    assert torch.equal(pool(x.bfloat16(), (32, 32), 5), wanted)


# -- TokenPacker


def test_tokenpacker_names_and_shapes():
    wanted = {"q_proj_1.weight": (1024, 1024)}
    for side in "kv":
        wanted |= {f"{side}_proj_1.0.weight": (1024, 4096), f"{side}_proj_1.0.bias": (1024,)}
        wanted |= {f"{side}_proj_1.2.weight": (1024, 1024), f"{side}_proj_1.2.bias": (1024,)}
    for side in "qkv":
        wanted |= {f"ln_{side}_1.weight": (1024,), f"ln_{side}_1.bias": (1024,)}
    wanted |= {"clip_attn.in_proj_weight": (3072, 1024), "clip_attn.in_proj_bias": (3072,)}
    wanted |= {"clip_attn.out_proj.weight": (1024, 1024), "clip_attn.out_proj.bias": (1024,)}
    wanted |= {"mlp.0.weight": (5120, 1024), "mlp.0.bias": (5120,)}
    wanted |= {"mlp.2.weight": (5120, 5120), "mlp.2.bias": (5120,)}
    assert shapes("tokenpacker", out_width=5120) == wanted
    assert build("tokenpacker", **SMALL["tokenpacker"][0] | {"layers": (12, 16, 22, 23)}).layers == (
        12, 16, 22, 23
    )  # fmt: skip


def coarse(x, grid, s):
    """Bilinear resizing by s: the mean of 2 x 2, the centre of 3 x 3, the mean of the centre of 4 x 4."""
    inner = {2: slice(0, 2), 3: slice(1, 2), 4: slice(1, 3)}[s]
    cells = rearrange(x, "b (h i w j) c -> b (h w) i j c", h=grid[0] // s, i=s, j=s)
    return cells[:, :, inner, inner].mean((2, 3))


@pytest.mark.parametrize("s, grid", [(2, (4, 6)), (3, (6, 3)), (4, (4, 8))])
@pytest.mark.parametrize("layers", [(1, 4, 7), ()])
def test_tokenpacker_is_restated(s, grid, layers):
    module = make("tokenpacker", window=s, layers=layers)
    state, x = module.state_dict(), features(grid)
    further = levels(module, x)
    read = torch.cat(further, 2) if layers else x
    query = norm(state, "ln_q_1", linear(state, "q_proj_1", coarse(x, grid, s)))
    key, value = (
        norm(
            state,
            f"ln_{side}_1",
            linear(state, f"{side}_proj_1.2", F.gelu(linear(state, f"{side}_proj_1.0", read))),
        )
        for side in "kv"
    )
    out = torch.zeros(3, query.shape[1], 12)
    for image in range(3):
        for row in range(grid[0] // s):
            for column in range(grid[1] // s):
                own = [(row * s + i) * grid[1] + column * s + j for i in range(s) for j in range(s)]
                place = row * (grid[1] // s) + column
                out[image, place] = attend(
                    module.clip_attn, query[image, place][None], key[image, own], value[image, own], 3
                )[0]
    wanted = linear(state, "mlp.2", F.gelu(linear(state, "mlp.0", out)))
    close(module(x, grid, levels=further), wanted)


def test_tokenpacker_reads_one_window_only():
    module, x = make("tokenpacker"), features()
    further = levels(module, x)
    before = module(x, (4, 6), levels=further)
    changed = [y.clone() for y in (x, *further)]
    for y in changed:
        y[:, 2 * 6 + 4] += 1  # of the window in row 1, column 2
    after = module(changed[0], (4, 6), levels=changed[1:])
    moved = (after - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 5 + [True]


def test_tokenpacker_of_equal_keys_is_blind_to_the_query():
    module, x = make("tokenpacker"), features()
    further = [torch.randn(3, 1, 16).expand(3, 24, 16) for _ in module.layers]
    close(module(x, (4, 6), levels=further), module(torch.randn_like(x), (4, 6), levels=further))
    one = levels(module, x)
    a, b = (module(y, (4, 6), levels=one) for y in (x, torch.randn_like(x)))
    assert (a - b).abs().max() > 1e-3  # otherwise it is not


def test_tokenpacker_counts():
    for s, m in ((2, 144), (3, 64), (4, 36)):
        module = make("tokenpacker", window=s)
        assert tuple(module.counts(576)) == tuple(module.counts_for((24, 24))) == (m,)
    with pytest.raises(ValueError, match="needs a grid that windows of 2 divide, not 4 x 5"):
        make("tokenpacker")(features((4, 5)), (4, 5), levels=[features((4, 5))] * 2)
    with pytest.raises(ValueError, match="reads 2 further layers"):
        make("tokenpacker")(features(), (4, 6))
    with pytest.raises(ValueError, match="heads must divide width"):
        make("tokenpacker", heads=5)


# -- TokenFLEX


def test_tokenflex_names_and_shapes():
    wanted = {"mlp.layernorm.weight": (1152,), "mlp.layernorm.bias": (1152,)}
    for name in ("f1", "f2"):
        wanted |= {f"mlp.{name}.weight": (3456, 1152), f"mlp.{name}.bias": (3456,)}
    assert shapes("tokenflex") == wanted | {"mlp.g.weight": (2048, 3456), "mlp.g.bias": (2048,)}


def swiglu(state, x):
    x = norm(state, "mlp.layernorm", x, eps=1e-5)
    gate = linear(state, "mlp.f1", x)
    return linear(state, "mlp.g", gate * gate.sigmoid() * linear(state, "mlp.f2", x))


def test_tokenflex_is_restated():
    module, x = make("tokenflex"), features((6, 6))
    for n in range(1, 7):
        pooled = F.adaptive_avg_pool2d(x.unflatten(1, (6, 6)).permute(0, 3, 1, 2), n)
        close(module(x, (6, 6), n * n), swiglu(module.state_dict(), pooled.flatten(2).transpose(1, 2)))
    close(module(x, (6, 6), 36), swiglu(module.state_dict(), x))  # nothing is pooled
    assert list(module.counts_for((6, 6))) == list(range(1, 37))


def test_tokenflex_with_resize_is_restated():
    """Rows and columns are enlarged by hand: corners on corners, then the mean of equal windows."""
    module, x = make("tokenflex", resize=True), features((5, 5))
    assert list(module.counts_for((5, 5))) == list(module.counts(25)) == [1, 4, 9, 16, 25]
    assert list(module.counts_for((3, 5))) == [1, 4, 9]
    for n in range(1, 6):
        side = -(-5 // n) * n
        at = torch.arange(side) * 4 / (side - 1)
        low = at.floor().long().clamp(max=3)
        line = torch.zeros(side, 5)
        line[range(side), low], line[range(side), low + 1] = 1 - (at - low), at - low
        y = torch.einsum("ir,bruc,ju->bijc", line, x.unflatten(1, (5, 5)), line)
        y = rearrange(y, "b (h i) (w j) c -> b (h w) (i j) c", h=n, w=n).mean(2)
        close(module(x, (5, 5), n * n), swiglu(module.state_dict(), y))
    with pytest.raises(ValueError, match="1, 4, 9, 16 or 25 tokens, not 8"):
        module(x, (5, 5), 8)


def test_tokenflex_of_a_constant_map_is_the_same_for_every_count():
    for resize in (False, True):
        module = make("tokenflex", resize=resize)
        x = torch.randn(3, 1, 16).expand(3, 36, 16)
        one = module(x, (6, 6), 1)
        for k in (4, 9, 16, 25, 36):
            close(module(x, (6, 6), k), one.expand(3, k, 24))


def test_tokenflex_with_a_closed_gate_gives_the_bias():
    module = make("tokenflex")
    nn.init.zeros_(module.mlp.f1.weight)
    nn.init.constant_(module.mlp.f1.bias, -100)
    close(module(features(), (4, 6), 9), module.mlp.g.bias.expand(3, 9, 24))


def test_tokenflex_draws_with_the_given_probabilities():
    module = make("tokenflex", train_counts=(4, 9, 16), train_probs=(0.2, 0.3, 0.5))
    rank0, rank1 = (torch.Generator().manual_seed(7) for _ in range(2))
    drawn = [module.draw((6, 6), rank0) for _ in range(10_000)]
    assert drawn[:200] == [module.draw((6, 6), rank1) for _ in range(200)]
    expected = {4: 2000, 9: 3000, 16: 5000}
    chi = sum((drawn.count(k) - n) ** 2 / n for k, n in expected.items())
    assert set(drawn) == set(expected) and chi < 9.21  # 1 %, two degrees of freedom
    small = {module.draw((3, 3), rank0) for _ in range(50)}
    assert small == {4, 9}  # 16 do not fit
    equal = make("tokenflex", train_counts=(4, 9))
    assert 400 < [equal.draw((6, 6), rank0) for _ in range(1000)].count(4) < 600
    with pytest.raises(ValueError, match="none of train_counts"):
        module.draw((1, 2))


@pytest.mark.parametrize(
    "options", [{"train_counts": ()}, {"train_probs": (0.5, 0.5)}, {"train_probs": (-1.0, 1.0, 1.0)}]
)
def test_tokenflex_refuses_probabilities_that_are_none(options):
    with pytest.raises(ValueError, match="train_probs"):
        make("tokenflex", **options)


# -- MQT


def test_mqt_names_and_shapes():
    wanted = {"pos_embed": (256, 1024), "query": (256, 1024), "proj": (1024, 4096)}
    for side in "qkv":
        wanted |= {f"ln_{side}.weight": (1024,), f"ln_{side}.bias": (1024,)}
    wanted |= {"attn.in_proj_weight": (3072, 1024), "attn.in_proj_bias": (3072,)}
    wanted |= {"attn.out_proj.weight": (1024, 1024), "attn.out_proj.bias": (1024,)}
    assert shapes("mqt") == wanted


def test_mqt_positions():
    """Column, then row; sines, then cosines; each place told on its own."""
    side, width = 5, 16
    table = sines(side, width)
    for row in range(side):
        for column in range(side):
            wanted = []
            for at in (column, row):
                angles = [at / 10000 ** (i / (width // 4)) for i in range(width // 4)]
                wanted += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            close(table[row * side + column], torch.tensor(wanted), atol=1e-6)
    assert torch.equal(build("mqt", **SMALL["mqt"][0]).pos_embed, sines(4, 16))


@pytest.mark.parametrize("content", [False, True])
def test_mqt_is_restated(content):
    module, x = make("mqt", content_keys=content), features()
    state = module.state_dict()
    embed = state["pos_embed"]
    places = F.interpolate(embed.view(1, 4, 4, 16).permute(0, 3, 1, 2), (4, 6), mode="bicubic")
    places = places.permute(0, 2, 3, 1).reshape(24, 16)
    for k in (1, 5, 16):
        q = norm(state, "ln_q", state["query"][:k] + embed[:k])
        wanted = [
            attend(
                module.attn,
                q,
                norm(state, "ln_k", image + places if content else places),
                norm(state, "ln_v", image),
                4,
            )
            @ state["proj"]
            for image in x
        ]
        close(module(x, (4, 6), k), torch.stack(wanted))


def test_mqt_attends_alike_in_every_image_unless_keys_have_content():
    x, y = features(), features()
    plain, content = make("mqt"), make("mqt", content_keys=True)
    maps = plain.pooling((4, 6), 5)
    assert maps.shape == (1, 4, 5, 24)
    close(maps.sum(-1), torch.ones(1, 4, 5))
    assert (content.pooling((4, 6), 5, x) - content.pooling((4, 6), 5, y)).abs().max() > 1e-3


def test_mqt_is_linear_in_normalised_features():
    module, a, b = make("mqt"), features(), features()
    module.ln_v = nn.Identity()
    zero = module(torch.zeros_like(a), (4, 6), 7)
    close(module(a + b, (4, 6), 7), module(a, (4, 6), 7) + module(b, (4, 6), 7) - zero, atol=1e-4)


@pytest.mark.parametrize("content", [False, True])
def test_mqt_knows_where_a_patch_is(content):
    module, x = make("mqt", content_keys=content), features()
    assert (module(x, (4, 6), 5) - module(x[:, torch.randperm(24)], (4, 6), 5)).abs().max() > 1e-3


def test_mqt_counts_and_draws():
    module = make("mqt")
    assert list(module.counts(24)) == list(range(1, 17)) and list(module.counts(5)) == [1, 2, 3, 4, 5]
    generator = torch.Generator().manual_seed(0)
    assert {module.draw((4, 6), generator) for _ in range(300)} == set(range(2, 17, 2))
    assert {module.draw((1, 1), generator) for _ in range(9)} == {1}
    for options in ({"queries": 15}, {"heads": 3}, {"in_width": 18, "heads": 3}):
        with pytest.raises(ValueError):
            make("mqt", **options)


# -- M3


def test_m3_is_average_pooling():
    module, x = build("m3", width=16), features((24, 24))
    assert not module.state_dict()
    assert list(module.counts(576)) == [1, 4, 9, 16, 36, 64, 144, 576]
    for scale, p in ((576, 1), (144, 2), (36, 4), (9, 8), (1, 24)):
        cells = rearrange(x, "b (h i w j) c -> b (h w) (i j) c", h=24 // p, i=p, j=p)
        out = module(x, (24, 24), scale)
        close(out, cells.mean(2))
        close(out.mean(1), x.mean(1))
    assert torch.equal(module(x, (24, 24), 576), x)


def test_m3_pools_nest():
    module, x = build("m3", width=16), features((24, 24))
    step, side = x, 24
    for smaller in (12, 6, 3, 1):
        step = module(step, (side, side), smaller**2)
        side = smaller
        close(step, module(x, (24, 24), smaller**2))


def test_m3_refuses_what_it_would_have_to_round():
    module = build("m3", width=16)
    with pytest.raises(ValueError, match="not 100"):
        module(features((24, 24)), (24, 24), 100)
    five = build("m3", width=16, windows=(1, 2, 4, 8, 24))
    assert list(five.counts_for((24, 24))) == [1, 9, 36, 144, 576]
    assert list(five.counts_for((4, 6))) == [6, 24]
    with pytest.raises(ValueError, match="no window of"):
        build("m3", width=16, windows=(5,))(features(), (4, 6))
    with pytest.raises(ValueError, match="no square grid"):
        module.counts(24)


# -- pixel unshuffle


@pytest.mark.parametrize("ratio, grid", [(2, (4, 6)), (3, (6, 9)), (1, (2, 3))])
def test_unshuffle_is_its_formula_and_the_published_views(ratio, grid):
    x, (rows, columns), width = features(grid), grid, 16 * ratio
    cells = unshuffle(x, grid, ratio)
    assert torch.equal(
        cells, rearrange(x, "b (h i w j) c -> b (h w) (i j c)", h=rows // ratio, i=ratio, j=ratio)
    )
    # InternVL and Idefics3 view, swap the sides, view again; the first version of InternVL stops there
    y = x.view(3, rows, columns // ratio, width).transpose(1, 2)
    y = y.reshape(3, columns // ratio, rows // ratio, width * ratio)
    assert torch.equal(unshuffle(x, grid, ratio, transposed=True), y.flatten(1, 2))
    assert torch.equal(cells, y.transpose(1, 2).flatten(1, 2))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("grid", [(4, 6), (6, 4), (5, 7)])
@pytest.mark.parametrize("ratio", [1, 2, 3])
def test_unshuffle_loses_nothing(transposed, grid, ratio):
    x = features(grid)
    cells = unshuffle(x, grid, ratio, transposed)
    assert cells.shape == (3, math.ceil(grid[0] / ratio) * math.ceil(grid[1] / ratio), 16 * ratio**2)
    assert torch.equal(shuffle(cells, grid, ratio, transposed), x)
    if grid[0] % ratio == grid[1] % ratio == 0:
        close(cells.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


def test_transposed_cells_go_by_column():
    x = features((4, 6))
    cells = unshuffle(x, (4, 6), 2)
    assert torch.equal(
        unshuffle(x, (4, 6), 2, transposed=True), rearrange(cells, "b (h w) c -> b (w h) c", h=2)
    )


def test_converting_the_order_of_channels():
    x, weight = features((4, 6)), torch.randn(5, 64)
    theirs = F.pixel_unshuffle(x.unflatten(1, (4, 6)).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    ours = convert_linear_order(weight, 2, 16)
    close(unshuffle(x, (4, 6), 2) @ ours.T, theirs @ weight.T, atol=1e-4)
    assert torch.equal(convert_linear_order(ours, 2, 16, inverse=True), weight)


def test_pixel_unshuffle_names_and_shapes():
    wanted = {"mlp1.0.weight": (4096,), "mlp1.0.bias": (4096,)}
    wanted |= {"mlp1.1.weight": (6144, 4096), "mlp1.1.bias": (6144,)}
    wanted |= {"mlp1.3.weight": (6144, 6144), "mlp1.3.bias": (6144,)}
    assert shapes("pixel-unshuffle", out_width=6144) == wanted
    linear = shapes("pixel-unshuffle", in_width=1152, out_width=4096, head="linear")
    assert linear == {"proj.weight": (4096, 4608)}


@pytest.mark.parametrize("grid", [(4, 6), (3, 5)])
def test_pixel_unshuffle_is_restated(grid):
    x = features(grid)
    for padding, mode in (("edge", "replicate"), ("zeros", "constant")):
        y = x.unflatten(1, grid).permute(0, 3, 1, 2)
        y = F.pad(y, (0, grid[1] % 2, 0, grid[0] % 2), mode=mode)
        y = rearrange(y, "b c (h i) (w j) -> b (h w) (i j c)", i=2, j=2)
        module = make("pixel-unshuffle", padding=padding)
        state = module.state_dict()
        wanted = F.gelu(linear(state, "mlp1.1", norm(state, "mlp1.0", y, eps=1e-5)))
        close(module(x, grid), linear(state, "mlp1.3", wanted))
        module = make("pixel-unshuffle", padding=padding, head="linear")
        close(module(x, grid), y @ module.proj.weight.T)
        assert tuple(module.counts_for(grid)) == (y.shape[1],)


def test_pixel_unshuffle_reads_one_window_only():
    for name in ("pixel-unshuffle", "token-shuffle"):
        module, x = make(name), features()
        changed = x.clone()
        changed[:, 2 * 6 + 3] += 1  # row 1, column 1 of the windows
        moved = (module(changed, (4, 6)) - module(x, (4, 6))).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [False, False, False, False, True, False]


def test_pixel_unshuffle_loads_all_published_names(tmp_path):
    cls, small = get_module("pixel-unshuffle"), SMALL["pixel-unshuffle"][0]
    state = make("pixel-unshuffle").state_dict()
    theirs = {"mlp1.0": "layer_norm", "mlp1.1": "linear_1", "mlp1.3": "linear_2"}
    renamed = {f"multi_modal_projector.{theirs[k[:6]]}{k[6:]}": v for k, v in state.items()}
    rest = {"language_model.lm_head.weight": torch.ones(2)}
    for published in (state | rest, renamed | rest, {f"model.{k}": v for k, v in renamed.items()} | rest):
        torch.save(published, tmp_path / "w.bin")
        loaded = cls.from_pretrained(tmp_path / "w.bin", **small).state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in state.items())
    weight = torch.randn(24, 64)
    published = {"model.connector.modality_projection.proj.weight": weight}
    torch.save(published | rest, tmp_path / "w.bin")
    loaded = cls.from_pretrained(tmp_path / "w.bin", **small, head="linear")
    assert torch.equal(loaded.proj.weight, weight)


@pytest.mark.parametrize("options", [{"head": "mean"}, {"padding": "none"}, {"ratio": 0}])
def test_pixel_unshuffle_refuses_other_options(options):
    with pytest.raises(ValueError, match="head is one of"):
        make("pixel-unshuffle", **options)


# -- Token-Shuffle


def residual(state, name, x):
    y = F.gelu(linear(state, f"{name}.fc1", norm(state, f"{name}.norm", x, eps=1e-5)))
    return x + linear(state, f"{name}.fc2", y)


def test_token_shuffle_is_restated():
    module, x = make("token-shuffle"), features()
    state = module.state_dict()
    y = rearrange(linear(state, "down", x), "b (h i w j) c -> b (h w) (i j c)", h=2, i=2, j=2)
    y = residual(state, "fuse.1", residual(state, "fuse.0", y))
    close(module(x, (4, 6)), y)
    back = make("token-unshuffle", in_width=24, out_width=16)
    state = back.state_dict()
    z = residual(state, "split.1", residual(state, "split.0", y))
    z = rearrange(z, "b (h w) (i j c) -> b (h i w j) c", h=2, i=2, j=2)
    close(back(y, (4, 6)), linear(state, "up", z))


@pytest.mark.parametrize("grid", [(4, 6), (5, 7)])
def test_token_shuffle_is_undone_in_its_subspace(grid):
    """Fresh blocks are the identity; down and up are inverses on d / window² dimensions."""
    there = build("token-shuffle", in_width=24, out_width=24)
    back = build("token-unshuffle", in_width=24, out_width=24)
    basis = torch.linalg.qr(torch.randn(24, 6)).Q
    there.down.weight.data.copy_(basis.T)
    back.up.weight.data.copy_(basis)
    x = torch.randn(2, grid[0] * grid[1], 6) @ basis.T
    close(back(there(x, grid), grid), x)


def test_token_shuffle_keeps_the_order_of_windows():
    """A causal model over windows: a later window changes no earlier token."""
    module, x = make("token-shuffle"), features()
    before = module(x, (4, 6))
    changed = x.clone()
    changed[:, 12:] += 1  # the second row of windows
    assert torch.equal(module(changed, (4, 6))[:, :3], before[:, :3])


def test_token_shuffle_with_a_window_of_one_keeps_the_count():
    module, x = make("token-shuffle", window=1), features()
    assert tuple(module.counts_for((4, 6))) == tuple(module.counts(24)) == (24,)
    state = module.state_dict()
    close(module(x, (4, 6)), residual(state, "fuse.1", residual(state, "fuse.0", linear(state, "down", x))))


def test_token_unshuffle_trains_and_is_saved(tmp_path):
    module = make("token-unshuffle", in_width=16, out_width=8)
    module(torch.randn(2, 6, 16), (4, 6)).square().sum().backward()
    assert all(weight.grad.abs().sum() > 0 for weight in module.parameters())
    module.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(tmp_path).up.weight, module.up.weight)
    with pytest.raises(ValueError, match="takes tokens"):
        module(torch.randn(2, 5, 16), (4, 6))


def test_token_shuffle_refuses_widths_it_cannot_cut():
    for name, options in (("token-shuffle", {"out_width": 26}), ("token-unshuffle", {"in_width": 26})):
        with pytest.raises(ValueError, match="its square divides"):
            make(name, **options)
    with pytest.raises(ValueError, match="padding is one of"):
        make("token-shuffle", padding="none")


# -- LDPv2


def test_ldpv2_names_and_shapes():
    wanted = {"mlp.mlp.0.weight": (2560, 1024), "mlp.mlp.0.bias": (2560,)}
    wanted |= {"mlp.mlp.2.weight": (2560, 2560), "mlp.mlp.2.bias": (2560,)}
    wanted |= {"peg.peg.0.weight": (2560, 1, 3, 3), "peg.peg.0.bias": (2560,)}
    assert shapes("ldpv2") == wanted


def ldp_mlp(state, x):
    return linear(state, "mlp.mlp.2", F.gelu(linear(state, "mlp.mlp.0", x)))


def test_ldpv2_is_restated():
    module, x = make("ldpv2"), features()
    state = module.state_dict()
    y = rearrange(ldp_mlp(state, x), "b (h i w j) c -> b h w (i j) c", h=2, i=2, j=2).mean(3)
    out = y + state["peg.peg.0.bias"]
    around = F.pad(y, (0, 0, 1, 1, 1, 1))
    for i in range(3):
        for j in range(3):
            out = out + around[:, i : i + 2, j : j + 3] * state["peg.peg.0.weight"][:, 0, i, j]
    close(module(x, (4, 6), 6), out.flatten(1, 2))


def test_ldpv2_without_its_convolution_is_a_pooled_mlp():
    module, x = make("ldpv2", shapes=((12, 12), (24, 24))), features((24, 24))
    for weight in module.peg.parameters():
        nn.init.zeros_(weight)
    y = ldp_mlp(module.state_dict(), x)
    pooled = F.avg_pool2d(y.unflatten(1, (24, 24)).permute(0, 3, 1, 2), 2).flatten(2).transpose(1, 2)
    close(module(x, (24, 24), 144), pooled)
    close(module(x, (24, 24), 576), y)


def test_ldpv2_reads_its_block_and_the_eight_around():
    module, x = make("ldpv2", shapes=((5, 5),)), features((10, 10))
    changed = x.clone()
    changed[:, 2 * 10 + 2] += 1  # block 1, 1
    moved = ((module(changed, (10, 10)) - module(x, (10, 10))).abs().amax((0, 2)) > 1e-6).view(5, 5)
    wanted = torch.zeros(5, 5, dtype=torch.bool)
    wanted[:3, :3] = True
    assert torch.equal(moved, wanted)


def test_ldpv2_sees_the_border():
    out = make("ldpv2", shapes=((4, 4),))(torch.randn(1, 1, 16).expand(1, 64, 16), (8, 8)).view(4, 4, 24)
    close(out[1, 1], out[2, 2])
    assert (out[0, 0] - out[1, 1]).abs().max() > 1e-3


def test_ldpv2_counts():
    module = make("ldpv2")
    assert tuple(module.counts_for((4, 6))) == (6, 9) and tuple(module.counts_for((2, 6))) == (6,)
    assert tuple(module.counts(8)) == (6,)
    with pytest.raises(ValueError, match="no shape of"):
        module(features((1, 6)), (1, 6))
    for wrong in ((), ((2, 3), (3, 2)), ((0, 3),)):
        with pytest.raises(ValueError, match="shapes are grids"):
            make("ldpv2", shapes=wrong)


# -- C-Abstractor


def test_c_abstractor_names_and_shapes():
    """Shapes of a block: 1 x 1, depthwise 3 x 3, channels weighed through a quarter of the block's input."""
    wanted = {"pos_emb": (1, 576, 1152), "prenorm.weight": (1152,), "prenorm.bias": (1152,)}
    wanted |= {"eos_tokens": (1, 2, 4096)}
    wanted |= {"readout.0.weight": (4096, 1024), "readout.0.bias": (4096,)}
    wanted |= {"readout.2.weight": (4096, 4096), "readout.2.bias": (4096,)}
    for part in (0, 2):
        for i in (1, 2, 3):
            block, width = f"net.{part}.b{i}", 1152 if (part, i) == (0, 1) else 1024
            convs = {"conv1": (width, 1), "conv2": (1, 3), "conv3": (1024, 1)}
            if width == 1152:
                convs["downsample"] = (1152, 1)
            for conv, (inner, size) in convs.items():
                wanted |= {f"{block}.{conv}.conv.weight": (1024, inner, size, size)}
                wanted |= {f"{block}.{conv}.bn.weight": (1024,), f"{block}.{conv}.bn.bias": (1024,)}
            fewer, gate = width // 4, f"{block}.se"
            wanted |= {f"{gate}.fc1.weight": (fewer, 1024, 1, 1), f"{gate}.fc1.bias": (fewer,)}
            wanted |= {f"{gate}.fc2.weight": (1024, fewer, 1, 1), f"{gate}.fc2.bias": (1024,)}
    assert shapes("c-abstractor", in_width=1152, prenorm=True, eos_tokens=2) == wanted


@pytest.mark.parametrize("width", [16, 20])
def test_c_abstractor_is_restated_with_timm(width):
    module, x = make("c-abstractor", width=width, eos_tokens=2), features((4, 6))
    state, kinds = module.state_dict(), {"act_layer": nn.SiLU, "norm_layer": LayerNorm2d}
    stages = {}
    for part, inner in ((0, 16), (2, width)):
        stages[part] = RegStage(2, inner, width, stride=1, dilation=1, **kinds)
        own = f"net.{part}."
        stages[part].load_state_dict({k.removeprefix(own): v for k, v in state.items() if k.startswith(own)})
    y = norm(state, "prenorm", x) + state["pos_emb"]
    y = stages[0](y.unflatten(1, (4, 6)).permute(0, 3, 1, 2))
    for n in (1, 2, 3, 4):
        z = stages[2](F.adaptive_avg_pool2d(y, n)).flatten(2).transpose(1, 2)
        z = linear(state, "readout.2", F.silu(linear(state, "readout.0", z)))
        out = module(x, (4, 6), n * n + 2)
        close(out, torch.cat([z, state["eos_tokens"].expand(3, 2, 24)], 1))
    assert list(module.counts_for((4, 6))) == [3, 6, 11, 18]


def test_c_abstractor_without_blocks_pools_and_projects():
    module, x = make("c-abstractor", depth=0, mlp_depth=1, positions=0, prenorm=False), features((6, 6))
    assert set(module.state_dict()) == {"readout.0.weight", "readout.0.bias"}
    close(module(x, (6, 6), 9), linear(module.state_dict(), "readout.0", pool(x, (6, 6), 9)))
    close(module(x, (6, 6), 36), linear(module.state_dict(), "readout.0", x))


def test_c_abstractor_drops_the_position_of_cls(tmp_path):
    small = SMALL["c-abstractor"][0] | {"positions": 25}
    state = make("c-abstractor", positions=25).state_dict()
    old = state | {"pos_emb": torch.cat([torch.ones(1, 1, 16), state["pos_emb"]], 1)}
    torch.save({f"abstractor.{key}": value for key, value in old.items()}, tmp_path / "w.bin")
    loaded = get_module("c-abstractor").from_pretrained(tmp_path / "w.bin", **small)
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in state.items())
    with pytest.raises(ValueError, match="positions of 25 tokens, not of 24"):
        loaded(features(), (4, 6))
    with pytest.raises(ValueError, match="mlp_depth is at least 1"):
        make("c-abstractor", mlp_depth=0)
