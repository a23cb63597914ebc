"""Methods that select inside of an encoder, each against a plain restatement of its card."""

import math

import pytest
import torch

import vtc
from vtc.methods import dpc_knn
from vtc.methods.tr_pts import least
from vtc.methods.zero_tprune import ZeroTPrune
from vtc.schedule import check_schedule
from vtc.tokens import Tokens, gather

GRID = (4, 6)
N = 24
METHODS = ("evit", "tr-pts", "ats", "dpc-knn", "representation-shift", "zero-tprune", "random", "divprune")
HEADS = 4


def tokens(seed=0, n=N, batch=3, prefix=1, suffix=0, layer=5, kind=torch.rand):
    """Tokens as a block has them, of which an earlier one may have left `n` of the grid."""
    torch.manual_seed(seed)
    m = prefix + n + suffix
    extras = {
        name: kind(batch, 1, n).abs() for name in ("cls_attention", "mean_attention", "cls_values", "shift")
    }
    extras["attention"] = (1.5 * kind(batch, 1, HEADS, m, m)).softmax(-1)
    extras["keys"] = kind(batch, 1, n, 8)
    place = torch.stack([torch.randperm(N)[:n].sort().values for _ in range(batch)])
    lot = torch.arange(batch) + 7
    size = torch.randint(1, 4, (batch, n)).float()
    settings = {"prefix": prefix, "layer": layer, "depth": 12}
    return Tokens(kind(batch, n, 16), GRID, size=size, place=place, lot=lot, extras=extras, **settings)


def rows(t, which):
    """The same tokens with the given rows of the batch."""
    extras = {name: extra[which] for name, extra in t.extras.items()}
    settings = {"prefix": t.prefix, "layer": t.layer, "depth": t.depth, "extras": extras}
    return Tokens(t.x[which], t.grid, size=t.size[which], place=t.place[which], lot=t.lot[which], **settings)


def halved(t):
    """The same tokens, in the precision of a model in bfloat16."""
    t.x, t.extras = t.x.bfloat16(), {name: extra.bfloat16() for name, extra in t.extras.items()}
    return t


def highest(score, k):
    return sorted(range(len(score)), key=lambda j: -score[j])[:k]  # Python's sort is stable


# EViT and TR-PTS


def evit_of_the_card(attention, x, size, k, fuse):
    """Place, members, features and size of every slot, by place."""
    order = highest(attention, len(attention))
    kept, rest = order[: k - 1], order[k - 1 :]
    slots = [(j, [j], x[j], size[j]) for j in kept]
    fused, total = torch.zeros_like(x[0]), sum(attention[j] for j in rest)
    for j in rest:
        share = attention[j] if fuse == "sum" else attention[j] / total if total else 1 / len(rest)
        fused = fused + share * x[j]
    slots.append((rest[0], rest, x[rest[0]] if len(rest) == 1 else fused, sum(size[j] for j in rest)))
    return sorted(slots, key=lambda slot: slot[0])


def check_slots(reduction, t, row, slots):
    assert reduction.index[row].tolist() == [place for place, *_ in slots]
    for slot, (_, members, _, _) in enumerate(slots):
        assert (reduction.source[row] == slot).nonzero()[:, 0].tolist() == sorted(members)
    features = torch.stack([feature for _, _, feature, _ in slots]).float()
    torch.testing.assert_close(reduction.apply(t.x.float(), t.size)[row], features)
    assert reduction.sizes(t.size)[row].tolist() == [size for *_, size in slots]


@pytest.mark.parametrize("name, fuse", [("evit", "sum"), ("evit", "mean"), ("tr-pts", "mean")])
@pytest.mark.parametrize("case", ["random", "ties", "no attention", "bfloat16"])
@pytest.mark.parametrize("k", [1, 2, 9, 22, 23])
def test_evit_and_tr_pts(k, case, name, fuse):
    t = tokens(seed=k, n=23)
    if case == "ties":
        t.extras["cls_attention"] = (4 * t.cls_attention).floor() / 16
    if case == "no attention":
        t.extras["cls_attention"] = t.cls_attention * (t.cls_attention > 0.8)
    if case == "bfloat16":
        t = halved(t)
    reduction = vtc.get_method(name, **({"fuse": fuse} if name == "evit" else {})).reduce(t, k)
    for row in range(3):
        attention = t.cls_attention[row, 0].tolist()
        slots = evit_of_the_card(attention, t.x[row].double(), t.size[row].tolist(), k, fuse)
        check_slots(reduction, t, row, slots)


