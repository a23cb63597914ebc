"""FLOPs by formula equal torch's counter, bytes equal the tensors, and measuring leaves a model as it was."""

import json
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import CLIP, HOSTS, SIGLIP, build
from tiny.llava import LLAVA, llava
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import vtc
from vtc.cost import compare, peak_memory, profile, versions
from vtc.flops import Lengths, flops, kv_bytes
from vtc.hosts import open_host


def counted(model, inputs):
    """What torch counts in the prefill that `profile` measures."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:
        model(**inputs, use_cache=True, logits_to_keep=1)
    return counter.get_total_flops()


def total(model, inputs):
    return profile(model, inputs, repeats=1)["tflops_total"] * 1e12


@pytest.mark.parametrize("name", LLAVA)
def test_formula_is_torchs_count_of_the_bare_model(name):
    model, make_inputs = build(name)
    inputs = make_inputs(images=(2, 1))
    assert total(model, inputs) == pytest.approx(counted(model, inputs), rel=1e-9)


@pytest.mark.parametrize(
    "name, method",
    [
        *((name, "uniform") for name in LLAVA),
        *(("llava_next-clip", name) for name in ("vtc-cls", "tome", "downsample")),
    ],
)
def test_formula_is_torchs_count_of_the_compressed_model(name, method):
    model, make_inputs = build(name)
    inputs = make_inputs(images=(2, 1))
    bare = counted(model, inputs)
    with vtc.compress(model, method, keep=0.25):
        count = counted(model, inputs)  # holds the scores of the method too
        assert count < bare
        assert total(model, inputs) == pytest.approx(count, rel=0.01)


@pytest.mark.parametrize(
    "tower, config",
    [
        ({**SIGLIP, "vision_use_head": True}, {"vision_feature_select_strategy": "full"}),
        (CLIP, {"vision_feature_layer": [-2, -1]}),
    ],
    ids=["pooling-head", "two-feature-layers"],
)
def test_formula_knows_variants_of_the_tower(tower, config):
    model, make_inputs = llava(tower, **config)
    inputs = make_inputs()
    assert total(model, inputs) == pytest.approx(counted(model, inputs), rel=1e-9)


def test_formula_from_the_record_alone():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs(images=(1,))
    with vtc.compress(model, "uniform", keep=5) as handle:
        count = counted(model, inputs)
        (record,) = handle.last
    length = inputs["input_ids"].shape[1] - len(record.source) + len(record.index)
    patches = record.entering["features"]
    lengths = Lengths([(1, patches + 1)] * 4, patches, [(1, length, length)] * 3, 1)
    assert sum(flops(model, open_host(model), lengths).values()) == count


@pytest.mark.parametrize("keep", [None, 0.25])
def test_kv_bytes_are_the_formula_at_the_physical_length(keep):
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs()
    if keep:
        vtc.compress(model, "uniform", keep=keep)
    row = profile(model, inputs, repeats=1)
    assert row["kv_bytes"] == kv_bytes(model, rows=2, length=row["physical_length"], bytes_per_number=4)
    assert (row["physical_length"] < row["prompt_length"]) == bool(keep)


def test_row_holds_the_lengths_of_the_last_forward():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs(images=(1, 1))
    with vtc.compress(model, "vtc-cls", keep=0.25) as handle:
        row = profile(model, inputs, repeats=2)
        assert handle.last and row["compressor_seconds"] > 0
        assert handle.keep == 0.25  # profile() runs all tokens in between
    text = inputs["input_ids"].shape[1] - 16
    assert (row["images"], row["rows"]) == (2, 2)
    assert (row["image_tokens"], row["encoder_tokens"], row["llm_tokens"]) == (16, 17, 4)
    assert row["decoder_tokens"] == text + 4
    assert (row["prompt_length"], row["physical_length"]) == (text + 16, text + 4)
    assert row["plan"] == [
        {
            "method": "vtc-cls",
            "options": row["plan"][0]["options"],
            "stage": "features",
            "keep": 0.25,
            "positions": "repack",
            "allocate": "proportional",
            "merge": None,
        }
    ]
    assert (row["dtype"], row["attention"]) == ("float32", "sdpa")
    assert row["first_token_seconds"] > row["compressor_seconds"]
    assert row["first_token_ratio"] == row["first_token_seconds"] / row["full_seconds"] > 0
    assert row["compressor_share"] == pytest.approx(row["compressor_seconds"] / row["first_token_seconds"])
    assert json.loads(json.dumps(row)) == row


def test_profiling_a_bare_model_leaves_nothing_behind():
    model, make_inputs = build("llava-clip")
    inputs = make_inputs()
    before, keys = model(**inputs).logits, set(vars(model)) | set(vars(model.model))
    row = profile(model, inputs, repeats=1)
    assert row["plan"] == [] and row["llm_tokens"] == row["image_tokens"] == 16
    assert set(vars(model)) | set(vars(model.model)) == keys
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(**inputs).logits, before)


def test_torchs_counter_is_asked_where_the_config_leaves_matrices_unexplained():
    model, make_inputs = build("llava-clip")
    by_formula = profile(model, make_inputs(), repeats=1)
    model.model.multi_modal_projector.extra = torch.nn.Linear(32, 32)  # which never runs
    by_counter = profile(model, make_inputs(), repeats=1)
    assert (by_formula["tflops_by"], by_counter["tflops_by"]) == ("formula", "counter")
    assert by_counter["tflops"] == pytest.approx(by_formula["tflops"], rel=1e-9)


PROFILED = [name for name, tiny in HOSTS.items() if tiny.works and name not in LLAVA]


@pytest.mark.parametrize("name", PROFILED)
def test_every_family_has_a_row(name):
    model, make_inputs = build(name)
    inputs = make_inputs((2, 1), pads=1)
    with vtc.compress(model, "divprune", keep=0.3) as handle:
        row = profile(model, inputs, repeats=1)
        assert row["images"] == len(handle.last) and row["llm_tokens"] < row["image_tokens"]
    assert row["tflops_total"] > 0 and row["kv_bytes"] > 0 and row["physical_length"] > 0
    assert json.loads(json.dumps(row)) == row


def test_prompts_without_an_image_are_refused():
    model, make_inputs = build("llava-clip")
    with pytest.raises(ValueError, match="no image"):
        profile(model, make_inputs(images=(0,)), repeats=1)
    vtc.compress(model, "uniform", keep=4)
    model(**make_inputs())  # what the handle remembers of another call does not count
    with pytest.raises(ValueError, match="no image"):
        profile(model, make_inputs(images=(0,)), repeats=1)


def test_peak_memory_is_that_of_the_call_however_often_it_runs():
    size = 64 << 20
    for _ in range(2):
        peak, _ = peak_memory(torch.device("cpu"), lambda: [torch.ones(size // 4 // 64) for _ in range(64)])
        assert peak == pytest.approx(size, rel=0.1)


def test_compare_runs_in_turn_after_a_warm_up():
    calls = []
    times = compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3)
    assert "".join(calls) == "ab" + "ababab"
    assert set(times) == {"a", "b"}
    assert all(len(seconds) == 3 and min(seconds) >= 0 for seconds in times.values())


def test_versions_name_the_commit_of_this_checkout():
    found = versions()
    assert found["torch"] == torch.__version__ and found["vtc"] == vtc.__version__
    root = Path(vtc.__file__).parents[1]
    head = subprocess.run(
        ["git", "-C", root, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert found["commit"] == (head if (root / ".git").exists() else None)
