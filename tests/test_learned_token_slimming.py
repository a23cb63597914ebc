import dataclasses

import pytest
import torch
import torch.nn.functional as F
from learned_host import all_have_gradients, apart, randomise, smooth

from vtc.learned import get_module
from vtc.learned.grids import spread
from vtc.learned.token_slimming import (
    ReverseSlimming,
    TokenSlimming,
    recalibration_loss,
    slimming_distillation,
)

GRID = (4, 6)


def fresh(**options):
    return TokenSlimming(TokenSlimming.Config(**{"in_width": 16, "tokens": 6} | options))


def slimming(**options):
    return randomise(fresh(**options), std=0.5)


def reverse(**options):
    options = {"width": 16, "tokens": 6, "recovered": 24, "ratio": 2.0} | options
    return randomise(ReverseSlimming(ReverseSlimming.Config(**options)))


def linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def norm(state, name, x):
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


@torch.no_grad()
def test_equals_the_formula():
    m, x = slimming(), torch.randn(3, 24, 16)
    state, out = m.state_dict(), m(x, GRID)
    for image, result in zip(x, out, strict=True):
        logits = linear(state, "weight.3", F.gelu(linear(state, "weight.1", norm(state, "weight.0", image))))
        weights = (logits * state["scale"].item()).exp()
        expected = torch.stack([(column[:, None] * image).sum(0) / column.sum() for column in weights.T])
        assert torch.allclose(result, expected, atol=1e-5)


@torch.no_grad()
def test_the_way_back_equals_the_formula():
    m, x = reverse(), torch.randn(3, 6, 16)
    state, out = m.state_dict(), m(x)
    for image, result in zip(x, out, strict=True):
        y = linear(state, "mlp1.fc2", F.gelu(linear(state, "mlp1.fc1", norm(state, "norm1", image).T))).T
        z = linear(state, "mlp2.fc2", F.gelu(linear(state, "mlp2.fc1", norm(state, "norm2", y))))
        assert torch.allclose(result, y + z, atol=1e-5)


@pytest.mark.parametrize("width, n, tokens", [(320, 196, 98), (384, 98, 49), (512, 49, 24), (768, 324, 162)])
def test_parameters_are_those_of_the_published_sizes(width, n, tokens):
    with torch.device("meta"):
        m = TokenSlimming(TokenSlimming.Config(in_width=width, tokens=tokens))
        back = ReverseSlimming(ReverseSlimming.Config(width=width, tokens=tokens, recovered=n))
    half = width // 2
    assert {name: tuple(p.shape) for name, p in m.named_parameters()} == {
        "weight.0.weight": (width,),
        "weight.0.bias": (width,),
        "weight.1.weight": (half, width),
        "weight.1.bias": (half,),
        "weight.3.weight": (tokens, half),
        "weight.3.bias": (tokens,),
        "scale": (1, 1, 1),
    }
    norms = {f"norm{i}.{part}": (width,) for i in (1, 2) for part in ("weight", "bias")}
    assert {name: tuple(p.shape) for name, p in back.named_parameters()} == norms | {
        "mlp1.fc1.weight": (4 * n, tokens),
        "mlp1.fc1.bias": (4 * n,),
        "mlp1.fc2.weight": (n, 4 * n),
        "mlp1.fc2.bias": (n,),
        "mlp2.fc1.weight": (4 * width, width),
        "mlp2.fc1.bias": (4 * width,),
        "mlp2.fc2.weight": (width, 4 * width),
        "mlp2.fc2.bias": (width,),
    }


def test_the_first_of_a_published_model_are_loaded(tmp_path):
    there, back, state = slimming(), reverse(), {"head.weight": torch.ones(2)}
    for name, m in (("tsm", there), ("rtsm", back)):
        state |= {f"{name}.0.{key}": value for key, value in m.state_dict().items()}
        state |= {f"{name}.1.{key}": value + 1 for key, value in m.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "model.pth")
    for m in (there, back):
        options = dataclasses.asdict(m.config)
        loaded = type(m).from_pretrained(tmp_path / "model.pth", **options).state_dict()
        assert all(torch.equal(value, loaded[key]) for key, value in m.state_dict().items())


