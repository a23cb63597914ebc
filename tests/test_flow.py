"""Rectified flow: paths, Euler steps, times, guidance."""

import math

import pytest
import torch

from vtc.tokenizers.parts.flow import (
    Guidance,
    ProjectedGuidance,
    flow_loss,
    logit_normal_times,
    path,
    same_noise,
    sample,
    time_embedding,
)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_path_leads_from_data_to_noise():
    data, noise = torch.randn(4, 3, 2), torch.randn(4, 3, 2)
    assert torch.equal(path(data, noise, torch.ones(4)), noise)
    assert torch.equal(path(data, noise, torch.zeros(4)), data)
    later, earlier = (path(data, noise, torch.full((4,), t)) for t in (0.75, 0.25))
    torch.testing.assert_close(later - earlier, (noise - data) / 2)


def test_each_image_has_its_own_time():
    data, noise, t = torch.randn(3, 2, 2), torch.randn(3, 2, 2), torch.tensor([0.0, 0.3, 1.0])
    wanted = torch.stack([t[i] * noise[i] + (1 - t[i]) * data[i] for i in range(3)])
    torch.testing.assert_close(path(data, noise, t), wanted)


@pytest.mark.parametrize("steps", [1, 7])
def test_the_true_velocity_leads_to_the_data(steps):
    data, noise, times = torch.randn(2, 5), torch.randn(2, 5), []

    def model(x, t):
        times.append(t)
        torch.testing.assert_close(x, path(data, noise, t), atol=1e-5, rtol=1e-5)
        return noise - data

    kept = noise.clone()
    torch.testing.assert_close(sample(model, noise, steps), data, atol=1e-5, rtol=1e-5)
    assert torch.equal(noise, kept)
    wanted = torch.tensor([1 - i / steps for i in range(steps)])
    torch.testing.assert_close(torch.stack(times), wanted[:, None].expand(-1, 2))


def test_euler_steps_are_of_first_order():
    """dx/dt = x, from 1 to 0, has the solution exp: twice the steps leave half the error."""
    start = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(float(sample(lambda x, t: x, start, n)) - 1 / math.e) for n in (64, 128)]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)


def test_loss_is_the_mean_squared_error_of_the_velocity():
    data, noise, t = torch.randn(4, 3), torch.randn(4, 3), torch.rand(4)
    assert float(flow_loss(lambda x, t: noise - data, data, noise, t)) == 0
    assert float(flow_loss(lambda x, t: noise - data + 2, data, noise, t)) == pytest.approx(4, rel=1e-5)
    seen = {}
    flow_loss(lambda x, t: seen.update(x=x, t=t) or x, data, noise, t)
    torch.testing.assert_close(seen["x"], path(data, noise, t))
    assert torch.equal(seen["t"], t)


@pytest.mark.parametrize("steps", [0, -1, 1.5])
def test_a_flow_takes_steps(steps):
    with pytest.raises(ValueError, match="1 or more steps"):
        sample(lambda x, t: x, torch.zeros(1, 1), steps)


def test_times_are_logit_normal():
    t = logit_normal_times(20000, mean=0.5, std=2.0, generator=torch.Generator().manual_seed(1))
    z = (t / (1 - t)).log()
    assert float(z.mean()) == pytest.approx(0.5, abs=0.05) and float(z.std()) == pytest.approx(2.0, abs=0.05)
    assert float(t.min()) > 0 and float(t.max()) < 1
    again = logit_normal_times(20000, 0.5, 2.0, torch.Generator().manual_seed(1))
    assert torch.equal(t, again)


@pytest.mark.parametrize("dim", [6, 7])
def test_time_embedding(dim):
    t = torch.tensor([0.0, 0.25, 1.0])
    embedding = time_embedding(t, dim, max_period=256, scale=1000.0)
    assert embedding.shape == (3, dim)
    for b in range(3):
        for i in range(3):
            angle = float(t[b]) * 1000 * math.exp(-math.log(256) * i / 3)
            assert float(embedding[b, i]) == pytest.approx(math.cos(angle), abs=1e-4)
            assert float(embedding[b, 3 + i]) == pytest.approx(math.sin(angle), abs=1e-4)
    assert dim == 6 or not embedding[:, 6].any()


