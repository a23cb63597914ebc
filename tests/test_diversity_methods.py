"""Methods that keep a diverse, covering or spread set, against plain loops over their cards."""

import math

import pytest
import torch
from drawn import CASES, cast, drawn
from tiny import build

import vtc
from vtc.tokens import Tokens

GRID = (6, 8)
N = 48
COUNTS = [1, 2, 7, 24, 47, 48]
WIDE = 64  # more channels than tokens, so that all are independent


def cosines(x, y=None):
    x, y = (torch.nn.functional.normalize(part.double(), dim=-1) for part in (x, x if y is None else y))
    return x @ y.T


def falling(scores):
    """Positions by falling score, the earlier of equal ones first."""
    return sorted(range(len(scores)), key=lambda j: -scores[j])


def kept(rule, t, k):
    return rule.reduce(t, k).index.sort(dim=1).values.tolist()


# -- CDPruner


def relevance_of_the_card(x, words, negate):
    c = [sum(line) / len(words) for line in cosines(x, words).tolist()] if len(words) else [0.0] * len(x)
    c = [-value for value in c] if negate else c
    least, most = min(c), max(c)
    return [(value - least + 1e-6) / (most - least) if most - least > 1e-6 else 1.0 for value in c]


def cdpruner_of_the_card(x, q, k):
    """Each step takes what multiplies the determinant by most."""
    q = torch.tensor(q, dtype=torch.double)
    kernel = q[:, None] * cosines(x).fill_diagonal_(1) * q
    chosen = []
    while len(chosen) < k:
        gains = kernel.diagonal().clone()
        if chosen:
            rows = kernel[chosen]  # of those chosen, (s, N)
            gains -= (rows * torch.linalg.solve(rows[:, chosen], rows)).sum(0)
        gains[chosen] = -1
        chosen.append(int(gains.argmax()))
    return sorted(chosen)


@pytest.mark.parametrize("negate", [False, True])
@pytest.mark.parametrize("k", COUNTS)
def test_cdpruner(k, negate):
    rule = vtc.get_method("cdpruner", negate=negate)
    t = drawn(rule, width=WIDE, seed=k)
    expected = []
    for row in range(3):
        q = relevance_of_the_card(t.x[row], t.text[row, t.text_after[row]], negate)
        expected.append(cdpruner_of_the_card(t.x[row], q, k))
    assert kept(rule, t, k) == expected


@pytest.mark.parametrize("k", COUNTS)
def test_cdpruner_where_all_are_equally_relevant(k):
    rule = vtc.get_method("cdpruner", relevance="none")
    assert rule.needs == ()
    t = drawn(rule, width=WIDE, seed=k)
    expected = [cdpruner_of_the_card(x, [1.0] * N, k) for x in t.x]
    assert kept(rule, t, k) == expected
    asked = vtc.get_method("cdpruner")
    t.extras = drawn(asked, width=WIDE).extras
    t.extras["text"] = torch.zeros_like(t.text)  # words that say nothing
    assert kept(asked, t, k) == expected
    t.extras["text_after"] = torch.zeros_like(t.text_after)  # and none at all
    assert kept(asked, t, k) == expected


def test_cdpruner_takes_the_most_relevant_of_tokens_that_have_nothing_in_common():
    words = torch.rand(1, 4, N).add(0.1)
    extras = {"text": words, "text_mask": torch.ones(1, 4, dtype=torch.bool)}
    t = Tokens(torch.eye(N)[None], GRID, extras={**extras, "text_after": extras["text_mask"]})
    scores = torch.nn.functional.normalize(words[0], dim=1).mean(0).tolist()
    assert kept(vtc.get_method("cdpruner"), t, 9) == [sorted(falling(scores)[:9])]
    assert kept(vtc.get_method("cdpruner", negate=True), t, 9) == [sorted(falling([-s for s in scores])[:9])]


@pytest.mark.parametrize("name", ["cdpruner", "mmtok"])
def test_words_in_front_of_the_image_and_padding_say_nothing(name):
    rule = vtc.get_method(name)
    t = drawn(rule)
    index = kept(rule, t, 11)
    outside = ~t.text_after[..., None]
    t.extras["text"] = torch.where(outside, torch.randn_like(t.text), t.text)
    assert kept(rule, t, 11) == index
    t.extras["text"] = torch.where(outside, t.text, torch.randn_like(t.text))
    assert kept(rule, t, 11) != index


# -- SCOPE and MMTok