@pytest.mark.parametrize("k", [1, 8, N])
def test_evit_without_fusing_drops(k):
    t = tokens()
    reduction = vtc.get_method("evit", fuse="none").reduce(t, k)
    for row in range(3):
        kept = sorted(highest(t.cls_attention[row, 0].tolist(), k))
        assert reduction.index[row].tolist() == kept
        assert (reduction.source[row] >= 0).nonzero()[:, 0].tolist() == kept
        assert torch.equal(reduction.apply(t.x, t.size)[row], t.x[row, kept])


def test_evit_without_cls_goes_by_what_tokens_receive():
    t = tokens()
    evit = vtc.get_method("evit", attention="mean")
    assert [need.kind for need in evit.needs] == ["mean_attention"]
    index = evit.reduce(t, 6).index
    t.extras["cls_attention"] = t.mean_attention
    assert torch.equal(vtc.get_method("evit").reduce(t, 6).index, index)


def test_evit_does_not_depend_on_the_order_of_tokens():
    t, mixed = tokens(), tokens()
    order = torch.randperm(N)
    mixed.x, mixed.size = t.x[:, order], t.size[:, order]
    mixed.extras["cls_attention"] = t.cls_attention[:, :, order]
    here, there = (vtc.get_method("evit").reduce(tokens, 9) for tokens in (t, mixed))
    placed = order[there.index].argsort(dim=1)  # the same slots in the order of the first
    torch.testing.assert_close(gather(there.apply(mixed.x, mixed.size), placed), here.apply(t.x, t.size))


def test_average_is_the_sum_over_the_dropped_attention_and_lies_among_the_dropped():
    t = tokens()
    total = vtc.get_method("evit").reduce(t, 9)
    mean = vtc.get_method("tr-pts").reduce(t, 9)
    order = t.cls_attention[:, 0].argsort(dim=1, descending=True)
    slot = total.source.gather(1, order[:, 8:9])[..., None].expand(-1, -1, 16)  # (B, 1, D)
    attention = t.cls_attention[:, 0].gather(1, order[:, 8:]).sum(dim=1)[:, None, None]
    fused, divided = (r.apply(t.x, t.size).gather(1, slot) for r in (total, mean))
    torch.testing.assert_close(fused / attention, divided)
    dropped = gather(t.x, order[:, 8:])
    assert (divided[:, 0] >= dropped.amin(dim=1) - 1e-6).all()
    assert (divided[:, 0] <= dropped.amax(dim=1) + 1e-6).all()


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6])
def test_tr_pts_does_not_depend_on_the_scale_of_attention(scale):
    t, other = tokens(), tokens()
    other.extras["cls_attention"] = t.cls_attention * scale
    here, there = (vtc.get_method("tr-pts").reduce(tokens, 5).apply(t.x, t.size) for tokens in (t, other))
    torch.testing.assert_close(there, here)


def test_a_fused_token_is_a_candidate_of_the_next_block():
    t = tokens()
    t.extras["cls_attention"] = torch.arange(N).float().expand(3, 1, N)
    first = vtc.get_method("evit").reduce(t, 10)  # 0..14 are fused in the place of 14
    assert first.index[0].tolist() == list(range(14, 24))
    x, size = first.apply(t.x, t.size), first.sizes(t.size)
    attention = torch.tensor([4.5, *range(9)]).expand(3, 1, 10)  # the fused one is the fifth now
    second = vtc.get_method("evit").reduce(Tokens(x, GRID, size, extras={"cls_attention": attention}), 4)
    assert second.index[0].tolist() == [6, 7, 8, 9]
    assert second.source[0].tolist() == [0] * 7 + [1, 2, 3]
    total = (attention[0, 0, :7, None] * x[0, :7]).sum(0)
    torch.testing.assert_close(second.apply(x, size)[0, 0], total)
    assert second.sizes(size).sum(1).tolist() == t.size.sum(1).tolist()


def test_least_sensitive_blocks_are_a_schedule():
    assert least([5, 1, 3, 1, 9], 2) == (1, 3)
    assert least([5, 1, 3, 1, 9], 1) == (1,)
    assert least(torch.tensor([0.5, 0.1, 0.1, 0.1]), 2) == (1, 2)
    assert least([3, 2, 1], 3) == (0, 1, 2)
    assert check_schedule(least([4, 3, 2, 1], 2)) == (2, 3)
    for sensitivity, count in (([1, 2], 0), ([1, 2], 3), ([1, 2], 1.5), ([1, math.nan], 1)):
        with pytest.raises(ValueError):
            least(sensitivity, count)


