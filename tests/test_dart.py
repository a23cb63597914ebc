"""DART against its rule in plain loops."""

import pytest
import torch

from vtc.method import get_method
from vtc.methods.dart import DART
from vtc.tokens import Tokens


def cosine(a, b):
    a, b = a.double(), b.double()
    length = max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12)
    return float(a @ b) / length


def longest(keys, places, m):
    """The m places with the longest keys (L1), the first of equal ones, in their order."""
    return sorted(sorted(places, key=lambda i: (-float(keys[i].double().abs().sum()), i))[:m])


def restated(x, keys, k, text=None, text_keys=None, behind=(), m=4, p=4):
    """What stays of one image: x, keys (N, .), text, text_keys (T, .), `behind` the places of text tokens."""
    own = longest(keys, range(len(x)), min(m, k))
    pivots = [x[i] for i in own] + [text[i] for i in longest(text_keys, behind, p)] if p else None
    pivots = pivots or [x[i] for i in own]
    kept, t = list(own), (k - len(own)) // len(pivots)
    for takes in (t, 1):  # T for each, then one each until there are k
        for pivot in pivots:
            left = [i for i in range(len(x)) if i not in kept]
            kept += sorted(left, key=lambda i: (cosine(pivot, x[i]), i))[: min(takes, k - len(kept))]
    return sorted(kept)


