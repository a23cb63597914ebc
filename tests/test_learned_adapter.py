"""Low-rank updates of the language model that go along with a module."""

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import build as host
from tiny.encoders import make

import vtc
from vtc.learned import ReplacedAttention, build, from_pretrained
from vtc.learned.adapter import Adapter


@pytest.fixture
def adapted():
    """A tiny LLaVA, its inputs, and a module with an adapter that adds something."""
    model, make_inputs = host("llava-clip")
    width = model.config.vision_config.hidden_size
    module = build("ordered", in_width=width, tokens=8, width=16, heads=2, decoder_width=16, decoder_heads=2)
    module.adapt(model, rank=2)
    return model.eval(), make_inputs(), module.eval()


@torch.no_grad()
def _stir(module):
    for weight in module.adapter.up:
        weight.normal_(std=0.1)


@torch.no_grad()
def test_a_fresh_one_adds_nothing_and_a_trained_one_does(adapted):
    model, inputs, module = adapted
    plain = build("ordered", **vars(module.config))
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("adapter.")})
    with vtc.compress(model, plain, keep=4):
        wanted = model(**inputs).logits
    with vtc.compress(model, module, keep=4):
        assert torch.equal(model(**inputs).logits, wanted)
        _stir(module)
        assert not torch.allclose(model(**inputs).logits, wanted, atol=1e-3)


@torch.no_grad()
def test_it_equals_updated_weights(adapted):
    model, inputs, module = adapted
    _stir(module)
    with vtc.compress(model, module, keep=4):
        found = model(**inputs).logits
    layers = dict(model.model.language_model.named_modules())
    for name, down, up in zip(module.adapter.layers, module.adapter.down, module.adapter.up):
        layers[name].weight += up @ down
    module.adapter = None
    with vtc.compress(model, module, keep=4):
        torch.testing.assert_close(model(**inputs).logits, found, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_removing_leaves_the_host_as_it_was(adapted):
    model, inputs, module = adapted
    before, names = model(**inputs).logits, list(model.state_dict())
    _stir(module)
    handle = vtc.compress(model, module, keep=4)
    model(**inputs)
    assert list(model.state_dict()) == names
    handle.remove()
    assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_it_rests_where_all_tokens_are_kept(adapted):
    model, inputs, module = adapted
    before = model(**inputs).logits
    _stir(module)
    with vtc.compress(model, module, keep=4) as handle:
        handle.keep = 1.0
        assert torch.equal(model(**inputs).logits, before)


@torch.no_grad()
def test_a_copy_of_the_host_has_an_adapter_of_its_own(adapted):
    model, inputs, module = adapted
    _stir(module)
    with vtc.compress(model, module, keep=4):
        wanted = model(**inputs).logits
        copy = deepcopy(model)
        for weight in module.adapter.up:
            weight.zero_()
        assert torch.equal(copy(**inputs).logits, wanted)
        assert not torch.equal(model(**inputs).logits, wanted)


def test_it_learns_with_the_module(adapted):
    model, inputs, module = adapted
    model.requires_grad_(False)
    with vtc.compress(model, module, keep=4):
        model(**inputs).logits.square().mean().backward()
    assert all(weight.grad is not None and weight.grad.abs().max() > 0 for weight in module.adapter.up)
    assert module.out_proj.weight.grad.abs().max() > 0


@torch.no_grad()
def test_it_is_saved_along(adapted, tmp_path):
    model, inputs, module = adapted
    _stir(module)
    module.save_pretrained(tmp_path)
    with vtc.compress(model, module, keep=4):
        wanted = model(**inputs).logits
    assert from_pretrained(tmp_path).adapter.rank == 2
    with vtc.compress(model, tmp_path, keep=4):
        assert torch.equal(model(**inputs).logits, wanted)


def test_alpha_scales_it():
    layer = torch.nn.Sequential(torch.nn.Linear(4, 3))
    x = torch.randn(2, 4)
    bare = layer(x)
    added = []
    for alpha in (None, 1.0):
        torch.manual_seed(0)
        adapter = Adapter.of(layer, rank=2, alpha=alpha)
        torch.nn.init.ones_(adapter.up[0])
        hooks = adapter.install(layer)
        added.append(layer(x) - bare)
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(added[1], added[0] / 2)
    assert torch.equal(layer(x), bare)


def test_another_language_model_is_refused(adapted):
    model, inputs, module = adapted
    module.adapter = Adapter.of(torch.nn.Sequential(torch.nn.Linear(4, 3)))
    with pytest.raises(ValueError, match="has an adapter for a language model with a layer 0 of widths"):
        vtc.compress(model, module, keep=4)
    assert model(**inputs).logits.isfinite().all()
    with pytest.raises(ValueError, match="no linear layers"):
        Adapter.of(torch.nn.Conv1d(2, 2, 1))
    with pytest.raises(ValueError, match="at least 1"):
        Adapter({"a": (2, 2)}, rank=0)
    with pytest.raises(ValueError, match="a whole number and at least 1, not '2'"):
        Adapter({"a": (2, 2)}, rank="2")


def test_a_model_without_a_language_model_has_none():
    module = build("ordered", in_width=32, tokens=4, width=16, heads=2, decoder_width=16, decoder_heads=2)
    with pytest.raises(ValueError, match="no language model"):
        module.adapt(make("timm-deit"), rank=2)


@torch.no_grad()
def test_one_module_in_two_hosts_is_taken_out_of_one(adapted):
    model, inputs, module = adapted
    _stir(module)
    other, _ = host("llava-clip", seed=1)
    handles = [vtc.compress(each.eval(), module, keep=4) for each in (model, other)]
    wanted = other(**inputs).logits
    handles[0].remove()
    assert torch.equal(other(**inputs).logits, wanted)
    handles[1].remove()
    for each in (model, other):
        assert not any(part._forward_hooks for part in each.model.language_model.modules())


@torch.no_grad()
@pytest.mark.parametrize("where", ["encoder", "attention"])
def test_it_goes_along_where_the_tower_has_the_module(adapted, where):
    model, inputs, _ = adapted
    if where == "encoder":
        module = build("learned-scorer", in_width=model.config.vision_config.hidden_size).eval()
        settings = {"keep": 0.5, "stage": "encoder"}
    else:
        module, settings = ReplacedAttention.for_host(model, "agent-attention", agents=4), {}
    bare = model(**inputs).logits
    with vtc.compress(model, module, **settings):
        wanted = model(**inputs).logits
    module.adapt(model, rank=2)
    with vtc.compress(model, module, **settings):
        assert torch.equal(model(**inputs).logits, wanted)
        _stir(module)
        assert not torch.allclose(model(**inputs).logits, wanted, atol=1e-3)
    assert torch.equal(model(**inputs).logits, bare)


@torch.no_grad()
def test_one_made_in_a_model_of_peft_fits_the_plain_one(adapted):
    model, inputs, module = adapted
    wrapped = get_peft_model(model, LoraConfig(target_modules="all-linear", r=2))
    module.adapt(wrapped, rank=2)
    _stir(module)
    with vtc.compress(wrapped, module, keep=4):
        wanted = wrapped(**inputs).logits
    with vtc.compress(wrapped.unload(), module, keep=4):
        torch.testing.assert_close(model(**inputs).logits, wanted)


@pytest.mark.parametrize("alpha", [0, -1.0])
def test_an_adapter_that_could_add_nothing_is_refused(alpha):
    with pytest.raises(ValueError, match="the alpha of an adapter is a positive number"):
        Adapter.of(torch.nn.Sequential(torch.nn.Linear(4, 3)), rank=2, alpha=alpha)
