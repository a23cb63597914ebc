import pytest
import torch
import torch.nn.functional as F
from learned_host import all_have_gradients, apart, distances, random_block, randomise, smooth

from vtc.learned.agent_attention import AgentAttention, AgentPooling
from vtc.learned.replacement import HostAttention


def made(seed=0, **options):
    options = {"width": 16, "heads": 2, "agents": 4, "window": (4, 6), "prefix": 1} | options
    return randomise(AgentAttention(AgentAttention.Config(**options)), seed)


@torch.no_grad()
def restated(m, x, heads, side, window, prefix, power, residual):
    """One picture after the other, one head after the other, softmaxes written out."""
    state = m.state_dict()
    (rows, columns), n, width = window, side * side, x.shape[-1]
    d = width // heads
    outs = []
    for image in x:
        qkv = image @ state["qkv.weight"].T + state.get("qkv.bias", torch.zeros(1))
        q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
        patches = q[prefix:].T.reshape(1, width, rows, columns)
        agents = F.adaptive_avg_pool2d(patches, side)[0].reshape(width, n).T
        out = torch.zeros_like(q)
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            b1 = F.interpolate(state["an_bias"], window, mode="bilinear")[h].reshape(n, -1)
            b1 = b1 + (state["ah_bias"][0, h] + state["aw_bias"][0, h]).reshape(n, -1)
            b2 = F.interpolate(state["na_bias"], window, mode="bilinear")[h].reshape(n, -1).T
            b2 = b2 + (state["ha_bias"][0, h] + state["wa_bias"][0, h]).reshape(-1, n)
            if prefix:
                b1 = torch.cat([state["ac_bias"][0, h], b1], 1)
                b2 = torch.cat([state["ca_bias"][0, h], b2], 0)
            gathered = (agents[:, own] @ k[:, own].T * d**-0.5 + b1).softmax(-1) @ v[:, own]
            read = (q[:, own] @ agents[:, own].T * (d**-0.5) ** power + b2).softmax(-1)
            out[:, own] = read @ gathered
        maps = v[prefix:].T.reshape(1, width, rows, columns)
        local = F.conv2d(maps, state["dwc.weight"], state["dwc.bias"], padding=1, groups=width)
        out[prefix:] += local[0].reshape(width, -1).T
        out += residual * v
        outs.append(out @ state["proj.weight"].T + state["proj.bias"])
    return torch.stack(outs)


@pytest.mark.parametrize("prefix, power, residual, bias", [(1, 1.0, 0.0, True), (0, 0.3, 0.075, False)])
def test_equals_the_formula(prefix, power, residual, bias):
    module = made(prefix=prefix, power=power, residual=residual, qkv_bias=bias)
    x = torch.randn(2, prefix + 24, 16)
    out = module(x, (4, 6))
    assert torch.allclose(out, restated(module, x, 2, 2, (4, 6), prefix, power, residual), atol=1e-5)


def test_parameters_are_those_of_the_papers_deit():
    with torch.device("meta"):
        tiny = AgentAttention(AgentAttention.Config(width=192, heads=3, prefix=1))
    h, n, w, c = 3, 49, 14, 192
    assert {name: tuple(p.shape) for name, p in tiny.named_parameters()} == {
        "qkv.weight": (3 * c, c),
        "qkv.bias": (3 * c,),
        "proj.weight": (c, c),
        "proj.bias": (c,),
        "dwc.weight": (c, 1, 3, 3),
        "dwc.bias": (c,),
        "an_bias": (h, n, 7, 7),
        "na_bias": (h, n, 7, 7),
        "ah_bias": (1, h, n, w, 1),
        "aw_bias": (1, h, n, 1, w),
        "ha_bias": (1, h, w, 1, n),
        "wa_bias": (1, h, 1, w, n),
        "ac_bias": (1, h, n, 1),
        "ca_bias": (1, h, 1, n),
    }
    with torch.device("meta"):
        swin = AgentAttention(AgentAttention.Config(width=96, heads=3, window=(7, 7), qkv_bias=False))
    assert not {"ac_bias", "ca_bias", "qkv.bias"} & set(swin.state_dict())


def without_extras(module):
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.endswith("_bias") or name.startswith("dwc"):
                p.zero_()
    return module


def test_as_many_agents_as_patches_are_linear_attention_and_not_softmax_attention():
    module = without_extras(made(agents=16, window=(4, 4), prefix=0, heads=1))
    x = torch.randn(1, 16, 16)
    q, k, v = module.qkv(x).chunk(3, -1)
    query_features = (q @ q.transpose(1, 2) / 4).softmax(-1)
    key_features = (q @ k.transpose(1, 2) / 4).softmax(-1).transpose(1, 2)
    linear = module.proj(query_features @ (key_features.transpose(1, 2) @ v))
    softmax = module.proj((q @ k.transpose(1, 2) / 4).softmax(-1) @ v)
    out = module(x, (4, 4))
    assert torch.allclose(out, linear, atol=1e-5)
    assert apart(out, softmax) > 0.05


