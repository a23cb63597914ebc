"""The mergers of the encoder stage against plain restatements of their cards, index for index."""

import math
from dataclasses import replace

import pytest
import torch

import vtc
from vtc.tokens import Reduction, Tokens

N = 23
COUNTS = [1, 2, 9, 11, 12, 20, 22, 23]
OPTIONS = [
    ("tome", {}),
    ("tome", {"order": "spatial"}),
    ("atc", {}),
    ("atc", {"linkage": "complete"}),
    ("atc", {"linkage": "single"}),
    ("tofu", {}),
    ("pitome", {}),
    ("pitome", {"pairs": "last"}),
    ("mctf", {}),
    ("mctf", {"forth": 1.0}),
]


def made(seed=0, batch=2, n=N, kind="random", **place):
    """Tokens inside of an encoder. "alike": few different ones, of entries 1 and -1, so that what is equally
    similar is so in any precision."""
    g = torch.Generator().manual_seed(seed)
    x, keys = torch.randn(batch, n, 16, generator=g), torch.randn(batch, n, 16, generator=g)
    received, size = torch.rand(batch, n, generator=g), torch.randint(1, 5, (batch, n), generator=g).float()
    if kind == "alike":
        which = torch.randint(0, 5, (batch, n), generator=g)[..., None].expand(-1, -1, 16)
        x, keys = x.sign().gather(1, which), keys.sign().gather(1, which)
        received, size = torch.full((batch, n), 0.25), torch.ones(batch, n)
    extras = {"keys": keys[:, None], "mean_attention": received[:, None]}
    return Tokens(x, (1, n), size=size, extras=extras, **place)


def rows_of(t):
    for b in range(len(t.x)):
        one = Tokens(t.x[b : b + 1], t.grid, size=t.size[b : b + 1], prefix=t.prefix)
        one.extras = {name: extra[b : b + 1] for name, extra in t.extras.items()}
        yield replace(one, layer=t.layer, depth=t.depth)


def cosine(a, b):
    a, b = a.double(), b.double()
    return float(a @ b) / max(float(a.norm()) * float(b.norm()), 1e-12)


def groups_of(reduction, row):
    """[(place, members), ...] in the order of the slots."""
    members = [[] for _ in range(reduction.k)]
    for token, slot in enumerate(reduction.source[row].tolist()):
        if slot >= 0:
            members[slot].append(token)
    return list(zip(reduction.index[row].tolist(), members))


def average(x, weight, members):
    return sum(float(weight[i]) * x[i].double() for i in members) / sum(float(weight[i]) for i in members)


def check(t, reduction, row, expected, ordered=True):
    """A row of a reduction is the expected groups, and its features are their averages by size."""
    found = groups_of(reduction, row)
    expected = [(place, sorted(members)) for place, members in expected]
    assert found == (expected if ordered else sorted(expected))
    weight = t.size if reduction.weight is None else reduction.weight
    y, size = reduction.apply(t.x, t.size), reduction.sizes(t.size)
    for slot, (_, members) in enumerate(found):
        mean = average(t.x[row], weight[row], members)
        torch.testing.assert_close(y[row, slot].double(), mean, atol=1e-5, rtol=1e-5)
        assert float(size[row, slot]) == sum(float(t.size[row, i]) for i in members)


# ToMe


