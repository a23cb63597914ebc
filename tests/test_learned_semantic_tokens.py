import pytest
import torch
import torch.nn.functional as F
from learned_host import all_have_gradients, apart, distances, random_block, randomise, smooth

from vtc.learned.semantic_blocks import areas
from vtc.learned.semantic_tokens import Dumbbell, SemanticTokens


def tokens(random=True, **options):
    options = {"in_width": 16, "heads": 2, "window": 4, "sample": 2, "area": 4, "ratio": 2.0} | options
    m = SemanticTokens(SemanticTokens.Config(**options))
    return randomise(m) if random else m


def dumbbell(random=True, **options):
    options = {"width": 16, "heads": 2, "ratio": 2.0} | options
    m = Dumbbell(Dumbbell.Config(**options))
    return randomise(m) if random else m


# -- a plain restatement, one picture and one window after the other


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def attend(state, block, heads, x, y):
    """x and y are normalised already."""
    q, (k, v) = linear(state, f"{block}.attn.q", x), linear(state, f"{block}.attn.kv", y).chunk(2, -1)
    d, outs = q.shape[-1] // heads, []
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        outs.append((q[:, own] @ k[:, own].T * d**-0.5).softmax(-1) @ v[:, own])
    return state[f"{block}.layer_scale_1"] * linear(state, f"{block}.attn.proj", torch.cat(outs, 1))


def network(state, block, x):
    y = F.gelu(linear(state, f"{block}.mlp.fc1", norm(state, f"{block}.norm2", x)))
    return x + state[f"{block}.layer_scale_2"] * linear(state, f"{block}.mlp.fc2", y)


def plain(state, block, heads, x, y):
    n = f"{block}.norm1"
    return network(state, block, x + attend(state, block, heads, norm(state, n, x), norm(state, n, y)))


def raster(windows, rows, columns, sample):
    """Tokens of windows (lists of sample^2), ordered by window row, row, window column, column."""
    return torch.stack(
        [
            windows[r * columns + c][i * sample + j]
            for r in range(rows)
            for i in range(sample)
            for c in range(columns)
            for j in range(sample)
        ]
    )


def semantic(m, x, grid, starts):
    """starts: where the areas of windows start, for rows and for columns."""
    state, c = m.state_dict(), m.config
    maps = x.T.reshape(-1, *grid)
    pool = {"max": F.adaptive_max_pool2d, "mean": F.adaptive_avg_pool2d}[c.pool]
    made, block = [], "blocks.1"
    for r, top in enumerate(starts[0]):
        for col, left in enumerate(starts[1]):
            own = maps[:, r * c.window : (r + 1) * c.window, col * c.window : (col + 1) * c.window]
            own = pool(own, c.sample).flatten(1).T
            around = maps[:, top : top + c.area, left : left + c.area].flatten(1).T
            read = norm(state, f"{block}.norm1", torch.cat([own, around]))
            told = attend(state, block, c.heads, norm(state, f"{block}.norm1", own), read)
            made.append(own + told if c.shortcut else told)
    made = network(state, block, raster(made, len(starts[0]), len(starts[1]), c.sample))
    queries = made + state["semantic_token2"][0] if c.centres else made
    return plain(state, "blocks.2", c.heads, queries, torch.cat([made, x]))


def recovered(m, x, grid, starts):
    state, c, s = m.state_dict(), m.config, semantic(m, x, grid, starts)
    rows, columns, n = len(starts[0]), len(starts[1]), c.sample
    width = columns * n
    windows = [
        [(r * n + i) * width + col * n + j for i in range(n) for j in range(n)]
        for r in range(rows)
        for col in range(columns)
    ]
    local = [plain_attention(state, "blocks.3", c.heads, s[places]) for places in windows]
    s = network(state, "blocks.3", s + raster(local, rows, columns, n))
    s = plain(state, "blocks.4", c.heads, s, s)
    return plain(state, "blocks.5", c.heads, x, s)


def plain_attention(state, block, heads, x):
    x = norm(state, f"{block}.norm1", x)
    return attend(state, block, heads, x, x)


OFFICIAL = ([0, 4], [0, 4])  # areas of 10 x 10 with a step of 4


