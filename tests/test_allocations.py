"""Budgets of tiles by attention: against plain restatements of the cards, and in running models."""

import math

import pytest
import torch
from tiny import build

import vtc
from vtc.allocate import ALLOCATIONS, Part, get_allocation
from vtc.allocations import Attention, GlobalCom2, Hired
from vtc.record import Tile

KINDS = ("cls_attention", "mean_attention", "cls_logits")


def picture(rows=2, cols=2, seed=0, grid=(8, 8), thumbnail=(8, 8), cut=0, attention=None):
    """A thumbnail and crops around it; `cut` rows of tokens are taken off the first and last row of crops."""
    generator = torch.Generator().manual_seed(seed)
    height = grid[0] * rows - 2 * cut  # in tokens of crops
    parts, first = [], 0

    def add(grid, box, whole):
        nonlocal first
        n = grid[0] * grid[1]
        extras = {kind: torch.rand(1, n, generator=generator) for kind in KINDS}
        extras["cls_logits"] -= 0.5
        if whole and attention is not None:
            extras = {kind: attention.view(1, n) for kind in KINDS}
        parts.append(Part(Tile(torch.arange(first, first + n), grid, box, whole), extras))
        first += n

    add(thumbnail, (0.0, 0.0, 1.0, 1.0), True)
    for row in range(rows):
        top = max(0, row * grid[0] - cut)
        bottom = min(height, (row + 1) * grid[0] - cut)
        for col in range(cols):
            box = (col / cols, top / height, (col + 1) / cols, bottom / height)
            add((bottom - top, grid[1]), box, False)
    return parts