def test_constant_values_come_out_constant():
    module = made(prefix=0)  # random biases: rows of both softmaxes sum to 1 whatever they are
    with torch.no_grad():
        module.dwc.weight.zero_(), module.dwc.bias.zero_()
        module.qkv.weight[32:].zero_()  # v is its bias
    out = module(torch.randn(2, 24, 16), (4, 6))
    expected = module.proj(module.qkv.bias[32:])
    assert torch.allclose(out, expected.expand_as(out), atol=1e-5)


def test_cls_gets_no_convolution_and_makes_no_agents():
    module = made()
    x = torch.randn(2, 25, 16)
    before = module(x, (4, 6))
    pooled = []
    with torch.no_grad():
        module.dwc.bias += 3
        after = module(x, (4, 6))
        assert torch.allclose(before[:, 0], after[:, 0], atol=1e-6)
        assert float((before[:, 1:] - after[:, 1:]).detach().abs().amax(-1).min()) > 0.1  # every patch does
        # where the CLS token counts neither as key nor as query, its features change nothing
        module.ac_bias.fill_(-1e4)
        for _ in range(2):
            pooled.append(module(x, (4, 6))[:, 1:])
            x[:, 0] = torch.randn(2, 16)
    assert torch.allclose(*pooled, atol=1e-6)


def test_biases_of_a_window_of_seven_are_not_resized():
    module = made(window=(7, 7), prefix=0)
    expected = module.an_bias.flatten(2) + (module.ah_bias + module.aw_bias)[0].flatten(2)
    assert torch.allclose(module._agent_bias()[0], expected, atol=1e-6)


