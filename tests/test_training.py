"""Training a compressed model: checkpointing, Trainer, and the wrappers of distributed training."""

import copy

import pytest
import torch
from torch import distributed
from wrapping import assert_same, gradients, on_three_hosts, prepared

import vtc


@pytest.fixture
def group():
    """A process group of this process alone."""
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@on_three_hosts
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("lora", [True, False])
def test_gradient_checkpointing(name, lora, reentrant):
    from peft import LoraConfig, get_peft_model

    model, inputs, method = prepared(name)
    if lora:
        adapter = LoraConfig(target_modules=["q_proj", "v_proj", "qkv"], init_lora_weights=False)
        model = get_peft_model(model, adapter)
    model.train()
    with vtc.compress(model, method, keep=0.4):
        expected = gradients(model, inputs)
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        assert_same(gradients(model, inputs), expected)
    assert sum("vision" in key or "visual" in key for key in expected) > 2
    with vtc.compress(model, method, keep=0.4):
        assert_same(gradients(model, inputs), expected)


@on_three_hosts
@pytest.mark.parametrize("checkpointing", [True, False])
def test_trainer(name, checkpointing, tmp_path):
    from transformers import Trainer, TrainingArguments

    model, inputs, method = prepared(name)
    inputs = {**inputs, "labels": inputs["input_ids"]}
    by_hand, steps, rate = copy.deepcopy(model), 2, 0.05
    arguments = TrainingArguments(
        tmp_path,
        max_steps=steps,
        learning_rate=rate,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=1,
        per_device_eval_batch_size=1,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    with vtc.compress(model, method, keep=0.4) as handle:
        trainer = Trainer(
            model, arguments, data_collator=lambda items: items[0], train_dataset=[inputs] * steps
        )
        trainer.train()
        loss = trainer.evaluate([inputs])["eval_loss"]
        assert all(len(record.index) < len(record.source) for record in handle.last)
        trainer.save_model(tmp_path)
    with vtc.compress(by_hand, method, keep=0.4):
        for _ in range(steps):
            by_hand.zero_grad()
            by_hand(**inputs).loss.backward()
            with torch.no_grad():
                for parameter in by_hand.parameters():
                    parameter -= rate * parameter.grad if parameter.grad is not None else 0
        with torch.no_grad():
            assert by_hand(**inputs).loss.item() == pytest.approx(loss, rel=1e-4)
    saved = type(model).from_pretrained(tmp_path)
    for found, kept, expected in zip(model.parameters(), saved.parameters(), by_hand.parameters()):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(found, kept)


def distributed_data_parallel(model):
    return torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)


def fully_sharded(model):
    from torch.distributed.fsdp import fully_shard

    mesh = distributed.init_device_mesh("cpu", (1,))
    for layer in model.base_model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def prepared_by_accelerate(model):
    from accelerate import Accelerator

    return Accelerator(cpu=True).prepare(model)


@on_three_hosts
@pytest.mark.parametrize("first", ["vtc", "wrapper"])
@pytest.mark.parametrize(
    "wrap", [distributed_data_parallel, fully_sharded, prepared_by_accelerate, torch.nn.DataParallel]
)
def test_wrappers_of_distributed_training(group, name, wrap, first):
    model, inputs, method = prepared(name)
    with vtc.compress(model, method, keep=0.4):
        expected = gradients(model, inputs)
    if first == "vtc":
        handle = vtc.compress(model, method, keep=0.4)
        wrapped = wrap(model)
    else:
        wrapped = wrap(model)
        handle = vtc.compress(wrapped, method, keep=0.4)
    assert_same(gradients(wrapped, inputs), expected)
    assert len(handle.last) == 3
    vtc.restore(wrapped)
    assert vtc.api.current(model) is None


@on_three_hosts
def test_data_parallel_over_several_devices_is_refused(name):
    """Its copies would all call the first one's encoder. On a CPU there is none, so one is made here."""
    model, inputs, method = prepared(name)
    with vtc.compress(model, method, keep=0.4):
        replica = model.base_model._replicate_for_data_parallel()
        with pytest.raises(RuntimeError, match="DistributedDataParallel"):
            replica(**inputs)
