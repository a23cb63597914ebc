"""Selectors that learn: by reconstruction, and DynamicViT's scorer with what trains it."""

import math

import pytest
import torch
import torch.nn.functional as F

from vtc.learned import build, from_pretrained
from vtc.learned.scorer import LearnedScorer, policy_softmax, ratio_loss, token_distillation
from vtc.learned.selector import gumbel_choice
from vtc.schedule import counts
from vtc.tokens import gather

GRID = (3, 4)
SMALL = {"in_width": 8, "width": 12, "depth": 3, "heads": 2, "ratio": 2.0}


def shaken(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def selector(**options):
    torch.manual_seed(0)
    module = shaken(build("reconstructing-selector", **SMALL | options))
    module.calibrate(torch.randn(50, 8) * 2 + 1)
    return module


def scorer(width=8):
    torch.manual_seed(0)
    return shaken(build("learned-scorer", in_width=width))


def features(n=4, count=12, width=8):
    return torch.randn(n, count, width, generator=torch.Generator().manual_seed(1))


def linear(x, layer):
    return x @ layer.weight.T + layer.bias


def norm(x, layer):
    return F.layer_norm(x, (x.shape[-1],), layer.weight, layer.bias)


# -- what both do


@pytest.mark.parametrize("make", [selector, scorer])
def test_the_highest_scores_stay_in_the_order_of_the_grid(make):
    module, x = make(), features()
    scores = module.scores(x, GRID)
    for k in (1, 3, 7, 12):
        kept, index = module(x, GRID, k), module.select(x, GRID, k)
        assert kept.shape == (4, k, 8)
        for i in range(4):
            wanted = sorted(sorted(range(12), key=lambda j: -scores[i, j].item())[:k])
            assert index[i].tolist() == wanted
            assert torch.equal(kept[i], x[i, wanted])
    for share in (0.1, 0.5, 0.9, 1.0):
        assert module(x, GRID, round(share * 12)).shape[1] == round(share * 12)
    with pytest.raises(ValueError, match="1 to 12"):
        module(x, GRID, 13)


@pytest.mark.parametrize("make", [selector, scorer])
def test_images_of_a_batch_get_what_they_get_alone(make):
    module, x = make(), features()
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(module(x[order], GRID, 5), module(x, GRID, 5)[order])
    for i in range(4):
        torch.testing.assert_close(module.scores(x[i : i + 1], GRID)[0], module.scores(x, GRID)[i])


@pytest.mark.parametrize("make", [selector, scorer])
def test_any_grid_half_precision_and_a_folder(make, tmp_path):
    module = make()
    for grid in ((1, 5), (2, 2), (7, 3)):
        x = features(2, grid[0] * grid[1])
        assert module(x, grid, 2).shape == (2, 2, 8)
    x = features()
    half = make().bfloat16()
    assert half(x.bfloat16(), GRID, 5).dtype == torch.bfloat16
    assert (half.scores(x.bfloat16(), GRID) - module.scores(x, GRID)).abs().max() < 0.2
    module.save_pretrained(tmp_path)
    back = from_pretrained(tmp_path)
    assert type(back) is type(module) and torch.equal(back.scores(x, GRID), module.scores(x, GRID))


def test_a_choice_is_hard_and_its_gradient_soft():
    logits = torch.randn(500, 2, requires_grad=True)
    drawn = gumbel_choice(logits, 0.7, torch.Generator().manual_seed(3))
    uniform = torch.rand(500, 2, generator=torch.Generator().manual_seed(3))
    soft = ((logits - (-uniform.log()).log()) / 0.7).softmax(-1)
    torch.testing.assert_close(drawn, F.one_hot(soft.argmax(-1), 2).float())
    weights = torch.randn(500, 2)
    (got,) = torch.autograd.grad((drawn * weights).sum(), logits)
    (wanted,) = torch.autograd.grad((soft * weights).sum(), logits)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)
    assert bool((got.abs() > 0).any(0).all())
    often = gumbel_choice(torch.tensor([0.0, math.log(3.0)]).expand(8000, 2), 1.0)[:, 1].mean()
    assert often == pytest.approx(0.75, abs=0.03)


# -- reconstruction


