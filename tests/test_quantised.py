"""Compression of quantised and half-precision models, as their packages load them."""

import copy

import pytest
import torch
from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from transformers import BitsAndBytesConfig, TorchAoConfig
from wrapping import (
    assert_as_shortened_by_hand,
    assert_same,
    compressed_logits,
    gradients,
    logits,
    on_three_hosts,
    prepared,
)

import vtc

EXACT = {"atol": 1e-4, "rtol": 1e-4}
ROUNDED = {"atol": 0.1, "rtol": 0.1}  # activations are rounded, so the last bit of one may move it by a step


def in_place(config):
    def quantise(model, folder):
        quantize_(model, config)
        return model

    return quantise


def loaded(**options):
    def quantise(model, folder):
        model.save_pretrained(folder)
        return type(model).from_pretrained(folder, **options).eval()

    return quantise


WAYS = {
    "torchao-weights": (in_place(Int8WeightOnlyConfig()), EXACT),
    "torchao-dynamic": (in_place(Int8DynamicActivationInt8WeightConfig()), ROUNDED),
    "torchao-loaded": (loaded(quantization_config=TorchAoConfig(Int8WeightOnlyConfig())), EXACT),
    "bitsandbytes-8bit": (
        loaded(quantization_config=BitsAndBytesConfig(load_in_8bit=True), device_map={"": "cpu"}),
        ROUNDED,
    ),
    "bfloat16": (loaded(dtype=torch.bfloat16), ROUNDED),
}


def assert_compresses(model, inputs, method, tolerance):
    bare = logits(model, inputs)
    with vtc.compress(model, method, keep=1.0):
        assert torch.equal(logits(model, inputs), bare)
    assert_as_shortened_by_hand(model, inputs, method, **tolerance)
    assert torch.equal(logits(model, inputs), bare)


@on_three_hosts
@pytest.mark.parametrize("way", WAYS)
def test_equals_the_quantised_model_over_shortened_prompts(name, way, tmp_path):
    model, inputs, method = prepared(name)
    plain = logits(model, inputs)
    quantise, tolerance = WAYS[way]
    model = quantise(model, tmp_path)
    assert not torch.equal(logits(model, inputs).float(), plain)
    assert_compresses(model, inputs, method, tolerance)


def test_bitsandbytes_4bit(tmp_path):
    """Its blocks on a CPU are 64 wide, and so must the layers be."""
    model, inputs, method = prepared("llava-clip")
    for part in (model.config.text_config, model.config.vision_config):
        part.hidden_size, part.intermediate_size, part.head_dim = 64, 128, 16
    wide = type(model)(model.config).eval()
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    wide = loaded(quantization_config=config, device_map={"": "cpu"})(wide, tmp_path)
    assert_compresses(wide, inputs, method, ROUNDED)


@on_three_hosts
def test_quantising_a_compressed_model(name):
    model, inputs, method = prepared(name)
    before = copy.deepcopy(model)
    quantize_(before, Int8WeightOnlyConfig())
    with vtc.compress(model, method, keep=0.4):
        quantize_(model, Int8WeightOnlyConfig())
        assert torch.equal(logits(model, inputs), compressed_logits(before, inputs, method))
    assert torch.equal(logits(model, inputs), logits(before, inputs))


@on_three_hosts
def test_casting_a_compressed_model(name):
    model, inputs, method = prepared(name)
    before = copy.deepcopy(model).to(torch.bfloat16)
    with vtc.compress(model, method, keep=0.4):
        model.to(torch.bfloat16)
        assert torch.equal(logits(model, inputs), compressed_logits(before, inputs, method))


@on_three_hosts
def test_training_adapters_of_a_quantised_model(name, tmp_path):
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    model, inputs, method = prepared(name)
    model = WAYS["bitsandbytes-8bit"][0](model, tmp_path)
    adapter = LoraConfig(target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
    model = get_peft_model(model, adapter).train()
    with vtc.compress(model, method, keep=0.4) as handle:
        expected = gradients(model, inputs)
        assert all(len(record.index) < len(record.source) for record in handle.last)
    assert sum(gradient.abs().sum() > 0 for gradient in expected.values()) > 8
    prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in parameter_name)
    with vtc.compress(model, method, keep=0.4):
        assert_same(gradients(model, inputs), expected)