def test_tr_pts_may_reduce_behind_the_block():
    assert not vtc.get_method("tr-pts").after_block
    assert vtc.get_method("tr-pts", after="block").after_block


# ATS


def ats_of_the_card(score, k):
    share = [s / sum(score) for s in score] if sum(score) else [1 / len(score)] * len(score)
    cdf = [sum(share[: j + 1]) for j in range(len(share))]
    sampled = set()
    for i in range(k):
        quantile = (2 * i + 1) / (2 * k)
        sampled.add(min(range(len(cdf)), key=lambda j: abs(cdf[j] - quantile)))
    others = [j for j in highest(score, len(score)) if j not in sampled]
    return sorted([*sampled, *others[: k - len(sampled)]]), len(sampled)


@pytest.mark.parametrize("k", [1, 2, 6, 17, 23, N])
@pytest.mark.parametrize("power", [1, 3])
def test_ats(k, power):
    t = tokens(seed=k)
    t.extras["cls_values"] = 1e-3 * t.cls_values**power
    index = vtc.get_method("ats").reduce(t, k).index
    found = [ats_of_the_card(t.cls_values[row, 0].double().tolist(), k) for row in range(3)]
    assert index.tolist() == [kept for kept, _ in found]
    if k == 17 and power == 3:
        assert all(count < k for _, count in found)  # so that filling up is tested too


@pytest.mark.parametrize("k", [1, 2, 4, 8, 16])
def test_ats_where_quantiles_lie_between_two_tokens(k):
    flat = [1] * 16
    steps = [0, 0, 4, 0, 0, 4, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0]
    mixed = [2, 0, 1, 1, 0, 0, 3, 1, 2, 2, 0, 0, 1, 1, 1, 1]
    values = torch.tensor([flat, steps, mixed, [0] * 16]).float()[:, None]
    t = Tokens(torch.rand(4, 16, 4), (4, 4), extras={"cls_values": values})
    index = vtc.get_method("ats").reduce(t, k).index
    for row, score in enumerate((flat, steps, mixed, [0] * 16)):  # sums are powers of two: all is exact
        assert index[row].tolist() == ats_of_the_card(score, k)[0]


# DPC-kNN


def dpc_knn_of_the_card(x, k, neighbours):
    """Centres, and for every token the position of its centre."""
    n = len(x)
    d = (x[:, None] - x).square().sum(-1).div(x.shape[1]).sqrt().tolist()
    density = [math.exp(-sum(v**2 for v in sorted(d[i])[:neighbours]) / min(neighbours, n)) for i in range(n)]
    gap = []
    for i in range(n):
        denser = [j for j in range(n) if (density[j], -j) > (density[i], -i)]
        gap.append(min((d[i][j] for j in denser), default=max(map(max, d))))
    centres = sorted(highest([a * b for a, b in zip(gap, density)], k))
    return centres, [j if j in centres else min(centres, key=lambda c: d[j][c]) for j in range(n)]


def check_clusters(t, k, **options):
    reduction = vtc.get_method("dpc-knn", **options).reduce(t, k)
    for row in range(len(t.x)):
        x = t.x[row].double()
        centres, joined = dpc_knn_of_the_card(x, k, options.get("neighbours", 5))
        assert reduction.index[row].tolist() == centres
        assert [centres[slot] for slot in reduction.source[row].tolist()] == joined
        for slot, centre in enumerate(centres):
            members = [j for j in range(t.n) if joined[j] == centre]
            size = t.size[row, members].double()
            mean = (x[members] * size[:, None]).sum(0) / size.sum()
            torch.testing.assert_close(reduction.apply(t.x, t.size)[row, slot], mean.float())
            assert reduction.sizes(t.size)[row, slot] == size.sum()


@pytest.mark.parametrize("k", [1, 2, 9, 23, N])
@pytest.mark.parametrize("neighbours", [1, 5, 40])
def test_dpc_knn(k, neighbours):
    check_clusters(tokens(seed=k, kind=torch.randn), k, neighbours=neighbours)


@pytest.mark.parametrize("k", [1, 3, 8, 15, 16])
def test_dpc_knn_with_ties(k):
    torch.manual_seed(k)
    half = torch.randint(-1, 2, (5, 8, 4)).float()
    half[0] = 0  # all tokens the same
    half[1, 4:] = half[1, :4]  # and pairs of them
    check_clusters(Tokens(torch.cat([half, -half], dim=1), (4, 4)), k)  # the mean is 0: all is exact


