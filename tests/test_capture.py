"""What is recomputed from captured queries and keys equals eager attention, while the model stays on sdpa."""

import copy

import pytest
import torch
from tiny import build
from tiny.llava import LLAVA
from tiny.parts import randomise

import vtc
from vtc.capture import Capture, working
from vtc.hosts import Encoder, open_host
from vtc.method import Need


def eager_maps(model, pixels):
    """Attention of every encoder layer as eager code returns it: list of (B, H, N, N)."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager.model.vision_tower(pixels, output_attentions=True).attentions


def capture(model, pixels, *needs):
    return recorded(open_host(model).encoder, pixels, *needs)


def recorded(encoder, pixels, *needs):
    """What needs of an encoder come to, and its output meanwhile."""
    recorder = Capture(encoder, needs, "test")
    recorder.install()
    with recorder.recording() as recording:
        output = encoder.tower(pixels)
    recorder.remove()
    # (patches, layers, ...) -> (rows, layers, N, ...)
    extras = {
        need.kind: recording.read(need).unflatten(0, (len(pixels), -1)).transpose(1, 2) for need in needs
    }
    return extras, output


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", LLAVA)
@torch.no_grad()
def test_rows_means_and_keys_equal_eager(name, implementation):
    model, _ = build(name)
    pixels = torch.randn(3, 3, 32, 32)
    maps = eager_maps(model, pixels)
    model.set_attn_implementation(implementation)
    bare = model.model.vision_tower(pixels).last_hidden_state
    prefix = 1 if "clip" in name else 0
    needs = [Need("mean_attention", (1, -2)), Need("keys", (-1,))]
    if prefix:
        needs.append(Need("cls_attention", (slice(1, -1), 0)))
    extras, output = capture(model, pixels, *needs)
    assert torch.equal(output.last_hidden_state, bare)
    assert model.model.vision_tower.config._attn_implementation == implementation
    for i, layer in enumerate((1, 2)):
        expected = maps[layer].mean(dim=(1, 2))[:, prefix:]
        torch.testing.assert_close(extras["mean_attention"][:, i], expected, atol=1e-5, rtol=0)
    if prefix:
        for i, layer in enumerate((1, 2, 0)):
            expected = maps[layer][:, :, 0, 1:].mean(dim=1)
            torch.testing.assert_close(extras["cls_attention"][:, i], expected, atol=1e-5, rtol=0)
    seen = {}
    attention = open_host(model).encoder.attention(3)
    hook = attention.k_proj.register_forward_hook(lambda m, a, o: seen.update(k=o))
    model.model.vision_tower(pixels)
    hook.remove()
    heads = seen["k"].unflatten(-1, (4, -1)).mean(dim=2)[:, prefix:]  # (B, N, head_dim)
    torch.testing.assert_close(extras["keys"][:, 0], heads, atol=1e-6, rtol=0)


# Towers whose attention is not written as in transformers: everything from the inputs of one module, by hand.


@torch.no_grad()
def check_by_hand(encoder, pixels, products, layers=(0, -1)):
    """products: (attention module, its arguments) -> query, key and value by head, (B, H, M, d) each."""
    depth = len(encoder.blocks)
    calls, hooks = {}, []
    for layer in range(depth):

        def note(module, args, kwargs, layer=layer):
            calls[layer] = (args, kwargs)

        hooks.append(encoder.attention(layer).register_forward_pre_hook(note, with_kwargs=True))
    bare = encoder.tower(pixels)
    for hook in hooks:
        hook.remove()
    kinds = ["mean_attention", "patch_attention", "keys", "all_keys"]
    kinds += ["cls_attention", "cls_values", "cls_logits", "cls_one_head"] * encoder.has_cls
    found, output = recorded(encoder, pixels, *(Need(kind, layers) for kind in kinds))
    assert torch.equal(last_hidden(output), last_hidden(bare))
    assert found.keys() == set(kinds)
    for i, layer in enumerate(layers):
        module = encoder.attention(layer % depth)
        args, kwargs = calls[layer % depth]
        query, key, value = products(module, *args, **kwargs)
        logits = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5  # (B, H, M, M)
        weights = logits.softmax(dim=-1)
        row = weights[:, :, 0]
        wide, wide_key = (x.transpose(1, 2).flatten(2) for x in (query, key))  # (B, M, H d)
        one_head = (wide[:, :1] @ wide_key.transpose(1, 2) * wide.shape[-1] ** -0.5).softmax(dim=-1)
        expected = {
            "mean_attention": weights.mean(dim=(1, 2)),
            "patch_attention": weights[:, :, encoder.prefix :].mean(dim=(1, 2)),
            "keys": key.mean(dim=1),
            "all_keys": wide_key,
            "cls_logits": logits[:, :, 0].mean(dim=1),
            "cls_one_head": one_head[:, 0],
            "cls_attention": row.mean(dim=1),
            "cls_values": (row * value.norm(dim=-1)).sum(dim=1),
        }
        for kind in kinds:
            own = expected[kind][:, encoder.prefix :]
            torch.testing.assert_close(found[kind][:, i], own, atol=1e-5, rtol=1e-5)
    return found


def last_hidden(output):
    return getattr(output, "last_hidden_state", output)


def heads(x, module):
    return x.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)  # (B, M, D) -> (B, H, M, d)


def eva_products(module, x, rope=None, attn_mask=None, is_causal=False):
    """timm's Eva: queries and keys of patches are turned, pairs of neighbouring channels by one angle."""
    assert rope is not None and attn_mask is None and not is_causal
    if module.qkv is None:
        query, key, value = (heads(part(x), module) for part in (module.q_proj, module.k_proj, module.v_proj))
    else:
        query, key, value = (heads(part, module) for part in module.qkv(x).chunk(3, dim=-1))
    sin, cos = rope.chunk(2, dim=-1)  # (N, d)

    def turned(y):
        patches = y[:, :, module.num_prefix_tokens :]
        other = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        return torch.cat([y[:, :, : module.num_prefix_tokens], patches * cos + other * sin], dim=2)

    return turned(module.q_norm(query)), turned(module.k_norm(key)), value


