import pytest
import torch
import torch.nn.functional as F
from learned_host import all_have_gradients, apart, distances, random_block, randomise, smooth

from vtc.learned.grids import from_windows
from vtc.learned.proxies import ProxyAttention, ProxyProjector
from vtc.learned.proxy_block import ProxyBlock, roll, wrap_mask
from vtc.learned.proxy_windows import partition, pooled


def attention(std=0.2, **options):
    options = {"width": 16, "heads": 2, "window": 4, "proxies": 2} | options
    return randomise(ProxyAttention(ProxyAttention.Config(**options)), std=std)


def block(std=0.2, **options):
    options = {"width": 16, "heads": 2, "window": 4, "proxies": 2, "text_width": 12} | options
    return randomise(ProxyBlock(ProxyBlock.Config(**options)), std=std)


def projector(std=0.2, **options):
    options = {"in_width": 16, "out_width": 24, "heads": 2, "window": 4, "proxies": 2} | options
    return randomise(ProxyProjector(ProxyProjector.Config(**options)), std=std)


def fresh_projector(**options):
    return ProxyProjector(ProxyProjector.Config(**{"in_width": 64, "out_width": 32, "heads": 4} | options))


# -- plain restatements, one picture and one window after the other


def attend(state, name, heads, x, context=None, mask=None):
    context = x if context is None else context
    q, k, v = (
        part @ state[f"{name}.to_{letter}.weight"].T + state.get(f"{name}.to_{letter}.bias", 0)
        for letter, part in (("q", x), ("k", context), ("v", context))
    )
    d = q.shape[-1] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        own = slice(h * d, (h + 1) * d)
        logits = q[:, own] @ k[:, own].T * d**-0.5
        out[:, own] = (logits if mask is None else logits + mask).softmax(-1) @ v[:, own]
    return out @ state[f"{name}.to_out.0.weight"].T + state[f"{name}.to_out.0.bias"]


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def windows_of(grid, window):
    """Of each window its tokens' places."""
    rows, columns = grid
    for top in range(0, rows, window):
        for left in range(0, columns, window):
            yield [(top + i) * columns + left + j for i in range(window) for j in range(window)]


def proxies_of(x, grid, window, proxies):
    """Strided means: of the tokens whose row and column in the window have the same rest by `proxies`."""
    out = []
    for places in windows_of(grid, window):
        for y in range(proxies):
            for z in range(proxies):
                own = [
                    place
                    for number, place in enumerate(places)
                    if number // window % proxies == y and number % window % proxies == z
                ]
                out.append(x[own].mean(0))
    return torch.stack(out)


def injected(state, x, grid, window, proxies, heads):
    told = proxies_of(x, grid, window, proxies)
    told = told + attend(state, "proxy_attn1", heads, norm(state, "proxy_norm1", told))
    read = attend(
        state, "pvisual_attn2", heads, norm(state, "norm_before", x), norm(state, "proxy_cross_norm", told)
    )
    return linear(state, "linear_1_visual", read)


def in_windows(state, name, x, grid, window, heads, masks=None):
    out = torch.zeros_like(x)
    for i, places in enumerate(windows_of(grid, window)):
        out[places] = attend(state, name, heads, x[places], mask=None if masks is None else masks[i])
    return out


