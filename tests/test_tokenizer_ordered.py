"""The ordered tokenizer: exact prefixes, a pyramid to start from, a halting head."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizers import TINY

from vtc.tokenizers import TokenSequence
from vtc.tokenizers.base import build
from vtc.tokenizers.systems.ordered import pyramid


def made(**options):
    torch.manual_seed(0)
    tokenizer = build("ordered", **TINY["ordered"] | options).eval()
    for parameter in tokenizer.parameters():
        scale = 0.5 if parameter.dim() > 1 else 0.3
        with torch.no_grad():
            parameter.add_(torch.randn_like(parameter) * scale)
    return tokenizer


def pictures(n=3, side=16):
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def attend(x, block, seen):
    """One block for one picture in loops over heads and rows; seen[i]: which rows row i looks at."""
    w, heads = x.shape[1], block.attn.heads
    d = w // heads
    y = F.layer_norm(x, (w,), block.ln_1.weight, block.ln_1.bias)
    q, k, v = (y @ block.attn.in_proj_weight.T + block.attn.in_proj_bias).split(w, 1)
    out = torch.zeros_like(x)
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        for i in range(len(x)):
            keys = torch.tensor(seen[i])
            weight = (q[i, part] @ k[keys, part].T / math.sqrt(d)).softmax(0)
            out[i, part] = weight @ v[keys, part]
    x = x + out @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    y = F.layer_norm(x, (w,), block.ln_2.weight, block.ln_2.bias)
    y = F.gelu(y @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias)
    return x + y @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def restated(t, image, k):
    """Latents of k tokens and the picture from them."""
    c, n = t.config, (t.config.image_size // t.config.patch) ** 2
    side, p, w = t.grid, c.patch, c.width
    patches = [
        (image[:, y * p : y * p + p, x * p : x * p + p] * 2 - 1).flatten()
        for y in range(side)
        for x in range(side)
    ]
    x = torch.stack(patches) @ t.patch_embed.weight.flatten(1).T + t.patch_embed.bias + t.patch_position
    pool = pyramid(c.tokens, side)
    registers = torch.stack([t.registers[i] + pool[i] @ x for i in range(k)])
    x = torch.cat([x, registers])
    seen = [list(range(n)) if i < n else list(range(i + 1)) for i in range(n + k)]
    for block in t.encoder:
        x = attend(x, block, seen)
    hidden = F.layer_norm(x[n:], (w,), t.encoder_norm.weight, t.encoder_norm.bias)
    latent = hidden @ t.to_latent.weight.T + t.to_latent.bias
    values = t.quantize(latent).values
    tokens = values @ t.from_latent.weight.T + t.from_latent.bias + t.token_position[:k]
    x = t.mask_tokens.clone()
    for i in range(n):
        for j in range(k):
            if pool[j, i] > 0:
                x[i] = x[i] + tokens[j]
    x = torch.cat([x, tokens])
    for block in t.decoder:
        x = attend(x, block, [list(range(n + k))] * (n + k))
    x = F.layer_norm(x[:n], (w,), t.decoder_norm.weight, t.decoder_norm.bias)
    x = x @ t.to_pixels.weight.T + t.to_pixels.bias  # (N, 3 p p), channels first
    out = torch.zeros(3, c.image_size, c.image_size)
    for i in range(n):
        y, z = divmod(i, side)
        out[:, y * p : y * p + p, z * p : z * p + p] = x[i].view(3, p, p)
    return hidden, values, out / 2 + 0.5


@pytest.mark.parametrize("k", [1, 4, 6])
def test_it_is_what_it_says(k):
    t, images = made(), pictures()
    with torch.no_grad():
        tokens = t.encode(images, k)
        decoded = t.decode_values(tokens.values, tokens.valid, tokens.index)
        for i, image in enumerate(images):
            _, values, picture = restated(t, image, k)
            torch.testing.assert_close(tokens.values[i], values, atol=1e-5, rtol=0)
            torch.testing.assert_close(decoded[i], picture, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("options", [{"bottleneck": "none"}, {"bottleneck": "none", "pyramid": False}])
def test_tokens_do_not_depend_on_later_ones(options):
    t, images = made(**options), pictures()
    with torch.no_grad():
        full = t.encode(images).values
        for k in range(1, 7):
            torch.testing.assert_close(t.encode(images, k).values, full[:, :k], atol=1e-5, rtol=1e-5)
    hidden = t.read(images, 6)
    (gradient,) = torch.autograd.grad(hidden[:, 2].sum(), t.registers)
    assert gradient[:3].abs().sum(1).all() and not gradient[3:].any()


def test_a_pyramid_halves_the_grid_level_by_level():
    pool = pyramid(16, 4)
    assert torch.allclose(pool.sum(1), torch.ones(16))
    whole = torch.full((16,), 1 / 16)
    assert torch.equal(pool[0], whole) and torch.equal(pool[1], whole)
    start = 2
    for down, across in ((2, 1), (2, 2)):  # then 4 x 2, cell by cell in raster order
        for i in range(down * across):
            y, x = divmod(i, across)
            cells = [
                (r * 4 + c)
                for r in range(4 * y // down, 4 * (y + 1) // down)
                for c in range(4 * x // across, 4 * (x + 1) // across)
            ]
            assert pool[start + i].nonzero()[:, 0].tolist() == cells
        start += down * across
    assert pool[start].nonzero()[:, 0].tolist() == [0, 1]
    assert bool((pyramid(200, 4).sum(1) > 0.999).all())  # more tokens than patches


def test_halting_is_monotone_in_epsilon_and_confidence():
    t, images = made(), pictures(8)
    with torch.no_grad():
        location, scale = t.foretell(t.read(images, 6))
        before = torch.zeros(8, dtype=torch.long)
        for epsilon in (10.0, 1.0, 0.3, 0.1, 0.03, 1e-4):
            tokens = t.halt(images, epsilon, confidence=0.8)
            for i in range(8):
                chance = torch.sigmoid((math.log(epsilon) - location[i]) / scale[i])
                found = [k for k in range(6) if chance[k] >= 0.8]
                assert tokens.lengths[i] == (found[0] + 1 if found else 6)
            assert bool((tokens.lengths >= before).all())
            before = tokens.lengths
            sure = t.halt(images, epsilon, confidence=0.99).lengths
            assert bool((sure >= tokens.lengths).all())
            single = torch.cat([t.halt(image[None], epsilon, confidence=0.8).lengths for image in images])
            assert torch.equal(single, tokens.lengths)
        assert torch.equal(t.halt(images).lengths, t.halt(images, 0.06, 0.5).lengths)
        assert before.tolist() == [6] * 8
        assert tokens.extras["error"].shape == (8, 6)
    for wrong in ({"epsilon": 0.0}, {"epsilon": -1.0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="epsilon is positive"):
            t.halt(images, **wrong)


def test_losses_are_log_errors_and_their_likelihood():
    t, images = made(), pictures(4)
    lengths = torch.tensor([1, 6, 3, 2])
    losses = t.training_loss(images, lengths)
    errors, likelihood = [], []
    for image, k in zip(images, lengths.tolist()):
        hidden, _, picture = restated(t, image, k)
        errors.append((picture - image).square().mean().log())
        location, scale = t.foretell(hidden[None])
        logistic = torch.distributions.TransformedDistribution(
            torch.distributions.Uniform(0.0, 1.0),
            [
                torch.distributions.SigmoidTransform().inv,
                torch.distributions.AffineTransform(location[0, -1], scale[0, -1]),
            ],
        )
        likelihood.append(-logistic.log_prob(errors[-1] / 2))
    torch.testing.assert_close(losses["reconstruction"], torch.stack(errors).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["halting"], torch.stack(likelihood).mean(), atol=1e-3, rtol=1e-3)
    losses["halting"].backward()
    assert {name.split(".")[0] for name, p in t.named_parameters() if p.grad is not None} == {"halting"}


def test_it_learns():
    """A few steps on pictures of coarse noise lower the error, and more of all than of one token."""
    torch.manual_seed(0)
    t = build("ordered", **TINY["ordered"] | {"bottleneck": "none", "dim": 8})
    optimiser = torch.optim.Adam(t.parameters(), 1e-2)
    images = F.interpolate(torch.rand(16, 3, 4, 4), (16, 16))

    def errors():
        with torch.no_grad():
            return [(t(images, k) - images).square().mean() for k in (1, 6)]

    before = errors()
    for _ in range(40):
        loss = sum(t.training_loss(images, torch.randint(1, 7, (16,))).values())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    one, all_ = errors()
    assert one < 0.7 * before[0] and all_ < 0.95 * one


def test_bottlenecks():
    images = pictures()
    for name, bits in (("fsq", math.log2(64000)), ("vq", 12), ("kl", 12 * 16), ("none", 12 * 16)):
        t = made(bottleneck=name)
        tokens = t.encode(images)
        assert t.bits_per_token == pytest.approx(bits)
        assert (tokens.ids is not None) == (name in ("fsq", "vq"))
        assert t.decode(tokens).shape == images.shape
        loss = sum(t.training_loss(images, torch.tensor([1, 2, 6])).values())
        loss.backward()
        assert t.patch_embed.weight.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="a bottleneck is one of fsq, vq, kl, none"):
        made(bottleneck="pq")
    with pytest.raises(ValueError, match="patch must divide"):
        made(patch=5)


def test_any_places_can_be_decoded():
    """Places that are not a prefix, as a policy of one's own may choose."""
    t, images = made(), pictures(2)
    with torch.no_grad():
        tokens = t.encode(images)
        places = torch.tensor([[0, 2, 5], [1, 3, 4]])
        values = tokens.values.gather(1, places[..., None].expand(-1, -1, tokens.values.shape[2]))
        some = TokenSequence(values, torch.tensor([3, 2]), index=places)
        both = t.decode(some)
        torch.testing.assert_close(both[1:], t.decode(some[1]))
        assert (both[0] - t.decode(tokens.truncate(3))[0]).abs().max() > 1e-3