@pytest.mark.parametrize("name", ["perception_lm", "perception_lm-nocls"])
def test_rows_means_and_keys_of_a_timm_tower(name, monkeypatch):
    """Perception-LM's: keys are the rotated ones, as its attention has them."""
    model, make_inputs = build(name)
    encoder = open_host(model).encoder
    assert encoder.prefix == ("nocls" not in name) and len(encoder.blocks) == 3
    pixels = torch.randn(3, 3, 64, 64)
    found = check_by_hand(encoder, pixels, eva_products)
    monkeypatch.setattr("vtc.capture._ELEMENTS", 1)  # as few rows of the map at a time as may be
    again = check_by_hand(encoder, pixels, eva_products)
    torch.testing.assert_close(found, again)
    methods = ["hiprune", "tome"] + ["vtc-cls"] * encoder.has_cls
    assert set(methods) <= set(working(encoder))
    for method in methods:  # four patches make a token, two tiles a picture
        with vtc.compress(model, method, keep=0.25, stage="features") as handle, torch.no_grad():
            assert model(**make_inputs((1, 1))).logits.isfinite().all()
            assert [len(record.index) for record in handle.last] == [8, 8]
    if not encoder.has_cls:
        with pytest.raises(ValueError, match="a CLS token, which"):
            vtc.compress(model, "vtc-cls", keep=0.25)


def test_attention_that_is_not_fused_is_refused():
    model, _ = build("perception_lm")
    encoder = open_host(model).encoder
    encoder.attention(0).fused_attn = False
    with pytest.raises(ValueError, match="fused attention, which is switched off"):
        vtc.compress(model, "hiprune", keep=0.25, stage="features")
    with vtc.compress(model, "divprune", keep=0.25):  # which needs nothing
        pass


def vit_products(module, x, **given):
    query, key, value = (heads(part, module) for part in module.qkv(x).chunk(3, dim=-1))
    return module.q_norm(query), module.k_norm(key), value


@pytest.mark.parametrize("qk_norm", [False, True])
def test_rows_means_and_keys_of_timms_vit(qk_norm):
    import timm

    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 0}
    tower = timm.create_model("vit_tiny_patch16_224", **shape, qk_norm=qk_norm, global_pool="")
    tower = randomise(tower)
    encoder = Encoder(tower, list(tower.blocks), prefix=1)
    check_by_hand(encoder, torch.randn(2, 3, 32, 32), vit_products)


def torch_products(module, query, key, value, **given):
    """torch's own: one matrix for all three."""
    parts = zip((query, key, value), module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3))
    made = [torch.nn.functional.linear(x, weight, bias) for x, weight, bias in parts]
    if not module.batch_first:
        made = [x.transpose(0, 1) for x in made]
    return tuple(heads(x, module) for x in made)


def test_rows_means_and_keys_of_an_open_clip_tower():
    from open_clip.transformer import VisionTransformer

    tower = randomise(VisionTransformer(32, 8, 32, 3, 4, 2.0, output_dim=32, output_tokens=True))
    encoder = Encoder(tower, list(tower.transformer.resblocks), prefix=1)
    encoder.tower = _Tokens(tower)
    check_by_hand(encoder, torch.randn(2, 3, 32, 32), torch_products)


class _Tokens(torch.nn.Module):
    """Class token and patches of an open_clip tower as one tensor."""

    def __init__(self, tower):
        super().__init__()
        self.tower = tower

    def forward(self, pixels):
        pooled, tokens = self.tower(pixels)
        return torch.cat([pooled, tokens.flatten(1)], dim=1)