@pytest.mark.parametrize("shortcut, centres, pool", [(False, 0, "max"), (True, 36, "mean")])
@torch.no_grad()
def test_the_dumbbell_equals_a_restatement_at_the_papers_size(shortcut, centres, pool):
    m = dumbbell(shortcut=shortcut, centres=centres, pool=pool)
    x = torch.randn(2, 196, 16)
    out = m(x, (14, 14))
    for image, result in zip(x, out, strict=True):
        expected = recovered(m, image, (14, 14), OFFICIAL)
        assert torch.allclose(result, expected, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("pool", ["max", "mean"])
@torch.no_grad()
def test_semantic_tokens_equal_a_restatement_on_a_grid_that_is_not_square(pool):
    m, grid, x = tokens(area=6, pool=pool, qkv_bias=False), (8, 12), torch.randn(2, 96, 16)
    out = m(x, grid)
    for image, result in zip(x, out, strict=True):
        expected = semantic(m, image, grid, ([0, 2], [0, 3, 6]))
        assert torch.allclose(result, expected, atol=1e-5 * float(expected.abs().max()))


def test_areas_are_those_of_the_published_code():
    x = torch.randn(2, 196, 3)
    cut = F.unfold(x.transpose(1, 2).unflatten(2, (14, 14)), 10, stride=4)  # (2, 3 * 100, 4)
    assert torch.equal(areas(x, (14, 14), 7, 10), cut.unflatten(1, (3, 100)).permute(0, 3, 2, 1))


def published_names(block, c):
    names = {f"{block}.norm{i}.{part}": (c,) for i in (1, 2) for part in ("weight", "bias")}
    names |= {f"{block}.attn.q.weight": (c, c), f"{block}.attn.q.bias": (c,)}
    names |= {f"{block}.attn.kv.weight": (2 * c, c), f"{block}.attn.kv.bias": (2 * c,)}
    names |= {f"{block}.attn.proj.weight": (c, c), f"{block}.attn.proj.bias": (c,)}
    names |= {f"{block}.mlp.fc1.weight": (4 * c, c), f"{block}.mlp.fc1.bias": (4 * c,)}
    names |= {f"{block}.mlp.fc2.weight": (c, 4 * c), f"{block}.mlp.fc2.bias": (c,)}
    return names | {f"{block}.layer_scale_{i}": (c,) for i in (1, 2)}


def test_parameters_are_those_of_the_published_code():
    expected = {"semantic_token2": (1, 36, 384)}
    for i in range(1, 6):
        expected |= published_names(f"blocks.{i}", 384)
    with torch.device("meta"):
        m = Dumbbell(Dumbbell.Config(centres=36))
    assert {name: tuple(p.shape) for name, p in m.named_parameters()} == expected


def test_loads_the_units_of_a_published_model(tmp_path):
    first, third = dumbbell(centres=36), randomise(dumbbell(), seed=5)
    state = {"patch_embed.proj.weight": torch.ones(2), "layers.2.blocks.0.norm1.weight": torch.ones(16)}
    state["layers.1.blocks.1.norm1.weight"] = torch.ones(8)
    for offset, unit in ((0, first), (12, third)):
        for name, value in unit.state_dict().items():
            if name.startswith("blocks."):
                _, i, rest = name.split(".", 2)
                state[f"layers.2.blocks.{offset + int(i)}.{rest}"] = value
    state["layers.2.semantic_token2"] = first.state_dict()["semantic_token2"]
    torch.save(state, tmp_path / "published.pth")
    x = torch.randn(1, 196, 16)
    loaded = Dumbbell.from_pretrained(tmp_path / "published.pth", width=16, heads=2, ratio=2.0, centres=36)
    assert torch.equal(loaded(x, (14, 14)), first(x, (14, 14)))
    other = dumbbell(random=False)
    other.load_state_dict(Dumbbell.rename(state, unit=2))
    assert torch.equal(other.eval()(x, (14, 14)), third(x, (14, 14)))


def without_scales(m):
    with torch.no_grad():
        for name, p in m.named_parameters():
            if "layer_scale" in name:
                p.zero_()
    return m


@torch.no_grad()
def test_without_their_branches_semantic_tokens_are_pooled_tokens_in_order():
    grid, x = (8, 12), torch.arange(96.0)[None, :, None].repeat(1, 1, 16)
    assert tokens().counts_for(grid) == [24]  # windows * sample^2
    for pool, ((top, down), (left, right)) in {
        "max": ((1, 3), (1, 3)),
        "mean": ((0.5, 2.5), (0.5, 2.5)),
    }.items():
        s = without_scales(tokens(pool=pool))(x, grid)[0, :, 0]
        columns = [4 * c + j for c in range(3) for j in (left, right)]
        expected = [(4 * r + i) * 12 + c for r in range(2) for i in (top, down) for c in columns]
        assert s.tolist() == expected
    # without the shortcut nothing is left
    assert not without_scales(tokens(shortcut=False))(x, grid).any()


@torch.no_grad()
def test_recovery_keeps_tokens_and_their_order():
    m, x = dumbbell(), torch.randn(2, 196, 16)
    state, s = m.state_dict(), torch.randn(36, 16)
    out = m.blocks["5"](x[:1], s[None])[0]
    assert torch.allclose(out, plain(state, "blocks.5", 2, x[0], s), atol=1e-4)
    order = torch.randperm(196)
    assert torch.allclose(m.blocks["5"](x[:1, order], s[None])[0], out[order], atol=1e-4)
    assert m(x, (14, 14)).shape == x.shape
    assert torch.equal(without_scales(m)(x, (14, 14)), x)


@torch.no_grad()
def test_windows_do_not_know_of_each_other_where_areas_are_windows():
    x, grid = torch.randn(1, 64, 16), (8, 8)
    other = x.clone()
    other[:, 63] = torch.randn(16)  # in the last window
    for area, same in ((4, True), (6, True), (8, False)):
        first = tokens(area=area).blocks["1"]
        changed = (first(x, grid) - first(other, grid))[0].abs().amax(-1).unflatten(0, (4, 4)) > 1e-6
        assert bool(changed[2:, 2:].all())
        assert bool(changed[:2, :2].any()) is not same
        if area == 4:
            assert int(changed.sum()) == 4


@torch.no_grad()
def test_starts_as_pooled_tokens_and_as_nothing_behind_a_host():
    torch.manual_seed(0)
    x, grid = smooth(grid=(12, 12)), (12, 12)
    m = tokens(random=False, in_width=64, heads=4, window=6, area=6)
    pooled = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), 3).flatten(2).transpose(1, 2)
    assert apart(m(x, grid), pooled) < 1e-4
    unit = dumbbell(random=False, width=64, heads=4, window=6, sample=2, area=6)
    host = random_block()(x)
    assert apart(unit(host, grid), host) < 1e-4