def transformed(t, x, grid):
    """One image through a transformer, in loops over heads."""
    if t.width != x.shape[1]:
        x = linear(x, t.input_proj)
    angles = [math.pi * 64 ** (i / (t.width // 4 - 1)) for i in range(t.width // 4)]
    places = []
    for r in range(grid[0]):
        for c in range(grid[1]):
            at = [(r + 0.5) / max(grid), (c + 0.5) / max(grid)]
            places.append([f(a * p) for p in at for f in (math.sin, math.cos) for a in angles])
    x = x + torch.tensor(places)
    for block in t.blocks:
        q, k, v = (norm(x, block.ln_1) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).chunk(3, 1)
        heads = [
            (a @ b.T / math.sqrt(a.shape[1])).softmax(1) @ c
            for a, b, c in zip(*(part.chunk(block.attn.heads, 1) for part in (q, k, v)))
        ]
        x = x + linear(torch.cat(heads, 1), block.attn.out_proj)
        x = x + linear(F.gelu(linear(norm(x, block.ln_2), block.mlp.c_fc)), block.mlp.c_proj)
    return linear(norm(x, t.ln_post), t.head)


@pytest.mark.parametrize("width", [12, 8])
def test_scores_and_losses_are_those_of_the_paper(width):
    s, x = selector(width=width, sparsity=0.7, keep=0.4), features()
    units = (x - s.mean) / s.std
    assert len(s.selector.blocks) == len(s.reconstructor.blocks) == 3
    logits = torch.stack([transformed(s.selector, image, GRID) for image in units])
    torch.testing.assert_close(s.scores(x, GRID), logits[..., 1] - logits[..., 0], atol=1e-5, rtol=1e-4)
    assert torch.equal(s.chosen(x, GRID), logits.argmax(-1) == 1)
    losses = s.training_loss(x, GRID, torch.Generator().manual_seed(5))
    mask = gumbel_choice(logits, 1.0, torch.Generator().manual_seed(5))[..., 1].detach()
    error, beyond = [], []
    for image, kept in zip(units, mask):
        given = torch.where(kept[:, None] > 0.5, image, s.masked)
        error.append((transformed(s.reconstructor, given, GRID) - image).square().mean())
        beyond.append(max(float(kept.mean()), 0.4) - 0.4)
    torch.testing.assert_close(losses["reconstruction"], torch.stack(error).mean(), atol=1e-5, rtol=1e-4)
    assert losses["sparsity"].item() == pytest.approx(0.7 * sum(beyond) / 4, abs=1e-6)
    sum(losses.values()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in s.parameters())
    assert bool((s.selector.head.weight.grad.abs().sum(1) > 0).all())  # of both logits


def test_dropping_more_than_wanted_gains_nothing():
    s, x = selector(keep=0.5), features()
    with torch.no_grad():
        for bias, some in (((-30.0, 30.0), True), ((30.0, -30.0), False)):
            s.selector.head.bias.copy_(torch.tensor(bias))
            s.zero_grad()
            with torch.enable_grad():
                loss = s.training_loss(x, GRID)["sparsity"]
                (gradient,) = torch.autograd.grad(loss, s.selector.head.bias)
            assert float(loss) == pytest.approx(0.5 if some else 0.0)
            assert bool(gradient.any()) is False or some
    s.selector.head.bias.data.copy_(torch.tensor([0.0, 1.0]))  # more than half stay, and it is not certain
    s.selector.head.weight.data.zero_()
    loss = s.training_loss(x, GRID, torch.Generator().manual_seed(0))["sparsity"]
    (gradient,) = torch.autograd.grad(loss, s.selector.head.bias)
    assert float(loss.detach()) > 0 and gradient[1] > 0 > gradient[0]


def test_with_all_kept_features_are_what_is_reconstructed_from():
    s, x = selector(keep=1.0), features()
    given = []
    s.reconstructor.register_forward_pre_hook(lambda module, args: given.append(args[0]))
    s.reconstruct(x, GRID, torch.ones(4, 12))
    torch.testing.assert_close(given[0], (x - s.mean) / s.std)
    s.reconstructor.forward = lambda x, grid: x
    s.selector.head.bias.data.copy_(torch.tensor([-30.0, 30.0]))
    losses = s.training_loss(x, GRID)
    assert sum(losses.values()).item() == pytest.approx(0.0, abs=1e-6)


def test_it_learns_to_keep_what_cannot_be_told():
    """Twelve tokens of sixteen are the same, four are unlike all others: those stay."""
    torch.manual_seed(0)
    s = build("reconstructing-selector", in_width=8, width=16, depth=1, heads=2, ratio=1.0, keep=0.3)
    common = torch.randn(8)

    def draw(count):
        unique = torch.rand(count, 16).argsort(1)[:, :4]
        x = common.expand(count, 16, 8).clone()
        return x.scatter(1, unique[..., None].expand(-1, -1, 8), torch.randn(count, 4, 8)), unique

    optimiser = torch.optim.Adam(s.parameters(), 1e-2)
    for _ in range(300):
        loss = sum(s.training_loss(draw(32)[0], (4, 4)).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    x, unique = draw(64)
    found = s.select(x, (4, 4), 4)
    right = (found[:, :, None] == unique[:, None]).any(2).float().mean()
    assert right > 0.95
    assert s.chosen(x, (4, 4)).float().mean() < 0.6


def test_options_that_cannot_be():
    for options, message in (
        ({"width": 10}, "width is a multiple of 4 and of heads"),
        ({"keep": 0.0}, "keep is a share of tokens above 0"),
        ({"temperature": 0.0}, "temperature positive"),
    ):
        with pytest.raises(ValueError, match=message):
            selector(**options)
    with pytest.raises(ValueError, match="in_width is a multiple of 4"):
        scorer(10)


# -- the scorer of DynamicViT


def test_names_and_shapes_of_the_scorer():
    c, wanted = 384, {"in_conv.0": (384,), "in_conv.1": (384, 384)}
    for place, out, into in ((0, c // 2, c), (2, c // 4, c // 2), (4, 2, c // 4)):
        wanted[f"out_conv.{place}"] = (out, into)
    with torch.device("meta"):
        state = LearnedScorer(LearnedScorer.Config()).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {
        f"{name}.{kind}": shape if kind == "weight" else shape[:1]
        for name, shape in wanted.items()
        for kind in ("weight", "bias")
    }


def test_the_first_scorer_of_a_published_model_is_loaded(tmp_path):
    s, x = scorer(), features()
    state = {f"score_predictor.0.{name}": value for name, value in s.state_dict().items()}
    state |= {f"score_predictor.1.{name}": value + 1 for name, value in s.state_dict().items()}
    torch.save(state | {"cls_token": torch.zeros(1, 1, 8)}, tmp_path / "model.pth")
    loaded = LearnedScorer.from_pretrained(tmp_path / "model.pth", in_width=8)
    assert torch.equal(loaded.scores(x, GRID), s.scores(x, GRID))


def test_the_scorer_is_what_it_says():
    s, x = scorer(), features()
    there = torch.ones(4, 12)
    there[1, [0, 5, 7]] = there[2, 3:] = 0
    for given in (None, there):
        got = s.log_probabilities(x, given)
        for i in range(4):
            h = F.gelu(linear(norm(x[i], s.in_conv[0]), s.in_conv[1]))
            kept = [j for j in range(12) if given is None or given[i, j] == 1]
            shared = torch.stack([h[j, 4:] for j in kept]).mean(0)
            for j in range(12):
                z = F.gelu(linear(torch.cat([h[j, :4], shared]), s.out_conv[0]))
                z = linear(F.gelu(linear(z, s.out_conv[2])), s.out_conv[4])
                torch.testing.assert_close(got[i, j], z - z.logsumexp(0), atol=1e-5, rtol=1e-4)
    assert torch.equal(s.scores(x, GRID), s.log_probabilities(x)[..., 0])


def test_what_is_gone_stays_gone():
    s, x = scorer(), features()
    first = s.decide(x, generator=torch.Generator().manual_seed(0))
    second = s.decide(x, first, generator=torch.Generator().manual_seed(1))
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert bool((second <= first).all()) and bool((second < first).any())
    loss = ratio_loss([first, second], [0.7, 0.49])
    wanted = [(kept.mean(1) - share) ** 2 for kept, share in ((first, 0.7), (second, 0.49))]
    torch.testing.assert_close(loss, torch.cat(wanted).mean())
    loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in s.parameters())


@pytest.mark.parametrize(
    ("n", "keep", "wanted"), [(196, 0.7, [137, 96, 67]), (576, 0.5, [288, 144, 72]), (64, 1.0, [64] * 3)]
)
def test_counts_of_stages(n, keep, wanted):
    left = counts({3: keep, 6: keep, 9: keep}, "once", n, 12)  # the same shares, block by block
    assert [left[block] for block in (3, 6, 9)] == wanted


def test_policy_attention():
    logits = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(
        policy_softmax(logits, torch.ones(2, 9)), logits.softmax(-1), atol=1e-5, rtol=0
    )
    there = torch.ones(2, 9)
    there[0, [2, 4]] = there[1, 5:] = 0
    weights = policy_softmax(logits, there)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 9), atol=1e-5, rtol=0)
    for b in range(2):
        for i in range(9):
            seen = [j for j in range(9) if there[b, j] or i == j]
            wanted = torch.zeros(3, 9)
            wanted[:, seen] = logits[b, :, i, seen].softmax(-1)
            torch.testing.assert_close(weights[b, :, i], wanted, atol=1e-3, rtol=0)
            assert bool((weights[b, :, i, [j for j in range(9) if j not in seen]] < 1e-3).all())
    there.requires_grad_()
    policy_softmax(logits, there)[:, :, :, 0].sum().backward()
    assert there.grad.abs().sum() > 0


def test_training_without_tokens_is_inference_without_them():
    """A block behind a drawn choice: what stays is what it is where the others were taken out."""
    torch.manual_seed(0)
    s, x = scorer(), features(1, 13)  # CLS and 12 tokens
    wq, wk, wv = torch.randn(3, 8, 8) * 0.3

    def attend(x, there):
        q, k, v = (x @ w for w in (wq, wk, wv))
        return x + (policy_softmax((q @ k.transpose(1, 2))[:, None] / 8, there) @ v[:, None])[:, 0]

    kept = s.decide(x[:, 1:], generator=torch.Generator().manual_seed(2)).detach()
    there = torch.cat([torch.ones(1, 1), kept], 1)  # CLS always stays
    index = there[0].nonzero().T
    assert 1 < index.shape[1] < 13
    masked = attend(attend(x, there), there)
    taken = gather(x, index)
    every = torch.ones_like(index, dtype=torch.float)
    taken = attend(attend(taken, every), every)
    torch.testing.assert_close(gather(masked, index), taken, atol=1e-4, rtol=1e-4)


def test_distillation_of_kept_tokens():
    student, teacher, there = features(), features().flip(0), torch.zeros(4, 12)
    there[0, 3] = there[2, 7] = 1
    wanted = ((student[0, 3] - teacher[0, 3]) ** 2).mean() + ((student[2, 7] - teacher[2, 7]) ** 2).mean()
    torch.testing.assert_close(token_distillation(student, teacher, there), wanted / 2)
    assert float(token_distillation(student, teacher, torch.zeros(4, 12))) == 0


def test_in_a_host_scores_learn_by_a_drawn_choice():
    torch.manual_seed(0)
    module = build("learned-scorer", in_width=8)
    x = torch.randn(64, 16, 8)
    x[..., 0] = 0
    x[:, ::4, 0] = 3.0  # tokens that the loss is small with
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(120):
        reduction = module.train().reduction(x, (4, 4), 4)
        loss = -reduction.apply(x)[..., 0].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    kept = module.eval().reduction(x, (4, 4), 4)
    assert kept.pruned and kept.new is None
    assert (kept.index % 4 == 0).float().mean() > 0.95


def test_what_a_drawn_choice_gives_is_the_tokens_themselves():
    torch.manual_seed(0)
    module, x = build("learned-scorer", in_width=8).train(), torch.randn(2, 16, 8)
    drawn = [module.reduction(x, (4, 4), 5) for _ in range(8)]
    for reduction in drawn:
        wanted = x.gather(1, reduction.index[..., None].expand(-1, -1, 8))
        torch.testing.assert_close(reduction.apply(x), wanted)
    assert len({tuple(reduction.index.flatten().tolist()) for reduction in drawn}) > 1
    with torch.no_grad():
        assert torch.equal(module.reduction(x, (4, 4), 5).index, module.select(x, (4, 4), 5))


@pytest.mark.parametrize("make", [selector, scorer])
def test_the_gradient_of_a_score_is_what_a_token_is_worth_beside_the_average(make):
    module, x = make().train(), features()
    torch.manual_seed(3)
    reduction = module.reduction(x, GRID, 5)
    torch.testing.assert_close(reduction.new, gather(x, reduction.index))  # the tokens themselves
    weights = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad((reduction.new * weights).sum(), list(module.parameters()), allow_unused=True)
    scores = module.scores(x, GRID)
    worth = torch.zeros(4, 12)
    for i in range(4):
        for j, token in enumerate(reduction.index[i].tolist()):
            worth[i, token] = weights[i, j] @ (x[i, token] - x[i].mean(0))
    wanted = torch.autograd.grad(
        (scores.sigmoid() * worth).sum(), list(module.parameters()), allow_unused=True
    )
    assert sum(gradient is not None for gradient in found) > 4
    for own, plain in zip(found, wanted, strict=True):
        if plain is not None:
            torch.testing.assert_close(own, plain)