class _Block(torch.nn.Module):
    """Attention of torch's own, its keys and values of other widths than its queries."""

    def __init__(self, batch_first, bias, narrow):
        super().__init__()
        widths = {"kdim": 16, "vdim": 24} if narrow else {}
        self.attn = torch.nn.MultiheadAttention(32, 4, bias=bias, batch_first=batch_first, **widths)
        self.narrow, self.batch_first = narrow, batch_first

    def forward(self, x):
        x = x if self.batch_first else x.transpose(0, 1)
        key, value = (x[..., :16], x[..., :24]) if self.narrow else (x, x)
        y = self.attn(x, key, value, need_weights=False)[0]
        return y if self.batch_first else y.transpose(0, 1)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
@torch.no_grad()
def test_torchs_own_attention_in_all_forms(batch_first, bias, narrow):
    """Against the maps that it returns itself when asked."""
    tower = torch.nn.Sequential(_Block(batch_first, bias, narrow), _Block(batch_first, bias, narrow))
    tower = randomise(tower)
    x = torch.randn(2, 17, 32)
    encoder = Encoder(tower, list(tower), prefix=1)
    kinds = ("mean_attention", "cls_attention", "keys", "cls_values")
    found, output = recorded(encoder, x, *(Need(kind, (0, 1)) for kind in kinds))
    assert torch.equal(output, tower(x))
    for layer, block in enumerate(tower):
        given = x if batch_first else x.transpose(0, 1)
        key, value = (given[..., :16], given[..., :24]) if narrow else (given, given)
        maps = block.attn(given, key, value, need_weights=True, average_attn_weights=False)[1]
        torch.testing.assert_close(found["mean_attention"][:, layer], maps.mean(dim=(1, 2))[:, 1:])
        torch.testing.assert_close(found["cls_attention"][:, layer], maps[:, :, 0, 1:].mean(dim=1))
        made = []
        for i, part in ((1, key), (2, value)):
            attn, rows = block.attn, slice(32 * i, 32 * i + 32)
            weight = (attn.k_proj_weight, attn.v_proj_weight)[i - 1] if narrow else attn.in_proj_weight[rows]
            y = part @ weight.T + (attn.in_proj_bias[rows] if bias else 0)
            made.append(heads(y if batch_first else y.transpose(0, 1), attn))
        torch.testing.assert_close(found["keys"][:, layer], made[0].mean(dim=1)[:, 1:])
        length = made[1].norm(dim=-1)  # (B, H, M)
        torch.testing.assert_close(
            found["cls_values"][:, layer], (maps[:, :, 0] * length).sum(dim=1)[:, 1:], atol=1e-5, rtol=1e-5
        )
        x = block(x)


@torch.no_grad()
def test_column_means_are_the_same_in_chunks(monkeypatch):
    model, _ = build("llava-clip")
    pixels = torch.randn(2, 3, 32, 32)
    whole, _ = capture(model, pixels, Need("mean_attention", (0,)))
    monkeypatch.setattr("vtc.capture._ELEMENTS", 2 * 4 * 17 * 3)  # three query rows at a time, of 17
    parts, _ = capture(model, pixels, Need("mean_attention", (0,)))
    torch.testing.assert_close(parts["mean_attention"], whole["mean_attention"])


def test_only_the_named_layers_are_touched():
    model, _ = build("llava-clip")
    encoder = open_host(model).encoder
    before = [encoder.attention(layer).config for layer in range(4)]
    with vtc.compress(model, "vtc-cls", keep=0.5, layers=(0, -2)):
        same = [encoder.attention(layer).config is before[layer] for layer in range(4)]
    assert same == [False, True, False, True]


@pytest.mark.parametrize("name, served", [("llava-siglip", True), ("internvl", False), ("fast_vlm", False)])
def test_smaller_pictures_are_offered_where_the_encoder_takes_them(name, served):
    encoder = open_host(build(name)[0]).encoder
    assert ("downsample" in working(encoder)) == encoder.resizable == served


@pytest.mark.parametrize(
    ("layers", "depth", "expected"),
    [
        ((slice(14 / 24, -1),), 24, tuple(range(14, 23))),
        ((slice(14 / 24, -1),), 6, (3, 4)),
        ((8.5 / 24, -2), 24, (8, 22)),
        ((0, -1), 12, (0, 11)),
    ],
)
def test_layers_resolve_as_in_the_cards(layers, depth, expected):
    assert Need("keys", layers).resolve(depth) == expected


def test_keeping_everything_scores_nothing(monkeypatch):
    model, make_inputs = build("llava-clip")
    monkeypatch.setitem(vtc.capture._COMPUTE, "mean_attention", None)  # calling it would raise
    with vtc.compress(model, "hiprune", keep=1.0), torch.no_grad():
        model(**make_inputs((1, 1)))


def test_gradient_checkpointing_does_not_record_twice():
    model, make_inputs = build("llava-clip")
    model.train()
    model.gradient_checkpointing_enable()
    inputs = make_inputs((1, 1))
    with vtc.compress(model, "hiprune", keep=0.5):
        model(**inputs).logits.mean().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
