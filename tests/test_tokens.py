"""Budgets become counts, and everything is derived from a Reduction."""

import math

import pytest
import torch

from vtc.tokens import Reduction, Tokens, check_keep, count_kept, share


@pytest.mark.parametrize(
    ("keep", "n", "k"),
    [
        (1.0, 576, 576),
        (1 / 9, 576, 64),
        (0.11, 576, 63),
        (0.5, 3, 2),
        (1e-9, 576, 1),
        (64, 576, 64),
        (64, 10, 10),
        (1, 1, 1),
    ],
)
def test_counts(keep, n, k):
    assert count_kept(check_keep(keep), n) == k


def test_shares_add_up_and_never_exceed_a_tile():
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        sizes = torch.randint(
            1, 30, (int(torch.randint(1, 7, (), generator=generator)),), generator=generator
        ).tolist()
        k = int(torch.randint(1, sum(sizes) + 1, (), generator=generator))
        parts = share(k, sizes)
        assert sum(parts) == k
        assert all(0 <= part <= size for part, size in zip(parts, sizes))
        assert all(abs(part - k * size / sum(sizes)) < 1 for part, size in zip(parts, sizes))


def test_select_copies_drops_and_expands():
    x = torch.randn(2, 6, 3)
    reduction = Reduction.select(torch.tensor([[4, 1], [0, 5]]), 6)
    assert reduction.index.tolist() == [[1, 4], [0, 5]]
    assert reduction.source.tolist() == [[-1, 0, -1, -1, 1, -1], [0, -1, -1, -1, -1, 1]]
    y = reduction.apply(x)
    assert torch.equal(y[0], x[0, [1, 4]])
    back = reduction.expand(y)
    assert torch.equal(back[1, 5], x[1, 5]) and not back[1, 1:5].any()


def test_merge_averages_by_size_and_by_weight():
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0]]])
    index, places = torch.tensor([[3, 0]]), torch.tensor([[0, 3, 3, 3]])
    merged = Reduction.merge(index, places)
    assert merged.source.tolist() == [[0, 1, 1, 1]]
    torch.testing.assert_close(merged.apply(x)[0, :, 0], torch.tensor([1.0, 14 / 3]))
    size = torch.tensor([[5.0, 1, 1, 2]])
    torch.testing.assert_close(merged.apply(x, size)[0, :, 0], torch.tensor([1.0, 22 / 4]))
    assert merged.sizes(size).tolist() == [[5.0, 4.0]]
    weighted = Reduction.merge(index, places, weight=torch.tensor([[1.0, 0, 1, 0]]))
    torch.testing.assert_close(weighted.apply(x, size)[0, :, 0], torch.tensor([1.0, 4.0]))
    torch.testing.assert_close(merged.expand(merged.apply(x))[0, 1], merged.expand(merged.apply(x))[0, 3])


def test_half_precision_averages_are_summed_in_float32():
    x = torch.full((1, 4096, 1), 1.001, dtype=torch.float16)
    merged = Reduction.merge(torch.tensor([[0]]), torch.zeros(1, 4096, dtype=torch.long))
    assert merged.apply(x).dtype == torch.float16
    assert math.isclose(float(merged.apply(x)), float(x[0, 0]), rel_tol=1e-3)


def test_an_undeclared_extra_is_an_attribute_error():
    tokens = Tokens(torch.randn(1, 4, 2), (2, 2), extras={"keys": torch.zeros(1)})
    assert tokens.keys is tokens.extras["keys"]
    with pytest.raises(AttributeError, match=r"cls_attention.*needs"):
        _ = tokens.cls_attention
