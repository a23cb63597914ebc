"""The ordered resampler: exact prefixes, averages to start from, principal components to reach, halting."""

import math

import pytest
import torch
import torch.nn.functional as F

from vtc.learned import build, from_pretrained
from vtc.learned.ordered import OrderedResampler
from vtc.learned.pyramid import Pyramid
from vtc.learned.reading import waves

GRID = (4, 6)
SMALL = {"in_width": 12, "tokens": 9, "width": 16, "heads": 4, "depth": 2, "order": 4}
SMALL |= {"decoder_width": 8, "decoder_heads": 2}


def fresh(**options):
    torch.manual_seed(0)
    return build("ordered", **SMALL | options).eval()


def made(**options):
    """One whose every weight is random."""
    module = fresh(**options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    module.calibrate(features(20) * 2 + 1)
    return module


def features(n=3, grid=GRID, width=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.2, 2, n)[:, None, None]
    return torch.randn(n, grid[0] * grid[1], width, generator=generator) * scale


# -- the averages that it starts from


def averages(x, grid, k, kind):
    """One image (N, D), in loops: the cells of levels of 1, 1, 2, 4, ... cells, and what they leave over."""
    rows, columns = grid
    picture = {(r, c): x[r * columns + c].clone() for r in range(rows) for c in range(columns)}
    left, cells, energy, shape = dict(picture), [], [], (1, 1)
    level = 0
    while len(cells) < k:
        if level > 1:
            tall = rows / shape[0] > columns / shape[1]
            shape = (shape[0] * 2, shape[1]) if tall else (shape[0], shape[1] * 2)
        groups = {}
        for r, c in picture:
            groups.setdefault((r * shape[0] // rows, c * shape[1] // columns), []).append((r, c))
        for a in range(shape[0]):
            for b in range(shape[1]):
                members = groups.get((a, b), [])
                residual = sum((left[m] for m in members), torch.zeros(x.shape[1])) / max(len(members), 1)
                middle = ((2 * a + 1) * rows // (2 * shape[0]), (2 * b + 1) * columns // (2 * shape[1]))
                cells.append(residual if kind == "residual" else residual + picture[middle] - left[middle])
                energy.append(len(members) * float(residual.square().sum()))
        now = {}
        for members in groups.values():
            mean = sum(left[m] for m in members) / len(members)
            now |= {m: left[m] - mean for m in members}
        left, level = now, level + 1
    whole = float(x.square().sum())
    return torch.stack(cells[:k]), [(whole - sum(energy[: i + 1])) / x.numel() for i in range(k)]


@pytest.mark.parametrize("grid", [(4, 6), (8, 8), (5, 3), (1, 7)])
@pytest.mark.parametrize("start", ["residual", "mean"])
def test_a_fresh_one_gives_averages_from_coarse_to_fine(grid, start):
    x = features(3, grid)
    module = fresh(start=start, tokens=16)
    for calibrated in (False, True):
        if calibrated:
            module.calibrate(x * 3 + 1)
        for k in (1, 3, 7):
            got = module(x, grid, k)
            for i in range(3):
                wanted, _ = averages(x[i], grid, k, start)
                torch.testing.assert_close(got[i], wanted, atol=1e-5, rtol=1e-5)


def test_levels_are_average_pooling_of_what_is_left():
    x = features(2, (8, 8))
    cells, _ = Pyramid((8, 8), 32, "residual").values(x)
    left, first = x.transpose(1, 2).unflatten(2, (8, 8)), 0
    for shape in ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4)):
        pooled = F.adaptive_avg_pool2d(left, shape)
        count = shape[0] * shape[1]
        wanted = pooled.flatten(2).transpose(1, 2)
        torch.testing.assert_close(cells[:, first : first + count], wanted, atol=1e-6, rtol=1e-5)
        left, first = left - F.interpolate(pooled, (8, 8)), first + count


@pytest.mark.parametrize("grid", [(4, 6), (5, 3), (7, 7)])
@pytest.mark.parametrize("kind", ["residual", "mean"])
def test_what_averages_leave_over_is_known_without_decoding(grid, kind):
    x = features(3, grid)
    pyramid = Pyramid(grid, 13, kind)
    cells, left = pyramid.values(x)
    for i in range(3):
        _, wanted = averages(x[i], grid, 13, kind)
        torch.testing.assert_close(left[i], torch.tensor(wanted).clamp(min=0), atol=1e-5, rtol=1e-4)
    for k in range(1, 14):
        valid = torch.arange(13).expand(3, -1) < k
        off = (pyramid.draft(cells, valid) - x).square().mean((1, 2))
        torch.testing.assert_close(off, left[:, k - 1], atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="a pyramid is one of residual, mean"):
        Pyramid(grid, 3, "max")


# -- the module against its restatement


def norm(x, layer):
    return F.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias)


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def weighed(q, k, v, heads, seen, fixed=None):
    """Attention of one image in loops; seen[i]: what row i looks at; fixed: weights that are added."""
    d = q.shape[1] // heads
    out = torch.zeros_like(q)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(q)):
            keys = torch.tensor(seen[i])
            out[i, part] = (q[i, part] @ k[keys, part].T / math.sqrt(d)).softmax(0) @ v[keys, part]
            if fixed is not None:
                for j in seen[i]:
                    out[i, part] += fixed[h, i, j] * v[j, part]
    return out