def official_matching(keys, r, cls, dist):
    """Steps 3 to 8 of the card over a whole sequence of keys, CLS and distillation token included: what each
    token goes into (by position), and the positions that stay, in the order that the next block sees."""
    count = len(keys)
    r = min(r, (count - cls - dist) // 2)
    score = {}
    for a in range(0, count, 2):
        for b in range(1, count, 2):
            forbidden = (cls and a == 0) or (dist and b == 1)
            score[a, b] = -math.inf if forbidden else cosine(keys[a], keys[b])
    best = {a: max(range(1, count, 2), key=lambda b: score[a, b]) for a in range(0, count, 2)}
    falling = sorted(best, key=lambda a: -score[a, best[a]])
    merged, unmerged = falling[:r], falling[r:]
    if cls:
        unmerged.sort()
    odd = list(range(1, count, 2))
    order = [unmerged[0], odd[0], *unmerged[1:], *odd[1:]] if dist else unmerged + odd
    return {a: best[a] for a in merged}, order


@pytest.mark.parametrize(("cls", "dist"), [(0, 0), (1, 0), (1, 1)])
@pytest.mark.parametrize(
    ("n", "removed"), [(24, (5, 4, 4, 3)), (25, (12, 6, 3, 2, 1)), (49, (8, 8, 8, 8, 8))]
)
def test_tome_is_the_official_matching_over_successive_blocks(cls, dist, n, removed):
    prefix, batch = cls + dist, 2
    g = torch.Generator().manual_seed(n)
    ours = Reduction(torch.arange(n).repeat(batch, 1), torch.arange(n).repeat(batch, 1))
    official = [[("prefix",)] * prefix + [[i] for i in range(n)] for _ in range(batch)]
    for block, r in enumerate(removed):
        keys = torch.randn(batch, prefix + ours.k, 16, generator=g)
        t = Tokens(torch.zeros(batch, ours.k, 1), (1, n), prefix=prefix, layer=block, depth=len(removed))
        t.extras = {"keys": keys[:, None, prefix:]}
        step = vtc.get_method("tome").reduce(t, ours.k - r)
        ours = Reduction(ours.index.gather(1, step.index), step.source.gather(1, ours.source))
        for row in range(batch):
            goes, order = official_matching(keys[row], r, cls, dist)
            for a, b in goes.items():
                official[row][b] = official[row][b] + official[row][a]
            official[row] = [official[row][i] for i in order]
            assert official[row][:prefix] == [("prefix",)] * prefix
            assert [sorted(members) for _, members in groups_of(ours, row)] == [
                sorted(members) for members in official[row][prefix:]
            ]
            assert len(official[row]) == prefix + ours.k


def tome_of_the_card(keys, size, k, prefix, order):
    """Rounds until k are left: the places that stay, in order, with the tokens that went there."""
    groups = [(i, [i]) for i in range(len(keys))]
    while len(groups) > k:
        metric = [average(keys, size, members) for _, members in groups]
        even = [i for i in range(len(groups)) if (i + prefix) % 2 == 0]
        odd = [i for i in range(len(groups)) if (i + prefix) % 2 == 1]
        best = {a: max(odd, key=lambda b: cosine(metric[a], metric[b])) for a in even}
        falling = sorted(even, key=lambda a: -cosine(metric[a], metric[best[a]]))
        r = min(len(groups) - k, len(groups) // 2)
        for a in falling[:r]:
            groups[best[a]] = (groups[best[a]][0], groups[best[a]][1] + groups[a][1])
        rest = falling[r:] if prefix == 0 else sorted(falling[r:])
        stay = rest + odd
        groups = [groups[i] for i in (sorted(stay) if order == "spatial" else stay)]
    return groups


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("order", ["paper", "spatial"])
def test_tome(k, prefix, order):
    t = made(seed=k, prefix=prefix)
    reduction = vtc.get_method("tome", order=order).reduce(t, k)
    for row in range(2):
        expected = tome_of_the_card(t.keys[row, 0], t.size[row], k, prefix, order)
        check(t, reduction, row, expected)


@pytest.mark.parametrize("k", [12, 15, 22])
@pytest.mark.parametrize("prefix", [0, 1])
def test_tome_takes_equals_in_turn(k, prefix):
    t = made(seed=k, kind="alike", prefix=prefix)
    reduction = vtc.get_method("tome").reduce(t, k)
    for row in range(2):
        check(t, reduction, row, tome_of_the_card(t.keys[row, 0], t.size[row], k, prefix, "paper"))


def test_tome_with_many_tokens_holds_few_similarities(monkeypatch):
    from vtc.methods import tome

    t = made(n=60, prefix=1)
    at_once = vtc.get_method("tome").reduce(t, 40)
    monkeypatch.setattr(tome, "_PAIRS", 500)
    assert torch.equal(vtc.get_method("tome").reduce(t, 40).source, at_once.source)


# ToFu


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize(("layer", "drop"), [(0, 0.5), (5, 0.5), (6, 0.5), (11, 0.5), (0, 0.0), (11, 1.0)])
def test_tofu(k, layer, drop):
    t = made(seed=k, prefix=1, layer=layer, depth=12)
    reduction = vtc.get_method("tofu", drop=drop).reduce(t, k)
    y = reduction.apply(t.x, t.size)
    for row in range(2):
        expected = tome_of_the_card(t.keys[row, 0], t.size[row], k, 1, "paper")
        assert reduction.index[row].tolist() == [place for place, _ in expected]
        if layer < drop * 12:
            assert groups_of(reduction, row) == [(place, [place]) for place, _ in expected]
            assert torch.equal(y[row], t.x[row, reduction.index[row]])
            continue
        assert groups_of(reduction, row) == [(place, sorted(members)) for place, members in expected]
        for slot, (_, members) in enumerate(expected):
            mean = sum(t.x[row, i].double() for i in members) / len(members)
            longest = max(float(t.x[row, i].double().norm()) for i in members)
            mlerp = mean / mean.norm() * longest
            torch.testing.assert_close(y[row, slot].double(), mlerp, atol=1e-5, rtol=1e-5)


def test_tofu_with_opposite_tokens_is_the_one_whose_place_it_is():
    x = torch.tensor([[[3.0, 4.0], [-3.0, -4.0]]])
    t = Tokens(x, (1, 2), layer=11, depth=12, extras={"keys": torch.ones(1, 1, 2, 4)})
    y = vtc.get_method("tofu").reduce(t, 1).apply(x)
    assert y.tolist() == [[[-3.0, -4.0]]]


# PiToMe


def pitome_of_the_card(keys, size, k, margin, pairs):
    groups = [(i, [i]) for i in range(len(keys))]
    while len(groups) > k:
        n, r = len(groups), min(len(groups) - k, len(groups) // 2)
        metric = [average(keys, size, members) for _, members in groups]
        similar = [[1.0 if a is b else cosine(a, b) for b in metric] for a in metric]

        def elu(value):
            return value if value > 0 else math.exp(value) - 1

        energy = [sum(elu(s - margin) for s in row) / n for row in similar]
        ranked = sorted(range(n), key=lambda i: -energy[i])
        mergeable = ranked if pairs else ranked[: 2 * r]
        a, b = mergeable[0::2], mergeable[1::2]
        best = {i: max(b, key=lambda j: similar[i][j]) for i in a}
        for i in sorted(a, key=lambda i: -similar[i][best[i]])[:r]:
            groups[best[i]] = (groups[best[i]][0], groups[best[i]][1] + groups[i][1])
            groups[i] = None
        groups = [group for group in groups if group is not None]
    return groups


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("layer", [0, 5, 6, 11])
@pytest.mark.parametrize("pairs", ["first", "last", "none", "both"])
def test_pitome(k, layer, pairs):
    t = made(seed=k, prefix=1, layer=layer, depth=12)
    reduction = vtc.get_method("pitome", pairs=pairs, margin=0.9).reduce(t, k)
    bipartite = {"first": layer < 6, "last": layer >= 6, "none": False, "both": True}[pairs]
    for row in range(2):
        margin = 0.9 * (1 - layer / 12)
        expected = pitome_of_the_card(t.keys[row, 0], t.size[row], k, margin, bipartite)
        check(t, reduction, row, expected)


def test_pitome_takes_the_first_half_of_an_odd_depth_with_its_middle():
    t = made(layer=2, depth=5)  # the official ceil(5 / 2) = 3 first blocks
    first, none, both = (vtc.get_method("pitome", pairs=p).reduce(t, 15) for p in ("first", "none", "both"))
    assert torch.equal(first.source, both.source) and not torch.equal(first.source, none.source)


@pytest.mark.parametrize("k", [12, 15, 22])
@pytest.mark.parametrize("pairs", ["none", "both"])
def test_pitome_takes_equals_in_turn(k, pairs):
    t = made(seed=k, kind="alike")
    reduction = vtc.get_method("pitome", pairs=pairs).reduce(t, k)
    for row in range(2):
        expected = pitome_of_the_card(t.keys[row, 0], t.size[row], k, 0.0, pairs == "both")
        check(t, reduction, row, expected)


def test_pitome_protects_what_stands_out():
    t = made(n=12, layer=0, depth=12)
    keys = torch.ones(2, 12, 16)
    keys[:, [3, 8]] = torch.eye(16)[[0, 1]] * torch.tensor([-5.0])
    t.extras["keys"] = keys[:, None]
    reduction = vtc.get_method("pitome", pairs="none").reduce(t, 7)
    assert torch.equal(reduction.apply(t.x)[0][reduction.source[0, [3, 8]]], t.x[0, [3, 8]])


# MCTF


def mctf_of_the_card(x, received, size, k, prefix, similarity, information, sizes, forth):
    """Steps 2 to 5 of the card, the criteria multiplied; a group's attention and size are sums."""
    groups = [(i, [i]) for i in range(len(x))]
    weight = [float(a) * float(s) for a, s in zip(received, size)]

    def power(value, temperature):
        return value ** (1 / temperature) if temperature else 1.0

    while len(groups) > k:
        features = [average(x, weight, members) for _, members in groups]
        attention = [sum(float(received[i]) for i in members) for _, members in groups]
        amount = [sum(float(size[i]) for i in members) for _, members in groups]
        u = [min(attention) / a for a in attention]  # one over it, divided by the largest
        z = [min(amount) / s for s in amount]
        even = [i for i in range(len(groups)) if (i + prefix) % 2 == 0]
        odd = [i for i in range(len(groups)) if (i + prefix) % 2 == 1]
        score = {
            (a, b): power((cosine(features[a], features[b]) + 1) / 2, similarity)
            * power(u[a] * u[b], information)
            * power(z[a] * z[b], sizes)
            for a in even
            for b in odd
        }
        r = min(len(groups) - k, len(groups) // 2)
        there = int(r * forth)
        best = {a: max(odd, key=lambda b: score[a, b]) for a in even}
        falling = sorted(even, key=lambda a: -score[a, best[a]])
        for a in falling[:there]:
            groups[best[a]] = (groups[best[a]][0], groups[best[a]][1] + groups[a][1])
        rest = falling[there:] if prefix == 0 else sorted(falling[there:])
        if r > there:
            back = {b: max(rest, key=lambda a: score[a, b]) for b in odd}
            falling = sorted(odd, key=lambda b: -score[back[b], b])
            for b in falling[: r - there]:
                groups[back[b]] = (groups[back[b]][0], groups[back[b]][1] + groups[b][1])
            odd = falling[r - there :]
        groups = [groups[i] for i in rest + odd]
    return groups


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("options", [(1.0, 20.0, 40.0, 0.5), (1.0, 2.0, 3.0, 0.5), (1.0, 0, 0, 1.0)])
def test_mctf(k, prefix, options):
    t = made(seed=k, prefix=prefix)
    names = ("similarity", "information", "sizes", "forth")
    reduction = vtc.get_method("mctf", **dict(zip(names, options))).reduce(t, k)
    for row in range(2):
        expected = mctf_of_the_card(t.x[row], t.mean_attention[row, 0], t.size[row], k, prefix, *options)
        check(t, reduction, row, expected)
    torch.testing.assert_close(reduction.weight, t.mean_attention[:, 0] * t.size)


@pytest.mark.parametrize("k", [12, 15, 22])
def test_mctf_takes_equals_in_turn(k):
    t = made(seed=k, kind="alike", prefix=1)
    reduction = vtc.get_method("mctf").reduce(t, k)
    for row in range(2):
        args = t.x[row], t.mean_attention[row, 0], t.size[row], k, 1, 1.0, 20.0, 40.0, 0.5
        check(t, reduction, row, mctf_of_the_card(*args))


def test_mctf_with_similarity_alone_and_one_way_is_tome_on_features():
    t = made(prefix=1)
    t.extras["keys"] = t.x[:, None]
    for k in (12, 17, 22):
        mctf = vtc.get_method("mctf", information=0, sizes=0, forth=1.0).reduce(t, k)
        tome = vtc.get_method("tome").reduce(t, k)
        assert torch.equal(mctf.index, tome.index) and torch.equal(mctf.source, tome.source)


def test_mctf_where_no_attention_is_received():
    t = made(prefix=1)
    t.extras["mean_attention"] = torch.zeros(2, 1, N)
    y = vtc.get_method("mctf").reduce(t, 9).apply(t.x, t.size)
    assert y.isfinite().all()


# ATC


def atc_of_the_card(keys, k, linkage):
    """The two nearest clusters become one until k are left, in the order of their first members."""
    distance = [[1 - cosine(a, b) for b in keys] for a in keys]
    of = {"average": lambda d: sum(d) / len(d), "complete": max, "single": min}[linkage]
    groups = [[i] for i in range(len(keys))]
    while len(groups) > k:
        pairs = [(i, j) for i in range(len(groups)) for j in range(i + 1, len(groups))]
        i, j = min(pairs, key=lambda p: of([distance[a][b] for a in groups[p[0]] for b in groups[p[1]]]))
        groups[i] += groups.pop(j)
    return sorted((min(members), members) for members in groups)


@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("linkage", ["average", "complete", "single"])
def test_atc(k, linkage):
    t = made(seed=k, prefix=1)
    reduction = vtc.get_method("atc", linkage=linkage).reduce(t, k)
    for row in range(2):
        check(t, reduction, row, atc_of_the_card(t.keys[row, 0], k, linkage))


def test_atc_puts_equal_tokens_together():
    t = made(kind="alike", n=40)
    for linkage in ("average", "complete", "single"):
        source = vtc.get_method("atc", linkage=linkage).reduce(t, 5).source
        for row in range(2):
            for i in range(40):
                same = (t.keys[row, 0] == t.keys[row, 0, i]).all(dim=1)
                assert torch.equal(source[row] == source[row, i], same)


# All of them


@pytest.mark.parametrize(("name", "options"), OPTIONS)
@pytest.mark.parametrize("kind", ["random", "alike", "zero", "one token"])
def test_exactly_k_and_a_batch_is_its_single_rows(name, options, kind):
    for layer in (0, 11):
        n = 1 if kind == "one token" else N
        t = made(batch=3, n=n, kind="alike" if kind == "alike" else "random", layer=layer, depth=12, prefix=1)
        if kind == "zero":
            t.x, t.extras["keys"] = torch.zeros_like(t.x), torch.zeros_like(t.keys)
        for k in sorted({1, 2, 11, 12, n - 1, n} & set(range(1, n + 1))):
            method = vtc.get_method(name, **options)
            reduction = method.reduce(t, k)
            assert reduction.index.shape == (3, k) and reduction.source.shape == (3, n)
            assert all(len(set(row)) == k for row in reduction.index.tolist())
            slots = torch.arange(k).expand(3, k)
            assert torch.equal(reduction.source.gather(1, reduction.index), slots)
            assert reduction.apply(t.x, t.size).isfinite().all()
            if k == n:
                assert torch.equal(reduction.ascending().apply(t.x, t.size), t.x)
            for row, one in enumerate(rows_of(t)):
                single = method.reduce(one, k)
                assert torch.equal(single.index[0], reduction.index[row])
                assert torch.equal(single.source[0], reduction.source[row])


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_half_precision_is_judged_in_float32(name, options):
    t = made(prefix=1)
    low = Tokens(t.x.bfloat16(), t.grid, size=t.size, prefix=1)
    low.extras = {key: extra.bfloat16() for key, extra in t.extras.items()}
    high = Tokens(low.x.float(), t.grid, size=t.size, prefix=1)
    high.extras = {key: extra.float() for key, extra in low.extras.items()}
    method = vtc.get_method(name, **options)
    a, b = method.reduce(low, 10), method.reduce(high, 10)
    assert torch.equal(a.index, b.index) and torch.equal(a.source, b.source)
    assert a.apply(low.x, t.size).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_gradients_reach_every_token_that_is_in_a_group(name, options):
    t = made(layer=11, depth=12)
    x = t.x.clone().requires_grad_()
    with torch.no_grad():
        reduction = vtc.get_method(name, **options).reduce(t, 9)
    reduction.apply(x, t.size).sum().backward()
    assert x.grad.abs().sum(dim=2).gt(0).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tome", {"order": "raster"}, "order must be 'paper' or 'spatial'"),
        ("atc", {"linkage": "ward"}, "linkage must be one of average"),
        ("tofu", {"drop": 2}, "share of the depth"),
        ("pitome", {"pairs": "half"}, "pairs must be one of first"),
        ("mctf", {"information": -1}, "information is a temperature"),
        ("mctf", {"forth": 3}, "forth is a share"),
    ],
)
def test_wrong_options_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        vtc.get_method(name, **options)
