"""Images of a handful of tokens, and of more than ten thousand."""

import pytest
import torch
from drawn import drawn
from tiny import IMAGE, SIGLIP, build
from tiny.llava import WHOLE, llava
from torch.utils._python_dispatch import TorchDispatchMode

import vtc
from vtc.capture import INSIDE, KINDS, computed
from vtc.taps import Call

# atc and pitome compare all pairs of tokens at once, and say so; downsample has a smaller image to show.
METHODS = [name for name in vtc.list_methods("features") if name not in ("atc", "pitome", "downsample")]


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation made."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.untyped_storage().nbytes() // tensor.itemsize)
        return out


@pytest.mark.parametrize("method", METHODS)
def test_memory_of_a_large_image(method):
    rule = vtc.get_method(method)
    many = drawn(rule, batch=1, grid=(104, 104), width=8)
    with Largest() as largest:
        reduction = rule.reduce(many, 200)
    assert reduction.k == 200
    assert largest.numbers < many.n**2 / 10


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in INSIDE])
def test_memory_of_what_is_captured(kind):
    heads, n = 4, 10_816
    query, key, value = torch.randn(3, 1, heads, n, 4)
    with Largest() as largest:
        found = computed(kind, Call(query, key, value, 0.5, None), 0, 0)
    assert found.shape[1] == n and largest.numbers < n**2 * heads / 20
    if kind == "mean_attention":
        assert found.sum().item() == pytest.approx(1, abs=1e-3)


@torch.no_grad()
def test_a_host_with_more_than_ten_thousand_image_tokens():
    model, make_inputs = llava({**SIGLIP, "image_size": 832, "num_hidden_layers": 2}, **WHOLE)
    inputs, n, heads = make_inputs((1,)), 104 * 104, SIGLIP["num_attention_heads"]
    with vtc.compress(model, "hiprune", keep=64) as handle, Largest() as largest:
        length = model(**inputs, use_cache=True).past_key_values.get_query_offset()
    (record,) = handle.last
    assert (len(record.source), len(record.index)) == (n, 64)
    assert length == inputs["input_ids"].shape[1] - n + 64
    assert largest.numbers < n**2 * heads / 20


@torch.no_grad()
def test_images_of_a_few_tokens_beside_a_larger_one():
    model, _ = build("qwen2_5_vl")
    grids = [(2, 2), (2, 4), (4, 2), (2, 6), (4, 4), (6, 8)]  # patches: 1, 2, 2, 3, 4 and 12 tokens
    counts = [rows * cols // 4 for rows, cols in grids]
    config = model.config.vision_config
    numbers = 3 * config.temporal_patch_size * config.patch_size**2
    pixels = torch.randn(sum(4 * n for n in counts), numbers)
    ids = torch.tensor([[5, *(token for n in counts for token in [*([IMAGE] * n), 7])]])
    kinds = (ids == IMAGE).long()
    given = {"pixel_values": pixels, "image_grid_thw": torch.tensor([(1, *grid) for grid in grids])}
    for method in ("hiprune", "tome", "divprune"):
        with vtc.compress(model, method, keep=0.5, stage="features") as handle:
            logits = model(input_ids=ids, mm_token_type_ids=kinds, **given).logits
        assert logits.isfinite().all()
        assert [len(record.index) for record in handle.last] == [1, 1, 1, 2, 2, 6]