def test_no_map_of_tokens_by_tokens_is_made(monkeypatch):
    module, seen = made(agents=4, window=(12, 12), prefix=0), []
    fused = F.scaled_dot_product_attention

    def counted(q, k, *rest, **options):
        seen.append(q.shape[2] * k.shape[2])
        return fused(q, k, *rest, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    module(torch.randn(1, 144, 16), (12, 12))
    assert seen == [4 * 144, 144 * 4]


def test_a_picture_is_the_same_alone_in_a_batch_and_in_bfloat16():
    module, x = made(), torch.randn(3, 25, 16)
    out = module(x, (4, 6))
    assert torch.allclose(out[1:2], module(x[1:2], (4, 6)), atol=1e-6)
    assert torch.allclose(out, module.bfloat16()(x.bfloat16(), (4, 6)).float(), atol=0.2)


def test_starts_from_the_host_as_training_free_agent_attention():
    block, grid = random_block(), (8, 8)
    module = AgentAttention(AgentAttention.Config(width=64, heads=4, agents=16, window=grid))
    module.start_from(block.attn)
    x = smooth(grid=grid)
    attention, output, without = distances(module, block, x, grid)
    assert attention < 0.6 and output < without / 2
    # where all queries are equal it is the host's attention
    same = torch.randn(1, 1, 64).expand(1, 64, 64)
    assert torch.allclose(module(same, grid), block.attn(same), atol=1e-5)


def test_a_host_is_read_from_three_layouts():
    block = random_block()
    attention = block.attn
    x = torch.randn(2, 9, 64)

    class Clip(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.num_heads = 4
            for i, name in enumerate(("q_proj", "k_proj", "v_proj")):
                layer = torch.nn.Linear(64, 64)
                layer.weight.data = attention.in_proj_weight.data[64 * i : 64 * (i + 1)]
                layer.bias.data = attention.in_proj_bias.data[64 * i : 64 * (i + 1)]
                setattr(self, name, layer)
            self.out_proj = attention.out_proj

    timm = torch.nn.Module()
    timm.num_heads, timm.qkv, timm.proj = 4, torch.nn.Linear(64, 192), attention.out_proj
    timm.qkv.weight.data, timm.qkv.bias.data = attention.in_proj_weight.data, attention.in_proj_bias.data
    torchs = torch.nn.MultiheadAttention(64, 4, batch_first=True)
    torchs.load_state_dict(attention.state_dict())
    assert torch.allclose(torchs(x, x, x)[0], attention(x), atol=1e-5)  # the layout is what it is taken for
    wanted = HostAttention.of(attention)
    for host in (Clip(), timm, torchs):
        found = HostAttention.of(host)
        assert found.heads == 4 and found.width == 64
        assert all(torch.equal(a, b) for a, b in zip(found[1:], wanted[1:], strict=True))
    with pytest.raises(ValueError, match="no query, key, value"):
        HostAttention.of(torch.nn.Linear(2, 2))


def test_all_parameters_learn():
    module, x = made(), torch.randn(2, 25, 16)
    assert all_have_gradients(module, module(x, (4, 6)).square().mean())
    pooling = randomise(AgentPooling(AgentPooling.Config(in_width=16, heads=2)))
    assert all_have_gradients(pooling, pooling(torch.randn(2, 16, 16), (4, 4), 4).square().mean())


def test_what_cannot_be_done_is_said():
    with pytest.raises(ValueError, match="square number"):
        made(agents=5)
    with pytest.raises(ValueError, match="square number"):
        made(agents=25)
    with pytest.raises(ValueError, match="prefix is 0"):
        made(prefix=2)
    with pytest.raises(ValueError, match="do not divide"):
        made(heads=3)
    with pytest.raises(ValueError, match="make agent-attention with window"):
        made()(torch.randn(1, 25, 16), (6, 4))
    with pytest.raises(ValueError, match="for a grid of 4 rows and 6"):
        made()(torch.randn(1, 24, 16), (4, 6))
    with pytest.raises(ValueError, match="has width 64 and 4 heads"):
        made().start_from(random_block().attn)
    with pytest.raises(ValueError, match="qkv_bias=True"):
        made(width=64, heads=4, qkv_bias=False).start_from(random_block().attn)


# -- agents as tokens


def pooling(**options):
    return AgentPooling(AgentPooling.Config(**{"in_width": 64, "heads": 4} | options))


def test_pooling_equals_the_formula_and_starts_as_means():
    module, x, grid = pooling(), torch.randn(2, 24, 64), (4, 6)
    means = F.adaptive_avg_pool2d(x.transpose(1, 2).reshape(2, 64, 4, 6), 3).flatten(2).transpose(1, 2)
    assert torch.equal(module(x, grid, 9), means)
    randomise(module, std=0.2)
    q, k, v = (F.layer_norm(x, (64,), module.norm.weight, module.norm.bias) @ module.qkv.weight.T).chunk(
        3, -1
    )
    q, k, v = (part + bias for part, bias in zip((q, k, v), module.qkv.bias.chunk(3), strict=True))
    agents = F.adaptive_avg_pool2d(q.transpose(1, 2).reshape(2, 64, 4, 6), 3).flatten(2).transpose(1, 2)
    heads = [
        (agents[..., i : i + 16] @ k[..., i : i + 16].transpose(1, 2) / 4).softmax(-1) @ v[..., i : i + 16]
        for i in range(0, 64, 16)
    ]
    expected = means + torch.cat(heads, -1) @ module.proj.weight.T + module.proj.bias
    assert torch.allclose(module(x, grid, 9), expected, atol=1e-5)


def test_pooling_from_a_layer_is_what_its_attention_gives_to_every_token_where_none_is_pooled():
    block, module, grid = random_block(), pooling(), (6, 6)
    module.start_from(block.ln_1, block.attn)
    x = smooth(grid=grid)
    host = x + block.attn(block.ln_1(x))
    assert torch.allclose(module(x, grid, 36), host, atol=1e-5)
    pooled = F.adaptive_avg_pool2d(host.transpose(1, 2).reshape(2, 64, 6, 6), 3).flatten(2).transpose(1, 2)
    assert apart(module(x, grid, 9), pooled) < 0.3
    with pytest.raises(ValueError, match="has width 64 and 2 heads"):
        pooling(heads=2).start_from(block.ln_1, block.attn)


def test_pooling_gives_squares_and_says_so():
    module = pooling()
    assert module.counts(24) == [1, 4, 9, 16] and module.counts_for((4, 6)) == [1, 4, 9, 16]
    assert module(torch.randn(1, 24, 64), (4, 6)).shape == (1, 16, 64)
    with pytest.raises(ValueError, match="4, 9 or 16 tokens, not 8"):
        module(torch.randn(1, 24, 64), (4, 6), 8)
    with pytest.raises(ValueError, match="do not divide"):
        pooling(heads=5)


def test_comes_back_from_a_folder(tmp_path):
    for module, call in (
        (made(), lambda m: m(torch.ones(1, 25, 16), (4, 6))),
        (randomise(pooling()), lambda m: m(torch.ones(1, 16, 64), (4, 4))),
    ):
        module.save_pretrained(tmp_path / module.name)
        assert torch.equal(call(type(module).from_pretrained(tmp_path / module.name)), call(module))
