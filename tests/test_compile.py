"""torch.compile in every order with compress() and remove(), and compiled decoding over a static cache."""

import pytest
import torch
from tiny import SUPPRESS, build

import vtc

GREEDY = {"max_new_tokens": 5, "do_sample": False, "suppress_tokens": SUPPRESS}


@pytest.fixture(params=["llava-clip", "qwen2_5_vl", "gemma3"])
def host(request):
    yield build(request.param)
    torch.compiler.reset()


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
def test_compiled_before_and_after_compressing(host, compiled):
    model, make_inputs = host
    inputs = make_inputs((2, 1), pads=1)
    bare = model(**inputs).logits
    with vtc.compress(model, "tome", keep=0.4):
        expected = model(**inputs).logits
    fast = compiled(model)
    torch.testing.assert_close(fast(**inputs).logits, bare)
    for _ in range(2):  # what was compiled for the bare model must not run, nor what was for the other
        with vtc.compress(fast, "tome", keep=0.4) as handle:
            torch.testing.assert_close(fast(**inputs).logits, expected)
            assert len(handle.last) == 3
            handle.keep = 1.0
            torch.testing.assert_close(fast(**inputs).logits, bare)
        torch.testing.assert_close(fast(**inputs).logits, bare)


@pytest.mark.parametrize("positions", ["keep", "repack"])
@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_decoding_over_a_static_cache(host, fullgraph, positions):
    from transformers import CompileConfig

    model, make_inputs = host
    if "qwen" in model.config.model_type and positions == "repack":
        positions = "keep"
    inputs = make_inputs((2, 1), pads=1)
    config = CompileConfig(backend="eager", fullgraph=fullgraph, mode=None)
    config._compile_all_devices = True  # transformers compiles on a GPU only, unless it is told to
    with vtc.compress(model, "divprune", keep=0.3, positions=positions):
        expected = model.generate(**inputs, **GREEDY)
        torch._dynamo.utils.counters.clear()
        found = model.generate(**inputs, **GREEDY, cache_implementation="static", compile_config=config)
        frames = torch._dynamo.utils.counters["stats"]
    assert torch.equal(found, expected)
    assert frames["unique_graphs"] >= 1  # it was compiled


@torch.no_grad()
def test_compiled_decoder_in_a_model_that_is_not():
    """What the hooks on the base model found out is not in its graph."""
    model, make_inputs = build("llava-clip")
    inputs = make_inputs((1,))
    with vtc.compress(model, "divprune", keep=0.4):
        expected = model(**inputs).logits
    model.model.language_model = torch.compile(model.model.language_model, backend="eager")
    with vtc.compress(model, "divprune", keep=0.4):
        torch.testing.assert_close(model(**inputs).logits, expected)
    torch.compiler.reset()
