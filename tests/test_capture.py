"""What is recomputed from captured queries and keys equals eager attention, while the model stays on sdpa."""

import copy

import pytest
import torch
from tiny import build
from tiny.llava import LLAVA

import vtc
from vtc.capture import Capture, working
from vtc.hosts import open_host
from vtc.method import Need


def eager_maps(model, pixels):
    """Attention of every encoder layer as eager code returns it: list of (B, H, N, N)."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    return eager.model.vision_tower(pixels, output_attentions=True).attentions


def capture(model, pixels, *needs):
    recorder = Capture(open_host(model).encoder, needs, "test")
    recorder.install()
    with recorder.recording() as recording:
        output = model.model.vision_tower(pixels)
    recorder.remove()
    # (patches, layers, ...) -> (rows, layers, N, ...)
    extras = {
        kind: extra.unflatten(0, (len(pixels), -1)).transpose(1, 2)
        for kind, extra in recording.extras().items()
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