def cover_of_the_card(table, worth, k):
    """table: for each thing how well each candidate covers it. Gains within a millionth are equal."""
    best, chosen = [0.0] * len(table), []
    table = torch.as_tensor(table, dtype=torch.double)
    for _ in range(k):
        more = (table - torch.tensor(best, dtype=torch.double)[:, None]).clamp_min(0)
        more[more < 1e-5 * table.amax(dim=1, keepdim=True)] = 0
        gains = (more.sum(0) * torch.as_tensor(worth, dtype=torch.double)).tolist()
        left = [j for j in range(table.shape[1]) if j not in chosen]
        top = max(gains[j] for j in left)
        chosen.append(next(j for j in left if gains[j] >= top * (1 - 1e-6)))
        best = [max(b, float(row[chosen[-1]])) for b, row in zip(best, table)]
    return sorted(chosen)


@pytest.mark.parametrize("case", ["random", "duplicates", "constant", "halves", "zeros", "one stands out"])
@pytest.mark.parametrize("k", COUNTS)
@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
def test_scope(alpha, k, case):
    rule = vtc.get_method("scope", alpha=alpha)
    assert rule.before_projector and rule.needs[0].resolve(24) == (22,)
    t = drawn(rule, case, seed=k)
    heads = 16 * t.cls_attention[:, 0].double()  # the card's sum over heads
    expected = [cover_of_the_card(cosines(x), a**alpha, k) for x, a in zip(t.x, heads)]
    assert kept(rule, t, k) == expected


def test_scope_without_cls_reads_what_tokens_receive():
    rule = vtc.get_method("scope", signal="mean_attention")
    t = drawn(rule)
    expected = [cover_of_the_card(cosines(x), a, 9) for x, a in zip(t.x, t.mean_attention[:, 0])]
    assert kept(rule, t, 9) == expected


def mmtok_of_the_card(x, y, z, k, alpha, of_text, of_vision):
    table = (cosines(y) / of_vision).softmax(dim=1) / len(y) * alpha
    if len(z):
        table = torch.cat([(cosines(z, x) / of_text).softmax(dim=1) / len(z), table])
    return cover_of_the_card(table, [1.0] * len(x), k)


@pytest.mark.parametrize("options", [(0.5, 0.02, 0.2), (0.0, 0.01, 0.2), (3.0, 0.2, 0.1)])
@pytest.mark.parametrize("k", COUNTS)
def test_mmtok(k, options):
    alpha, of_text, of_vision = options
    rule = vtc.get_method("mmtok", alpha=alpha, text_temperature=of_text, vision_temperature=of_vision)
    t = drawn(rule, seed=k)
    words = [text[after] for text, after in zip(t.text, t.text_after)]
    expected = [mmtok_of_the_card(*row, k, *options) for row in zip(t.x, t.vision, words)]
    assert kept(rule, t, k) == expected


@pytest.mark.parametrize("case", ["duplicates", "halves"])
def test_mmtok_of_tokens_that_are_equal(case):
    rule = vtc.get_method("mmtok")
    t = drawn(rule, case)
    words = [text[after] for text, after in zip(t.text, t.text_after)]
    expected = [mmtok_of_the_card(*row, 6, 0.5, 0.02, 0.2) for row in zip(t.x, t.vision, words)]
    assert kept(rule, t, 6) == expected


def test_mmtok_without_words_covers_the_picture():
    rule = vtc.get_method("mmtok")
    t = drawn(rule)
    t.extras["text_after"] = torch.zeros_like(t.text_after)
    expected = [mmtok_of_the_card(x, y, x[:0], 12, 0.5, 0.02, 0.2) for x, y in zip(t.x, t.vision)]
    assert kept(rule, t, 12) == expected
    t.extras |= {name: t.extras[name][:, :0] for name in ("text", "text_mask", "text_after")}
    assert kept(rule, t, 12) == expected


# -- HoloV


def holov_of_the_card(x, a, k, alpha, parts):
    """parts: lists of positions. What a part cannot hold is shared by the others in the same way."""
    scores = []
    for part in parts:
        s, n = cosines(x[part]).fill_diagonal_(0).tolist(), len(part)
        variance = []
        for line in s:
            mean = sum(line) / max(1, n - 1)
            variance.append(sum((value - mean) ** 2 for value in line) / max(1, n - 1))
        u = [1000 * a[j] for j in part]
        scale = (sum(u) / n) / (sum(variance) / n + 1e-6)
        scores.append(sum(value + alpha * scale * v for value, v in zip(u, variance)) / n)
    given = [0] * len(parts)
    while sum(given) < k:
        rest, free = k - sum(given), [p for p in range(len(parts)) if given[p] < len(parts[p])]
        total = sum(scores[p] for p in free)
        weight = {p: scores[p] / total if total > 0 else 1 / len(free) for p in free}
        more = {p: math.floor(weight[p] * rest + 1e-9) for p in free}
        for p in sorted(free, key=lambda p: -weight[p])[: rest - sum(more.values())]:
            more[p] += 1
        for p in free:
            given[p] = min(len(parts[p]), given[p] + more[p])
    order = []
    for part, count in zip(parts, given):
        best = sorted(part, key=lambda j: -a[j])
        order += part if count >= len(part) else best[:count]
    return order


