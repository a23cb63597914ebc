"""The first methods against plain restatements of their cards, index for index; others have files of their
own. What holds of every method: tests/test_every_method.py."""

import pytest
import torch

import vtc
from vtc.grid import centres, low_grid, nearest, regions
from vtc.tokens import Tokens

GRID = (6, 8)
N = 48


def tokens(seed=0, batch=3, grid=GRID, **extras):
    n = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.rand(batch, *shape(n), generator=generator) for name, shape in extras.items()}
    return Tokens(torch.randn(batch, n, 16, generator=generator), grid, extras=made)


def attention(layers):
    return lambda n: (layers, n)


KEYS = {"keys": lambda n: (1, n, 8)}


@pytest.mark.parametrize("k", [1, 7, 24, 47, 48])
def test_vtc_cls(k):
    t = tokens(cls_attention=attention(3))
    index = vtc.get_method("vtc-cls").reduce(t, k).index
    for row in range(3):
        score = [sum(float(t.cls_attention[row, layer, j]) for layer in range(3)) for j in range(N)]
        assert index[row].tolist() == sorted(sorted(range(N), key=lambda j: -score[j])[:k])


def test_vtc_cls_excludes_the_last_layer_and_reduces_to_fastervlm():
    assert vtc.get_method("vtc-cls", start=14).needs[0].resolve(24) == tuple(range(14, 23))
    assert vtc.get_method("vtc-cls", start=22).needs[0].resolve(24) == (22,)
    assert vtc.get_method("vtc-cls", layers=[5, 22]).needs[0].resolve(24) == (5, 22)


def hiprune_of_the_card(middle, deep, k, alpha, columns):
    """Steps 3 to 6 of the card, with the official clamping."""
    n = len(middle)
    count = round(k * alpha / 5)
    anchors = sorted(range(n), key=lambda j: -middle[j])[:count]
    chosen = {min(max(a + step, 0), n - 1) for a in anchors for step in (0, -1, 1, -columns, columns)}
    left = sorted(range(n), key=lambda j: -(deep[j] - 1.0 if j in chosen else deep[j]))
    return sorted(chosen | set(left[: k - len(chosen)]))


