"""MiniMax-M3 with fewer blocks of keys than a prompt has. Padding shifts blocks: prompts come alone."""

import pytest
import torch
from decoder_oracle import Watch, shortened_rows
from test_families import GREEDY, forward
from tiny.padded import minimax_m3_vl

import vtc


@pytest.mark.parametrize("positions", ["keep", "repack"])
def test_sparse_layers_choose_among_the_blocks_that_remain(positions):
    torch.manual_seed(0)
    model, make_inputs = minimax_m3_vl(blocks=2)
    inputs = make_inputs((3,))
    with Watch(model) as watch, vtc.compress(model, "tome", keep=0.6, positions=positions):
        watch.listen()
        forward(model, inputs)
        given, hidden = watch.given, watch.hidden
        expected = model.generate(**inputs, **GREEDY, use_cache=False)
        for cache in ("dynamic", "static"):
            assert torch.equal(model.generate(**inputs, **GREEDY, cache_implementation=cache), expected)
    (row,) = shortened_rows(model, inputs, given, positions == "repack")
    assert len(row.hidden) > 2 * 8
    torch.testing.assert_close(hidden[0, row.stay], row.hidden, atol=1e-4, rtol=1e-4)
