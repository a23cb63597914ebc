"""Attention of vision towers replaced by modules with weights."""

import copy
from pathlib import Path

import pytest
import torch
from learned_host import apart
from small import QUESTIONS, small_model, small_processor
from tiny.encoders import ENCODERS, make
from torch import nn

import vtc
from vtc.api import current
from vtc.encoder_cost import operations
from vtc.evaluation.prompts import encode
from vtc.evaluation.scenes import scene
from vtc.learned import build, from_pretrained
from vtc.learned.in_tower import ReplacedAttention
from vtc.learned.replacement import HostAttention, attention_flops

# of which queries and keys are turned by places or normalised, or pictures padded
REFUSED = {
    "timm-qk-norm": "does more than to project and attend",
    "timm-eva02": "turns queries and keys by places",
    "timm-eva-split": "turns queries and keys by places",
    "timm-dinov3": "turns queries and keys by places",
    "timm-pe": "turns queries and keys by places",
    "timm-rope-mixed": "turns queries and keys by places",
    "DINOv3ViTModel": "turns queries and keys by places",
    "Siglip2VisionModel": "pads pictures",
    "InternVLVisionModel": "does more than to project and attend",
}
SERVED = [name for name in ENCODERS if name not in REFUSED]
EXACT = {"window": 2, "proxies": 2}  # a proxy for each token: the host's own attention
NEAR = {"window": 2, "proxies": 1}


def tensors(output):
    """All tensors of an output, in order."""
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [x for part in values for x in tensors(part)] if isinstance(output, (tuple, list, dict)) else []


@torch.no_grad()
def called(name, model, **more):
    return tensors(ENCODERS[name].call(model, ENCODERS[name].images(), **more))


def same(one, other):
    return len(one) == len(other) > 0 and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def close(one, other, tolerance=1e-5):
    pairs = zip(one, other, strict=True)
    return len(one) > 0 and all(apart(a, b) < tolerance for a, b in pairs)


@pytest.mark.parametrize("name", SERVED)
def test_a_proxy_for_each_token_is_the_tower_itself_and_removing_gives_it_back(name):
    model = make(name)
    bare, weights = called(name, model), {key: x.clone() for key, x in model.state_dict().items()}
    exact, near = (ReplacedAttention.for_host(model, "proxy-attention", **o) for o in (EXACT, NEAR))
    with vtc.compress(model, exact):
        assert close(called(name, model), bare)
        assert model.state_dict().keys() == weights.keys()
    with vtc.compress(model, near) as handle:
        other = called(name, model)
        assert not close(other, bare, 1e-4) and all(bool(x.isfinite().all()) for x in other)
        assert [len(record.index) for record in handle.last] == [ENCODERS[name].n] * 2
    assert same(called(name, model), bare)
    assert all(torch.equal(x, weights[key]) for key, x in model.state_dict().items())
    assert not any(key.startswith("_vtc") or key == "forward" for m in model.modules() for key in vars(m))


@pytest.mark.parametrize("name", REFUSED)
def test_attention_that_is_more_than_that_is_refused_in_one_sentence(name):
    model = make(name)
    with pytest.raises(ValueError, match=REFUSED[name]):
        ReplacedAttention.for_host(model, "proxy-attention", **NEAR)
    plain = ReplacedAttention.for_host(make("timm-deit"), "proxy-attention", blocks=[0], **NEAR)
    with pytest.raises(ValueError, match=REFUSED[name]):
        vtc.compress(model, plain)
    assert current(model) is None