def drawn(n, seed, t=7, rows=2, d=12, heads=6):
    """Tokens as the decoder stage shows them; the second prompt is shorter, its text padded."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator)

    mask = torch.ones(rows, t, dtype=torch.bool)
    mask[1:, max(1, t - 3) :] = False
    after = mask.clone()
    after[:, : t // 3] = False
    extras = {
        "all_keys": randn(rows, 1, n, heads),
        "text": randn(rows, t, d) * mask[..., None],
        "text_keys": randn(rows, 1, t, heads) * mask[:, None, :, None],
        "text_mask": mask,
        "text_after": after,
    }
    lot = torch.arange(rows) * 1009 + seed
    return Tokens(randn(rows, n, d), grid=(1, n), lot=lot, extras=extras)


def check(tokens, k, m=4, p=4):
    found = DART(pivot_image_token=m, pivot_text_token=p).select(tokens, k)
    for row in range(len(tokens.x)):
        behind = (tokens.text_mask & tokens.text_after)[row].nonzero()[:, 0].tolist()
        text = (tokens.text[row], tokens.text_keys[row, 0], behind)
        expected = restated(tokens.x[row], tokens.all_keys[row, 0], k, *text, m=m, p=p)
        assert found[row].tolist() == expected


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 5, 12, 40])
def test_inside_the_decoder(n, seed):
    tokens = drawn(n, seed)
    for k in {*range(1, min(n, 14) + 1), n // 2 or 1, n}:
        check(tokens, k)


@pytest.mark.parametrize("m, p", [(1, 0), (1, 1), (2, 6), (8, 3), (50, 50)])
def test_other_numbers_of_pivots(m, p):
    for k in (1, 3, 8, 9, 23, 30):
        check(drawn(30, seed=5), k, m, p)


@pytest.mark.parametrize("t", [1, 2, 3])
def test_a_short_text_has_fewer_pivots(t):
    for k in (3, 4, 5, 11, 20):
        check(drawn(20, seed=t, t=t), k)


@pytest.mark.parametrize("n", [1, 2, 5, 12, 40])
def test_in_front_of_the_decoder(n):
    """No keys and no text: pivots of the image by the length of its features."""
    x = torch.randn(2, n, 12)
    for k in range(1, n + 1):
        found = DART().select(Tokens(x, grid=(1, n)), k)
        assert found.tolist() == [restated(row, row, k, p=0) for row in x]


def test_as_many_as_the_paper_keeps():
    """Of k = 4 + 8 T nothing is filled up; a larger budget keeps these and adds to them."""
    tokens = drawn(60, seed=1, t=14)
    for t in range(1, 6):
        paper = [set(row) for row in DART().select(tokens, 4 + 8 * t).tolist()]
        for more in range(1, 8):
            assert all(a < set(b) for a, b in zip(paper, DART().select(tokens, 4 + 8 * t + more).tolist()))


def test_ties_go_to_the_first():
    """All keys are of one length, and features are a few directions that repeat."""
    tokens = drawn(24, seed=2)
    directions = torch.eye(12)[:5]
    tokens.x = directions[torch.randint(0, 5, (2, 24))]
    tokens.extras["text"] = directions[torch.randint(0, 5, (2, 7))]
    tokens.extras["all_keys"] = tokens.all_keys.sign()
    tokens.extras["text_keys"] = tokens.text_keys.sign()
    for k in range(1, 25):
        check(tokens, k)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_constant_features(value):
    tokens = drawn(14, seed=3)
    tokens.x = torch.full_like(tokens.x, value)
    tokens.extras["all_keys"] = torch.full_like(tokens.all_keys, value)
    for k in range(1, 15):
        found = DART().select(tokens, k)
        assert all(len(set(row)) == k for row in found.tolist())
    assert DART().select(Tokens(tokens.x, grid=(1, 14)), 6).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@pytest.mark.parametrize("pivots", ["norm", "random"])
@pytest.mark.parametrize("k", [1, 6, 17, 40])
def test_a_batch_equals_its_rows(pivots, k):
    """However long the text of another prompt is."""
    tokens, method = drawn(40, seed=4), DART(pivots=pivots)
    both = method.select(tokens, k)
    for row in range(2):
        t = int(tokens.text_mask[row].sum())
        extras = {name: extra[row : row + 1] for name, extra in tokens.extras.items()}
        for name in ("text", "text_mask", "text_after"):
            extras[name] = extras[name][:, :t]
        extras["text_keys"] = extras["text_keys"][:, :, :t]
        alone = Tokens(tokens.x[row : row + 1], grid=(1, 40), lot=tokens.lot[row : row + 1], extras=extras)
        assert torch.equal(method.select(alone, k)[0], both[row])


def test_bfloat16_and_turned_features():
    tokens = drawn(30, seed=6)
    half = drawn(30, seed=6)
    half.x = half.x.bfloat16()
    for name in ("all_keys", "text", "text_keys"):
        half.extras[name] = half.extras[name].bfloat16()
    check(half, 13)
    turn = torch.linalg.qr(torch.randn(12, 12)).Q  # the same for all: nothing of the rule changes
    turned = drawn(30, seed=6)
    turned.x, turned.extras["text"] = tokens.x @ turn, tokens.text @ turn
    assert torch.equal(DART().select(turned, 13), DART().select(tokens, 13))


def test_random_pivots():
    """Of the same picture the same, of another picture or seed others; they are kept, whatever their keys."""
    tokens, k = drawn(60, seed=7), 4
    found = DART(pivots="random").select(tokens, k)
    assert torch.equal(DART(pivots="random").select(tokens, k), found)
    assert not torch.equal(found[0], found[1])
    assert not torch.equal(DART(pivots="random", seed=1).select(tokens, k), found)
    tokens.extras["all_keys"] = tokens.all_keys.flip(2)
    assert torch.equal(DART(pivots="random").select(tokens, k), found)
    larger = DART(pivots="random").select(tokens, 20)
    assert all(set(a) <= set(b) for a, b in zip(found.tolist(), larger.tolist()))


@pytest.mark.parametrize(
    "option, value",
    [
        ("pivot_image_token", 0),
        ("pivot_image_token", 1.5),
        ("pivot_text_token", -1),
        ("pivots", "all"),
        ("seed", 0.5),
    ],
)
def test_options(option, value):
    with pytest.raises(ValueError, match=option):
        get_method("dart", **{option: value})