def runs(n, parts):
    sizes = [n // parts + (p < n % parts) for p in range(parts)]
    return [list(range(sum(sizes[:p]), sum(sizes[: p + 1]))) for p in range(parts)]


@pytest.mark.parametrize("case", [case for case in CASES if case != "opposites"])
@pytest.mark.parametrize("parts", [16, 5, 1, 100])
def test_holov(parts, case):
    rule = vtc.get_method("holov", parts=parts, alpha=0.5)
    t = drawn(rule, case)
    t.extras["cls_attention"] = t.cls_attention**3  # some parts are given more than they hold
    for k in COUNTS:
        reduction = rule.reduce(t, k)
        for row in range(3):
            a = t.cls_attention[row, 0].tolist()
            expected = holov_of_the_card(t.x[row], a, k, 0.5, runs(N, min(parts, N)))
            assert reduction.index[row].tolist() == expected
        assert kept(vtc.get_method("holov", parts=parts, alpha=0.5, order="raster"), t, k) == kept(rule, t, k)


def test_holov_with_one_part_takes_what_cls_attends_to():
    rule = vtc.get_method("holov", parts=1)
    t = drawn(rule)
    for row, index in enumerate(rule.reduce(t, 20).index.tolist()):
        assert index == falling(t.cls_attention[row, 0].tolist())[:20]


def test_holov_orders_by_part_or_by_place():
    rule, raster = vtc.get_method("holov"), vtc.get_method("holov", order="raster")
    t = drawn(rule)
    assert rule.reduce(t, 24).ordered and not raster.reduce(t, 24).ordered
    assert torch.equal(rule.reduce(t, 24).ascending().index, raster.reduce(t, 24).index)
    assert (rule.reduce(t, 24).index.diff(dim=1) < 0).any()
    assert torch.equal(rule.reduce(t, N).index, torch.arange(N).expand(3, N))


def test_holov_in_squares():
    rule = vtc.get_method("holov", crops="squares", parts=6, alpha=0.5)
    assert rule.needs_grid and rule.allocate == "proportional"
    assert not vtc.get_method("holov").needs_grid and vtc.get_method("holov").allocate == "joint"
    squares = []
    for top in (0, 3):
        for left, right in ((0, 3), (3, 6), (6, 8)):  # 8 columns in 3 parts
            squares.append([r * 8 + c for r in range(top, top + 3) for c in range(left, right)])
    t = drawn(rule)
    for k in COUNTS:
        index = rule.reduce(t, k).index
        for row in range(3):
            a = t.cls_attention[row, 0].tolist()
            assert index[row].tolist() == holov_of_the_card(t.x[row], a, k, 0.5, squares)


# -- VScan


def vscan_of_the_card(x, shallow, deep, k, grid, windows=4, share=0.5):
    """The places that stay, and what each other one goes into."""
    rows, cols = grid
    down, across = min(windows, rows), min(windows, cols)

    def window(j):
        return min(j // cols // (rows // down), down - 1), min(j % cols // (cols // across), across - 1)

    each = math.floor(k * share + 1e-6) // (down * across)
    local = []
    for place in {window(j) for j in range(len(x))}:
        inside = [j for j in range(len(x)) if window(j) == place]
        local += sorted(inside, key=lambda j: -shallow[j])[:each]
    index = sorted(local + [j for j in falling(deep) if j not in local][: k - len(local)])
    cosine = cosines(x).tolist()
    into = {j: j for j in index}
    for j in range(len(x)):
        if j not in index:
            highest = max(cosine[j][i] for i in index)
            into[j] = next(i for i in index if cosine[j][i] >= highest - 1e-6)
    return index, into


@pytest.mark.parametrize("grid", [(8, 8), (6, 8), (9, 7), (3, 15)])
@pytest.mark.parametrize("case", ["random", "duplicates", "constant", "zeros", "halves"])
def test_vscan(case, grid):
    rule = vtc.get_method("vscan")
    t = drawn(rule, case, grid=grid)
    for k in sorted({1, 7, 32, 40, t.n - 1, t.n}):
        reduction = rule.reduce(t, k)
        for row in range(3):
            shallow, deep = t.cls_attention[row].tolist()
            index, into = vscan_of_the_card(t.x[row], shallow, deep, k, grid)
            assert reduction.index[row].tolist() == index
            assert [index[slot] for slot in reduction.source[row].tolist()] == [into[j] for j in range(t.n)]
            members = [[j for j in into if into[j] == i] for i in index]
            merged = [
                (t.x[row, i] + sum(t.x[row, j] for j in group if j != i)) / len(group)
                for i, group in zip(index, members)
            ]
            torch.testing.assert_close(reduction.apply(t.x)[row], torch.stack(merged), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("share,windows", [(0.0, 4), (1.0, 2), (0.3, 3), (0.5, 9)])
def test_vscan_with_other_shares_and_windows(share, windows):
    rule = vtc.get_method("vscan", local=share, windows=windows)
    t = drawn(rule, grid=(12, 12))
    index = rule.reduce(t, 70).index
    for row in range(3):
        shallow, deep = t.cls_attention[row].tolist()
        expected = vscan_of_the_card(t.x[row], shallow, deep, 70, (12, 12), windows, share)
        assert index[row].tolist() == expected[0]


def test_vscan_of_llava():
    """576 tokens: 16 windows of 6 x 6, each of which chooses 3 of 96."""
    rule = vtc.get_method("vscan")
    assert rule.needs[0].resolve(24) == (5, 22)
    t = drawn(rule, grid=(24, 24))
    reduction = rule.reduce(t, 96)
    window = torch.arange(24)[:, None] // 6 * 4 + torch.arange(24) // 6  # (24, 24)
    for row in range(3):
        assert (torch.bincount(window.flatten()[reduction.index[row]], minlength=16) >= 3).all()
    size = reduction.sizes(t.size)[..., None]
    torch.testing.assert_close((reduction.apply(t.x) * size).sum(1), t.x.sum(1), atol=1e-3, rtol=1e-4)


def test_vscan_never_chooses_a_token_again_where_nothing_is_attended_to():
    t = drawn(vtc.get_method("vscan"), grid=(8, 8))
    t.extras["cls_attention"][:, 1] = 0
    index = vtc.get_method("vscan").reduce(t, 40).index
    assert (index.diff(dim=1) > 0).all()


# -- all of them

METHODS = ["cdpruner", "divprune", "holov", "mmtok", "scope", "vscan"]
WRONG = [
    ("cdpruner", {"relevance": "clip"}, "'prompt' or 'none'"),
    ("holov", {"alpha": -1}, "at least 0"),
    ("holov", {"parts": 0}, "at least 1"),
    ("holov", {"parts": 2.5}, "whole number"),
    ("holov", {"crops": "circles"}, "'runs' or 'squares'"),
    ("holov", {"order": "random"}, "'paper' or 'raster'"),
    ("holov", {"signal": "keys"}, "'cls_attention' or 'mean_attention'"),
    ("mmtok", {"alpha": float("nan")}, "at least 0"),
    ("mmtok", {"text_temperature": 0}, "above 0"),
    ("scope", {"alpha": -0.1}, "at least 0"),
    ("scope", {"signal": "text"}, "'cls_attention' or 'mean_attention'"),
    ("vscan", {"local": 1.1}, "between 0 and 1"),
    ("vscan", {"windows": 0}, "at least 1"),
    ("vscan", {"signal": "text"}, "'cls_attention' or 'mean_attention'"),
]


@pytest.mark.parametrize("name,options,message", WRONG)
def test_options_that_mean_nothing_raise(name, options, message):
    with pytest.raises(ValueError, match=message):
        vtc.get_method(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_bfloat16_gives_what_its_numbers_in_float32_give(name):
    rule = vtc.get_method(name)
    t = drawn(rule, dtype=torch.bfloat16)
    for k in (1, 13, 47):
        reduction, exact = rule.reduce(t, k), rule.reduce(cast(t, torch.float32), k)
        assert torch.equal(reduction.index, exact.index) and torch.equal(reduction.source, exact.source)


SETTINGS = [
    *((name, {}) for name in METHODS),
    ("cdpruner", {"relevance": "none"}),
    ("holov", {"order": "raster", "crops": "squares"}),
    ("scope", {"alpha": 0.0, "signal": "mean_attention"}),
    ("vscan", {"signal": "mean_attention"}),
]


@pytest.mark.parametrize("name,options", SETTINGS)
@pytest.mark.parametrize("host", ["llava-clip", "llava_next-clip", "qwen2_5_vl"])
def test_on_hosts_a_batch_is_what_its_rows_are(name, options, host):
    model, make_inputs = build(host)
    rule = vtc.get_method(name, **options)
    if host == "qwen2_5_vl" and any(need.kind == "cls_attention" for need in rule.needs):
        with pytest.raises(ValueError, match="CLS"):
            vtc.compress(model, rule, keep=0.5)
        return
    with vtc.compress(model, rule, keep=0.5) as handle, torch.no_grad():
        logits = model(**make_inputs((1, 1))).logits
        together = [(record.index.tolist(), record.source.tolist()) for record in handle.last]
        assert len(together) == 2 and logits.isfinite().all()
        for row in range(2):
            model(**make_inputs((1,), first=row))
            assert [(one.index.tolist(), one.source.tolist()) for one in handle.last] == [together[row]]