KINDS = {
    "proxy-attention": NEAR,
    "agent-attention": {"agents": 4},
    "super-token-attention": {"cell": (2, 2)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_replaces_the_blocks_it_is_for_and_no_others(kind):
    name = "timm-deit"
    model = make(name)
    module = ReplacedAttention.for_host(model, kind, blocks=[1, 3], **KINDS[kind])
    assert list(module.parts) == [1, 3]
    seen = {}
    for number, block in enumerate(ENCODERS[name].blocks_of(model)):
        block.register_forward_hook(lambda _, __, out, number=number: seen.__setitem__(number, out))
    bare = called(name, model)
    before = dict(seen)
    with vtc.compress(model, module):
        assert not close(called(name, model), bare, 1e-4)
    assert torch.equal(seen[0], before[0])
    assert all(not torch.equal(seen[number], before[number]) for number in (1, 2, 3))
    # what the second block gets is what the module says of the norm before it
    block = ENCODERS[name].blocks_of(model)[1]
    with torch.no_grad():
        x = before[0]
        x = x + module.parts[1](block.norm1(x), ENCODERS[name].grid)
        assert apart(seen[1], x + block.mlp(block.norm2(x))) < 1e-5


def test_pictures_of_other_sizes_have_their_own_grid():
    model = make("timm-dynamic")
    module = ReplacedAttention.for_host(model, "proxy-attention", **EXACT)
    for size in ((32, 48), (48, 32), (64, 32)):
        pixels = torch.randn(1, 3, *size)
        with torch.no_grad():
            bare = model(pixels)
            with vtc.compress(model, module) as handle:
                assert apart(model(pixels), bare) < 1e-5
                assert handle.last[0].grid == (size[0] // 8, size[1] // 8)
    with vtc.compress(model, module), pytest.raises(ValueError, match="do not tile a grid of 3 x 4"):
        model(torch.randn(1, 3, 24, 32))


@pytest.mark.parametrize("kind", KINDS)
def test_operations_are_those_of_the_formula(kind):
    model = make("timm-deit")
    grid = ENCODERS["timm-deit"].grid
    host = HostAttention.of(model.blocks[0].attn)
    x = torch.randn(1, 1 + grid[0] * grid[1], host.width)
    module = ReplacedAttention.for_host(model, kind, **KINDS[kind]).requires_grad_(False)
    for part in module.parts.values():
        assert operations(lambda part=part: part(x, grid)) == part.flops(grid)
    model.requires_grad_(False)
    attention = model.blocks[0].attn
    assert operations(lambda: attention(x)) == attention_flops(x.shape[1], host.width)
    assert module.host_flops(grid) == len(module.parts) * attention_flops(x.shape[1], host.width)


@pytest.mark.parametrize(
    "kind, options, share",
    [
        ("proxy-attention", {"window": 4}, 1.60),
        ("proxy-attention", {"window": 4, "inject": False}, 0.77),
        ("agent-attention", {"agents": 36, "window": (12, 12)}, 0.83),
        ("super-token-attention", {}, 0.22),
    ],
)
def test_how_much_cheaper_attention_is_on_the_reference_tower(kind, options, share):
    part = build(kind, width=128, heads=4, prefix=1, **options).requires_grad_(False)
    x = torch.randn(1, 145, 128)
    counted = operations(lambda: part(x, (12, 12)))
    assert counted == part.flops((12, 12))
    assert abs(counted / attention_flops(145, 128) - share) < 0.006


def test_with_many_tokens_all_of_them_are_cheaper():
    grid, width = (64, 64), 768
    with torch.device("meta"):
        parts = [
            build("proxy-attention", width=width, heads=12, window=8),
            build("agent-attention", width=width, heads=12, window=grid),
            build("super-token-attention", width=width, heads=12),
        ]
    shares = [part.flops(grid) / attention_flops(4096, width) for part in parts]
    assert max(shares) < 0.75 and shares == pytest.approx([0.61, 0.29, 0.12], abs=0.01)


def test_the_handle_tells_the_share_and_no_budget_is_taken():
    model = make("timm-deit")
    module = ReplacedAttention.for_host(model, "super-token-attention")
    with vtc.compress(model, module) as handle:
        called("timm-deit", model)
        share = module.flops((4, 6)) / module.host_flops((4, 6))
        assert f"in 4 blocks with {share:.2f} of the operations" in handle.describe()
        with pytest.raises(ValueError, match="keeps all tokens"):
            handle.keep = 0.5
    for given in ({"keep": 0.5}, {"stage": "encoder", "schedule": (1,)}):
        with pytest.raises(ValueError, match="keeps all tokens"):
            vtc.compress(model, module, **given)


def test_a_module_for_another_tower_is_refused():
    module = ReplacedAttention.for_host(make("timm-deit"), "proxy-attention", **NEAR)
    with pytest.raises(ValueError, match=r"4 heads and 1 tokens in front, and .* has 32, 4 and 0"):
        vtc.compress(make("timm-siglip"), module)
    deep = ReplacedAttention.for_host(make("timm-deit"), "proxy-attention", blocks=[3], **NEAR)
    with pytest.raises(ValueError, match="blocks 0 to 2, and the module is for"):
        vtc.compress(make("timm-augreg"), deep)
    agents = ReplacedAttention.for_host(make("timm-deit"), "agent-attention", agents=4)
    clip = make("CLIPVisionModel")
    with vtc.compress(clip, agents), pytest.raises(ValueError, match=r"grid of \(4, 6\), not \(4, 4\)"):
        called("CLIPVisionModel", clip)


def test_what_cannot_be_made_is_said():
    model = make("timm-deit")
    with pytest.raises(ValueError, match="is no replacement of attention: there are agent-attention"):
        ReplacedAttention.for_host(model, "token-slimming")
    with pytest.raises(ValueError, match=r"has blocks 0 to 3, and no \[4\]"):
        ReplacedAttention.for_host(model, "proxy-attention", blocks=[4], **NEAR)
    with pytest.raises(ValueError, match="would replace no attention"):
        ReplacedAttention.for_host(model, "proxy-attention", blocks=[], **NEAR)
    with pytest.raises(ValueError, match="ascending"):
        build("replaced-attention", blocks=(2, 1))
    with pytest.raises(ValueError, match="do not tile"):
        ReplacedAttention.for_host(model, "proxy-attention", window=4)
    with pytest.raises(ValueError, match="would read no proxies"):
        ReplacedAttention.for_host(model, "proxy-attention", joint=False, inject=False, **NEAR)
    with pytest.raises(ValueError, match="holds no vision transformer"):
        ReplacedAttention.for_host(nn.Linear(2, 2), "proxy-attention")


def test_a_saved_module_comes_back_and_knows_its_host(tmp_path):
    model, other = make("timm-deit"), make("timm-deit", seed=1)
    module = ReplacedAttention.for_host(model, "agent-attention", blocks=[0, 2], agents=4)
    module.trained_on(model).save_pretrained(tmp_path / "module")
    loaded = from_pretrained(tmp_path / "module")
    assert loaded.config == module.config
    with vtc.compress(model, module) as handle:
        expected = called("timm-deit", model)
        vtc.save(handle.plan, tmp_path / "plan.json")
    with vtc.compress(model, loaded):
        assert same(called("timm-deit", model), expected)
    with vtc.compress(model, str(tmp_path / "module")):
        assert same(called("timm-deit", model), expected)
    with vtc.compress(model, vtc.load(tmp_path / "plan.json")):
        assert same(called("timm-deit", model), expected)
    with pytest.raises(ValueError, match="was trained on"):
        vtc.compress(other, loaded)
    vtc.compress(other, loaded.trained_on(None)).remove()


def test_it_works_in_a_deep_copy_in_bfloat16_and_compiled():
    model = make("timm-deit")
    module = ReplacedAttention.for_host(model, "proxy-attention", **NEAR)
    with vtc.compress(model, module):
        expected = called("timm-deit", model)
        twin = copy.deepcopy(model)
        assert same(called("timm-deit", twin), expected)
        compiled = torch.compile(model, backend="eager")
        assert close(called("timm-deit", compiled), expected)
        with torch.no_grad():  # another module than that of the model
            next(iter(module.parts.values())).attn1.to_v.weight.zero_()
        assert same(called("timm-deit", twin), expected)
        assert not close(called("timm-deit", model), expected, 1e-4)
    half = make("timm-deit").bfloat16()
    mixed = ReplacedAttention.for_host(half, "proxy-attention", **EXACT)
    assert mixed.dtype == torch.bfloat16
    pixels = ENCODERS["timm-deit"].images().bfloat16()
    with torch.no_grad():
        bare = half(pixels)
        for dtype in (torch.bfloat16, torch.float32):
            with vtc.compress(half, mixed.to(dtype)):
                assert half(pixels).dtype == torch.bfloat16 and apart(half(pixels), bare) < 0.03


def test_masks_and_maps_are_refused_while_it_is_on():
    model = make("CLIPVisionModel")
    module = ReplacedAttention.for_host(model, "proxy-attention", **NEAR)
    block = ENCODERS["CLIPVisionModel"].blocks_of(model)[0]
    with vtc.compress(model, module), pytest.raises(RuntimeError, match="given a mask"):
        block(torch.randn(1, 17, 32), attention_mask=torch.zeros(1, 1, 17, 17))
    with (
        vtc.compress(model, module),
        pytest.raises(RuntimeError, match="no picture that it was given has as"),
    ):
        block(torch.randn(1, 14, 32), attention_mask=None)


@pytest.fixture(scope="module")
def clip():
    """The vision tower of models/tiny-clip, scenes to train with and others to judge by."""
    from transformers import AutoImageProcessor, CLIPModel

    folder = Path(__file__).parents[1] / "models" / "tiny-clip"
    tower = CLIPModel.from_pretrained(folder).vision_model.eval().requires_grad_(False)
    look = AutoImageProcessor.from_pretrained(folder)

    def pixels(split, count):
        return look([scene(split, i).image for i in range(count)], return_tensors="pt")["pixel_values"]

    return tower, pixels("train", 16), pixels("test", 4)


@pytest.mark.parametrize(
    "kind, options",
    [
        ("proxy-attention", {"window": 4}),
        ("agent-attention", {"agents": 16}),
        ("super-token-attention", {}),
    ],
)
def test_a_few_steps_bring_the_features_nearer_to_those_of_the_bare_tower(clip, kind, options):
    tower, train, test = clip
    module = ReplacedAttention.for_host(tower, kind, blocks=[4, 5], **options)
    with torch.no_grad():
        wanted, held = tower(train).last_hidden_state, tower(test).last_hidden_state
    optimizer = torch.optim.Adam(module.parameters(), 1e-3)
    with vtc.compress(tower, module):
        with torch.no_grad():
            before = apart(tower(test).last_hidden_state, held)
        for step in range(10):
            rows = slice(8 * (step % 2), 8 * (step % 2) + 8)
            loss = (tower(train[rows]).last_hidden_state - wanted[rows]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            after = apart(tower(test).last_hidden_state, held)
    assert before < 0.5 and after < 0.92 * before
    assert all(p.grad is None for p in tower.parameters())


def test_gradient_checkpointing_gives_the_same_gradients():
    name = "ViTModel"
    model = make(name)
    module = ReplacedAttention.for_host(model, "proxy-attention", **NEAR)
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.train()
        with vtc.compress(model, module):
            output = ENCODERS[name].call(model, ENCODERS[name].images())
            other = ENCODERS[name].call(model, ENCODERS[name].images(first=5))  # before the backward
            loss = tensors(output)[0].square().mean() + tensors(other)[0].square().mean()
            found.append(torch.autograd.grad(loss, list(module.parameters())))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))
    assert any(bool(x.any()) for x in found[0])


# -- in a vision-language model


def test_in_a_vision_language_model_prompts_stay_as_they_are(tmp_path):
    model, processor = small_model(), small_processor()
    inputs = encode(processor, list(QUESTIONS[:2]), [scene("test", i).image for i in range(2)])
    weights = list(model.state_dict())
    exact = ReplacedAttention.for_host(model, "proxy-attention", window=2, proxies=2)
    near = ReplacedAttention.for_host(model, "agent-attention", blocks=[0, 1], agents=9)
    with torch.no_grad():
        bare = model(**inputs).logits
        with vtc.compress(model, exact) as handle:
            assert apart(model(**inputs).logits, bare) < 1e-4
            assert [record.entering for record in handle.last] == [{"features": 144, "decoder": 144}] * 2
            told = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert torch.equal(told, model.generate(**inputs, max_new_tokens=3, do_sample=False))
            assert list(model.state_dict()) == weights
        with vtc.compress(model, near):
            assert apart(model(**inputs).logits, bare) > 1e-3
        assert torch.equal(model(**inputs).logits, bare)


def test_gradients_reach_the_module_through_the_language_model():
    model, processor = small_model(), small_processor()
    model.requires_grad_(False)
    inputs = encode(processor, [QUESTIONS[0]], [scene("test", 0).image])
    module = ReplacedAttention.for_host(model, "super-token-attention", blocks=[0])
    with vtc.compress(model, module):
        model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in module.parameters())
    assert any(bool(p.grad.any()) for p in module.parameters())


def test_operations_of_a_profile_are_those_of_the_replacement(tmp_path):
    model, processor = small_model(), small_processor()
    inputs = encode(processor, [QUESTIONS[0]], [scene("test", 0).image])
    module = ReplacedAttention.for_host(model, "super-token-attention")
    module.save_pretrained(tmp_path)
    bare = vtc.profile(model, inputs, repeats=1)["tflops"]["encoder"] * 1e12
    with vtc.compress(model, module):
        row = vtc.profile(model, inputs, repeats=1)
    saved = module.host_flops((12, 12)) - module.flops((12, 12))
    assert saved > 0 and abs(bare - row["tflops"]["encoder"] * 1e12 - saved) < 0.01 * saved
