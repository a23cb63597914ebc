"""What holds of every rule, whatever it is given. What each one is to choose: tests/test_<method>.py."""

import dataclasses

import pytest
import torch
from drawn import CASES, cast, drawn, part

import vtc
from vtc.tokens import gather

METHODS = vtc.list_methods()
GRIDS = [(6, 8), (1, 1), (1, 2), (2, 1), (1, 3), (2, 2), (5, 1)]

# What options of the same name take in several methods.
WORDS = {
    "order": ("raster", "spatial"),
    "signal": ("cls_attention", "mean_attention"),
    "combine": ("mean",),
    "question": ("after",),
}


def variants():
    """Each method with each of its switches, and of those words, set to what is not the default."""
    for name in METHODS:
        for field in dataclasses.fields(vtc.get_method(name)):
            values = [not field.default] if isinstance(field.default, bool) else WORDS.get(field.name, ())
            for value in values:
                try:
                    rule = vtc.get_method(name, **{field.name: value})
                except ValueError:  # another method's word
                    continue
                if value != field.default:
                    yield pytest.param(rule, id=f"{name} {field.name}={value}")


def counts(n):
    return sorted({1, 2, 7, n - 1, n} & set(range(1, n + 1)))


def reduced(rule, tokens, k):
    """The reduction, which is a valid one and left its tokens alone."""
    given = {"x": tokens.x, "size": tokens.size, "place": tokens.place, **tokens.extras}
    before = {name: value.clone() for name, value in given.items()}
    reduction, (batch, n) = rule.reduce(tokens, k), tokens.x.shape[:2]
    assert all(torch.equal(value, before[name]) for name, value in given.items())
    index, source = reduction.index, reduction.source
    assert (index.dtype, index.shape) == (torch.long, (batch, k))
    assert (source.dtype, source.shape) == (torch.long, (batch, n))
    ordered = index.sort(dim=1).values
    assert int(ordered[:, 0].min()) >= 0 and int(ordered[:, -1].max()) < n and (ordered.diff(dim=1) > 0).all()
    assert int(source.min()) >= -1 and int(source.max()) < k
    assert torch.equal(source.gather(1, index), torch.arange(k).expand(batch, k))
    assert reduction.mix is None or reduction.mix.shape == (batch, k, n)
    new = reduction.apply(tokens.x)
    assert (new.dtype, new.shape) == (tokens.x.dtype, (batch, k, tokens.x.shape[2])) and new.isfinite().all()
    if reduction.pruned or (k == n and reduction.mix is None):
        assert torch.equal(new, gather(tokens.x, index))
    return reduction


def same(one, other):
    return torch.equal(one.index, other.index) and torch.equal(one.source, other.source)


def alone_as_in_a_batch(rule, case):
    tokens = drawn(rule, case)
    for k in counts(tokens.n):
        together = reduced(rule, tokens, k)
        assert same(rule.reduce(tokens, k), together)
        new = together.apply(tokens.x)
        for row in range(3):
            single = part(tokens, torch.tensor([row]))
            alone = reduced(rule, single, k)
            assert torch.equal(alone.index, together.index[[row]]), (k, row)
            assert torch.equal(alone.source, together.source[[row]]), (k, row)
            torch.testing.assert_close(alone.apply(single.x), new[[row]])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_exactly_k_of_any_tokens_and_the_same_alone_as_in_a_batch(name, case):
    alone_as_in_a_batch(vtc.get_method(name), case)


@pytest.mark.parametrize("rule", variants())
def test_other_forms(rule):
    for case in ("random", "duplicates", "constant", "zeros"):
        alone_as_in_a_batch(rule, case)


@pytest.mark.parametrize("name", METHODS)
def test_few_tokens(name):
    rule = vtc.get_method(name)
    for grid in GRIDS[1:]:
        for case in ("random", "constant", "zeros"):
            tokens = drawn(rule, case, batch=2, grid=grid)
            for k in range(1, tokens.n + 1):
                reduced(rule, tokens, k)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_chooses_as_float32_does_of_the_same_numbers(name, dtype):
    rule = vtc.get_method(name)
    for case in ("random", "duplicates", "constant", "zeros"):
        tokens = drawn(rule, case, dtype=dtype)
        for k in counts(tokens.n):
            assert same(reduced(rule, tokens, k), rule.reduce(cast(tokens, torch.float32), k)), (case, k)


@pytest.mark.parametrize("name", METHODS)
def test_a_number_of_its_own_is_between_one_and_the_cap(name):
    rule = vtc.get_method(name)
    for case in CASES:
        for grid in GRIDS:
            tokens = drawn(rule, case, grid=grid)
            for cap in counts(tokens.n):
                own = rule.count(tokens, cap)
                if own is None:
                    continue
                assert (own.dtype, own.shape) == (torch.long, (3,))
                assert int(own.min()) >= 1 and int(own.max()) <= cap
                for row in range(3):
                    single = part(tokens, torch.tensor([row]))
                    assert torch.equal(rule.count(single, cap), own[[row]])
                    reduced(rule, single, int(own[row]))