@pytest.mark.parametrize("alpha", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("k", [8, 24, 40, 48])
def test_hiprune(k, alpha):
    t = tokens(seed=k, mean_attention=attention(2))
    index = vtc.get_method("hiprune", alpha=alpha).reduce(t, k).index
    for row in range(3):
        middle, deep = t.mean_attention[row].tolist()
        assert index[row].tolist() == hiprune_of_the_card(middle, deep, k, alpha, columns=8)


def test_hiprune_with_valid_neighbours_neither_wraps_nor_adds_corners():
    middle, deep = torch.zeros(1, N), torch.zeros(1, N)
    middle[0, 15] = 1  # the last of row 1: its right neighbour would be the first of row 2
    deep[0, 40:] = 0.5
    t = Tokens(torch.randn(1, N, 4), GRID, extras={"mean_attention": torch.stack([middle, deep], dim=1)})
    valid = vtc.get_method("hiprune", alpha=0.5, neighbours="valid").reduce(t, 10).index[0].tolist()
    clamp = vtc.get_method("hiprune", alpha=0.5).reduce(t, 10).index[0].tolist()
    assert {7, 14, 15, 23} <= set(valid) and 16 not in valid
    assert {7, 14, 15, 16, 23} <= set(clamp)


def test_hiprune_keeps_exactly_k_when_neighbours_exceed_it():
    for k in (1, 2, 3):
        t = tokens(mean_attention=attention(2))
        index = vtc.get_method("hiprune", alpha=1.0).reduce(t, k).index
        assert index.shape == (3, k) and (index.diff(dim=1) > 0).all()


def divprune_of_the_card(x, k):
    x = torch.nn.functional.normalize(x.double(), dim=-1)
    d = 1 - x @ x.T
    n = len(x)
    chosen = [max(range(n), key=lambda j: min(float(d[j, i]) for i in range(n) if i != j))]
    while len(chosen) < k:
        left = [j for j in range(n) if j not in chosen]
        chosen.append(max(left, key=lambda j: min(float(d[j, i]) for i in chosen)))
    return sorted(chosen)


@pytest.mark.parametrize("k", [1, 2, 9, 30, 48])
def test_divprune(k):
    t = tokens(seed=k)
    index = vtc.get_method("divprune").reduce(t, k).index
    for row in range(3):
        assert index[row].tolist() == divprune_of_the_card(t.x[row], k)


def test_divprune_prefers_distinct_tokens_to_duplicates():
    x = torch.randn(1, 8, 16).repeat(1, 6, 1)  # eight directions, each six times
    index = vtc.get_method("divprune").reduce(Tokens(x, GRID), 8).index[0]
    assert len(set((index % 8).tolist())) == 8
    scaled = vtc.get_method("divprune").reduce(Tokens(x * torch.rand(1, N, 1).add(0.5), GRID), 8).index[0]
    assert len(set((scaled % 8).tolist())) == 8
    everything = vtc.get_method("divprune").reduce(Tokens(torch.ones(1, N, 4), GRID), 20).index[0]
    assert len(everything.unique()) == 20


def tome_round_of_the_card(keys, r):
    """Steps 4 to 8 of the card without CLS. keys: list of vectors; returns what each merged token goes into,
    and those that stay in the order of the card."""
    unit = torch.nn.functional.normalize(torch.stack(keys).double(), dim=-1)
    even, odd = range(0, len(keys), 2), range(1, len(keys), 2)
    best = {a: max(odd, key=lambda b: float(unit[a] @ unit[b])) for a in even}
    falling = sorted(even, key=lambda a: -float(unit[a] @ unit[best[a]]))
    return {a: best[a] for a in falling[:r]}, falling[r:] + list(odd)


@pytest.mark.parametrize("k", [47, 30, 24, 11, 1])
def test_tome(k):
    t = tokens(seed=k, **KEYS)
    reduction = vtc.get_method("tome").reduce(t, k)
    for row in range(3):
        groups = [(j, [j]) for j in range(N)]  # the place of each group, and its members
        while len(groups) > k:
            keys = [t.keys[row, 0][members].mean(0) for _, members in groups]
            goes, order = tome_round_of_the_card(keys, min(len(groups) - k, len(groups) // 2))
            for a, b in goes.items():
                groups[b] = groups[b][0], groups[b][1] + groups[a][1]
            groups = [groups[i] for i in order]
        assert reduction.index[row].tolist() == [place for place, _ in groups]
        assert reduction.ascending().index[row].tolist() == sorted(place for place, _ in groups)
        for slot, (_, members) in enumerate(groups):
            assert sorted((reduction.source[row] == slot).nonzero()[:, 0].tolist()) == sorted(members)
        mean = torch.stack([t.x[row][members].mean(0) for _, members in groups])
        torch.testing.assert_close(reduction.apply(t.x, t.size)[row], mean)


def test_tome_weighs_by_size():
    t = tokens(**KEYS)
    t.size = torch.rand(3, N).add(0.5)
    reduction = vtc.get_method("tome").reduce(t, 20)
    y, size = reduction.apply(t.x, t.size), reduction.sizes(t.size)
    torch.testing.assert_close(size.sum(1), t.size.sum(1))
    torch.testing.assert_close(
        (y * size[..., None]).sum(1), (t.x * t.size[..., None]).sum(1), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("k", [1, 5, 12, 17, 30, 47, 48])
def test_regions_are_k_rectangles_that_cover_the_grid(k):
    region = regions(GRID, k, torch.device("cpu")).view(GRID)
    assert region.unique().tolist() == list(range(k))
    for r in range(k):
        rows, cols = (region == r).nonzero(as_tuple=True)
        height, width = rows.max() - rows.min() + 1, cols.max() - cols.min() + 1
        assert height * width == len(rows)
    index = centres(GRID, k, torch.device("cpu"))
    assert sorted(region.flatten()[index].tolist()) == list(range(k))


def test_regular_grids_where_k_allows_one():
    assert low_grid((24, 24), 64) == (8, 8)
    assert low_grid((12, 12), 72) in ((8, 9), (9, 8))
    assert low_grid((6, 8), 12) == (3, 4)
    rows = centres((24, 24), 64, torch.device("cpu")).view(8, 8) // 24
    assert (rows == rows[:, :1]).all()


@pytest.mark.parametrize("grid", [(6, 8), (12, 12), (24, 24)])
def test_downsample_keeps_every_low_resolution_token_once(grid):
    n = grid[0] * grid[1]
    for k in range(1, n + 1, 5):
        low = low_grid(grid, k)
        cell = nearest(grid, low, torch.device("cpu"))
        t = Tokens(
            torch.randn(low[0] * low[1], 4)[cell].repeat(2, 1, 1), grid, extras={"cell": cell.repeat(2, 1)}
        )
        reduction = vtc.get_method("downsample").reduce(t, k)
        y = reduction.apply(t.x, t.size)[0]
        assert reduction.index.shape == (2, k) and len(y.unique(dim=0)) == k
        assert torch.equal(y, t.x[0, reduction.index[0]])


def test_pool_is_area_pooling():
    t = tokens()
    y = vtc.get_method("pool").reduce(t, 12).apply(t.x, t.size)  # 3 x 4 regions of 2 x 2
    image = t.x.transpose(1, 2).unflatten(2, GRID)
    expected = torch.nn.functional.adaptive_avg_pool2d(image, (3, 4)).flatten(2).transpose(1, 2)
    torch.testing.assert_close(y, expected)


def test_random_is_seeded_and_unbiased():
    t = tokens()
    first, again = (vtc.get_method("random", seed=3).reduce(t, 10).index for _ in range(2))
    assert torch.equal(first, again)
    counts = torch.zeros(N)
    for seed in range(400):
        counts[vtc.get_method("random", seed=seed).reduce(t, 12).index[0]] += 1
    assert counts.min() > 60 and counts.max() < 140  # expected 100, standard deviation 9
    t.lot = torch.tensor([5, 6, 5])
    index = vtc.get_method("random").reduce(t, 10).index
    assert torch.equal(index[0], index[2]) and not torch.equal(index[0], index[1])
