"""Methods that rank tokens by the encoder's attention: each against a plain restatement of its card."""

import pytest
import torch

import vtc
from vtc.tokens import Tokens

GRID = (6, 8)
N = 48
EVERY = [1, 2, 7, 8, 9, 24, 33, 47, 48]
KINDS = ("cls_attention", "mean_attention", "patch_attention", "cls_logits", "thumbnail_cls_logits")


def tokens(seed=0, batch=3, grid=GRID, dtype=torch.float32, case="random"):
    """With every kind of attention, of one layer. "ties": few different values; "constant": one."""
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, 16, generator=generator)
    extras = {kind: torch.rand(batch, 1, n, generator=generator) for kind in KINDS}
    extras["cls_logits"] -= 0.5
    extras["thumbnail_cls_logits"] -= 0.5
    if case == "ties":  # the cosines of such features are exact
        x = torch.randint(0, 2, (batch, n, 4), generator=generator) * 2.0 - 1
        extras = {kind: torch.round(extra * 4) for kind, extra in extras.items()}
    if case == "constant":
        x, extras = torch.ones_like(x), {kind: torch.ones_like(extra) for kind, extra in extras.items()}
    if case == "zero":
        x, extras = torch.zeros_like(x), {kind: torch.zeros_like(extra) for kind, extra in extras.items()}
    return Tokens(x.to(dtype), grid, extras={kind: extra.to(dtype) for kind, extra in extras.items()})


def falling(scores):
    """Positions by score, the highest first, earlier ones first on ties."""
    return sorted(range(len(scores)), key=lambda j: -scores[j])


def unit(vector):
    length = sum(value * value for value in vector) ** 0.5
    return [value / max(length, 1e-12) for value in vector]


def top(scores, k, **_):
    return sorted(falling(scores)[:k])