def test_dpc_knn_gives_every_group_of_equal_tokens_a_centre():
    torch.manual_seed(0)
    distinct = torch.randn(2, 4, 16) * torch.tensor([1.0, 1000.0])[:, None, None]
    t = Tokens(distinct.repeat(1, 6, 1), GRID)
    reduction = vtc.get_method("dpc-knn").reduce(t, 4)
    assert reduction.index.tolist() == [[0, 1, 2, 3]] * 2
    assert reduction.source.tolist() == [[0, 1, 2, 3] * 6] * 2


@pytest.mark.parametrize("k", [1, 7, 20])
def test_dpc_knn_of_features_so_large_that_densities_vanish_in_float32(k):
    t = tokens(seed=k, kind=torch.randn)
    t.x = 12 * t.x
    nearest = torch.cdist(t.x, t.x).div(4).topk(5, largest=False).values
    assert (-nearest.square().mean(dim=2)).exp().eq(0).float().mean() > 0.5
    check_clusters(t, k)


def test_dpc_knn_a_few_rows_at_a_time(monkeypatch):
    t = tokens(kind=torch.randn)
    once = vtc.get_method("dpc-knn").reduce(t, 9)
    monkeypatch.setattr(dpc_knn, "_PAIRS", 5 * t.n * len(t.x))
    parts = vtc.get_method("dpc-knn").reduce(t, 9)
    assert torch.equal(parts.index, once.index) and torch.equal(parts.source, once.source)


# Representation Shift


@pytest.mark.parametrize("k", [1, 10, N])
@pytest.mark.parametrize("levels", [None, 3])
def test_representation_shift(k, levels):
    t = tokens()
    if levels:
        t.extras["shift"] = (levels * t.shift).floor()
    method = vtc.get_method("representation-shift")
    assert method.after_block
    for row, index in enumerate(method.reduce(t, k).index.tolist()):
        assert index == sorted(highest(t.shift[row, 0].tolist(), k))


# Zero-TPrune


def importance_of_the_card(attention, rounds, start, variance):
    """attention: for each head a list of rows. Returns the votes of every token."""
    m, heads = len(attention[0]), []
    for head in attention:
        votes = [1.0] * m
        if start == "cls":
            votes[0] = math.sqrt(m)
        for _ in range(rounds):
            votes = [sum(votes[j] * head[j][i] for j in range(m)) for i in range(m)]
        heads.append(votes)
    spread = [sum((v - sum(votes) / m) ** 2 for v in votes) / m for votes in heads]
    good = [votes for votes, var in zip(heads, spread) if variance[0] <= var <= variance[1]]
    count = len(good)
    good = good or heads
    return [math.sqrt(sum(votes[i] ** 2 for votes in good) / len(good)) for i in range(m)], count