def reads(x, context, layer, fixed):
    everything = [list(range(len(context)))] * len(x)
    q, k = linear(norm(x, layer.ln_query), layer.query), linear(norm(context, layer.ln_key), layer.key)
    x = x + linear(weighed(q, k, linear(context, layer.value), layer.heads, everything, fixed), layer.out)
    return x + linear(F.gelu(linear(norm(x, layer.ln_mlp), layer.mlp[0])), layer.mlp[2])


def attends(x, block):
    q, k, v = (norm(x, block.ln_1) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, 1)
    earlier = [list(range(i + 1)) for i in range(len(x))]
    x = x + linear(weighed(q, k, v, block.attn.heads, earlier), block.attn.out_proj)
    return x + linear(F.gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)


def places(grid, width):
    rows, columns = grid
    angles = [math.pi * 64 ** (i / (width // 4 - 1)) for i in range(width // 4)]
    out = []
    for r in range(rows):
        for c in range(columns):
            at = [(r + 0.5) / max(grid), (c + 0.5) / max(grid)]
            out.append([f(a * t) for t in at for f in (math.sin, math.cos) for a in angles])
    return torch.tensor(out)


def cosines(grid, order):
    rows, columns = grid
    out = []
    for a, b in sorted(((a, b) for a in range(order) for b in range(order)), key=lambda p: (sum(p), p)):
        wave = [
            math.cos(math.pi * a * (r + 0.5) / rows) * math.cos(math.pi * b * (c + 0.5) / columns)
            for r in range(rows)
            for c in range(columns)
        ]
        wave = torch.tensor(wave) * (a < rows and b < columns)
        out.append(wave / wave.square().mean().sqrt().clamp(min=1e-6))
    return torch.stack(out)


def restated(m, x, grid, k):
    """Of one image (N, D): k tokens, in units of the features and calibrated, what was read, and the
    reconstruction from them."""
    c = m.config
    u = (x - m.mean) / m.std
    cells, left = averages(u, grid, k, c.start)
    phi = cosines(grid, c.order)
    context = linear(u, m.input_proj) + places(grid, c.width)
    hidden = m.registers[:k] + linear(cells, m.input_proj)
    for reader, block in zip(m.readers, m.blocks):
        hidden = attends(reads(hidden, context, reader, m.mixture[:, :k] @ phi / len(x)), block)
    tokens = cells + linear(hidden, m.out_proj)
    average = torch.arange(k)[:, None] < (1 if c.start == "residual" else k)
    d = m.decoder
    draft = Pyramid(grid, k, c.start).draft(tokens[None], torch.ones(1, k, dtype=torch.bool))[0]
    context = linear(tokens, d.token_proj) + d.token_position[:k]
    y = linear(draft, d.draft_proj) + places(grid, c.decoder_width)
    for reader in d.readers:
        y = reads(y, context, reader, (d.mixture[:, :k] @ phi).transpose(1, 2))
    found = draft + linear(y, d.out_proj)
    return tokens * m.std + average * m.mean, hidden, torch.tensor(left), found * m.std + m.mean


@pytest.mark.parametrize("start", ["residual", "mean"])
@pytest.mark.parametrize(("grid", "k"), [((4, 6), 9), ((3, 2), 4), ((4, 6), 1)])
def test_it_is_what_it_says(start, grid, k):
    m, x = made(start=start), features(2, grid)
    with torch.no_grad():
        tokens = m(x, grid, k)
        decoded = m.decode(tokens, grid)
        for i in range(2):
            wanted, _, _, found = restated(m, x[i], grid, k)
            torch.testing.assert_close(tokens[i], wanted, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(decoded[i], found, atol=1e-4, rtol=1e-5)


def test_waves_are_orthogonal():
    phi = waves((8, 5), 4, torch.zeros(1))
    torch.testing.assert_close(phi @ phi.T / 40, torch.eye(16), atol=1e-5, rtol=0)
    assert not waves((2, 5), 4, torch.zeros(1)).square().sum(1)[[5, 8, 9]].any()  # no third wave in two rows
    torch.testing.assert_close(waves((2, 5), 4, torch.zeros(1)), cosines((2, 5), 4), atol=1e-5, rtol=0)


def test_tokens_do_not_depend_on_later_ones():
    m, x = made(tail=4), features()
    with torch.no_grad():
        full = m(x, GRID)
        assert full.shape == (3, 9, 12)
        for k in range(1, 10):
            torch.testing.assert_close(m(x, GRID, k), full[:, :k], atol=1e-5, rtol=1e-5)
        with_tail = m.features(m.read(x, GRID, 13)[0])
        torch.testing.assert_close(with_tail[:, :9], full, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(m(x, GRID)[:, 2].sum(), m.registers)
    assert gradient[:3].abs().sum(1).all() and not gradient[3:].any()


def test_padding_is_not_decoded():
    m, x = made(), features(4)
    lengths = torch.tensor([1, 9, 3, 5])
    with torch.no_grad():
        tokens = m(x, GRID)
        padded = tokens.masked_fill(torch.arange(9)[None, :, None] >= lengths[:, None, None], 7.0)
        together = m.decode(padded, GRID, lengths)
        for i, k in enumerate(lengths.tolist()):
            alone = m.decode(m(x[i : i + 1], GRID, k), GRID)
            torch.testing.assert_close(together[i : i + 1], alone, atol=1e-4, rtol=1e-5)


def test_what_it_refuses():
    m = fresh()
    for grid, k, message in (((4, 6), 10, "1 to 9"), ((2, 3), 7, "1 to 6"), ((4, 6), 0, "1 to 9")):
        with pytest.raises(ValueError, match=message):
            m(features(1, grid), grid, k)
    with pytest.raises(ValueError, match="no grid of 4 rows and 5 columns"):
        m(features(1), (4, 5))
    for options in ({"heads": 3}, {"decoder_width": 10}):
        with pytest.raises(ValueError, match="a width is a multiple of 4 and of its heads"):
            fresh(**options)
    for options in ({"tokens": 0}, {"depth": 0}, {"order": 0}):
        with pytest.raises(ValueError, match="tokens, depth and order are 1 or more"):
            fresh(**options)
    with pytest.raises(ValueError, match="a drop schedule is one of"):
        fresh(drop="none")
    with pytest.raises(ValueError, match="a pyramid is one of"):
        fresh(start="max")
    assert list(m.counts(24)) == list(range(1, 10)) and list(m.counts(4)) == [1, 2, 3, 4]


# -- training


def test_losses_are_those_of_all_tokens_and_of_a_prefix():
    m, x = made(tail=3, cosine=0.5), features(3)
    losses = m.training_loss(x, GRID, torch.Generator().manual_seed(5))
    lengths = m.schedule.draw(12, 3, torch.Generator().manual_seed(5))

    def loss(found, wanted):
        off = (found - wanted).abs()
        smooth = torch.where(off < 1, off.square() / 2, off - 0.5).mean()
        angle = (found * wanted).sum(-1) / found.norm(dim=-1) / wanted.norm(dim=-1)
        return smooth + 0.5 * (1 - angle).mean()

    units = [(x - m.mean) / m.std for x in x]
    wanted = {"full": [], "prefix": []}
    for i, k in enumerate(lengths.tolist()):
        for name, own in (("full", 9), ("prefix", k)):
            found = (restated(m, x[i], GRID, own)[3] - m.mean) / m.std
            wanted[name].append(loss(found, units[i]))
    for name, parts in wanted.items():
        torch.testing.assert_close(losses[name], torch.stack(parts).mean(), atol=1e-4, rtol=1e-4)
    sum(losses.values()).backward()
    m.halting_loss(x, GRID, torch.tensor([[1, 5, 9]] * 3)).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in m.parameters())


def test_a_step_of_training_draws_by_the_schedule():
    generator = torch.Generator().manual_seed(0)

    def drawn(**options):
        m = fresh(**options)
        return {m.draw(GRID, generator) for _ in range(200)}

    assert drawn(drop="full") == {9} and drawn(drop="pow2") == {1, 2, 4, 8, 9} and len(drawn()) == 9


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, [1 / 8] * 8),
        ({"drop": "pow2"}, [1 / 4, 1 / 4, 0, 1 / 4, 0, 0, 0, 1 / 4]),
        ({"drop": "uniform_pow2"}, [1 / 8, 1 / 8, 0, 1 / 4, 0, 0, 0, 1 / 2]),
        ({"drop": "levels", "levels": (2, 4)}, [0, 1 / 2, 0, 1 / 2, 0, 0, 0, 0]),
        ({"drop": "full"}, [0] * 7 + [1]),
    ],
)
def test_the_schedule_draws_what_it_says(options, wanted):
    m = fresh(tokens=8, **options)
    drawn = m.schedule.draw(8, 4000, torch.Generator().manual_seed(0))
    found = torch.bincount(drawn, minlength=9)[1:] / 4000
    torch.testing.assert_close(found, torch.tensor(wanted, dtype=torch.float), atol=0.03, rtol=0)


def test_it_finds_the_principal_components():
    """For features that are a linear mixture of normal numbers these are the best code for every k at once
    (Rippel et al., arXiv:1402.0915): the error must fall with k and come near to theirs."""
    torch.manual_seed(0)
    n, d, k = 16, 4, 5
    patterns, channels = (torch.linalg.qr(torch.randn(size, size)).Q for size in (n, d))
    spread = 0.9 ** torch.arange(n)[:, None]

    def draw(count):
        return patterns.T @ (torch.randn(count, n, d) * spread) @ channels

    m = build(
        "ordered", in_width=d, tokens=k, width=16, heads=4, depth=1, ratio=1.0, order=4, decoder_width=16,
        decoder_depth=1, cosine=0.0,
    )  # fmt: skip
    m.calibrate(draw(2048))
    many, test = m.units(draw(4096)).flatten(1), draw(256)
    mean, flat = many.mean(0), m.units(test).flatten(1)
    _, _, basis = torch.linalg.svd(many - mean, full_matrices=False)
    left = [flat - mean - (flat - mean) @ basis[: i * d].T @ basis[: i * d] for i in range(1, k + 1)]
    best = torch.stack([off.square().mean() for off in left])
    every, steps = torch.arange(1, k + 1).expand(256, -1), 400
    assert bool((m.errors(test, (4, 4), every).mean(0)[1:] > 1.3 * best[1:]).all())
    optimiser = torch.optim.Adam(m.parameters(), 2e-2, (0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-2, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        loss = sum(m.training_loss(draw(32), (4, 4)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    error = m.errors(test, (4, 4), every).mean(0)
    assert bool((error.diff() < 0).all())
    assert bool((error < 1.1 * best).all()), error / best


# -- how many tokens


def foretold(m, x, k):
    """What the halting head says of one image after each of k tokens: location and scale of the log error."""
    _, hidden, left, _ = restated(m, x, GRID, k)
    told = []
    for i in range(k):
        known = torch.stack([left[i], left[0]]).add(1e-4).log()
        location, scale = m.halting(torch.cat([norm(hidden[i], m.ln_halting), known]))
        told.append((known[0] + location, F.softplus(scale) + 0.05))
    return told


def test_halting_is_monotone_in_epsilon_and_confidence():
    m, x = made(), features(4)
    with torch.no_grad():
        told, seen = [foretold(m, image, 9) for image in x], set()
        before = torch.zeros(4, dtype=torch.long)
        for epsilon in (30.0, 3.0, 1.0, 0.3, 0.1, 0.01, 1e-5):
            tokens = m.halt(x, GRID, epsilon, confidence=0.7)
            for i in range(4):
                chance = [torch.sigmoid((math.log(epsilon + 1e-4) - at) / scale) for at, scale in told[i]]
                found = [k for k in range(9) if chance[k] >= 0.7]
                assert tokens.lengths[i] == (found[0] + 1 if found else 9)
                wanted = torch.stack([at.exp() - 1e-4 for at, _ in told[i]]).clamp(min=0)
                torch.testing.assert_close(tokens.extras["error"][i], wanted, atol=1e-3, rtol=1e-3)
            assert bool((tokens.lengths >= before).all())
            before = tokens.lengths
            seen.update(before.tolist())
            assert bool((m.halt(x, GRID, epsilon, confidence=0.95).lengths >= before).all())
        assert len(seen) > 2
        assert torch.equal(m.halt(x, GRID).lengths, m.halt(x, GRID, 0.3, 0.5).lengths)
    for options in ({"epsilon": 0.0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="epsilon is positive"):
            m.halt(x, GRID, **options)


def test_images_of_a_batch_get_what_they_get_alone():
    m, x = made(), features(6)
    with torch.no_grad():
        epsilon = float(m.halt(x, GRID).extras["error"][:, 2].median())
        together = m.halt(x, GRID, epsilon)
        assert len(set(together.lengths.tolist())) > 1
        for i in range(6):
            alone = m.halt(x[i : i + 1], GRID, epsilon)
            assert alone.lengths == together.lengths[i]
            torch.testing.assert_close(together[i].values, alone.values, atol=1e-5, rtol=1e-5)
            own = m(x[i : i + 1], GRID, int(alone.lengths))
            torch.testing.assert_close(alone.values, own, atol=1e-5, rtol=1e-5)


def test_labels_are_errors_and_the_smallest_number_that_will_do():
    m, x = made(), features(4)
    every = torch.arange(1, 10).expand(4, -1)
    errors = m.errors(x, GRID, every)
    with torch.no_grad():
        for i in range(4):
            for k in (1, 4, 9):
                off = (restated(m, x[i], GRID, k)[3] - x[i]) / m.std
                torch.testing.assert_close(errors[i, k - 1], off.square().mean(), atol=1e-4, rtol=1e-4)
    for epsilon in errors.flatten().quantile(torch.tensor([0.05, 0.3, 0.6, 0.9])).tolist():
        for i, k in enumerate(m.smallest(x, GRID, epsilon).tolist()):
            enough = [j + 1 for j in range(9) if errors[i, j] <= epsilon]
            assert k == (enough[0] if enough else 9)


def test_the_halting_head_learns_likelihood_alone():
    m, x = made(), features(3)
    lengths = torch.tensor([[1, 4], [9, 2], [5, 5]])
    loss = m.halting_loss(x, GRID, lengths)
    errors = m.errors(x, GRID, torch.arange(1, 10).expand(3, -1))
    wanted = []
    for i in range(3):
        told = foretold(m, x[i], 9)
        for k in lengths[i].tolist():
            at, scale = told[k - 1]
            y = ((errors[i, k - 1] + 1e-4).log() - at) / scale
            density = torch.sigmoid(y) * torch.sigmoid(-y) / scale
            wanted.append(-density.log())
    torch.testing.assert_close(loss, torch.stack(wanted).mean(), atol=1e-3, rtol=1e-3)
    loss.backward()
    learned = {name.split(".")[0] for name, p in m.named_parameters() if p.grad is not None}
    assert learned == {"halting", "ln_halting"}


def test_the_halting_head_learns_which_images_need_more():
    """Of pictures that are more or less smooth, after a few steps of training."""
    m = fresh(depth=1, ratio=1.0, decoder_depth=1)
    phi = waves(GRID, 4, torch.zeros(1))

    def draw(count):
        fall = torch.linspace(0.3, 1, count)[:, None] ** torch.arange(16)
        return (torch.randn(count, 12, 16) * fall[:, None] @ phi).transpose(1, 2)

    head = [*m.halting.parameters(), *m.ln_halting.parameters()]
    lengths = torch.randint(1, 10, (40, 32, 3))
    for weights, loss in (
        (m.parameters(), lambda x, own: sum(m.training_loss(x, GRID).values())),
        (head, lambda x, own: m.halting_loss(x, GRID, own)),
    ):
        optimiser = torch.optim.Adam(weights, 1e-2)
        for own in lengths:
            optimiser.zero_grad()
            loss(draw(32), own).backward()
            optimiser.step()
    x = draw(64)
    epsilon = float(m.errors(x, GRID, torch.full((64, 1), 5)).median())
    wanted = m.smallest(x, GRID, epsilon)
    assert all((wanted == k).float().mean() < 0.6 for k in range(1, 10))
    off = (m.halt(x, GRID, epsilon).lengths - wanted).abs().float().mean()
    constant = min((wanted - k).abs().float().mean() for k in range(1, 10))
    assert off < 0.5 * constant, (off, constant)
    kept = m.halt(x, GRID, epsilon, confidence=0.9).lengths
    reached = m.errors(x, GRID, kept[:, None])[:, 0] <= epsilon
    assert reached[kept < 9].float().mean() > 0.8


# -- where it is used


def test_a_masked_tail_is_a_tail_cut_off():
    """For the LLM behind: training may mask what inference leaves away, if positions count what is kept."""
    from transformers import LlamaConfig, LlamaModel

    m, x = made(), features(3)
    llama = LlamaModel(
        LlamaConfig(
            vocab_size=8, hidden_size=12, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
    ).eval()
    text = torch.randn(1, 5, 12)
    lengths = [2, 9, 4]
    with torch.no_grad():
        inputs = torch.cat([m(x, GRID), text.expand(3, -1, -1)], 1)  # (3, 9 + 5, 12)
        mask = torch.cat([torch.arange(9) < torch.tensor(lengths)[:, None], torch.ones(3, 5) > 0], 1)
        place = (mask.cumsum(1) - 1).clamp(min=0)
        masked = llama(inputs_embeds=inputs, attention_mask=mask.long(), position_ids=place)[0]
        for i, k in enumerate(lengths):
            cut = torch.cat([m(x[i : i + 1], GRID, k), text], 1)
            alone = llama(inputs_embeds=cut)[0]
            torch.testing.assert_close(masked[i][mask[i]], alone[0], atol=1e-4, rtol=1e-4)


def test_half_precision():
    m, x = made(), features()
    with torch.no_grad():
        wanted = m(x, GRID)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = m(x, GRID)
        tolerance = 2e-2 * float(wanted.abs().max())
        torch.testing.assert_close(mixed.float(), wanted, atol=tolerance, rtol=2e-2)
        half = made().bfloat16()
        tokens = half(x.bfloat16(), GRID)
        assert tokens.dtype == torch.bfloat16
        torch.testing.assert_close(tokens.float(), wanted, atol=2 * tolerance, rtol=4e-2)
        assert half.halt(x.bfloat16(), GRID).values.dtype == torch.bfloat16


def test_it_is_saved_and_comes_back(tmp_path):
    m, x = made(tail=2, start="mean"), features()
    m.save_pretrained(tmp_path)
    back = from_pretrained(tmp_path)
    assert isinstance(back, OrderedResampler) and back.config == m.config
    with torch.no_grad():
        assert torch.equal(back(x, GRID, 5), m(x, GRID, 5))
        assert torch.equal(back.halt(x, GRID).values, m.halt(x, GRID).values)