def test_noise_is_the_same_for_every_image_of_every_batch():
    like = torch.zeros(1)
    noise = same_noise(3, (2, 4), 5, like)
    assert noise.shape == (3, 2, 4) and torch.equal(noise[0], noise[1]) and torch.equal(noise[0], noise[2])
    assert torch.equal(same_noise(1, (2, 4), 5, like)[0], noise[0])
    assert not torch.equal(same_noise(1, (2, 4), 6, like)[0], noise[0])
    assert same_noise(0, (2, 4), 5, like).shape == (0, 2, 4)
    assert same_noise(1, (2, 4), 5, like.half()).dtype == torch.float16


def test_noise_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    same_noise(1, (3,), 0, torch.zeros(1))
    assert torch.equal(before, torch.get_rng_state())


def test_classifier_free_guidance():
    conditional, unconditional = torch.randn(2, 3), torch.randn(2, 3)
    wanted = 7.5 * conditional - 6.5 * unconditional
    torch.testing.assert_close(Guidance(7.5)(conditional, unconditional), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(Guidance(1.0)(conditional, unconditional), conditional)


def plain_projected(steps, scale, momentum, threshold, eta):
    """One image, double precision: the algorithm of the paper, step by step."""
    average, out = 0, []
    for conditional, unconditional in steps:
        conditional, unconditional = conditional.double().flatten(), unconditional.double().flatten()
        average = momentum * average + (conditional - unconditional)
        update = average
        if threshold > 0:
            update = update * min(1.0, threshold / float(update.square().sum().sqrt()))
        direction = conditional / conditional.square().sum().sqrt()
        parallel = float((update * direction).sum()) * direction
        out.append(conditional + (scale - 1) * (update - parallel + eta * parallel))
    return out


@pytest.mark.parametrize("momentum, threshold, eta", [(-0.5, 2.5, 0.0), (0.3, 0.0, 0.5), (0.0, 100.0, 1.0)])
def test_projected_guidance(momentum, threshold, eta):
    steps = [(torch.randn(2, 3, 4), torch.randn(2, 3, 4)) for _ in range(4)]
    guide = ProjectedGuidance(7.5, momentum, threshold, eta)
    together = [guide(*step) for step in steps]
    for i in range(2):
        plain = plain_projected([(c[i], u[i]) for c, u in steps], 7.5, momentum, threshold, eta)
        alone = ProjectedGuidance(7.5, momentum, threshold, eta)
        for step, mine, wanted in zip(steps, together, plain):
            torch.testing.assert_close(mine[i].flatten().double(), wanted, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(alone(step[0][i : i + 1], step[1][i : i + 1])[0], mine[i])


def test_projected_guidance_by_its_defaults():
    guide = ProjectedGuidance(7.5)
    assert (guide.momentum, guide.threshold, guide.eta) == (-0.5, 2.5, 0.0)
    conditional = torch.randn(1, 8)
    same = torch.equal(ProjectedGuidance(7.5)(conditional, conditional), conditional)
    assert same, "no difference: no update, and no division by its length"
    update = guide(conditional, torch.randn(1, 8)) - conditional
    assert abs(float((update * conditional).sum())) < 1e-5, "the update is orthogonal to the prediction"
    assert float(update.norm()) <= 6.5 * 2.5 + 1e-5


def test_without_momentum_threshold_and_projection_it_is_the_classifier_free_one():
    conditional, unconditional = torch.randn(2, 5), torch.randn(2, 5)
    plain = ProjectedGuidance(3.0, momentum=0.0, threshold=0.0, eta=1.0)(conditional, unconditional)
    torch.testing.assert_close(plain, Guidance(3.0)(conditional, unconditional))
