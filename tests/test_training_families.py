"""Hosts of other families are trained with their own processors."""

import pytest
import torch
from processors import save
from training import DISTILL, FEATURES, ORDERED, settings, write_questions

from vtc.learned import build
from vtc.training import train

# Positions of several components, tiles, layers that slide; and a prompt that is read in both directions,
# which does not go on from a beginning that was run before.
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next", "paligemma")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_trained(family, tmp_path, caplog):
    host, questions = save(family, tmp_path / "host"), write_questions(tmp_path / "questions", 3)
    stages = [{**FEATURES, "steps": 1, "batch_size": 2}, {**DISTILL, "steps": 2, "counts": [1, 4]}]
    module = train(settings(host, questions, tmp_path / "out", *stages, module={**ORDERED, "tokens": 4}))
    assert all(p.isfinite().all() for p in module.parameters())
    assert float(module.out_proj.weight.detach().abs().max()) > 0  # what is learned last: from answers alone
    assert ("each question is run with a prompt of its own" in caplog.text) == (family == "paligemma")
    assert float(module.std.std()) > 0


@pytest.mark.parametrize("family", ["gemma3", "llava_next"])
def test_attention_and_scorers_in_the_tower_of_a_family_are_trained(family, tmp_path):
    host, questions = save(family, tmp_path / "host"), write_questions(tmp_path / "questions", 3)
    steps = {"steps": 1, "batch_size": 2, "learning_rate": 1e-2, "weight_decay": 0}
    stages = [{"kind": "features", **steps}, {"kind": "distill", **steps}]
    agents = {"name": "replaced-attention", "replacement": "agent-attention", "agents": 1}
    learned = train(settings(host, questions, tmp_path / "agents", *stages, module=agents))
    scorers = {"name": "staged", "module": "learned-scorer", "blocks": [0]}
    other = train(
        settings(host, questions, tmp_path / "scorers", stages[1] | {"counts": [4]}, module=scorers)
    )
    for module in (learned, other):
        assert all(p.isfinite().all() for p in module.parameters())
    # answers have moved what each score is made of, by steps of Adam
    torch.manual_seed(0)
    fresh = build("learned-scorer", in_width=other.in_width)
    assert not torch.equal(fresh.out_conv[0].weight, other.parts[0].out_conv[0].weight)