def zero_tprune_of_the_card(attention, keys, k, prefix, rounds, similar, start, variance):
    n, m = len(keys), len(attention[0])
    gone = min(math.floor(similar * (n - k) + 0.5), n // 2)
    guide, _ = importance_of_the_card(attention, 1, start, variance)
    order = highest(guide[prefix : prefix + n], n)
    more, less = order[: n - n // 2], order[n - n // 2 :][::-1]  # the least important first

    def cosine(a, b):
        return float(keys[a] @ keys[b] / (keys[a].norm() * keys[b].norm()))

    closest = {a: max(cosine(a, b) for b in more) for a in less}
    removed = sorted(less, key=lambda a: -closest[a])[:gone]
    left = [j for j in range(n) if j not in removed]
    nodes = [*range(prefix), *(prefix + j for j in left), *range(prefix + n, m)]
    graph = [
        [[row[i] / sum(row[v] for v in nodes) for i in nodes] for row in (h[j] for j in nodes)]
        for h in attention
    ]
    score, count = importance_of_the_card(graph, rounds, start, variance)
    return sorted(left[j] for j in highest(score[prefix : prefix + len(left)], k)), count


CASES = [
    {},
    {"similar": 0.0},
    {"similar": 1.0, "start": "uniform"},
    {"variance": (0.05, 0.12), "iterations": (4, 2, 3)},
    {"variance": (50.0, 60.0), "start": "uniform"},
]


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("layer, rounds", [(2, 0), (3, 1), (8, 1), (9, 2)])
@pytest.mark.parametrize("k", [1, 6, 12])
def test_zero_tprune(k, layer, rounds, options):
    t = tokens(seed=k + layer, n=13, batch=2, prefix=2, suffix=1, layer=layer, kind=torch.randn)
    method = vtc.get_method("zero-tprune", **options)
    index = method.reduce(t, k).index
    rule = [method.iterations[rounds], method.similar, method.start, method.variance]
    counts = []
    for row in range(2):
        attention, keys = t.attention[row, 0].double().tolist(), t.keys[row, 0].double()
        kept, count = zero_tprune_of_the_card(attention, keys, k, 2, *rule)
        assert index[row].tolist() == kept
        counts.append(count)
    if options.get("variance") == (50.0, 60.0):
        assert counts == [0, 0]  # no head survives, so that all count


@pytest.mark.parametrize("k", [8, 11, 12])
def test_zero_tprune_takes_the_least_important_of_equally_similar_tokens(k):
    t = tokens(seed=k, n=13, batch=2, kind=torch.randn)
    t.extras["keys"] = torch.eye(2)[torch.arange(13) % 2].expand(2, 1, 13, 2)  # in both halves: all similar
    method = vtc.get_method("zero-tprune", similar=1.0)
    index = method.reduce(t, k).index
    for row in range(2):
        guide = method.importance(t.attention[row : row + 1, 0], 1, 1)[0, 1:].tolist()
        assert index[row].tolist() == sorted(highest(guide, k))


def test_zero_tprune_leaves_out_heads_that_are_too_flat_or_too_peaked():
    seen = set()
    for seed in range(6):
        t = tokens(seed=seed, n=13, batch=1, kind=torch.randn)
        for variance in ((0.05, 0.12), (0.01, 0.7)):
            attention = t.attention[0, 0].double().tolist()
            found, count = importance_of_the_card(attention, 2, "uniform", variance)
            method = ZeroTPrune(start="uniform", variance=variance)
            votes = method.importance(t.attention[:, 0], 2, 1)
            torch.testing.assert_close(votes[0].tolist(), found, atol=1e-5, rtol=1e-5)
            seen.add(count)
    assert seen & {1, 2, 3} and 4 in seen  # some left out, and none


def test_importance_in_closed_form():
    m = 6
    method, uniform = (
        ZeroTPrune(variance=(0.0, math.inf)),
        ZeroTPrune(start="uniform", variance=(0.0, math.inf)),
    )
    start = torch.ones(1, m)
    start[0, 0] = m**0.5
    random = torch.rand(1, 1, m, m).softmax(-1)
    torch.testing.assert_close(method.importance(random, 0, 1), start)
    torch.testing.assert_close(method.importance(random, 0, 0), torch.ones(1, m))  # nothing is in front
    torch.testing.assert_close(uniform.importance(random, 0, 1), torch.ones(1, m))
    permutation = torch.eye(m)[torch.randperm(m)]
    torch.testing.assert_close(method.importance(permutation[None, None], 1, 1), start @ permutation)
    doubly = (permutation + permutation.T + torch.ones(m, m)) / (2 + m)
    torch.testing.assert_close(
        method.importance(doubly[None, None], 60, 1), (start.sum() / m).expand(1, m), atol=1e-4, rtol=1e-4
    )
    for rounds in range(4):
        torch.testing.assert_close(method.importance(random, rounds, 1).sum(), start.sum())
    values, vectors = torch.linalg.eig(random[0, 0].double().T)
    perron = vectors[:, values.abs().argmax()].real
    perron = (perron / perron.sum() * start.sum()).float()
    torch.testing.assert_close(method.importance(random, 60, 1)[0], perron, atol=1e-4, rtol=1e-4)


def test_the_similar_stage_takes_nothing_of_the_more_important_half():
    t = tokens(n=23)
    method = vtc.get_method("zero-tprune", similar=1.0)
    score = method.importance(t.attention[:, 0], 1, 1)[:, 1:]
    more = score.argsort(dim=1, descending=True)[:, :12]  # the half with the odd token
    kept = method.reduce(t, 12).index
    assert torch.equal(kept, more.sort(dim=1).values)  # all of the other half are gone
    kept = method.reduce(t, 15).source.gather(1, more)
    assert (kept >= 0).all()


def test_rounds_in_shallow_encoders():
    method = vtc.get_method("zero-tprune", iterations=(7, 5, 3))
    t = tokens(n=4, batch=1)

    def rounds(depth):
        found = []
        for layer in range(depth):
            t.layer, t.depth = layer, depth
            found.append(method._rounds(t))
        return found

    assert rounds(12) == [7] * 3 + [5] * 6 + [3] * 3
    assert rounds(24) == [7] * 3 + [5] * 18 + [3] * 3
    assert rounds(4) == [7, 5, 5, 3]
    assert rounds(2) == [5, 5]


# Rules of the features stage


def test_random_goes_by_one_draw_in_all_blocks():
    t = tokens()
    t.place = torch.arange(N).expand(3, N)
    method = vtc.get_method("random", seed=3)
    once = method.reduce(t, 6).index
    index = torch.arange(N).expand(3, N)
    for k in (20, 11, 6):
        step = method.reduce(Tokens(torch.rand(3, index.shape[1], 4), GRID, place=index, lot=t.lot), k)
        index = index.gather(1, step.index)
    assert torch.equal(index, once) and not torch.equal(once[0], once[1])


@pytest.mark.parametrize("name", ["random", "divprune", "dpc-knn"])
def test_stages(name):
    assert {"features", "encoder"} <= set(vtc.get_method(name).stages)
    assert vtc.get_method(name).stages[0] == ("encoder" if name == "dpc-knn" else "features")


# All of them


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", ["random", "ties", "constant", "zeros", "one token", "bfloat16"])
def test_exactly_k_in_any_batch(name, case):
    kind = {"constant": torch.ones, "zeros": torch.zeros}.get(case, torch.randn)
    t = tokens(n=1 if case == "one token" else 19, kind=kind, batch=4)
    if case == "ties":
        t.x = t.x.round()
        t.extras = {n: e if n == "attention" else e.round() for n, e in t.extras.items()}
    if case == "bfloat16":
        t = halved(t)
    method = vtc.get_method(name)
    order = torch.tensor([2, 0, 3, 1])
    for k in range(1, t.n + 1):
        reduction = method.reduce(t, k)
        assert reduction.index.shape == (4, k) and reduction.source.shape == (4, t.n)
        assert (reduction.index.diff(dim=1) > 0).all()
        assert torch.equal(reduction.source.gather(1, reduction.index), torch.arange(k).expand(4, k))
        y = reduction.apply(t.x, t.size)
        assert y.isfinite().all() and y.dtype == t.x.dtype
        mixed, single = method.reduce(rows(t, order), k), method.reduce(rows(t, slice(1, 2)), k)
        for part, which in ((mixed, order), (single, slice(1, 2))):
            assert torch.equal(part.index, reduction.index[which])
            assert torch.equal(part.source, reduction.source[which])
            torch.testing.assert_close(part.apply(t.x[which], t.size[which]), y[which])
        if k == t.n:
            assert torch.equal(y, t.x) and torch.equal(reduction.sizes(t.size), t.size)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", [torch.randn, torch.zeros])
def test_gradients(name, kind):
    t = tokens(kind=kind)
    reduction = vtc.get_method(name).reduce(t, 7)
    x = torch.randn(3, N, 16, requires_grad=True)
    reduction.apply(x, t.size).sum().backward()
    parts = reduction.apply(torch.eye(N).expand(3, N, N), t.size)  # (B, K, N) of each token in each slot
    assert parts.sum() > 0
    torch.testing.assert_close(x.grad, parts.sum(dim=1)[..., None].expand_as(x))


BAD = [
    ("evit", {"fuse": "max"}),
    ("evit", {"attention": "rows"}),
    ("tr-pts", {"after": "mlp"}),
    ("dpc-knn", {"neighbours": 0}),
    ("dpc-knn", {"neighbours": 2.5}),
    ("zero-tprune", {"similar": 1.5}),
    ("zero-tprune", {"start": "register"}),
    ("zero-tprune", {"iterations": (30, 5)}),
    ("zero-tprune", {"iterations": (30, -1, 1)}),
    ("zero-tprune", {"iterations": "301"}),
    ("zero-tprune", {"variance": (0.7, 0.01)}),
    ("zero-tprune", {"variance": 0.5}),
]


@pytest.mark.parametrize("name, options", BAD)
def test_options_that_mean_nothing_are_refused(name, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        vtc.get_method(name, **options)


def test_plans_with_lists_as_options_load(tmp_path):
    method = vtc.get_method("zero-tprune", iterations=(4, 2, 1), variance=(0.0, 0.5))
    vtc.save([(method, {"stage": "encoder"})], tmp_path / "plan.json")
    (loaded, _), *_ = vtc.load(tmp_path / "plan.json")
    t = tokens()
    assert torch.equal(loaded.reduce(t, 5).index, method.reduce(t, 5).index)
