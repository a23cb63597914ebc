"""Three hosts of different kinds, and what tests of wrapped, quantised and trained models compare."""

from __future__ import annotations

import pytest
import torch
from decoder_oracle import Watch, shortened_rows
from tiny import SUPPRESS, Inputs, build
from torch import Tensor, nn

import vtc

GREEDY = {"max_new_tokens": 4, "do_sample": False, "suppress_tokens": SUPPRESS}
METHODS = {"llava-clip": "vtc-cls", "qwen2_5_vl": "hiprune", "gemma3": "hiprune"}  # each reads attention
on_three_hosts = pytest.mark.parametrize("name", METHODS)


def prepared(name: str) -> tuple[nn.Module, Inputs, str]:
    model, make_inputs = build(name)
    return model, make_inputs((2, 1), pads=1), METHODS[name]


def logits(model: nn.Module, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def compressed_logits(model: nn.Module, inputs: Inputs, method: str) -> Tensor:
    with vtc.compress(model, method, keep=0.4):
        return logits(model, inputs)


def gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Of the loss, by the names that the parameters have without wrappers; and the loss itself."""
    model.zero_grad(set_to_none=True)
    loss = model(**inputs, labels=inputs["input_ids"]).loss
    loss.backward()
    found = {
        name.removeprefix("module."): getattr(parameter.grad, "full_tensor", parameter.grad.clone)()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {**found, "": loss.detach()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys() and len(found) > 1
    for name, gradient in expected.items():
        assert gradient.isfinite().all()
        torch.testing.assert_close(found[name], gradient, atol=1e-6, rtol=1e-5)


def assert_as_shortened_by_hand(
    model: nn.Module, inputs: Inputs, method: str, virtual: int = 0, **tolerance: float
) -> None:
    """The decoder returns what it makes of prompts cut by hand. virtual: tokens that PEFT puts in front."""
    base = vtc.api.unwrap(model)
    with Watch(base) as watch, vtc.compress(model, method, keep=0.4, positions="keep") as handle:
        watch.listen()
        logits(model, inputs)
        given, hidden = watch.given, watch.hidden
        assert all(len(record.index) < len(record.source) for record in handle.last)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (virtual, 0), value=1)
    for row, expected in enumerate(shortened_rows(base, {"attention_mask": mask}, given)):
        torch.testing.assert_close(hidden[row, expected.stay], expected.hidden, **tolerance)
