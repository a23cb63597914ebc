"""DiffRate, Expedit and the baselines inside an encoder, each against a plain restatement of its card."""

import math

import pytest
import torch

import vtc
from vtc.grid import regions
from vtc.methods.diffrate import SCHEDULES, DiffRate, published
from vtc.methods.expedit import Expedit
from vtc.schedule import counts
from vtc.tokens import Tokens

GRID = (6, 8)
N = 48
BUDGETS = [1, 2, 13, 24, 47, 48]


def tokens(seed=0, batch=3, grid=GRID, left=None, width=16, **fields):
    """Random ones; `left` of the grid's, in places of their own in each row and with sizes, if given."""
    generator = torch.Generator().manual_seed(seed)
    n = left or grid[0] * grid[1]
    rows = [torch.randperm(grid[0] * grid[1], generator=generator)[:n] for _ in range(batch)]
    if left is not None:
        fields |= {"place": torch.stack(rows), "size": 1 + 3 * torch.rand(batch, n, generator=generator)}
    x = torch.randn(batch, n, width, generator=generator)
    extras = {"cls_attention": torch.rand(batch, 1, n, generator=generator)}
    return Tokens(x, grid, extras=extras, **fields)


def structured(kind):
    """Inputs full of ties: few distinct tokens with few distinct scores, constants, zeros."""
    t = tokens(seed=5, left=30)
    if kind == "duplicates":
        t.x = t.x[:, :5].repeat(1, 6, 1)
        t.extras["cls_attention"] = t.cls_attention[..., :3].repeat(1, 1, 10)
    if kind == "constant":
        t.x, t.extras["cls_attention"] = torch.ones_like(t.x), torch.ones(3, 1, 30)
    if kind == "zero":
        t.x = torch.zeros_like(t.x)
    if kind == "opposite":  # every token has a negative similarity to every one of another sign
        sign = torch.where(torch.arange(30) % 7 == 0, 1.0, -1.0)
        t.x = t.x[:, :1] * sign[:, None]
        t.extras["cls_attention"] = (sign + 2).expand(3, 1, 30).clone()
    return t


def row_of(t, row):
    """One row of a batch by itself."""
    extras = {name: extra[row : row + 1] for name, extra in t.extras.items()}
    parts = {name: getattr(t, name)[row : row + 1] for name in ("size", "place", "lot")}
    return Tokens(t.x[row : row + 1], t.grid, layer=t.layer, extras=extras, **parts)


def diffrate_of_the_card(t, row, pruned, k):
    """Steps 3 to 5: a list of (place, members, size) by slot, in the order of places."""
    importance, x = t.cls_attention[row, 0].tolist(), t.x[row].double()
    order = sorted(range(t.n), key=lambda j: -importance[j])
    unit = [x[j] / max(float(x[j].norm()), 1e-12) for j in range(t.n)]
    kept, merged = order[:k], order[k:pruned]
    members, size = {j: [j] for j in kept}, {j: float(t.size[row, j]) for j in kept}
    for j in merged:
        similarity = [float(unit[j] @ unit[i]) for i in kept]
        # equal ones may differ in their last bits, in which the card's own arithmetic differs from ours
        best = next(i for i, s in zip(kept, similarity) if s >= max(similarity) - 1e-6)
        members[best].append(j)
        size[best] += float(t.size[row, j]) * max(0.0, max(similarity))
    return [(j, sorted(members[j]), size[j]) for j in sorted(kept)]


def check_diffrate(t, method, pruned, k):
    reduction = method.reduce(t, k)
    assert reduction.index.shape == (len(t.x), k)
    y, size = reduction.apply(t.x, t.size), reduction.sizes(t.size)
    for row in range(len(t.x)):
        expected = diffrate_of_the_card(t, row, pruned, k)
        assert reduction.index[row].tolist() == [place for place, _, _ in expected]
        for slot, (_, members, s) in enumerate(expected):
            assert (reduction.source[row] == slot).nonzero()[:, 0].tolist() == members
            torch.testing.assert_close(y[row, slot], t.x[row, members].mean(0))
            assert math.isclose(float(size[row, slot]), s, rel_tol=1e-4)
        assert int((reduction.source[row] < 0).sum()) == t.n - pruned
    return reduction