def shift_masks(grid, window):
    """Whether a window's tokens came from the same side of the map, from the places before the shift."""
    rows, columns = grid
    by, masks = window // 2, []
    for places in windows_of(grid, window):
        wrapped = [(p // columns + by >= rows, p % columns + by >= columns) for p in places]
        masks.append(torch.tensor([[0.0 if a == b else -1e4 for b in wrapped] for a in wrapped]))
    return masks


def whole_block(m, x, grid, time, text):
    state, c = m.state_dict(), m.config
    table = state["scale_shift_table"] + time.reshape(6, -1)
    own = state["proxy_scale_shift_table"] + time.reshape(6, -1)[:3]
    (rows, columns), by = grid, c.window // 2
    x = x + injected(state, x, grid, c.window, c.proxies, c.heads)
    y = norm(state, "norm1", x) * (1 + table[1]) + table[0]
    x = x + table[2] * in_windows(state, "attn1", y, grid, c.window, c.heads)
    moved = [(i + by) % rows * columns + (j + by) % columns for i in range(rows) for j in range(columns)]
    y = norm(state, "shift_window_norm", x[moved]) * (1 + own[1]) + own[0]
    y = in_windows(state, "attn3", y, grid, c.window, c.heads, shift_masks(grid, c.window))
    back = torch.zeros_like(y)
    back[moved] = y
    x = x + linear(state, "linear_2", own[2] * back)
    x = x + attend(state, "attn2", c.heads, x, text)
    y = linear(state, "ff.net.0.proj", norm(state, "norm2", x) * (1 + table[4]) + table[3])
    if c.activation == "geglu":
        y, gate = y.chunk(2, -1)
        y = y * F.gelu(gate)
    else:
        y = F.gelu(y, approximate="tanh")
    return x + table[5] * linear(state, "ff.net.2", y)


@pytest.mark.parametrize("activation", ["geglu", "gelu-approximate"])
@torch.no_grad()
def test_the_block_equals_a_restatement_and_every_picture_has_its_own_time(activation):
    m, grid = block(activation=activation), (8, 12)
    x, time, text = torch.randn(2, 96, 16), torch.randn(2, 96), torch.randn(2, 5, 12)
    out = m(x, grid, time, text)
    for i in range(2):
        expected = whole_block(m, x[i], grid, time[i], text[i])
        assert torch.allclose(out[i], expected, atol=1e-5 * float(expected.abs().max()))
        assert torch.allclose(out[i], m(x[i : i + 1], grid, time[i : i + 1], text[i : i + 1])[0], atol=1e-5)


@torch.no_grad()
def test_attention_equals_a_restatement():
    m, grid, x = attention(joint=False, pool="strided_mean"), (4, 12), torch.randn(2, 48, 16)
    state = m.state_dict()
    for i in range(2):
        expected = in_windows(state, "attn1", x[i], grid, 4, 2) + injected(state, x[i], grid, 4, 2, 2)
        assert torch.allclose(m(x, grid)[i], expected, atol=1e-5)


@torch.no_grad()
def test_joint_attention_equals_a_restatement():
    """Where others' tokens are replaced by the mean of those they are pooled with."""
    m, grid, x = attention(pool="strided_mean"), (4, 12), torch.randn(2, 48, 16)
    state = m.state_dict()
    for i in range(2):
        expected = torch.zeros(48, 16)
        for places in windows_of(grid, 4):
            seen = torch.zeros_like(x[i])
            for others in windows_of(grid, 4):
                for number, place in enumerate(others):
                    alike = [
                        q for k, q in enumerate(others) if (k // 4 - number // 4) % 2 == (k - number) % 2 == 0
                    ]
                    seen[place] = x[i, alike].mean(0)
            seen[places] = x[i, places]
            expected[places] = attend(state, "attn1", 2, x[i, places], seen)
        expected = expected + injected(state, x[i], grid, 4, 2, 2)
        assert torch.allclose(m(x, grid)[i], expected, atol=1e-5)


def test_parameters_are_those_of_the_published_code():
    with torch.device("meta"):
        m = ProxyBlock(ProxyBlock.Config(width=48, heads=4, text_width=20))
    c, names = 48, {}
    for name in ("proxy_norm1", "norm1", "proxy_cross_norm", "norm_before", "norm2", "shift_window_norm"):
        names |= {f"{name}.weight": (c,), f"{name}.bias": (c,)}
    for name, context in (
        ("proxy_attn1", c),
        ("pvisual_attn2", c),
        ("attn1", c),
        ("attn2", 20),
        ("attn3", c),
    ):
        names |= {f"{name}.to_q.weight": (c, c), f"{name}.to_k.weight": (c, context)}
        names |= {f"{name}.to_v.weight": (c, context)}
        names |= {f"{name}.to_out.0.weight": (c, c), f"{name}.to_out.0.bias": (c,)}
    for name in ("linear_1_visual", "linear_2"):
        names |= {f"{name}.weight": (c, c), f"{name}.bias": (c,)}
    names |= {"ff.net.0.proj.weight": (4 * c, c), "ff.net.0.proj.bias": (4 * c,)}
    names |= {"ff.net.2.weight": (c, 4 * c), "ff.net.2.bias": (c,)}
    names |= {"scale_shift_table": (6, c), "proxy_scale_shift_table": (3, c)}
    assert {name: tuple(p.shape) for name, p in m.named_parameters()} == names
    with torch.device("meta"):
        gated = ProxyBlock(ProxyBlock.Config(width=48, heads=4, activation="geglu", bias=True))
    assert gated.ff.net[0].proj.weight.shape == (8 * c, c) and gated.attn1.to_q.bias.shape == (c,)


def test_a_fresh_block_is_a_block_with_window_attention():
    m = ProxyBlock(ProxyBlock.Config(width=16, heads=2, window=4, modulated=False))
    kept = {name: part for name, part in m.named_children() if name in ("norm1", "attn1", "norm2", "ff")}
    x, grid = torch.randn(2, 64, 16), (8, 8)
    windows = partition(kept["norm1"](x), grid, 4)
    y = x + from_windows(kept["attn1"](windows.flatten(0, 1)).unflatten(0, (2, 4)), grid, 4)
    assert torch.equal(m(x, grid), y + kept["ff"](kept["norm2"](y)))


# -- windows and proxies


def test_windows_are_cut_and_put_together():
    x, grid = torch.randn(2, 96, 3), (8, 12)
    windows = partition(x, grid, 4)
    assert windows.shape == (2, 6, 16, 3)
    assert torch.equal(windows[:, 4], x[:, [r * 12 + c for r in range(4, 8) for c in range(4, 8)]])
    assert torch.equal(from_windows(windows, grid, 4), x)
    assert torch.equal(partition(from_windows(windows, grid, 4), grid, 4), windows)


def test_shifting_back_is_the_identity_and_nothing_leaks_across_the_wrap():
    x, grid = torch.randn(2, 96, 3), (8, 12)
    assert torch.equal(roll(roll(x, grid, -2), grid, 2), x) and not torch.equal(roll(x, grid, -2), x)
    masks = torch.stack(shift_masks(grid, 4)) == 0
    assert torch.equal(wrap_mask(grid, 4), masks) and not masks.all()
    # the first column and the last share a shifted window, and do not see each other
    m = block(modulated=False, text_width=None)
    x = torch.randn(1, 96, 16, requires_grad=True)
    out = m._shifted(x, grid, None).unflatten(1, grid)
    (gradient,) = torch.autograd.grad(out[0, 5, 0].sum(), x)
    reached = gradient.unflatten(1, grid)[0].abs().sum(-1) > 0
    assert reached.nonzero().tolist() == [[r, c] for r in range(2, 6) for c in range(2)]


def test_strided_means_of_a_constant_and_of_swapped_tokens():
    assert torch.allclose(
        pooled(torch.full((1, 2, 64, 3), 0.7), 8, 2, "strided_mean"), torch.full((1, 2, 4, 3), 0.7)
    )
    x = torch.randn(1, 1, 64, 3, dtype=torch.float64)
    swapped, other = x.clone(), x.clone()
    a, b, c = 1 * 8 + 2, 5 * 8 + 4, 5 * 8 + 5  # rows 4 and columns 2 apart; columns 3 apart
    swapped[:, :, [a, b]], other[:, :, [a, c]] = x[:, :, [b, a]], x[:, :, [c, a]]
    before = pooled(x, 8, 2, "strided_mean")
    assert torch.allclose(before, pooled(swapped, 8, 2, "strided_mean"))
    assert not torch.allclose(before, pooled(other, 8, 2, "strided_mean"))


def test_ways_to_pool():
    grid = torch.arange(16.0).reshape(1, 1, 16, 1)
    assert pooled(grid, 4, 2, "strided_mean").flatten().tolist() == [5, 6, 9, 10]
    assert pooled(grid, 4, 2, "block_mean").flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert pooled(grid, 4, 2, "first").flatten().tolist() == [0, 1, 4, 5]
    assert pooled(grid, 4, 2, "random").flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    torch.manual_seed(0)
    drawn = torch.stack([pooled(grid, 4, 2, "random", training=True).flatten() for _ in range(60)])
    blocks = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert [sorted(set(column.tolist())) for column in drawn.T] == blocks
    with pytest.raises(ValueError, match="pool is one of"):
        attention(pool="max")


def test_with_a_proxy_for_each_token_it_is_full_attention():
    m, grid, x = attention(window=4, proxies=4), (8, 8), torch.randn(1, 64, 16)
    tokens = x + m.proxy_attn1(m.proxy_norm1(x))
    expected = m.linear_1_visual(m.pvisual_attn2(m.norm_before(x), m.proxy_cross_norm(tokens)))
    assert torch.allclose(m.injected(x, grid), expected, atol=1e-5)


# -- in the place of a host's attention


def started(host, **options):
    m = ProxyAttention(ProxyAttention.Config(width=64, heads=4, **options))
    m.start_from(host.attn)
    return m


def test_starts_near_the_host_with_pooled_tokens_of_other_windows():
    host, grid = random_block(), (16, 16)
    x = smooth(grid=grid)
    near = {p: distances(started(host, window=4, proxies=p), host, x, grid) for p in (1, 2, 4)}
    assert near[4][0] < 1e-5 and near[4][1] < 1e-5  # a proxy for each token: the host itself
    assert near[4][0] < near[2][0] < near[1][0] and near[2][1] < near[2][2] / 2
    # tokens that do not differ within a block
    same = torch.randn(1, 16, 64).unflatten(1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert distances(started(host, window=4), host, same.flatten(1, 2), (8, 8))[0] < 1e-5
    m = started(host, window=4)
    with torch.no_grad():  # only then does the branch of the proxies count
        m.linear_1_visual.weight.add_(torch.eye(64))
    assert distances(m, host, x, grid)[0] > near[2][0] + 0.1


@torch.no_grad()
def test_cls_attends_to_all_tokens_and_all_attend_to_it():
    host, grid = random_block(), (8, 8)
    x = torch.cat([torch.randn(2, 1, 64), smooth(grid=grid)], 1)
    wanted = host.attn(x)
    assert torch.allclose(started(host, window=4, proxies=4, prefix=1)(x, grid), wanted, atol=1e-4)
    assert torch.allclose(started(host, window=8, joint=False, prefix=1)(x, grid), wanted, atol=1e-4)
    out = started(host, window=4, prefix=1)(x, grid)
    assert torch.allclose(out[:, 0], wanted[:, 0], atol=1e-4) and apart(out, wanted) < 0.2


def test_in_windows_only_it_starts_far_from_a_host_of_several_windows():
    host, grid = random_block(), (16, 16)
    near = [
        distances(started(host, window=w, joint=False), host, smooth(grid=grid), grid) for w in (4, 8, 16)
    ]
    assert near[2][0] < 1e-5 < near[1][0] < near[0][0] and near[0][0] > 0.5


@torch.no_grad()
def test_proxies_carry_what_windows_cannot():
    m, x = attention(joint=False), torch.randn(1, 64, 16)
    other = x.clone()
    other[:, -1] = torch.randn(16)  # in the last window
    assert float((m(x, (8, 8)) - m(other, (8, 8)))[:, 0].abs().max()) > 1e-3
    m.linear_1_visual.weight.zero_()
    assert torch.equal(m(x, (8, 8))[:, 0], m(other, (8, 8))[:, 0])


# -- proxies alone


@torch.no_grad()
def test_the_projector_equals_a_restatement():
    m, grid, x = projector(pool="strided_mean"), (8, 4), torch.randn(2, 32, 16)
    state = m.state_dict()
    for i in range(2):
        proxies = proxies_of(x[i], grid, 4, 2)  # window by window; row by row of 4 x 2 is the same here
        assert len(proxies) == 8
        proxies = proxies + attend(state, "proxy_attn1", 2, norm(state, "proxy_norm1", proxies))
        expected = linear(state, "projector.2", F.gelu(linear(state, "projector.0", proxies)))
        assert torch.allclose(m(x, grid)[i], expected, atol=1e-5)


@torch.no_grad()
def test_the_projector_starts_as_the_hosts_of_pooled_features():
    m, grid = fresh_projector(), (8, 12)
    first, second = torch.nn.Linear(64, 32), torch.nn.Linear(32, 32)
    m.start_from(first, second)
    x = smooth(grid=grid)
    maps = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), 2).flatten(2).transpose(1, 2)
    assert torch.allclose(m(x, grid), second(F.gelu(first(maps))), atol=1e-5)  # row by row of 4 x 6
    # tokens that do not differ within a block come out as the host projects each of them
    same = maps.transpose(1, 2).unflatten(2, (4, 6)).repeat_interleave(2, 2).repeat_interleave(2, 3)
    host = second(F.gelu(first(same.flatten(2).transpose(1, 2))))
    assert torch.allclose(
        m(same.flatten(2).transpose(1, 2), grid),
        host.unflatten(1, grid)[:, ::2, ::2].flatten(1, 2),
        atol=1e-5,
    )
    of_all = second(F.gelu(first(x))).transpose(1, 2).unflatten(2, grid)
    of_all = F.avg_pool2d(of_all, 2).flatten(2).transpose(1, 2)
    assert apart(m(x, grid), of_all) < 0.1
    with pytest.raises(ValueError, match="projects 64 to 32, not 64 to 16"):
        m.start_from(torch.nn.Linear(64, 16), torch.nn.Linear(16, 16))


def test_the_projector_gives_a_part_of_the_tokens():
    m = projector()
    assert m.counts(64) == [16] and m.counts_for((4, 12)) == [12] and m.counts(30) == []
    assert m(torch.randn(1, 48, 16), (4, 12)).shape == (1, 12, 24)
    with pytest.raises(ValueError, match="12 tokens, not 9"):
        m(torch.randn(1, 48, 16), (4, 12), 9)
    with pytest.raises(ValueError, match="do not tile"):
        m(torch.randn(1, 36, 16), (6, 6))


# -- all of them


MODULES = {
    "attention": (attention, lambda m, x: m(x, (8, 8))),
    "windows": (lambda: attention(joint=False), lambda m, x: m(x, (8, 8))),
    "block": (lambda **o: block(text_width=None, modulated=False, **o), lambda m, x: m(x, (8, 8))),
    "projector": (projector, lambda m, x: m(x, (8, 8))),
}


@pytest.mark.parametrize("name", MODULES)
def test_batches_are_singles_in_float32_and_bfloat16_and_all_parameters_learn(name):
    make, call = MODULES[name]
    m, x = make(), torch.randn(3, 64, 16)
    out = call(m, x)
    assert torch.allclose(out[1:2], call(m, x[1:2]), atol=1e-5)
    assert all_have_gradients(m, out.square().mean())
    assert apart(call(m.bfloat16(), x.bfloat16()).float(), out) < 0.05


@pytest.mark.parametrize("name", MODULES)
def test_comes_back_from_a_folder(name, tmp_path):
    make, call = MODULES[name]
    m, x = make(), torch.randn(1, 64, 16)
    m.save_pretrained(tmp_path)
    assert torch.equal(call(type(m).from_pretrained(tmp_path), x), call(m, x))


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="do not tile a grid of 6 x 8"):
        attention()(torch.randn(1, 48, 16), (6, 8))
    with pytest.raises(ValueError, match="proxies divides window"):
        attention(proxies=3)
    with pytest.raises(ValueError, match="do not divide"):
        attention(heads=3)
    with pytest.raises(ValueError, match="do not divide"):
        projector(heads=3)
    with pytest.raises(ValueError, match="for a grid of 8 rows"):
        attention()(torch.randn(1, 63, 16), (8, 8))
    with pytest.raises(ValueError, match="activation is one of"):
        block(activation="relu")
    with pytest.raises(ValueError, match="needs time"):
        block(text_width=None)(torch.randn(1, 64, 16), (8, 8))
    with pytest.raises(ValueError, match="reads no text"):
        block(text_width=None)(torch.randn(1, 64, 16), (8, 8), torch.randn(1, 96), torch.randn(1, 2, 12))
    with pytest.raises(ValueError, match="biases"):
        attention(width=64, heads=4, bias=False).start_from(random_block().attn)


def test_no_map_of_tokens_by_tokens_is_made(monkeypatch):
    m, seen = attention(joint=False), []
    fused = F.scaled_dot_product_attention

    def counted(q, k, *rest, **options):
        seen.append(q.shape[0] * q.shape[2] * k.shape[2])
        return fused(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    m(torch.randn(1, 256, 16), (16, 16))
    assert seen == [16 * 16 * 16, 64 * 64, 256 * 64]  # in windows, among proxies, tokens over proxies
    seen.clear()
    attention()(torch.randn(1, 256, 16), (16, 16))
    assert seen[0] == 16 * 16 * (16 + 64)
