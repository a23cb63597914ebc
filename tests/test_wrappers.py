"""Compression together with what people wrap around models."""

import copy

import pytest
import torch
from footprint import footprint
from tiny import SUPPRESS, build

import vtc

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SUPPRESS}


@pytest.fixture
def host():
    model, make_inputs = build("llava-clip")
    return model, make_inputs((2, 1), pads=1)


def test_a_deep_copy_compresses_by_its_own_weights(host):
    model, inputs = host
    bare = copy.deepcopy(model)
    handle = vtc.compress(model, "vtc-cls", keep=0.4)
    twin = copy.deepcopy(model)
    for parameter in twin.model.vision_tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    bare.load_state_dict(twin.state_dict())
    handle.remove()
    with torch.no_grad(), vtc.compress(bare, "vtc-cls", keep=0.4):
        expected = bare(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(twin(**inputs).logits, expected)
        vtc.restore(twin)
        vtc.restore(bare) if hasattr(bare, "_vtc_handle") else None
        assert torch.equal(twin(**inputs).logits, bare(**inputs).logits)


def test_peft_wrapped(host):
    from peft import LoraConfig, get_peft_model

    model, inputs = host
    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    wrapped.eval()
    with vtc.compress(wrapped, "vtc-cls", keep=0.4) as handle:
        tokens = wrapped.generate(**inputs, **GREEDY)
        assert all(len(record.index) == 6 for record in handle.last)
        wrapped.train()
        wrapped(**inputs).logits.square().mean().backward()
    tower = [p.grad for n, p in wrapped.named_parameters() if "lora" in n and "tower.encoder.layers.0" in n]
    assert tower and all(g.isfinite().all() and g.abs().sum() > 0 for g in tower)
    merged = wrapped.eval().merge_and_unload()
    with vtc.compress(merged, "vtc-cls", keep=0.4):
        assert torch.equal(merged.generate(**inputs, **GREEDY), tokens)


@pytest.mark.parametrize("first", ["accelerate", "vtc"])
def test_accelerate_offload(host, first):
    from accelerate import cpu_offload

    model, inputs = host
    with vtc.compress(model, "vtc-cls", keep=0.4), torch.no_grad():
        expected = model(**inputs).logits
    if first == "accelerate":
        cpu_offload(model, execution_device="cpu")
    with vtc.compress(model, "vtc-cls", keep=0.4), torch.no_grad():
        if first == "vtc":
            cpu_offload(model, execution_device="cpu")
        torch.testing.assert_close(model(**inputs).logits, expected)


def test_saving_a_compressed_model(host, tmp_path):
    model, inputs = host
    before = footprint(model)
    with vtc.compress(model, "vtc-cls", keep=0.4):
        expected = model.generate(**inputs, **GREEDY)
        model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert footprint(model)[1] == before[1] == footprint(loaded)[1]
    with vtc.compress(loaded, "vtc-cls", keep=0.4):
        assert torch.equal(loaded.generate(**inputs, **GREEDY), expected)


@pytest.mark.parametrize("method", ["vtc-cls", "downsample", "random"])
def test_several_threads_at_once(host, method):
    """Each thread's calls keep to themselves."""
    from concurrent.futures import ThreadPoolExecutor

    model, _ = host
    _, make_inputs = build("llava-clip")
    many = [make_inputs((1 + i % 2, 1), seed=i) for i in range(12)]
    with vtc.compress(model, method, keep=0.4):
        expected = [model.generate(**inputs, **GREEDY) for inputs in many]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda inputs: model.generate(**inputs, **GREEDY), many))
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_a_users_own_wrap_of_get_image_features_stays(host):
    model, inputs = host
    calls = []

    def counting(self, *args, **kwargs):
        calls.append(1)
        return type(self).get_image_features(self, *args, **kwargs)

    counting.__wrapped__ = type(model.model).get_image_features
    model.model.get_image_features = counting.__get__(model.model)
    with vtc.compress(model, "tome", keep=0.4), torch.no_grad():
        model(**inputs)
    assert calls == [1]
    assert vars(model.model)["get_image_features"].__func__ is counting