@pytest.mark.parametrize("left", [None, 30])
@pytest.mark.parametrize("prune", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("k", BUDGETS)
def test_diffrate(k, prune, left):
    t = tokens(seed=k, left=left)
    k = min(k, t.n)
    check_diffrate(t, DiffRate(prune), t.n - math.floor(prune * (t.n - k) + 0.5), k)


def test_diffrate_prunes_to_the_count_of_its_block_and_never_below_the_budget_or_above_what_there_is():
    method = DiffRate([40, 20, 99, 3])
    for layer, pruned in enumerate([40, 20, 48, 10]):
        check_diffrate(tokens(seed=layer, layer=layer), method, pruned, 10)
    with pytest.raises(ValueError, match=r"4 blocks.*block 4"):
        method.reduce(tokens(layer=4), 10)


@pytest.mark.parametrize("kind", ["duplicates", "constant", "zero", "opposite"])
def test_diffrate_with_ties_and_without_directions(kind):
    for k in (1, 4, 29):
        t = structured(kind)
        reduction = check_diffrate(t, DiffRate(0.3), 30 - math.floor(0.3 * (30 - k) + 0.5), k)
        size = reduction.sizes(t.size)
        assert (size > 0).all() and (size.sum(1) <= t.size.sum(1) * 1.00001).all()
        assert reduction.apply(t.x, t.size).isfinite().all()


def test_diffrate_counts_no_negative_similarity():
    t = structured("opposite")  # places 0, 7, 14, 21 and 28 are the important ones, all others point away
    reduction = DiffRate(0.0).reduce(t, 5)
    assert reduction.index[0].tolist() == [0, 7, 14, 21, 28]
    torch.testing.assert_close(reduction.sizes(t.size), t.size[:, ::7])


def test_diffrate_in_half_precision_decides_in_float32():
    t = tokens(seed=3)
    half = Tokens(t.x.bfloat16(), t.grid, extras={"cls_attention": t.cls_attention.bfloat16()})
    full = Tokens(half.x.float(), t.grid, extras={"cls_attention": half.cls_attention.float()})
    a, b = (DiffRate().reduce(each, 20) for each in (half, full))
    assert torch.equal(a.index, b.index) and torch.equal(a.source, b.source) and torch.equal(a.size, b.size)
    assert a.apply(half.x, half.size).dtype == torch.bfloat16


def test_published_schedules_are_counts_by_block_that_fit():
    pruned, merged = SCHEDULES["deit-s-2.9g"]  # the card's numbers count CLS
    assert [p + 1 for p in pruned] == [197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3]
    assert [m + 1 for m in merged] == [197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3]
    assert [p + 1 for p in SCHEDULES["deit-b-11.5g"][0]][3:] == [188, 170, 154, 139, 123, 107, 72, 43, 3]
    assert len(SCHEDULES) == 28
    depth = {"t": 12, "s": 12, "b": 12, "l": 24, "h": 32}
    for name in SCHEDULES:
        method, keep = published(name)
        assert len(method.prune) == len(keep) == depth[name.split("-")[1]]
        now = n = 256 if "-h-" in name else 196
        for layer, k in enumerate(counts(keep, "constant", n, len(keep))):
            after = min(now, method.prune[layer], SCHEDULES[name][1][layer])  # rows = min(T, P, M)
            assert k == after
            if k < now:
                t = Tokens(torch.ones(1, now, 2), (1, now), layer=layer)
                t.extras["cls_attention"] = torch.rand(1, 1, now)
                reduction = method.reduce(t, k)
                assert reduction.k == k
                assert int((reduction.source < 0).sum()) == now - min(now, max(k, method.prune[layer]))
            now = k
    with pytest.raises(ValueError, match="no published schedule"):
        published("deit-s")


# 4 G C^2 + 2 N^2 C and 8 N C^2, what the names of the schedules promise in GMAC
@pytest.mark.parametrize(
    ("name", "width"), [("deit-s-2.9g", 384), ("deit-b-11.5g", 768), ("deit-t-0.8g", 192)]
)
def test_published_schedules_have_the_operations_in_their_name(name, width):
    _, keep = published(name)
    now, total = 197, 197 * 3 * 16 * 16 * width + 1000 * width
    for k in counts(keep, "constant", 196, 12):
        total += 4 * now * width**2 + 2 * now**2 * width
        now = k + 1
        total += 8 * now * width**2
    assert math.isclose(total / 1e9, float(name.split("-")[2][:-1]), rel_tol=0.02)


def test_diffrate_options_are_checked_and_survive_a_file(tmp_path):
    for wrong in (1.5, -0.1, float("nan"), True, "a", [3, 0], [1.5], None):
        with pytest.raises(ValueError, match="prune"):
            vtc.get_method("diffrate", prune=wrong)
    for prune in (0.25, [40, 30]):
        vtc.save([(DiffRate(prune), {"keep": [40, 20]})], tmp_path / "plan.json")
        assert vtc.load(tmp_path / "plan.json")[0][0] == DiffRate(prune)
    assert vtc.get_method("diffrate") == DiffRate(0.4)


def adaptive(length, parts, i):
    """The places that adaptive pooling averages in part i, and those whose own part it is."""
    window = range(math.floor(i * length / parts), math.ceil((i + 1) * length / parts))
    return window, [p for p in range(length) if p * parts // length == i]


def expedit_of_the_card(x, grid, shape, iterations, window, tau, neighbours, norm):
    """Plain loops over one row: centroids, hard labels, reconstruction weights, soft sizes. x (N, D)."""
    (rows, cols), (h, w), r = grid, shape, window // 2
    x = x.double()
    cells = [(i, j) for i in range(h) for j in range(w)]
    own = [(p // cols * h // rows, p % cols * w // cols) for p in range(rows * cols)]
    image = x.T.reshape(1, -1, rows, cols)
    c = torch.nn.functional.adaptive_avg_pool2d(image, shape)[0].flatten(1).T
    a = torch.tensor([[float(own[p] == cell) for cell in cells] for p in range(len(x))]).double()
    for _ in range(iterations):
        a = torch.zeros(len(x), len(cells), dtype=torch.float64)
        for p in range(len(x)):
            near = [
                k for k, (i, j) in enumerate(cells) if abs(own[p][0] - i) <= r and abs(own[p][1] - j) <= r
            ]
            d = torch.stack([(x[p] - c[k]).square().sum() for k in near])
            a[p, near] = (-tau * d).softmax(0)
        c = torch.stack(
            [(a[:, k, None] * x).sum(0) / a[:, k].sum().clamp_min(1e-16) for k in range(len(cells))]
        )
    d = (x[:, None] - c[None]).square().sum(2)
    weights = torch.zeros_like(d)
    for p in range(len(x)):
        kth = d[p].sort().values[min(neighbours, len(cells)) - 1]
        weight = torch.where(d[p] <= kth, (-tau * d[p]).exp(), 0.0)
        weights[p] = weight / (weight.sum() if norm == "l1" else weight.square().sum().sqrt())
    return c, d.argmin(1), weights, a.sum(0)


SHAPES = {1: (1, 1), 6: (2, 3), 12: (3, 4), 20: (4, 5), 24: (4, 6)}


@pytest.mark.parametrize("k", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"iterations": 1, "window": 1}, {"iterations": 0}, {"norm": "l2", "neighbours": 3}]
)
def test_expedit(k, options):
    t = tokens(seed=k)
    method = Expedit(**{"temperature": 0.05, "window": 3, "neighbours": 5, **options})
    reduction = method.reduce(t, k)
    y, middle = reduction.apply(t.x, t.size), torch.zeros(3, N, dtype=torch.bool)
    middle = middle.scatter(1, reduction.index, True)
    back = reduction.expand(y)
    for row in range(3):
        c, labels, weights, sizes = expedit_of_the_card(
            t.x[row], GRID, SHAPES[k], method.iterations, method.window, 0.05, method.neighbours, method.norm
        )
        torch.testing.assert_close(y[row].double(), c, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reduction.spread[row].double(), weights, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(back[row].double(), weights @ c, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(reduction.sizes(t.size)[row].double(), sizes, atol=1e-4, rtol=1e-4)
        assert torch.equal(reduction.source[row][~middle[row]], labels[~middle[row]])
        assert reduction.source[row][reduction.index[row]].tolist() == list(range(k))


@pytest.mark.parametrize("k", range(1, N + 1))
def test_expedit_meets_every_budget(k):
    t = tokens(seed=k, width=5)
    reduction = Expedit().reduce(t, k)
    y = reduction.apply(t.x, t.size)
    assert y.shape == (3, k, 5) and y.isfinite().all()
    assert (reduction.index.diff(dim=1) > 0).all()
    torch.testing.assert_close(reduction.sizes(t.size).sum(1), t.size.sum(1))
    assert reduction.expand(y).shape == t.x.shape
    if k == N:
        assert torch.equal(y, t.x) and torch.equal(reduction.expand(y), t.x)
        return
    torch.testing.assert_close(reduction.mix.sum(2), torch.ones(3, k))  # in the hull of the patches
    torch.testing.assert_close(reduction.spread.sum(2), torch.ones(3, N))
    for row in range(3):
        alone = Expedit().reduce(row_of(t, row), k)
        assert torch.equal(alone.mix[0], reduction.mix[row]) and torch.equal(
            alone.source[0], reduction.source[row]
        )
        assert torch.equal(alone.spread[0], reduction.spread[row])


@pytest.mark.parametrize(
    ("grid", "k"), [((6, 8), 47), ((14, 14), 97), ((14, 14), 127), ((5, 9), 11), ((16, 3), 7)]
)
def test_expedit_where_no_product_of_rows_and_columns_is_the_budget(grid, k):
    """Its cells are the bands of `vtc.grid`, whose patches are all that window=1 averages."""
    t = tokens(grid=grid, batch=1)
    own = regions(grid, k, t.x.device)
    inside = Expedit(window=1).reduce(t, k).mix[0] > 0  # (k, N)
    for cell in range(k):
        assert inside[cell].nonzero()[:, 0].tolist() == (own == cell).nonzero()[:, 0].tolist()
    pooled = Expedit(iterations=0).reduce(t, k).mix[0]
    assert ((pooled > 0) >= inside).all() and torch.allclose(pooled.sum(1), torch.ones(k))
    for row in pooled:  # plain means
        assert torch.allclose(row[row > 0], 1 / (row > 0).sum())


def test_expedit_lays_out_products_in_the_shape_of_the_grid():
    def shape(grid, k):
        index = Expedit().reduce(tokens(grid=grid, batch=1, width=2), k).index[0]
        rows = (index // grid[1]).unique(return_counts=True)[1].tolist()
        return len(rows), rows[0] if len(set(rows)) == 1 else set(rows)

    assert shape((14, 14), 49) == (7, 7) and shape((14, 14), 98) == (7, 14) and shape((14, 14), 56) == (7, 8)
    assert shape((12, 24), 72) == (6, 12) and shape((24, 12), 72) == (12, 6)
    assert shape((14, 14), 13) == (3, {4, 5})  # 1 x 13 would be strips
    assert shape((1, 20), 7) == (1, 7) and shape((20, 1), 7) == (7, 1)


def test_expedit_is_local():
    """A centroid is made of patches whose own cell is within the window; one iteration sees twice as far."""
    grid, t = (12, 12), tokens(grid=(12, 12), batch=1)
    method = Expedit(iterations=4, window=3)
    mix = method.reduce(t, 36).mix[0].view(6, 6, 12, 12)
    for i in range(6):
        for j in range(6):
            rows, cols = (mix[i, j] > 0).nonzero(as_tuple=True)
            assert ((rows // 2 - i).abs() <= 1).all() and ((cols // 2 - j).abs() <= 1).all()
            assert (mix[i, j] > 0).sum() == (6 - 2 * (i in (0, 5))) * (6 - 2 * (j in (0, 5)))
    moved = Tokens(t.x.clone(), grid)
    moved.x.view(1, 12, 12, -1)[:, 8:] += 5  # from cell 4 on
    one = Expedit(iterations=1, window=3)
    a, b = (one.reduce(each, 36).apply(each.x).view(6, 6, -1) for each in (t, moved))
    assert torch.equal(a[:2], b[:2]) and not torch.equal(a[3], b[3])


def test_expedit_with_hard_clusters():
    """A picture of two colours: clusters become the colours, one that lies between both and has no patch near
    to it stays a mean (official code: zeros), and the round trip is exact."""
    colour = torch.zeros(1, 6, 8, 3)
    colour[:, :, 3:] = torch.tensor([4.0, 0.0, -4.0])
    t = Tokens(colour.flatten(1, 2), GRID)
    reduction = Expedit(temperature=5.0, neighbours=1).reduce(t, 12)
    y = reduction.apply(t.x)
    expected = torch.tensor([0.0, 2, 4, 4])[:, None] * torch.tensor([1.0, 0, -1])
    torch.testing.assert_close(y, expected.repeat(1, 3, 1), atol=1e-5, rtol=0)
    torch.testing.assert_close(reduction.expand(y), t.x, atol=1e-5, rtol=0)


def test_expedit_gives_constants_back_as_they_are_or_longer_as_the_official_code_does():
    flat = Tokens(torch.full((1, N, 3), 2.5), GRID)
    reduction = Expedit().reduce(flat, 12)
    torch.testing.assert_close(reduction.expand(reduction.apply(flat.x)), flat.x)
    longer = Expedit(norm="l2", neighbours=9).reduce(flat, 9)
    torch.testing.assert_close(longer.expand(longer.apply(flat.x)), flat.x * 3)
    far = Tokens(1000 * torch.randn(1, N, 3), GRID)  # whose weights are zero before they are divided
    for norm in ("l1", "l2"):
        reduction = Expedit(norm=norm, temperature=10.0).reduce(far, 12)
        assert (reduction.spread.sum(2) > 0.9).all() and reduction.apply(far.x).isfinite().all()


def test_expedit_needs_the_full_grid_and_numbers_that_make_sense():
    with pytest.raises(ValueError, match=r"full grid of 6 x 8.*30"):
        Expedit().reduce(tokens(left=30), 10)
    wrong = [("iterations", -1), ("iterations", 1.5), ("window", 4), ("window", 0), ("neighbours", 0)]
    for name, value in [*wrong, ("temperature", 0), ("temperature", float("nan")), ("norm", "l3")]:
        with pytest.raises(ValueError, match=name):
            vtc.get_method("expedit", **{name: value})


def test_expedit_in_half_precision_and_through_gradients():
    t = tokens(seed=2)
    half = Tokens(t.x.bfloat16(), GRID)
    reduction = Expedit().reduce(half, 12)
    assert reduction.mix.dtype == torch.float32 and reduction.apply(half.x).dtype == torch.bfloat16
    assert torch.equal(reduction.mix, Expedit().reduce(Tokens(half.x.float(), GRID), 12).mix)
    x = t.x.clone().requires_grad_()
    reduction.expand(reduction.apply(x)).square().sum().backward()
    assert (x.grad.abs().sum(2) > 0).all()


def bisected(cells, k, first=()):
    """Groups of (row, col, position) by recursive halving across the longer side."""
    if k == 1:
        return [cells]
    height, width = (max(c[i] for c in cells) - min(c[i] for c in cells) for i in (0, 1))
    cells = sorted(cells, key=lambda c: c if height >= width else (c[1], c[0], c[2]))
    cut = len(cells) * (k // 2) // k
    return bisected(cells[:cut], k // 2) + bisected(cells[cut:], k - k // 2)


@pytest.mark.parametrize("left", [2, 17, 30, 47])
def test_pool_and_uniform_after_earlier_reductions(left):
    t = tokens(seed=left, left=left)
    for k in sorted({1, 2, 5, left // 2, left - 1, left}):
        if not 1 <= k <= left:
            continue
        reduction = vtc.get_method("pool").reduce(t, k)
        index = vtc.get_method("uniform").reduce(t, k).index
        assert torch.equal(index, reduction.index) and index.shape == (3, k)
        y = reduction.apply(t.x, t.size)
        for row in range(3):
            cells = [(p // 8, p % 8, j) for j, p in enumerate(t.place[row].tolist())]
            groups = [sorted(j for *_, j in group) for group in bisected(cells, k)]
            slots = [(reduction.source[row] == slot).nonzero()[:, 0].tolist() for slot in range(k)]
            assert sorted(slots) == sorted(groups)
            for slot, members in enumerate(slots):
                place = [divmod(int(t.place[row, j]), 8) for j in members]
                mean = [sum(p[i] for p in place) / len(place) for i in (0, 1)]
                away = [round(sum((a - b) ** 2 for a, b in zip(p, mean)), 9) for p in place]
                assert int(index[row, slot]) == members[away.index(min(away))]
                weight = t.size[row, members][:, None]
                torch.testing.assert_close(y[row, slot], (t.x[row, members] * weight).sum(0) / weight.sum())
            alone = vtc.get_method("pool").reduce(row_of(t, row), k)
            assert torch.equal(alone.source[0], reduction.source[row])
        torch.testing.assert_close(reduction.sizes(t.size).sum(1), t.size.sum(1))
        if k == left:
            assert torch.equal(y, t.x)


def test_groups_of_pool_are_compact_and_about_equal():
    """Of a grid without a corner: all groups of 4 of 36 tokens span at most 4 rows and columns together."""
    place = torch.tensor([[r * 7 + c for r in range(7) for c in range(7) if r + c < 8]])
    t = Tokens(torch.randn(1, place.shape[1], 4), (7, 7), place=place)
    reduction = vtc.get_method("pool").reduce(t, 10)
    members = [place[0][reduction.source[0] == slot] for slot in range(10)]
    assert {len(m) for m in members} <= {3, 4, 5}
    for m in members:
        assert (m // 7).max() - (m // 7).min() + (m % 7).max() - (m % 7).min() <= 4


@pytest.mark.parametrize("name", ["diffrate", "expedit", "pool", "uniform"])
def test_they_run_in_an_encoder_and_batches_do_not_matter(name):
    method = vtc.get_method(name)
    assert "encoder" in method.stages and method.after_block == (name == "expedit")
    assert method.proportional == (name == "diffrate")
    one = tokens(grid=(1, 1))
    assert torch.equal(method.reduce(one, 1).apply(one.x, one.size), one.x)
    t = tokens(seed=9, left=None if name == "expedit" else 31)
    for k in (1, 10, 30):
        reduction = method.reduce(t, k)
        for row in range(3):
            alone = method.reduce(row_of(t, row), k)
            assert torch.equal(alone.index[0], reduction.index[row])
            assert torch.equal(alone.source[0], reduction.source[row])
            torch.testing.assert_close(
                alone.sizes(t.size[row : row + 1])[0], reduction.sizes(t.size)[row], rtol=0, atol=0
            )