def rows_of_the_card(scores, k, grid):
    """FoPru's row strategy: whole rows by their sums, then the best tokens of the next."""
    height, width = grid
    rows = falling([sum(scores[r * width : (r + 1) * width]) for r in range(height)])
    whole = [r * width + c for r in rows[: k // width] for c in range(width)]
    if k % width:
        start = rows[k // width] * width
        whole += [start + c for c in falling(scores[start : start + width])[: k % width]]
    return sorted(whole)


def vispruner_of_the_card(x, scores, k, ratio):
    """Steps 1 to 4, with ceil(R/2) of an odd R in the first set."""
    order, important = falling(scores), int(k * ratio)
    kept, rest, k = order[:important], order[important:], k - important
    x = [unit(vector) for vector in x.double().tolist()]

    def alike(a, b):
        return sum(p * q for p, q in zip(x[a], x[b], strict=True))

    while k and len(rest) > k:
        first, second = rest[::2], rest[1::2]
        most = [max(alike(a, b) for b in second) for a in first]
        gone = min(8, len(rest) - k, len(first))
        rest = [first[i] for i in falling(most)[gone:]] + second
    return sorted(kept + (rest if k else []))


def globalcom2_of_the_card(own, thumbnail, k):
    return sorted(falling([a + b for a, b in zip(unit(own), unit(thumbnail), strict=True)])[:k])


CARDS = {
    ("fastervlm", ()): lambda t, row, k: top(t["cls_attention"], k),
    ("fastervlm", ("signal", "mean_attention")): lambda t, row, k: top(t["mean_attention"], k),
    ("hired", ()): lambda t, row, k: top(t["cls_attention"], k),
    ("fopru", ()): lambda t, row, k: top(t["mean_attention"], k),
    ("fopru", ("signal", "patch_attention")): lambda t, row, k: top(t["patch_attention"], k),
    ("fopru", ("strategy", "row")): lambda t, row, k: rows_of_the_card(t["mean_attention"], k, GRID),
    ("globalcom2", ()): lambda t, row, k: globalcom2_of_the_card(
        t["cls_logits"], t["thumbnail_cls_logits"], k
    ),
    ("vispruner", ()): lambda t, row, k: vispruner_of_the_card(row, t["cls_attention"], k, 0.5),
    ("vispruner", ("important_ratio", 0)): lambda t, row, k: vispruner_of_the_card(
        row, t["cls_attention"], k, 0
    ),
    ("vispruner", ("important_ratio", 0.29)): lambda t, row, k: vispruner_of_the_card(
        row, t["cls_attention"], k, 0.29
    ),
}


def rule(key):
    name, options = key
    return vtc.get_method(name, **dict([options] if options else []))


@pytest.mark.parametrize("key", CARDS, ids=str)
@pytest.mark.parametrize("case", ["random", "ties", "constant"])
def test_method_is_its_card(key, case):
    for k in EVERY:
        t = tokens(seed=k, case=case)
        index = rule(key).reduce(t, k).ascending().index
        for row in range(len(index)):
            scores = {kind: extra[row, 0].double().tolist() for kind, extra in t.extras.items()}
            assert index[row].tolist() == CARDS[key](scores, t.x[row], k)


@pytest.mark.parametrize("key", CARDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["random", "ties", "constant", "zero", "one token"])
def test_a_batch_equals_its_rows_and_gives_k_places(key, dtype, case):
    one = case == "one token"
    t = tokens(dtype=dtype, grid=(1, 1) if one else GRID, case="random" if one else case)
    for k in [1] if one else EVERY:
        reduction = rule(key).reduce(t, k)
        index = reduction.ascending().index
        assert index.shape == (3, k) and (index.diff(dim=1) > 0).all() and index.max() < t.n
        assert reduction.pruned and reduction.apply(t.x).dtype == dtype
        for row in range(3):
            extras = {kind: extra[row : row + 1] for kind, extra in t.extras.items()}
            single = rule(key).reduce(Tokens(t.x[row : row + 1], t.grid, extras=extras), k)
            assert torch.equal(single.index[0], reduction.index[row])


@pytest.mark.parametrize("k", EVERY)
def test_methods_of_one_layer_of_cls_attention_agree(k):
    t = tokens(seed=k)
    expected = vtc.get_method("vtc-cls", layers=(-2,)).reduce(t, k).index
    same = (
        vtc.get_method("fastervlm"),
        vtc.get_method("hired"),
        vtc.get_method("vispruner", important_ratio=1.0),
        vtc.get_method("fopru", signal="cls_attention"),
    )
    for method in same:
        assert method.needs[0].resolve(24) == (22,)
        assert torch.equal(method.reduce(t, k).index, expected)


def test_fopru_keeps_whole_rows_and_one_part():
    t = tokens()
    for k in range(1, N + 1):
        index = vtc.get_method("fopru", strategy="row").reduce(t, k).index
        for row in index:
            counts = torch.bincount(row // 8, minlength=6).tolist()
            assert sorted(counts, reverse=True)[: k // 8] == [8] * (k // 8)
            assert sum(0 < count < 8 for count in counts) == (k % 8 > 0)
    flipped = t.mean_attention.unflatten(2, GRID).flip(3).flatten(2)
    mirror = Tokens(t.x, GRID, extras={"mean_attention": flipped})
    rows = vtc.get_method("fopru", strategy="row").reduce(mirror, 24).index // 8
    assert torch.equal(rows, vtc.get_method("fopru", strategy="row").reduce(t, 24).index // 8)


def test_fopru_ranks_rows_of_equal_tokens_as_it_ranks_tokens():
    t = tokens()
    t.extras["mean_attention"] = torch.rand(3, 1, 6).repeat_interleave(8, dim=2)
    rank, row = (vtc.get_method("fopru", strategy=strategy) for strategy in ("rank", "row"))
    for k in (8, 24, 29, 40):
        assert torch.equal(rank.reduce(t, k).index, row.reduce(t, k).index)


def test_globalcom2_ranks_the_thumbnail_by_its_own_logits_in_their_order():
    t = tokens()
    t.thumbnail = torch.tensor([True, False, False])
    t.extras["thumbnail_cls_logits"][0] = t.cls_logits[0]
    paper = vtc.get_method("globalcom2").reduce(t, 12)
    raster = vtc.get_method("globalcom2", order="raster").reduce(t, 12)
    own = t.cls_logits[0, 0].tolist()
    assert paper.ordered and paper.index[0].tolist() == falling(own)[:12]
    assert torch.equal(paper.index[1:], raster.index[1:])
    assert not raster.ordered and raster.index[0].tolist() == top(own, 12)
    assert torch.equal(paper.apply(t.x)[0], t.x[0, paper.index[0]])


def test_globalcom2_without_cls_reads_mean_attention():
    needs = vtc.get_method("globalcom2", signal="mean_attention").needs
    assert [need.name for need in needs] == ["mean_attention", "thumbnail_mean_attention"]
    assert all(need.resolve(24) == (23,) for need in needs)


def test_vispruner_prefers_distinct_tokens_to_duplicates():
    x = torch.nn.functional.one_hot(torch.arange(N) % 6, 16).float()[None]  # six directions, eight times each
    t = Tokens(x, GRID, extras={"cls_attention": torch.rand(1, 1, N)})
    index = vtc.get_method("vispruner", important_ratio=0).reduce(t, 12).index[0]
    assert len((index % 6).unique()) == 6


def test_vispruner_in_chunks_is_vispruner(monkeypatch):
    t = tokens(case="ties")
    rule = vtc.get_method("vispruner")
    whole = {k: rule.reduce(t, k).index for k in EVERY}
    monkeypatch.setattr("vtc.methods.vispruner._PAIRS", 100)
    for k, index in whole.items():
        assert torch.equal(rule.reduce(t, k).index, index)


@pytest.mark.parametrize(
    "name, options",
    [
        ("fastervlm", {"signal": "keys"}),
        ("fopru", {"strategy": "columns"}),
        ("fopru", {"signal": "cls_logits"}),
        ("globalcom2", {"order": "random"}),
        ("globalcom2", {"signal": "cls_attention"}),
        ("vispruner", {"important_ratio": 1.5}),
        ("vispruner", {"signal": "values"}),
    ],
)
def test_wrong_options_are_named(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        vtc.get_method(name, **options)
