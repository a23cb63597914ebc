"""Modules with weights that make fewer tokens between the blocks of an encoder."""

import gc

import pytest
import torch
from learned_host import apart
from small import QUESTIONS, small_model, small_processor
from tiny.encoders import ENCODERS, make
from torch import nn

import vtc
from vtc.api import current
from vtc.evaluation.prompts import encode
from vtc.evaluation.scenes import scene
from vtc.learned import build, from_pretrained
from vtc.learned.token_slimming import ReverseSlimming, recalibration_loss
from vtc.tokens import Reduction

# of grids of 4 x 6 and 4 x 4, by name: options, the settings of compress(), tokens of 4 x 6 that are left
CASES = {
    "token-slimming": ({"tokens": 6}, {}, 6),
    "semantic-tokens": ({"heads": 4, "window": 2, "sample": 1, "area": 2}, {}, 6),
    "super-tokens": ({"heads": 4}, {"keep": 6}, 6),
    "learned-scorer": ({}, {"keep": 6}, 6),
    "reconstructing-selector": ({"width": 16, "heads": 2, "depth": 1}, {"keep": 6}, 6),
}
TOWERS = ("timm-deit", "timm-dinov3", "CLIPVisionModelWithProjection", "open_clip-tok", "Dinov2Model")


def module_of(name, width=32, seed=0):
    torch.manual_seed(seed)
    module = build(name, in_width=width, **CASES[name][0])
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval()


def first(output):
    return output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tower", TOWERS)
@torch.no_grad()
def test_as_many_tokens_leave_the_tower_and_removing_gives_it_back(tower, name):
    model, encoder, module = make(tower), ENCODERS[tower], module_of(name)
    settings = CASES[name][1]
    if encoder.n == 16 and name != "token-slimming":
        settings = settings and {"keep": 4}
    pixels = encoder.images()
    bare = first(encoder.call(model, pixels))
    with vtc.compress(model, module, stage="encoder", **settings) as handle:
        out = first(encoder.call(model, pixels))
        left = 6 if encoder.n == 24 or name == "token-slimming" else 4
        assert [len(record.index) for record in handle.last] == [left, left]
        assert bool(out.isfinite().all()) and not torch.equal(out.flatten(1)[:, :9], bare.flatten(1)[:, :9])
        alone = first(encoder.call(model, pixels[1:]))
        assert torch.allclose(alone, out[1:], atol=1e-4)
    assert torch.equal(first(encoder.call(model, pixels)), bare)


@pytest.mark.parametrize("name", ["token-slimming", "semantic-tokens", "super-tokens"])
@torch.no_grad()
def test_the_next_block_is_given_what_the_module_makes(name):
    model, encoder, module = make("timm-deit"), ENCODERS["timm-deit"], module_of(name)
    seen = []
    blocks = encoder.blocks_of(model)
    hook = blocks[1].register_forward_hook(lambda _, __, out: seen.append(out))
    encoder.call(model, encoder.images())
    hook.remove()
    expected = torch.cat([seen[0][:, :1], module(seen[0][:, 1:], encoder.grid, 6)], 1)
    given = []
    with vtc.compress(model, module, keep=6, stage="encoder", schedule=(1,)):
        hook = blocks[2].norm1.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        encoder.call(model, encoder.images())
        hook.remove()
    assert given[0].shape == (2, 7, 32) and apart(given[0], expected) < 1e-5


@torch.no_grad()
def test_a_scorer_works_at_several_blocks_each_on_what_is_left():
    model, encoder, scorer = make("timm-deit"), ENCODERS["timm-deit"], module_of("learned-scorer")
    blocks, given = encoder.blocks_of(model), {}
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, number=number: given.__setitem__(number, args[0]))
    with vtc.compress(model, scorer, keep={0: 12, 2: 5}, stage="encoder") as handle:
        encoder.call(model, encoder.images())
        assert "12 x 2, 5 x 2" in handle.describe()
    x = given[0]
    for number, k in ((0, 12), (1, None), (2, 5)):
        x = blocks[number](x)
        if k:
            chosen = scorer.scores(x[:, 1:], (1, x.shape[1] - 1)).topk(k, dim=1).indices.sort(1).values
            rows = torch.arange(2)[:, None]
            x = torch.cat([x[:, :1], x[:, 1:][rows, chosen]], 1)
        assert torch.allclose(given[number + 1], x, atol=1e-5)


