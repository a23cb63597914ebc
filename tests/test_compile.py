"""torch.compile in every order with compress() and remove(), and compiled decoding over a static cache.

A compile takes seconds, so hosts have two layers of each kind and each test compiles as seldom as it can.
"""

import pytest
import torch
from tiny import SUPPRESS, build
from tiny.parts import randomise

import vtc

GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SUPPRESS}


@pytest.fixture
def shallow():
    """name -> a host of that name cut to two layers; nothing compiled is left behind."""
    yield _shallow
    torch.compiler.reset()


def _shallow(name):
    model, make_inputs = build(name)
    config = model.config
    for part in (config.vision_config, config.text_config):
        setattr(part, "depth" if hasattr(part, "depth") else "num_hidden_layers", 2)
        if getattr(part, "layer_types", None):
            part.layer_types = part.layer_types[-2:]
    return randomise(type(model)(config)), make_inputs


def compiled_module(model):
    return torch.compile(model, backend="eager")


def compiled_in_place(model):
    model.compile(backend="eager")
    return model


def compiled_forward(model):
    model.forward = torch.compile(model.forward, backend="eager")
    return model


@pytest.mark.parametrize("compiled", [compiled_module, compiled_in_place, compiled_forward])
@torch.no_grad()
def test_compiled_before_compressing(shallow, compiled):
    model, make_inputs = shallow("llava-clip")
    inputs = make_inputs((2, 1), pads=1)
    bare = model(**inputs).logits
    with vtc.compress(model, "tome", keep=0.4):
        expected = model(**inputs).logits
    fast = compiled(model)
    torch.testing.assert_close(fast(**inputs).logits, bare)
    # What was compiled for the bare model must not run for the compressed one, nor the other way round.
    with vtc.compress(fast, "tome", keep=0.4) as handle:
        torch.testing.assert_close(fast(**inputs).logits, expected)
        assert len(handle.last) == 3
    torch.testing.assert_close(fast(**inputs).logits, bare)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
@torch.no_grad()
def test_compiled_after_compressing(shallow, name):
    model, make_inputs = shallow(name)
    inputs = make_inputs((2, 1), pads=1)
    with vtc.compress(model, "tome", keep=0.4) as handle:
        expected = model(**inputs).logits
        torch.testing.assert_close(compiled_module(model)(**inputs).logits, expected)
        assert len(handle.last) == 3


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl", "gemma3"])
def test_compiled_decoding_over_a_static_cache(shallow, name):
    from transformers import CompileConfig

    model, make_inputs = shallow(name)
    inputs = make_inputs((2, 1), pads=1)
    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU only, unless it is told to
    positions = "keep" if name == "qwen2_5_vl" else "repack"
    with vtc.compress(model, "divprune", keep=0.3, positions=positions):
        expected = model.generate(**inputs, **GREEDY)
        torch._dynamo.utils.counters.clear()
        found = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        frames = torch._dynamo.utils.counters["stats"]
    assert torch.equal(found, expected)
    assert frames["unique_graphs"] >= 1  # it was compiled


@torch.no_grad()
def test_compiled_decoder_in_a_model_that_is_not(shallow):
    """What the hooks on the base model found out is not in its graph."""
    model, make_inputs = shallow("llava-clip")
    inputs = make_inputs((1,))
    bare = model(**inputs).logits
    with vtc.compress(model, "divprune", keep=0.4):
        expected = model(**inputs).logits
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    with vtc.compress(model, "divprune", keep=0.4) as handle:
        torch.testing.assert_close(model(**inputs).logits, expected)
        handle.keep = 1.0
        torch.testing.assert_close(model(**inputs).logits, bare)