def test_all_of_a_published_model_are_loaded(tmp_path):
    parts = [slimming(tokens=tokens) for tokens in (6, 3)]
    state = {f"tsm.{i}.{key}": value for i, m in enumerate(parts) for key, value in m.state_dict().items()}
    torch.save(state | {"blocks.0.norm1.weight": torch.ones(2)}, tmp_path / "model.pth")
    sizes = tuple(dataclasses.asdict(m.config) for m in parts)
    options = {"module": "token-slimming", "blocks": (0, 1), "options": sizes}
    loaded = get_module("staged").from_pretrained(tmp_path / "model.pth", **options)
    x = torch.randn(2, 24, 16)
    for found, m in zip(loaded.parts, parts, strict=True):
        assert torch.equal(found(x, GRID), m(x, GRID))


def test_weights_sum_to_one_and_tokens_stay_between_tokens():
    m, x = slimming(), torch.randn(2, 24, 16)
    weights = m.weights_of(x)
    assert torch.allclose(weights.sum(1), torch.ones(2, 6), atol=1e-5) and bool((weights >= 0).all())
    out = m(x, GRID)
    assert bool(
        (out <= x.amax(1, keepdim=True) + 1e-5).all() and (out >= x.amin(1, keepdim=True) - 1e-5).all()
    )
    assert torch.allclose(out, torch.einsum("bnk,bnd->bkd", weights, x), atol=1e-5)  # of those weights
    constant = torch.randn(2, 1, 16).expand(2, 24, 16)
    assert torch.allclose(m(constant, GRID), constant[:, :6], atol=1e-5)


def test_order_of_tokens_changes_nothing():
    m, x = slimming(), torch.randn(2, 24, 16)
    assert torch.allclose(m(x, GRID), m(x[:, torch.randperm(24)], GRID), atol=1e-5)


def test_one_token_without_scale_is_the_mean():
    m, x = slimming(tokens=1), torch.randn(2, 24, 16)
    assert not torch.allclose(m(x, GRID), x.mean(1, keepdim=True), atol=1e-2)
    with torch.no_grad():
        m.scale.zero_()
    assert torch.allclose(m(x, GRID), x.mean(1, keepdim=True), atol=1e-6)


def test_cls_is_untouched():
    m, x = slimming(), torch.randn(2, 26, 16)
    out = m.slim(x, prefix=2)
    assert out.shape == (2, 8, 16) and torch.equal(out[:, :2], x[:, :2])
    assert torch.equal(out[:, 2:], m(x[:, 2:], GRID))


def test_fresh_weights_give_about_the_mean_of_all():
    torch.manual_seed(0)
    x = smooth(grid=(8, 8))
    mean = x.mean(1, keepdim=True).expand(2, 6, 64)
    assert apart(fresh(in_width=64)(x, (8, 8)), mean) < 0.2


