"""Products of all pairs of tokens, and methods that hold them against the same without."""

import pytest
import torch

import vtc
from vtc import greedy, means
from vtc.methods import dpc_knn, vispruner
from vtc.pairs import products
from vtc.tokens import Tokens

GRID, N = (6, 8), 48


def random(n=N, width=16, batch=3, seed=0):
    return torch.randn(batch, n, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("n, width", [(1, 1), (2, 5), (3, 600), (7, 16), (48, 1030), (101, 16)])
def test_products(n, width, centred):
    for x in (random(n, width), random(n, width).bfloat16()):
        exact = x.double() - centred * x.double().mean(dim=1, keepdim=True)
        found = products(x, centred)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), exact @ exact.transpose(1, 2), atol=2e-4, rtol=1e-5)
        # float32 all along; how rows lie in memory may decide which kernel sums them
        torch.testing.assert_close(found, products(x.float(), centred), atol=5e-5, rtol=1e-6)
        assert all(torch.equal(found[[row]], products(x[[row]], centred)) for row in range(3))


def test_features_are_left_as_they_are():
    x = random()
    before = x.clone()
    products(x, centred=True)
    assert torch.equal(x, before)


@pytest.mark.parametrize("structure", ["random", "duplicates", "constant", "bfloat16"])
@pytest.mark.parametrize("name", ["kmeans", "dpc-knn", "vispruner", "mmtok", "scope"])
def test_methods_choose_the_same_whether_pairs_are_held_or_not(name, structure, monkeypatch):
    x = random()
    if structure == "duplicates":
        # Signs, whose cosines are exact: rounding would choose among what is equally alike.
        x = x[:, :8].sign().repeat(1, 6, 1)
    x = {"constant": torch.ones_like(x)}.get(structure, x)
    x = x.bfloat16() if structure == "bfloat16" else x
    words = torch.ones(3, 5, dtype=torch.bool)
    extras = {"cls_attention": random()[:, None, :, 0].abs(), "vision": x, "text": random(5)}
    t = Tokens(x, GRID, extras=extras | {"text_mask": words, "text_after": words})
    rule = vtc.get_method(name)
    held = {k: rule.reduce(t, k) for k in (1, 8, 20)}
    for module in (means, dpc_knn, vispruner, greedy):
        monkeypatch.setattr(module, "_PAIRS", 100)
    for k, reduction in held.items():
        other = rule.reduce(t, k)
        assert torch.equal(other.index, reduction.index) and torch.equal(other.source, reduction.source)
        alone = rule.reduce(Tokens(x[:1], GRID, extras={kind: e[:1] for kind, e in t.extras.items()}), k)
        assert torch.equal(alone.index[0], other.index[0]) and torch.equal(alone.source[0], other.source[0])