@torch.no_grad()
def test_each_block_has_its_own_module_and_fixed_numbers_need_no_budget(tmp_path):
    model, encoder = make("timm-deit"), ENCODERS["timm-deit"]
    torch.manual_seed(0)
    sizes = tuple({"in_width": 32, "tokens": k} for k in (12, 5))
    slim = build("staged", module="token-slimming", blocks=(0, 2), options=sizes)
    blocks, given = encoder.blocks_of(model), {}
    for number, block in enumerate(blocks):
        block.register_forward_pre_hook(lambda _, args, number=number: given.__setitem__(number, args[0]))
    with vtc.compress(model, slim) as handle:
        out = encoder.call(model, encoder.images())
        assert "12 x 2, 5 x 2" in handle.describe()
    expected = slim.parts[0].slim(blocks[0](given[0]), prefix=1)
    assert apart(given[1], expected) < 1e-5
    expected = slim.parts[1].slim(blocks[2](blocks[1](expected)), prefix=1)
    assert apart(given[3], expected) < 1e-5
    slim.save_pretrained(tmp_path)
    with vtc.compress(model, str(tmp_path)):
        assert torch.equal(encoder.call(model, encoder.images()), out)
    assert list(from_pretrained(tmp_path).state_dict()) == list(slim.state_dict())
    with pytest.raises(ValueError, match=r"made for blocks 0, 2, not for \[1\]"):
        vtc.compress(model, slim, keep=5, schedule=(1,))


def test_published_scorers_of_a_model_load_into_its_stages(tmp_path):
    torch.manual_seed(0)
    scorers = build("staged", module="learned-scorer", blocks=(0, 1, 2), options=({"in_width": 32},))
    state = {key.replace("parts.", "score_predictor."): x for key, x in scorers.state_dict().items()}
    torch.save({"model": state | {"head.weight": torch.zeros(2, 32)}}, tmp_path / "model.pth")
    kind, options = type(scorers), {"blocks": (0, 1, 2), "options": ({"in_width": 32},)}
    loaded = kind.from_pretrained(tmp_path / "model.pth", **options)
    assert all(torch.equal(x, loaded.state_dict()[key]) for key, x in scorers.state_dict().items())
    model, encoder = make("timm-deit"), ENCODERS["timm-deit"]
    with torch.no_grad(), vtc.compress(model, loaded, keep=0.25) as handle:
        encoder.call(model, encoder.images())
        assert len(handle.last[0].index) == 6
    with pytest.raises(ValueError, match="makes any number of tokens: give it a budget"):
        vtc.compress(model, loaded)


@pytest.mark.parametrize("name", CASES)
def test_in_a_vision_language_model_prompts_follow(name):
    model, processor = small_model(), small_processor()
    options = {"token-slimming": {"tokens": 36}, "semantic-tokens": {"heads": 4, "window": 4, "area": 6}}
    module = build(name, in_width=32, **CASES[name][0] | options.get(name, {})).eval()
    settings = {"stage": "encoder", "schedule": (0,), "keep": 9 if name == "semantic-tokens" else 36}
    inputs = encode(processor, list(QUESTIONS[:2]), [scene("test", i).image for i in range(2)])
    k, tower = settings["keep"], model.model.vision_tower
    with torch.no_grad():
        bare = model(**inputs).logits
        with vtc.compress(tower, module, **settings) as handle:
            alone = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2][:, 1:]
            orders = [record.order for record in handle.last]
        with vtc.compress(model, module, **settings) as handle:
            features = model.model.get_image_features(inputs["pixel_values"]).pooler_output
            logits = model(**inputs).logits
            assert [record.entering["decoder"] for record in handle.last] == [k, k]
            told = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            assert torch.equal(told, model.generate(**inputs, max_new_tokens=3, do_sample=False))
        for x, tokens, order in zip(features, alone, orders, strict=True):
            kept = x[~x.isnan().any(1)]
            made = model.model.multi_modal_projector(tokens)[order.argsort()]  # in the order of places
            assert apart(kept, made) < 1e-4
        assert torch.equal(model(**inputs).logits, bare) and not torch.equal(logits[:, -1], bare[:, -1])


