"""Compression together with what people wrap around models."""

import copy

import pytest
import torch
from footprint import footprint
from tiny import build
from wrapping import (
    GREEDY,
    assert_as_shortened_by_hand,
    compressed_logits,
    logits,
    on_three_hosts,
    prepared,
)

import vtc
from vtc.hosts import open_host


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


LORA = {"target_modules": ["q_proj", "v_proj", "qkv"], "init_lora_weights": False}


@on_three_hosts
def test_lora_put_on_and_merged_while_compressed(name):
    from peft import LoraConfig, get_peft_model

    model, inputs, method = prepared(name)
    before = copy.deepcopy(model)
    handle = vtc.compress(model, method, keep=0.4)
    torch.manual_seed(1)
    after = get_peft_model(model, LoraConfig(**LORA)).eval()
    torch.manual_seed(1)
    before = get_peft_model(before, LoraConfig(**LORA)).eval()
    found, tokens = logits(after, inputs), after.generate(**inputs, **GREEDY)
    assert torch.equal(found, compressed_logits(before, inputs, method))
    merged = after.merge_and_unload()
    assert vtc.api.current(merged) is handle
    torch.testing.assert_close(logits(merged, inputs), found, atol=1e-4, rtol=1e-4)
    assert torch.equal(merged.generate(**inputs, **GREEDY), tokens)
    vtc.restore(merged)
    torch.testing.assert_close(logits(merged, inputs), logits(before, inputs), atol=1e-4, rtol=1e-4)


@on_three_hosts
def test_an_adapter_of_transformers_added_while_compressed(name):
    from peft import LoraConfig

    model, inputs, method = prepared(name)
    before = copy.deepcopy(model)
    with vtc.compress(model, method, keep=0.4):
        torch.manual_seed(1)
        model.add_adapter(LoraConfig(**LORA))
        found = logits(model, inputs)
    torch.manual_seed(1)
    before.add_adapter(LoraConfig(**LORA))
    assert torch.equal(found, compressed_logits(before, inputs, method))


@pytest.mark.parametrize("name", ["llava-clip", "gemma3"])  # PEFT itself fails on Qwen's positions
def test_prompt_tuning(name):
    from peft import PromptTuningConfig, get_peft_model

    model, inputs, method = prepared(name)
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    tuned = get_peft_model(model, config).eval()
    assert_as_shortened_by_hand(tuned, inputs, method, virtual=3, atol=1e-4, rtol=1e-4)


def test_a_projector_that_peft_copies(host):
    """Of the methods, 'downsample' alone has hooks on the projector."""
    from peft import LoraConfig, get_peft_model

    model, inputs = host
    config = LoraConfig(**LORA, modules_to_save=["multi_modal_projector"])
    expected = compressed_logits(model, inputs, "downsample")
    handle = vtc.compress(model, "downsample", keep=0.4)
    logits(model, inputs)
    torch.manual_seed(1)
    wrapped = get_peft_model(model, config).eval()
    with pytest.raises(RuntimeError, match=r"modules_to_save.*replace=True"):
        logits(wrapped, inputs)
    handle.remove()
    bare = logits(wrapped, inputs)
    with wrapped.disable_adapter():
        assert torch.equal(compressed_logits(wrapped, inputs, "downsample"), expected)
    assert torch.equal(logits(wrapped, inputs), bare)


def test_a_decoder_replaced_while_compressed(host):
    model, inputs = host
    with vtc.compress(model, "vtc-cls", keep=0.4):
        model.model.language_model = type(model.model.language_model)(model.config.text_config).eval()
        with pytest.raises(RuntimeError, match=r"decoder was replaced.*replace=True"):
            logits(model, inputs)
        with vtc.compress(model, "vtc-cls", keep=0.4, replace=True):
            assert not logits(model, inputs).isnan().any()


@on_three_hosts
def test_attention_set_anew_while_compressed(name):
    """The layers that are recorded take part, and go on being recorded."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    model, inputs, method = prepared(name)
    called = set()

    def noting(module, *args, **kwargs):
        called.add(module)
        return sdpa_attention_forward(module, *args, **kwargs)

    AttentionInterface.register("noting", noting)
    with vtc.compress(model, method, keep=0.4) as handle:
        expected, records = logits(model, inputs), handle.last
        model.set_attn_implementation({"vision_config": "noting"})
        assert torch.equal(logits(model, inputs), expected)
        assert all(a is not b and torch.equal(a.index, b.index) for a, b in zip(handle.last, records))
    encoder = open_host(model).encoder
    assert called == {encoder.attention(layer) for layer in range(len(encoder.blocks))}
    model.set_attn_implementation("eager")
    assert {m.config._attn_implementation for m in model.modules() if hasattr(m, "config")} == {"eager"}
    with vtc.compress(model, method, keep=0.4):
        model.set_attn_implementation("sdpa")
        torch.testing.assert_close(logits(model, inputs), expected, atol=1e-4, rtol=1e-4)


def device_maps(model):
    """Where each part goes, by the name of the map."""
    text, layers = "model.language_model", "model.language_model.layers"
    names = ["lm_head", *(f"model.{part}" for part, _ in model.model.named_children())]
    names += [f"{text}.{part}" for part, _ in model.model.language_model.named_children()]
    cpu = {name: "cpu" for name in names if name not in (text, layers)}
    each = [f"{layers}.{i}" for i in range(len(model.model.language_model.layers))]
    return {
        "cpu": {"": "cpu"},
        "disk": {"": "disk"},
        "layers": {**cpu, each[0]: "cpu", **dict.fromkeys(each[1:], "disk")},
        "tower": {**cpu, layers: "cpu", f"model.{open_host(model).host.tower}": "disk"},
    }


@on_three_hosts
@pytest.mark.parametrize("kind", ["cpu", "disk", "layers", "tower"])
def test_device_maps(name, kind, tmp_path):
    model, inputs, method = prepared(name)
    with vtc.compress(model, method, keep=0.4):
        expected, tokens = logits(model, inputs), model.generate(**inputs, **GREEDY)
    model.save_pretrained(tmp_path / "model")
    spread = type(model).from_pretrained(
        tmp_path / "model", device_map=device_maps(model)[kind], offload_folder=tmp_path / "offload"
    )
    assert any(parameter.is_meta for parameter in spread.parameters()) == (kind != "cpu")
    bare = logits(spread, inputs)
    with vtc.compress(spread.eval(), method, keep=0.4):
        assert torch.equal(logits(spread, inputs), expected)
        assert torch.equal(spread.generate(**inputs, **GREEDY), tokens)
    assert torch.equal(logits(spread, inputs), bare)


@on_three_hosts
def test_dispatching_a_compressed_model(name, tmp_path):
    from accelerate import dispatch_model

    model, inputs, method = prepared(name)
    with vtc.compress(model, method, keep=0.4):
        expected = logits(model, inputs)
        dispatch_model(model, device_maps(model)["layers"], main_device="cpu", offload_dir=tmp_path)
        assert torch.equal(logits(model, inputs), expected)


@on_three_hosts
@pytest.mark.parametrize("strict", [True, False])
def test_export_is_refused(name, strict):
    model, inputs, method = prepared(name)
    with vtc.compress(model, method, keep=0.4), pytest.raises(Exception, match="cannot be exported"):
        torch.export.export(model, (), inputs, strict=strict)


def test_tracing_is_refused(host):
    model, inputs = host
    with vtc.compress(model, "vtc-cls", keep=0.4), pytest.raises(RuntimeError, match="cannot be exported"):
        torch.jit.trace(model, example_kwarg_inputs=inputs, strict=False)