def placed(grid, width=64, seed=3):
    """Smooth features with position embeddings, as those of encoders have them."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.meshgrid(*(torch.linspace(-1, 1, side) for side in grid), indexing="ij")
    waves = torch.randn(2, width, generator=generator) * 2.5
    phase = torch.randn(width, generator=generator) * 3
    place = (torch.stack([rows, columns], -1).flatten(0, 1) @ waves + phase).sin()
    return lambda batch, seed: 1.4 * place + 0.5 * smooth(batch, grid, width, seed=seed)


def test_starts_as_means_of_blocks_where_features_know_their_place():
    torch.manual_seed(0)
    grid = (8, 8)
    features = placed(grid)
    m = fresh(in_width=64, tokens=16, ratio=1.0)
    x = features(4, 100)
    blocks = F.avg_pool2d(x.transpose(1, 2).unflatten(2, grid), (2, 2)).flatten(2).transpose(1, 2)
    before = apart(m(x, grid), blocks)
    m.start_from(features(64, 5), grid)
    after = apart(m(x, grid), blocks)  # other pictures
    assert after < 0.45 and after < before / 2
    # most of the weight lies in the token's own block
    owner = torch.arange(16).reshape(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    own = m.weights_of(x).gather(2, owner[None, :, None].expand(4, -1, 1))
    assert float(own.detach().sum(1).mean()) / 16 > 0.6
    with pytest.raises(ValueError, match="no blocks on a grid of 3 x 5"):
        m.start_from(x[:, :15], (3, 5))


def test_starts_as_means_of_blocks_of_any_number_on_any_grid():
    torch.manual_seed(0)
    grid, features = (8, 12), placed((8, 12))
    m = fresh(in_width=64, tokens=7, ratio=1.0)
    m.start_from(features(64, 5), grid)
    owner = F.one_hot(spread(grid, 7)[1]).T.float()  # (7, N)
    x = features(4, 100)
    blocks = owner @ x / owner.sum(1, keepdim=True)
    assert apart(m(x, grid), blocks) < 0.5


def test_the_loss_is_the_mean_over_layers_and_teaches_the_student_only():
    student = [torch.randn(2, 24, 16, requires_grad=True) for _ in range(3)]
    teacher = [torch.randn(2, 24, 16, requires_grad=True) for _ in range(3)]
    loss = recalibration_loss(student, teacher)
    pairs = zip(student, teacher, strict=True)
    assert torch.allclose(loss, sum((a - b).square().mean() for a, b in pairs) / 3)
    loss.backward()
    assert all(x.grad is not None for x in student) and all(x.grad is None for x in teacher)
    assert float(recalibration_loss(teacher, teacher).detach()) == 0
    for other in ([], teacher[:2], [x[:, 1:] for x in teacher]):
        with pytest.raises(ValueError, match="layers of student and teacher differ"):
            recalibration_loss(student, other)
    with pytest.raises(ValueError, match="layers of student and teacher differ"):
        recalibration_loss([], [])


def test_distillation_has_the_papers_weights():
    student, teacher = [torch.randn(2, 24, 16)], [torch.randn(2, 24, 16)]
    logits, wanted = torch.randn(2, 5, requires_grad=True), torch.randn(2, 5, requires_grad=True)
    losses = slimming_distillation(student, teacher, logits, wanted, temperature=3.0)
    assert torch.allclose(losses["tokens"], 2 * (student[0] - teacher[0]).square().mean())
    p, q = (wanted / 3).softmax(1), (logits / 3).softmax(1)
    divergence = (p * (p.log() - q.log())).sum(1).mean()
    assert torch.allclose(losses["logits"], 2 * 9 * divergence, atol=1e-5)
    losses["logits"].backward()
    assert logits.grad is not None and wanted.grad is None
    halved = slimming_distillation(student, teacher, logits, wanted, tokens_weight=1.0, logits_weight=0.0)
    assert torch.allclose(2 * halved["tokens"], losses["tokens"]) and not halved["logits"].detach()


def test_training_brings_the_recovered_tokens_nearer():
    torch.manual_seed(0)
    m, back = fresh(), ReverseSlimming(ReverseSlimming.Config(width=16, tokens=6, recovered=24, ratio=2.0))
    x = smooth(4, GRID, 16)
    parameters = [*m.parameters(), *back.parameters()]
    optimizer, losses = torch.optim.Adam(parameters, 3e-3), []
    for _ in range(120):
        loss = recalibration_loss([back(m(x, GRID))], [x])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 2


def test_batches_are_singles_in_float32_and_bfloat16_and_all_parameters_learn(tmp_path):
    for m, x, call in (
        (slimming(), torch.randn(3, 24, 16), lambda m, x: m(x, GRID)),
        (reverse(), torch.randn(3, 6, 16), lambda m, x: m(x)),
    ):
        out = call(m, x)
        assert torch.allclose(out[1:2], call(m, x[1:2]), atol=1e-5)
        assert all_have_gradients(m, out.square().mean())
        m.save_pretrained(tmp_path / m.name)
        assert torch.equal(call(type(m).from_pretrained(tmp_path / m.name), x), out)
        assert apart(call(m.bfloat16(), x.bfloat16()).float(), out) < 0.05


def test_what_cannot_be_done_is_said():
    assert slimming().counts(24) == [6]
    with pytest.raises(ValueError, match=r"of 4 x 6 tokens, .* makes 6 tokens, not 5"):
        slimming()(torch.randn(1, 24, 16), GRID, 5)
    with pytest.raises(ValueError, match="at least 1"):
        fresh(tokens=0)
    with pytest.raises(ValueError, match=r"takes \(B, 6, 16\)"):
        reverse()(torch.randn(1, 7, 16))