def film(frames=4, n=16):
    tile = [Tile(torch.arange(n * i, n * i + n), (4, n // 4)) for i in range(frames)]
    generator = torch.Generator().manual_seed(1)
    return [Part(t, {kind: torch.rand(1, n, generator=generator) for kind in KINDS}) for t in tile]


def budgets(allocation, parts, k):
    """By part. The rule of every allocation here: each tile is a row of its own and the budget is spent."""
    groups = allocation.split(parts, k)
    assert sorted(number for numbers, _ in groups for number in numbers) == list(range(len(parts)))
    assert all(len(numbers) == 1 for numbers, _ in groups)
    found = {numbers[0]: budget for numbers, budget in groups}
    found = [found[number] for number in range(len(parts))]
    assert sum(found) == k and all(0 <= b <= part.n for b, part in zip(found, parts, strict=True))
    return found


def near(found, exact):
    """Whether budgets are the exact shares, rounded down or up."""
    return all(math.floor(e - 1e-9) <= b <= math.ceil(e + 1e-9) for b, e in zip(found, exact, strict=True))


@pytest.mark.parametrize("name", ["hired", "globalcom2", "attention"])
def test_every_budget_is_spent_whatever_the_tiles(name):
    rule = get_allocation(name)
    for parts in (picture(), picture(3, 1), picture(2, 3), picture(cut=3), picture(1, 1), film()):
        total = sum(part.n for part in parts)
        for k in (1, 2, 3, 10, total // 4, total // 2, total - 1, total):
            budgets(rule, parts, k)


def hired_of_the_card(parts, k, alpha):
    """Steps 1 to 3 of the card, where nothing has to be rounded: exact shares of the crops."""
    thumbnail, crops = parts[0], parts[1:]
    own = min(int(k * alpha), thumbnail.n)
    scores = thumbnail.cls_attention[0].tolist()
    top = sorted(range(thumbnail.n), key=lambda j: -scores[j])[: int(thumbnail.n * (1 - alpha))]
    band = thumbnail.n // len(crops)
    counts = [sum(j // band == crop for j in top) for crop in range(len(crops))]
    return own, [count / len(top) * (k - own) for count in counts]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.7])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (4, 1)])
def test_hired_is_its_card(alpha, shape):
    for seed in range(5):
        parts = picture(*shape, seed=seed)
        for k in (1, 7, 20, 40):
            own, exact = hired_of_the_card(parts, k, alpha)
            found = budgets(Hired(alpha=alpha), parts, k)
            assert found[0] == own and near(found[1:], exact)
            rest = [(e - math.floor(e + 1e-9), b > e + 1e-9) for b, e in zip(found[1:], exact, strict=True)]
            up, down = ([r for r, is_up in rest if is_up == which] for which in (True, False))
            assert not up or not down or min(up) >= max(down) - 1e-9  # the largest remainders


def test_hired_by_region_and_count():
    attention = torch.zeros(8, 8)
    attention[:4, 4:] = 1.0  # the upper right quarter
    attention[5, 0] = 10.0
    parts = picture(attention=attention)
    # The 32 most attended: 16 of the quarter in rows 0 to 3, one in row 5, and 15 of 47 that tie at zero.
    assert budgets(Hired(alpha=0.0, region="spatial", count="sum"), parts, 26) == [0, 0, 16, 10, 0]
    assert budgets(Hired(alpha=0.0, count="sum"), parts, 26) == [0, 8, 8, 10, 0]
    assert budgets(Hired(region="spatial"), parts, 64) == [32, 5, 16, 6, 5]
    assert budgets(Hired(), parts, 64) == [32, 11, 10, 6, 5]


def test_hired_splits_a_thumbnail_of_odd_size_between_crops():
    attention = torch.arange(49.0).view(7, 7)
    parts = picture(thumbnail=(7, 7), attention=attention)
    weights = [1.0, 1.0, 1.0, 0.5, 0.0, 0.0, 0.0]
    down = torch.tensor([weights, weights[::-1]])
    exact = (down.double() @ attention.double() @ down.T.double()).flatten()
    found = budgets(Hired(alpha=0.0, region="spatial", count="sum"), parts, 100)
    assert near(found[1:], (100 * exact / exact.sum()).tolist())


@pytest.mark.parametrize("options", [{}, {"count": "sum"}, {"region": "spatial"}, {"alpha": 0.3}], ids=str)
def test_hired_gives_equal_crops_the_same(options):
    parts = picture(attention=torch.ones(8, 8))
    for k in (40, 80, 120):
        found = budgets(Hired(**options), parts, k)
        assert max(found[1:]) - min(found[1:]) <= 1


def test_hired_hands_on_what_exceeds_a_crop_or_the_thumbnail():
    attention = torch.zeros(8, 8)
    attention[:2] = 1.0  # the band of the first crop
    parts = picture(attention=attention)
    found = budgets(Hired(count="sum"), parts, 200)
    assert found[:2] == [64, 64] and max(found[2:]) - min(found[2:]) <= 1  # nothing claims the rest
    assert budgets(Hired(alpha=0.0), parts, 319) == [63, 64, 64, 64, 64]  # crops are full
    assert budgets(Hired(alpha=1.0), parts, 50) == [50, 0, 0, 0, 0]
    assert budgets(Hired(alpha=1.0), picture(3, 1, cut=4), 80) == [64, 4, 8, 4]  # nobody claims: by size


@pytest.mark.parametrize("name", ["hired", "globalcom2"])
def test_without_a_thumbnail_by_size(name):
    assert budgets(get_allocation(name), film(), 32) == [8, 8, 8, 8]
    assert budgets(get_allocation(name), picture()[1:], 32) == [8, 8, 8, 8]


def globalcom2_of_the_card(parts, rows, cols, rho, temperature):
    """Step 2 of the card: the ratio of each crop, unclipped."""
    height, width = parts[0].tile.grid
    seen = parts[0].cls_logits[0].double().view(height, width).tolist()
    tall, wide = height // rows, width // cols
    sums = []
    for i in range(rows):
        for j in range(cols):
            bottom = height if i == rows - 1 else (i + 1) * tall
            right = width if j == cols - 1 else (j + 1) * wide
            sums.append(sum(seen[r][c] for r in range(i * tall, bottom) for c in range(j * wide, right)))
    powers = [math.exp((s - max(sums)) / temperature) for s in sums]
    p = [power / sum(powers) for power in powers]
    return [rho * (1 + q - 1 / len(p)) for q in p]


@pytest.mark.parametrize("temperature", [0.5, 10.0])
@pytest.mark.parametrize("shape", [(2, 2), (1, 2), (3, 1), (2, 3)])
def test_globalcom2_is_its_card(temperature, shape):
    for seed in range(3):
        parts = picture(*shape, seed=seed)  # 8 is no multiple of 3: the last cell has more
        total = sum(part.n for part in parts)
        for k in (7, total // 8, total // 4):
            ratios = globalcom2_of_the_card(parts, *shape, k / total, temperature)
            assert sum(ratios) / len(ratios) == pytest.approx(k / total)
            exact = [64 * ratio for ratio in [k / total, *ratios]]
            assert near(budgets(GlobalCom2(temperature=temperature), parts, k), exact)


def test_globalcom2_with_a_uniform_thumbnail_is_by_size():
    for parts in (picture(attention=torch.ones(8, 8)), picture(attention=torch.ones(8, 8), cut=2)):
        rest = budgets(get_allocation("proportional"), parts, 77)
        assert budgets(GlobalCom2(), parts, 77) == rest


def test_globalcom2_clips_and_hands_on():
    attention = torch.zeros(8, 8)
    attention[:4, :4] = 100.0
    parts = picture(attention=attention)
    found = budgets(GlobalCom2(), parts, 240)
    assert found[1] == 64 and found[0] > max(found[2:]) and max(found[2:]) - min(found[2:]) <= 1


def test_globalcom2_counts_the_tokens_that_unpadding_leaves():
    parts = picture(cut=4, attention=torch.ones(8, 8))
    assert budgets(GlobalCom2(), parts, 48) == [16, 8, 8, 8, 8]


@pytest.mark.parametrize("signal", ["mean_attention", "cls_attention"])
def test_attention_counts_the_most_attended_of_all(signal):
    for parts in (picture(seed=3), picture(seed=4, cut=3), film()):
        scores = [(float(s), i) for i, part in enumerate(parts) for s in getattr(part, signal)[0]]
        for k in (1, 9, 40):
            best = sorted(scores, key=lambda pair: -pair[0])[:k]
            expected = [sum(i == number for _, i in best) for number in range(len(parts))]
            assert budgets(Attention(signal=signal), parts, k) == expected


def test_attention_gives_ties_to_the_first():
    parts = film()
    for part in parts:
        part.extras["mean_attention"] = torch.ones(1, part.n)
    assert budgets(Attention(), parts, 40) == [16, 16, 8, 0]


@pytest.mark.parametrize("rule", [Hired(layer=1), GlobalCom2(temperature=2.0), Attention(layer=-1)])
def test_they_are_written_and_read(rule):
    assert ALLOCATIONS[rule.name] is type(rule)
    assert get_allocation(rule.shown()) == rule and get_allocation(rule) is rule
    assert rule.needs[0].layers == (rule.layer,)


@pytest.mark.parametrize(
    "rule, options",
    [
        (Hired, {"alpha": 1.5}),
        (Hired, {"region": "rows"}),
        (Hired, {"count": "mean"}),
        (GlobalCom2, {"temperature": 0.0}),
        (GlobalCom2, {"signal": "cls_attention"}),
        (Attention, {"signal": "keys"}),
    ],
)
def test_wrong_options_are_named(rule, options):
    with pytest.raises(ValueError, match=next(iter(options))):
        rule(**options)


# -- in running models


@pytest.fixture(scope="module")
def tiled():
    """A model of tiles, inputs with three pictures in two prompts, and what CLS attends to, in eager mode:
    (images, tiles, layers, n)."""
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((2, 1), pads=1)
    tower = model.base_model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        maps = tower(inputs["pixel_values"].flatten(0, 1), output_attentions=True).attentions
    tower.set_attn_implementation("sdpa")
    cls = torch.stack(maps, dim=1)[:, :, :, 0, 1:].mean(dim=2)
    return model, make_inputs, inputs, cls.unflatten(0, inputs["pixel_values"].shape[:2])


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs)


def kept(record):
    """For each tile the positions of its tokens that stayed."""
    stays = torch.zeros(len(record.source), dtype=torch.bool)
    stays[record.index] = True
    return [stays[tile.slots].nonzero()[:, 0].tolist() for tile in record.tiles]


@pytest.mark.parametrize("keep", [5, 0.3, 0.6])
def test_hired_in_a_model(tiled, keep):
    model, _, inputs, cls = tiled
    with vtc.compress(model, "hired", keep=keep) as handle:
        forward(model, inputs)
    for record, seen in zip(handle.last, cls, strict=True):
        parts = [
            Part(tile, {"cls_attention": seen[i, :1]}) for i, tile in enumerate(record.tiles)
        ]  # no padding is cut off these pictures
        k = vtc.tokens.count_kept(keep, 16 * len(parts))
        found = kept(record)
        assert [len(positions) for positions in found] == budgets(Hired(), parts, k)
        for positions, attention in zip(found, seen[:, -2].tolist()):
            best = sorted(range(16), key=lambda j: -attention[j])[: len(positions)]
            assert positions == sorted(best)


def test_methods_bring_their_allocations_and_give_way_to_others(tiled):
    model, _, inputs, _ = tiled

    def shares(method, **options):
        with vtc.compress(model, method, keep=0.3, **options) as handle:
            forward(model, inputs)
            return [[len(positions) for positions in kept(record)] for record in handle.last]

    assert shares("hired") == shares("fastervlm", allocate="hired") != shares("fastervlm")
    assert shares("hired", allocate="proportional") == shares("fastervlm")
    steep = GlobalCom2(temperature=0.1)
    assert shares("globalcom2", allocate=steep) == shares("divprune", allocate=steep) != shares("divprune")
    assert shares("hired", allocate={"name": "hired", "alpha": 0.2}) == shares(
        "hired", allocate=Hired(alpha=0.2)
    )
    assert shares("hired", allocate=Hired(alpha=0.2)) != shares("hired")


@pytest.mark.parametrize(
    "method, options", [("hired", {}), ("globalcom2", {}), ("vispruner", {"allocate": "attention"})]
)
def test_a_batch_of_tiled_pictures_equals_each_alone(tiled, method, options):
    model, make_inputs, inputs, _ = tiled
    with vtc.compress(model, method, keep=0.3, **options) as handle:
        forward(model, inputs)
        together = handle.last
        forward(model, make_inputs((2,)))
        alone = handle.last
        for number in (1, 2):
            forward(model, make_inputs((1,), first=number))
            alone.append(handle.last[0])
    for one, other in zip(alone, [*together[:2], *together[1:]], strict=True):
        assert torch.equal(one.index, other.index) and torch.equal(one.source, other.source)


def test_globalcom2_puts_the_thumbnail_in_the_order_of_its_logits(tiled):
    model, _, inputs, _ = tiled
    vision = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    attention, seen = model.base_model.vision_tower.encoder.layers[-1].self_attn, {}
    hooks = [
        getattr(attention, name).register_forward_hook(lambda m, a, out, name=name: seen.update({name: out}))
        for name in ("q_proj", "k_proj")
    ]

    def features():
        with torch.no_grad():
            return model.base_model.get_image_features(**vision, return_dict=True).pooler_output

    bare = features()
    q, k = (
        seen[name].unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for name in ("q_proj", "k_proj")
    )
    logits = (q[:, :, :1] @ k.transpose(2, 3) * q.shape[3] ** -0.5)[:, :, 0, 1:].mean(dim=1)  # (all tiles, n)
    tiles = [1 + rows * cols for rows, cols in ((2, 2), (1, 2), (2, 1))]
    thumbnails = logits[[0, tiles[0], tiles[0] + tiles[1]]]
    for positions, order in (("repack", "paper"), ("repack", "raster"), ("keep", "paper")):
        with vtc.compress(model, "globalcom2", keep=0.3, positions=positions, order=order) as handle:
            new = features()
            records = handle.last
        for own, made, record, scores in zip(bare, new, records, thumbnails.tolist(), strict=True):
            first = kept(record)[0]
            falling = sorted(range(16), key=lambda j: -scores[j])[: len(first)]
            assert first == sorted(falling) != falling
            expected = falling if (positions, order) == ("repack", "paper") else first
            assert torch.equal(made[:16][first], own[expected])
            crops = record.index[len(first) :]
            assert torch.equal(made[crops], own[crops])
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("name", ["hired", "globalcom2"])
def test_towers_without_cls_are_refused(name):
    model, _ = build("llava_next-siglip")
    with pytest.raises(ValueError, match="needs a CLS token"):
        vtc.compress(model, "divprune", keep=0.5, allocate=name)


def test_globalcom2_without_cls_also_shares_without_it():
    model, make_inputs = build("llava_next-siglip")
    with vtc.compress(model, "globalcom2", keep=0.3, signal="mean_attention") as handle:
        forward(model, make_inputs((1, 1)))
        assert [len(record.index) for record in handle.last] == [24, 14]