@pytest.mark.parametrize("name", ["token-slimming", "semantic-tokens", "super-tokens"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_reach_module_and_tower_also_with_checkpointing(name, checkpointing):
    """checkpointing: None for without, else whether the reentrant one."""
    model, encoder, module = make("ViTModel"), ENCODERS["ViTModel"], module_of(name)
    model.train()
    pixels, other = encoder.images().requires_grad_(), encoder.images(first=7)
    found = []
    for again in (False, checkpointing is not None):
        if again:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        with vtc.compress(model, module, keep=6, stage="encoder", schedule=(1,)):
            loss = first(encoder.call(model, pixels)).square().mean()
            loss = loss + first(encoder.call(model, other.requires_grad_())).square().mean()
            loss.backward()
        weights = [*module.parameters(), *encoder.blocks_of(model)[0].parameters()]
        assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in weights)
        found.append([p.grad.clone() for p in weights])
        assert sum(bool(grad.any()) for grad in found[-1]) > 0.8 * len(weights)
        model.zero_grad(), module.zero_grad()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*found, strict=True))


def test_no_graph_of_an_earlier_forward_is_kept():
    model, encoder, module = make("timm-deit"), ENCODERS["timm-deit"], module_of("semantic-tokens")
    with vtc.compress(model, module, stage="encoder") as handle:
        for _ in range(3):
            encoder.call(model, encoder.images()).square().mean().backward()
        gc.collect()
        held = [x for x in gc.get_objects() if isinstance(x, Reduction)]
        assert len(handle.last) == 2 and held
        assert all(x.new is None or not x.new.requires_grad for x in held)


def test_slimming_learns_to_give_the_teachers_features_back():
    """SiT's recipe: slimmed tokens of every later layer, reversed, against the layers of the whole tower."""
    torch.manual_seed(0)
    model, encoder = make("ViTModel").requires_grad_(False), ENCODERS["ViTModel"]
    module = build("token-slimming", in_width=32, tokens=6)
    back = nn.ModuleList(
        build("reverse-slimming", width=32, tokens=6, recovered=24, ratio=2.0) for _ in range(2)
    )
    assert isinstance(back[0], ReverseSlimming)
    common = 0.3 * encoder.images(1, seed=5)  # pictures that have something in common
    train, test = (common + 0.1 * encoder.images(16, first=n) for n in (0, 50))

    def layers(pixels):
        states = model(pixels, output_hidden_states=True).hidden_states
        return [x[:, 1:] for x in states[3:5]]  # behind blocks 2 and 3

    with torch.no_grad():
        teacher, wanted = layers(train), layers(test)
    optimizer = torch.optim.Adam([*module.parameters(), *back.parameters()], 3e-3)
    losses = []
    with vtc.compress(model, module, stage="encoder", schedule=(1,)) as handle:

        def loss_of(pixels, targets):
            found = [reverse(x) for reverse, x in zip(back, layers(pixels), strict=True)]
            return recalibration_loss(found, targets)

        with torch.no_grad():
            before = float(loss_of(test, wanted))
        for _ in range(60):
            loss = loss_of(train, teacher)
            optimizer.zero_grad()
            loss.backward()
            assert module.weight[3].weight.grad.any()
            optimizer.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            after = float(loss_of(test, wanted))
        assert len(handle.last[0].index) == 6
    assert losses[-1] < losses[0] / 2 and after < before / 2


def test_what_does_not_fit_is_refused_and_the_model_is_as_it_was():
    model, encoder = make("timm-deit"), ENCODERS["timm-deit"]
    wide, slim = module_of("token-slimming", width=16), module_of("token-slimming")
    with pytest.raises(ValueError, match=r"makes tokens of 16 numbers of 16, and those in .* have 32"):
        vtc.compress(model, wide, stage="encoder")
    with pytest.raises(ValueError, match="works on the whole grid"):
        vtc.compress(model, module_of("semantic-tokens"), keep=6, stage="encoder", schedule=(0, 1))
    with pytest.raises(ValueError, match="give it a budget"):
        vtc.compress(model, module_of("learned-scorer"), stage="encoder")
    with pytest.raises(ValueError, match="cannot work at several blocks"):
        build("staged", module="semantic-tokens", blocks=(0, 1))
    with pytest.raises(ValueError, match="ascending"):
        build("staged", blocks=(3, 1))
    with pytest.raises(ValueError, match="options for each of the 3 blocks"):
        build("staged", blocks=(0, 1, 2), options=({}, {}))
    assert current(model) is None
    wanted = pytest.raises(ValueError, match=r"of 4 x 6 tokens, .* makes 6 tokens, not 8")
    with vtc.compress(model, slim, keep=8, stage="encoder"), wanted:
        encoder.call(model, encoder.images())
    assert encoder.call(model, encoder.images()).isfinite().all()