def test_in_the_place_of_attention_it_gives_its_input():
    """Which is why it takes the place of whole layers, or comes behind one."""
    unit = dumbbell(random=False, width=64, heads=4, window=6, sample=2, area=6)
    attention, _, _ = distances(unit, random_block(), smooth(grid=(12, 12)), (12, 12))
    assert attention > 0.5


@pytest.mark.parametrize(
    "make", [tokens, lambda: tokens(centres=16), lambda: dumbbell(window=4, sample=2, area=5)]
)
def test_batches_are_singles_in_float32_and_bfloat16_and_all_parameters_learn(make, tmp_path):
    m, x, grid = make(), torch.randn(3, 64, 16), (8, 8)
    out = m(x, grid)
    assert torch.allclose(out[1:2], m(x[1:2], grid), atol=1e-5 * float(out.detach().abs().max()))
    assert all_have_gradients(m, out.square().mean())
    m.save_pretrained(tmp_path)
    assert torch.equal(type(m).from_pretrained(tmp_path)(x, grid), out)
    assert apart(m.bfloat16()(x.bfloat16(), grid).float(), out) < 0.05


def test_what_cannot_be_done_is_said():
    assert tokens().counts(64) == [16]
    with pytest.raises(ValueError, match="do not tile a grid of 6 x 8"):
        tokens()(torch.randn(1, 48, 16), (6, 8))
    with pytest.raises(ValueError, match="smaller than an area"):
        dumbbell()(torch.randn(1, 98, 16), (7, 14))
    with pytest.raises(ValueError, match="at most window"):
        tokens(sample=5)
    with pytest.raises(ValueError, match="window at most area"):
        tokens(area=3)
    with pytest.raises(ValueError, match="pool is one of"):
        tokens(pool="sum")
    with pytest.raises(ValueError, match="do not divide"):
        dumbbell(heads=3)
    with pytest.raises(ValueError, match="gives 24 semantic tokens; there are 16"):
        tokens(centres=16)(torch.randn(1, 96, 16), (8, 12))
    with pytest.raises(ValueError, match=r"of 8 x 8 tokens, .* makes 16 tokens, not 9"):
        tokens()(torch.randn(1, 64, 16), (8, 8), 9)
