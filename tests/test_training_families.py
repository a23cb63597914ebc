"""Hosts of other families are trained with their own processors."""

import pytest
from processors import save
from training import DISTILL, FEATURES, ORDERED, settings, write_questions

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
