"""Methods that merge around what they keep, and SliME's selector, against plain loops over their cards."""

import math
import re

import numpy as np
import pytest
import torch
from tiny import IMAGE, PAD, build

import vtc
from vtc.tokens import Tokens

GRID = (6, 8)
N = 48
NAMES = ("visionzip", "prumerge", "prumerge+", "slime", "kmeans")
CASES = ("random", "ties", "duplicates", "constant", "zero")


def tokens(case="random", seed=0, batch=3, grid=GRID):
    """Everything that the five methods read. Of "ties" scores are of few values and keys all signs, whose
    cosines are exact; of "duplicates" each token stands in the row six times."""
    n, make = grid[0] * grid[1], torch.Generator().manual_seed(seed)
    x = torch.randn(batch, n, 16, generator=make)
    attention = torch.rand(batch, 1, n, generator=make).pow(6)
    keys, heads = (torch.randn(batch, 1, n, 16, generator=make) for _ in range(2))
    if case == "ties":
        attention, keys, heads = attention.mul(6).round().div(8), keys.sign(), heads.sign()
    if case == "duplicates":
        same = torch.arange(n) % max(1, n // 6)
        x, attention, keys, heads = x[:, same], attention[..., same], keys[:, :, same], heads[:, :, same]
    if case in ("constant", "zero"):
        x, attention, keys, heads = (
            torch.full_like(part, float(case == "constant")) for part in (x, attention, keys, heads)
        )
    mask = torch.ones(batch, 7, dtype=torch.bool)
    mask[1:, 5:] = False
    after = mask & (torch.arange(7) >= 3)
    text = torch.randn(batch, 7, 16, generator=make) * mask[..., None]
    extras = {"cls_attention": attention, "mean_attention": attention.flip(2), "cls_one_head": attention}
    extras |= {"keys": keys, "all_keys": heads, "text": text, "text_mask": mask, "text_after": after}
    return Tokens(x, grid, extras=extras)


def falling(scores):
    """Positions by falling score, the earlier of equal ones first."""
    return sorted(range(len(scores)), key=lambda j: -scores[j])


def cosines(vectors):
    unit = torch.nn.functional.normalize(vectors.double(), dim=-1)
    return (unit @ unit.T).tolist()


def compare(method, t, k, row, index, merged):
    """Whether a method keeps the places `index`, in this order, and makes the tokens `merged` of them."""
    reduction = method.reduce(t, k)
    assert reduction.index[row].tolist() == index
    torch.testing.assert_close(reduction.apply(t.x, t.size)[row].double(), merged, atol=1e-4, rtol=1e-4)
    return reduction.source[row].tolist()


def visionzip_of_the_card(x, score, keys, k, contextual, combine):
    """Steps 2 to 4, CLS not among the tokens: places in the order of step 5, members of each, and tokens."""
    dominant = sorted(falling(score)[: k - contextual])
    rest = [j for j in range(len(score)) if j not in dominant]
    targets = rest[:: max(1, len(rest) // max(contextual, 1))][:contextual]
    like, joined = cosines(keys), {target: [] for target in targets}
    for j in rest:
        if targets and j not in targets:
            joined[max(targets, key=lambda i: like[j][i])].append(j)
    merged = [x[j].double() for j in dominant]
    for target, others in joined.items():
        if combine == "mean" or not others:
            merged.append(x[[target, *others]].double().mean(0))
        else:
            merged.append(x[target].double() + x[others].double().mean(0))
    members = [[j] for j in dominant] + [[target, *others] for target, others in joined.items()]
    return dominant + targets, members, torch.stack(merged)


@pytest.mark.parametrize("combine", ["paper", "mean"])
@pytest.mark.parametrize("k, contextual", [(1, 0), (3, 0), (4, 1), (16, 3), (31, 5), (47, 7), (48, 8)])
@pytest.mark.parametrize("case", ["random", "ties"])
def test_visionzip(case, k, contextual, combine):
    t = tokens(case, seed=k)
    method = vtc.get_method("visionzip", combine=combine)
    for row in range(3):
        score = t.cls_attention[row, 0].tolist()
        found = visionzip_of_the_card(t.x[row], score, t.keys[row, 0], k, contextual, combine)
        source = compare(method, t, k, row, found[0], found[2])
        assert source == [next((s for s, m in enumerate(found[1]) if j in m), -1) for j in range(N)]


@pytest.mark.parametrize("ratio, k, contextual", [(0.5, 10, 5), (1.0, 10, 10), (0.9, 47, 42)])
def test_visionzip_with_other_shares(ratio, k, contextual):
    t = tokens(seed=3)
    method = vtc.get_method("visionzip", contextual_ratio=ratio, signal="mean_attention", order="raster")
    assert [need.kind for need in method.needs] == ["mean_attention", "keys"]
    score = t.mean_attention[0, 0].tolist()
    index, _, merged = visionzip_of_the_card(t.x[0], score, t.keys[0, 0], k, contextual, "paper")
    compare(method, t, k, 0, index, merged)
    assert not method.reduce(t, k).ordered and vtc.get_method("visionzip").reduce(t, k).ordered


@pytest.mark.parametrize("k, dominant", [(64, 54), (128, 108), (192, 162)])
def test_visionzip_has_the_published_settings(k, dominant):
    t = tokens(grid=(24, 24), batch=1)
    index = vtc.get_method("visionzip").reduce(t, k).index[0]
    assert (index[:dominant].diff() > 0).all() and (index[dominant:].diff() > 0).all()
    assert index[dominant] < index[dominant - 1]
    assert set(index[:dominant].tolist()) == set(falling(t.cls_attention[0, 0].tolist())[:dominant])


def test_visionzip_without_merging_and_with_keys_all_alike():
    t = tokens()
    pruned = vtc.get_method("visionzip", contextual_ratio=0).reduce(t, 12)
    assert pruned.pruned and torch.equal(pruned.index, t.cls_attention[:, 0].topk(12).indices.sort().values)
    t.extras["keys"] = torch.ones(3, 1, N, 8)
    reduction = vtc.get_method("visionzip").reduce(t, 16)  # 13 and 3
    assert (reduction.sizes(t.size)[:, 13] == N - 15).all()  # all others join the first target


def prumerge_of_the_card(x, attention, keys, kept, neighbours, normalise):
    """Steps 4 and 5: tokens kept, then the one of all that are dropped; its place is our own choice."""
    n, like, x = len(attention), cosines(keys), x.double()
    merged = []
    for i in kept:
        others = sorted((j for j in range(n) if j != i), key=lambda j: -like[i][j])[:neighbours]
        added = sum(attention[j] * x[j] for j in others)
        total = attention[i] + sum(attention[j] for j in others)
        merged.append((attention[i] * x[i] + added) / total if normalise else x[i] + added)
    dropped = [j for j in range(n) if j not in kept]
    added = sum(attention[j] * x[j] for j in dropped)
    merged.append(added / sum(attention[j] for j in dropped) if normalise else added)
    return [*kept, max(dropped, key=lambda j: attention[j])], torch.stack(merged)


def outliers_of_the_card(attention):
    low, high = np.percentile(np.array(attention), [25, 75])
    return sum(a > high + 1.5 * (high - low) for a in attention)


def with_spaced(ranked, m):
    """Step 3: the first m, and those spaced for them in raster order, none of them twice."""
    n = len(ranked)
    stride = max(1, int(int(n / m) / 3)) if m else n
    spaced = [j for j in range(0, n - 1, stride) if m and j not in ranked[:m]]
    return ranked[:m], spaced


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("neighbours", [4, 32, 1000])
@pytest.mark.parametrize("k", [1, 2, 9, 30, 47])
@pytest.mark.parametrize("case", ["random", "ties"])
def test_prumerge(case, k, neighbours, normalise):
    t = tokens(case, seed=k)
    t.extras["cls_one_head"] = t.cls_one_head + 0.01
    method = vtc.get_method("prumerge", neighbours=neighbours, normalise=normalise)
    for row in range(3):
        attention, keys = t.cls_one_head[row, 0].tolist(), t.all_keys[row, 0]
        kept = falling(attention)[: k - 1]
        index, merged = prumerge_of_the_card(t.x[row], attention, keys, kept, neighbours, normalise)
        source = compare(method, t, k, row, index, merged)
        like = cosines(keys)
        for j in set(range(N)) - set(index):  # the kept token it is most like, of those it was added to
            near = [
                i
                for i in kept
                if sorted(set(range(N)) - {i}, key=lambda a: -like[i][a]).index(j) < neighbours
            ]
            assert source[j] == (kept.index(max(near, key=lambda i: like[i][j])) if near else k - 1)


@pytest.mark.parametrize("case", ["random", "ties", "duplicates", "constant", "zero"])
def test_prumerge_counts_outliers_and_the_token_of_the_others(case):
    t = tokens(case, seed=5)
    counts = vtc.get_method("prumerge").count(t, N).tolist()
    wanted = [outliers_of_the_card(row.double().tolist()) for row in t.cls_one_head[:, 0]]
    assert counts == [outliers + 1 for outliers in wanted]
    assert case in ("constant", "zero", "duplicates") or max(counts) > 3
    assert vtc.get_method("prumerge").count(t, 2).tolist() == [min(count, 2) for count in counts]
    assert vtc.get_method("prumerge", adaptive=False).count(t, N) is None


def test_prumerge_without_outliers_is_one_token():
    t = tokens()
    t.extras["cls_one_head"] = torch.full((3, 1, N), 1 / N)
    for name in ("prumerge", "prumerge+"):
        assert vtc.get_method(name).count(t, N).tolist() == [1, 1, 1]
        y = vtc.get_method(name).reduce(t, 1).apply(t.x, t.size)
        torch.testing.assert_close(y, t.x.mean(dim=1, keepdim=True))


@pytest.mark.parametrize("seed", range(6))
def test_prumerge_plus_at_its_own_number(seed):
    t = tokens(seed=seed, batch=1)
    t.extras["cls_one_head"] = torch.rand(1, 1, N).index_fill(2, torch.randperm(N)[: 1 + seed // 2], 5.0)
    attention = t.cls_one_head[0, 0].tolist()
    attended, spaced = with_spaced(falling(attention), outliers_of_the_card(attention))
    own = len(attended + spaced) + 1
    method = vtc.get_method("prumerge+")
    assert len(attended) == 1 + seed // 2 and spaced and method.count(t, N).tolist() == [own]
    index, merged = prumerge_of_the_card(t.x[0], attention, t.all_keys[0, 0], attended + spaced, 32, False)
    compare(method, t, own, 0, index, merged)


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("grid", [(6, 8), (3, 5), (2, 1)])
def test_prumerge_plus_at_any_number(grid, adaptive):
    """The most outliers, at most the image's own where they are its choice, that leave room for their spaced
    tokens; filled up by attention."""
    method = vtc.get_method("prumerge+", adaptive=adaptive)
    for case in ("random", "ties"):
        t = tokens(case, seed=7, grid=grid)
        for k in range(1, t.n):
            index = method.reduce(t, k).index
            for row in range(3):
                attention = t.cls_one_head[row, 0].tolist()
                ranked = falling(attention)
                most = outliers_of_the_card(attention) if adaptive else t.n - 1
                for m in range(most, -1, -1):
                    attended, spaced = with_spaced(ranked, m)
                    if len(attended + spaced) <= k - 1:
                        break
                rest = [j for j in ranked if j not in attended + spaced]
                kept = attended + rest[: k - 1 - len(attended + spaced)] + spaced
                assert index[row, :-1].tolist() == kept
                assert index[row, -1] == next(j for j in ranked if j not in kept)


def test_prumerge_keeps_everything_as_it_is_where_nothing_has_to_go():
    t = tokens()
    for name in ("prumerge", "prumerge+"):
        assert torch.equal(vtc.get_method(name).reduce(t, N).apply(t.x), t.x)


def slime_of_the_card(x, text, words, temperature=1.0):
    """Step 4: similarities and their probabilities."""
    x, text = x.double(), text[words].double()
    score = [sum(float(torch.cosine_similarity(v, t, dim=0)) for t in text) for v in x]
    highest = max(score)
    power = [math.exp((s - highest) / temperature) for s in score]
    return score, [p / sum(power) for p in power]


@pytest.mark.parametrize("question", ["prompt", "after"])
@pytest.mark.parametrize("top_p, temperature", [(0.95, 1.0), (0.5, 1.0), (0.0, 1.0), (0.3, 0.1), (0.9, 0.01)])
def test_slime(top_p, temperature, question):
    t = tokens(seed=2)
    method = vtc.get_method("slime", top_p=top_p, temperature=temperature, question=question)
    counts = method.count(t, N)
    for row in range(3):
        words = (t.text_mask if question == "prompt" else t.text_after)[row]
        score, chance = slime_of_the_card(t.x[row], t.text[row], words, temperature)
        sums = np.cumsum(sorted(chance, reverse=True))
        assert counts[row] == min(sum(s <= top_p for s in sums) + 1, N)
        for k in (1, 5, 30, 47, N):
            assert method.reduce(t, k).index[row].tolist() == sorted(falling(score)[:k])
    assert vtc.get_method("slime", adaptive=False).count(t, N) is None


def test_slime_at_its_limits():
    t = tokens()
    count = lambda k=N, **options: vtc.get_method("slime", **options).count(t, k).tolist()  # noqa: E731
    assert count(top_p=1.0) == [N] * 3 and count(top_p=0.0) == [1] * 3
    assert count(top_p=1.0, k=9) == [9] * 3
    assert count(temperature=1e9) == [math.ceil(0.95 * N)] * 3
    before = vtc.get_method("slime").reduce(t, 9).index
    order = torch.tensor([4, 2, 0, 3, 1, 6, 5])
    t.extras |= {name: t.extras[name][:, order] for name in ("text", "text_mask")}
    assert torch.equal(vtc.get_method("slime").reduce(t, 9).index, before)
    t.extras["text_mask"] = torch.zeros(3, 7, dtype=torch.bool)  # a prompt without a word
    assert vtc.get_method("slime").reduce(t, 3).index.tolist() == [[0, 1, 2]] * 3


def test_slime_leaves_thumbnails_whole():
    t = tokens()
    t.thumbnail = torch.tensor([True, False, True])
    counts = vtc.get_method("slime", top_p=0.1).count(t, 40).tolist()
    assert counts[::2] == [40, 40] and counts[1] < 20
    assert vtc.get_method("slime").allocate == "thumbnail"


def squares(x, y):
    """Square distances, what is less than rounding being 0."""
    square = (x[:, None] - y).square().sum(2)
    sums = x.square().sum(1)[:, None] + y.square().sum(1)
    return torch.where(square > 1e-6 * sums, square, 0).tolist()


def middle(members, away):
    """The first of those nearest to the mean, as both of two are."""
    return next(j for j in members if away[j] <= 1.0001 * min(away[i] for i in members))


def kmeans_in_loops(x, k, iterations=10, size=None):
    """Lloyd's from tokens far apart: members and place of each cluster."""
    x, n = x.double() - x.double().mean(0), len(x)
    size = torch.ones(n) if size is None else size
    between, length = squares(x, x), x.square().sum(1).tolist()
    start = [min(range(n), key=lambda j: length[j])]
    while len(start) < k:
        left = [j for j in range(n) if j not in start]
        start.append(max(left, key=lambda j: min(between[j][i] for i in start)))
    means = x[start]
    for _ in range(iterations):
        away = squares(x, means)
        slot = [min(range(k), key=lambda i: away[j][i]) for j in range(n)]
        members = [[j for j in range(n) if slot[j] == i] for i in range(k)]
        own = [away[j][slot[j]] for j in range(n)]
        stay = [middle(of, own) for of in members if of]
        free = sorted(set(range(n)) - set(stay), key=lambda j: (-own[j], j))
        for i, j in zip([i for i in range(k) if not members[i]], free):
            members[slot[j]].remove(j)
            members[i] = [j]
        means = torch.stack([(x[of] * size[of, None]).sum(0) / size[of].sum() for of in members])
    away = squares(means, x)
    return members, [middle(of, line) for of, line in zip(members, away)]


@pytest.mark.parametrize("iterations", [1, 2, 10])
@pytest.mark.parametrize("k", [1, 2, 9, 30, 47, 48])
@pytest.mark.parametrize("case", ["random", "duplicates", "constant"])
def test_kmeans(case, k, iterations):
    """Of duplicates and constant features, clusters are empty where k exceeds the 8 or the one there are."""
    t = tokens(case, seed=k, batch=2)
    t.size = torch.randint(1, 4, (2, N)).float()
    method = vtc.get_method("kmeans", iterations=iterations)
    for row in range(2):
        members, places = kmeans_in_loops(t.x[row], k, iterations, t.size[row])
        slots = sorted(range(k), key=places.__getitem__)
        x, size = t.x[row].double(), t.size[row].double()[:, None]
        merged = [(x[members[s]] * size[members[s]]).sum(0) / size[members[s]].sum() for s in slots]
        source = compare(method, t, k, row, sorted(places), torch.stack(merged))
        assert source == [next(i for i, s in enumerate(slots) if j in members[s]) for j in range(N)]
    reduction = method.reduce(t, k)
    y, size = reduction.apply(t.x, t.size), reduction.sizes(t.size)
    total = (t.x * t.size[..., None]).sum(1)
    torch.testing.assert_close((y * size[..., None]).sum(1), total, atol=1e-4, rtol=1e-4)


def test_kmeans_gives_an_empty_cluster_the_farthest_token():
    """Three kinds of tokens make five clusters: the two that stay empty take what is not the first of its
    kind, and of tokens equally far from their means the first."""
    x = torch.tensor([0.0, 0.0, 0.0, 9.0, 5.0, 5.0, 5.0])[None, :, None]
    for iterations in (1, 10):
        reduction = vtc.get_method("kmeans", iterations=iterations).reduce(Tokens(x, (1, 7)), 5)
        assert reduction.index.tolist() == [[0, 1, 2, 3, 4]]
        assert torch.equal(reduction.expand(reduction.apply(x)), x)


def test_kmeans_gets_closer_with_every_step():
    t = tokens(batch=2, grid=(24, 24))
    away = []
    for iterations in (1, 2, 4, 8, 16):
        reduction = vtc.get_method("kmeans", iterations=iterations).reduce(t, 40)
        away.append(float((t.x - reduction.expand(reduction.apply(t.x, t.size))).square().sum()))
    assert away == sorted(away, reverse=True) and away[-1] < 0.99 * away[0]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("grid", [(6, 8), (1, 1), (1, 2), (3, 3)])
def test_exactly_k_of_any_input_and_alone_as_in_a_batch(name, case, grid):
    t, method = tokens(case, grid=grid), vtc.get_method(name)
    for k in sorted({1, 2, 13, t.n - 1, t.n} & set(range(1, t.n + 1))):
        reduction = method.reduce(t, k)
        assert reduction.index.shape == (3, k) and all(len(row.unique()) == k for row in reduction.index)
        assert torch.equal(reduction.source.gather(1, reduction.index), torch.arange(k).expand(3, k))
        assert (
            reduction.source.shape == (3, t.n) and -1 <= reduction.source.min() <= reduction.source.max() < k
        )
        y = reduction.apply(t.x, t.size)
        assert y.isfinite().all() and reduction.sizes(t.size).sum() <= 3 * t.n
        if k == t.n:
            assert torch.equal(y.gather(1, reduction.index.argsort(dim=1)[..., None].expand_as(y)), t.x)
        count = method.count(t, k)
        assert count is None or bool(((count >= 1) & (count <= k)).all())
        for row in range(3):
            own = Tokens(t.x[[row]], grid, extras={kind: extra[[row]] for kind, extra in t.extras.items()})
            alone = method.reduce(own, k)
            assert torch.equal(alone.index[0], reduction.index[row])
            assert torch.equal(alone.source[0], reduction.source[row])
            torch.testing.assert_close(alone.apply(own.x, own.size)[0], y[row])
            assert count is None or method.count(own, k)[0] == count[row]


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_is_read_as_it_is(name):
    t, method = tokens(), vtc.get_method(name)
    half = {k: e.bfloat16() if e.is_floating_point() else e for k, e in t.extras.items()}
    low = Tokens(t.x.bfloat16(), GRID, extras=half)
    full = {k: e.float() if e.is_floating_point() else e for k, e in half.items()}
    full = Tokens(low.x.float(), GRID, extras=full)
    first, second = method.reduce(low, 13), method.reduce(full, 13)
    assert torch.equal(first.index, second.index) and torch.equal(first.source, second.source)
    y, wanted = first.apply(low.x, low.size), second.apply(full.x, full.size)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), wanted, atol=0.02, rtol=0.01)


@pytest.mark.parametrize(
    "name, options",
    [
        ("visionzip", {"contextual_ratio": 1.5}),
        ("visionzip", {"combine": "sum"}),
        ("visionzip", {"order": "rising"}),
        ("visionzip", {"signal": "keys"}),
        ("prumerge", {"neighbours": 0}),
        ("prumerge+", {"order": "score"}),
        ("slime", {"top_p": 95}),
        ("slime", {"temperature": 0.0}),
        ("slime", {"temperature": math.inf}),
        ("slime", {"question": "before"}),
        ("kmeans", {"iterations": 0}),
    ],
)
def test_options_out_of_range_are_refused_by_name(name, options):
    (option,) = options
    with pytest.raises(ValueError, match=option):
        vtc.get_method(name, **options)


# -- in models


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def inside(model, inputs):
    """What is inside the bare model: what the projector is given of each picture, CLS set aside, and what
    CLS of the last block attends to, all heads taken as one."""
    tower, seen = model.model.vision_tower, {}
    attention = tower.encoder.layers[-1].self_attn
    modules = {"query": attention.q_proj, "key": attention.k_proj, "given": model.model.multi_modal_projector}
    hooks = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen.setdefault(name, args[0] if name == "given" else out)
        )
        for name, module in modules.items()
    ]
    run(model, inputs)
    for hook in hooks:
        hook.remove()
    query, key = seen["query"][:, :1], seen["key"]  # CLS is the first
    cls = (query @ key.transpose(1, 2) * key.shape[2] ** -0.5).softmax(dim=2)[:, 0, 1:]
    return seen["given"], cls, key[:, 1:]


def given_to_decoder(model, inputs):
    """What stands where the one image of a prompt begins, and behind it: (L, D)."""
    seen = []
    decoder = model.model.language_model
    hook = decoder.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    run(model, inputs)
    hook.remove()
    return seen[0][0, int((inputs["input_ids"][0] == IMAGE).nonzero()[0]) :]


@pytest.mark.parametrize("order", ["paper", "raster"])
@pytest.mark.parametrize("name", ["prumerge", "prumerge+"])
def test_prumerge_in_a_model(name, order):
    """Outliers of the un-headed attention, merged in front of the projector, in the order of the card."""
    model, make_inputs = build("llava-clip")
    numbers = set()
    for picture in range(6):
        inputs = make_inputs((1,), first=picture)
        vision, cls, keys = (part[0] for part in inside(model, inputs))
        attention = cls.tolist()
        with vtc.compress(model, name, keep=15, order=order) as handle:
            embeds = given_to_decoder(model, inputs)
            (record,) = handle.last
        kept = falling(attention)[: outliers_of_the_card(attention)]
        if name == "prumerge+":
            attended, spaced = with_spaced(falling(attention), len(kept))
            kept = attended + spaced
        places, merged = prumerge_of_the_card(vision, attention, keys, kept, 32, False)
        assert record.index.tolist() == sorted(places)
        with torch.no_grad():
            expected = model.model.multi_modal_projector(merged.float())
        if order == "raster":
            expected = expected[torch.tensor(places).argsort()]
        torch.testing.assert_close(embeds[: len(places)], expected, atol=1e-5, rtol=1e-4)
        numbers.add(len(places))
    assert len(numbers) > 1


def test_visionzip_in_a_model():
    model, make_inputs = build("llava-clip")
    inputs, seen = make_inputs((1,)), []
    vision, *_ = inside(model, inputs)
    with vtc.compress(model, "visionzip", keep=13) as handle:
        method = handle._stages[0].method
        method.reduce = lambda tokens, k: (
            seen.append((tokens, type(method).reduce(method, tokens, k))) or seen[0][1]
        )
        embeds = given_to_decoder(model, inputs)
    tokens, reduction = seen[0]
    torch.testing.assert_close(tokens.x, vision)
    score, keys = tokens.cls_attention[0, 0].tolist(), tokens.keys[0, 0]
    index, _, merged = visionzip_of_the_card(vision[0], score, keys, 13, 2, "paper")
    assert reduction.index[0].tolist() == index and index != sorted(index)
    with torch.no_grad():
        expected = model.model.multi_modal_projector(merged.float())
    torch.testing.assert_close(embeds[:13], expected, atol=1e-5, rtol=1e-4)


def test_slime_in_a_model():
    """The words are those of the picture's own prompt; a thumbnail stays, crops compete as one row."""
    model, make_inputs = build("llava_next-clip")
    inputs = make_inputs((1, 1), pads=2)
    pictures = {name: inputs[name] for name in ("pixel_values", "image_sizes")}
    features = model.model.get_image_features(**pictures, return_dict=True).pooler_output
    for k, top_p in ((30, 0.95), (40, 0.3)):
        with vtc.compress(model, "slime", keep=k, top_p=top_p, temperature=0.5) as handle:
            run(model, inputs)
            records = handle.last
        for row, record in enumerate(records):
            ids = inputs["input_ids"][row]
            text = model.get_input_embeddings()(ids[(ids != IMAGE) & (ids != PAD)])
            (thumbnail,) = (tile.slots for tile in record.tiles if tile.thumbnail)
            crops = torch.cat([tile.slots for tile in record.tiles if not tile.thumbnail])
            assert len(thumbnail) == 16 and set(thumbnail.tolist()) <= set(record.index.tolist())
            x = features[row][crops].detach()
            score, chance = slime_of_the_card(x, text.detach(), slice(None), temperature=0.5)
            own = sum(s <= top_p for s in np.cumsum(sorted(chance, reverse=True))) + 1
            best = crops[falling(score)[: min(own, k - 16)]]
            assert record.index.tolist() == sorted([*thumbnail.tolist(), *best.tolist()])


@pytest.mark.parametrize("host", ["llava-clip", "llava_next-clip"])
@pytest.mark.parametrize("name", NAMES)
def test_a_batch_is_as_its_pictures_alone_in_a_model(name, host):
    model, make_inputs = build(host)
    inputs = make_inputs((1, 1, 1), pads=1)
    with vtc.compress(model, name, keep=0.6) as handle:
        run(model, inputs)
        records = handle.last
        for row, record in enumerate(records):
            run(model, make_inputs((1,), first=row))
            assert torch.equal(handle.last[0].index, record.index)
            assert torch.equal(handle.last[0].source, record.source)


@pytest.mark.parametrize("host", ["llava-siglip", "qwen2_5_vl"])
def test_without_cls(host):
    model, make_inputs = build(host)
    inputs = make_inputs((2, 1))
    for name in ("visionzip", "prumerge", "prumerge+"):
        with pytest.raises(ValueError, match=f"'{re.escape(name)}' needs a CLS token"):
            vtc.compress(model, name, keep=5)
    for name, options in (("visionzip", {"signal": "mean_attention"}), ("slime", {}), ("kmeans", {})):
        with vtc.compress(model, name, keep=5, **options) as handle:
            assert run(model, inputs).isfinite().all()
            assert [len(record.index) for record in handle.last] == [5, 5, 5]
