"""The ordered tokenizer: exact prefixes, principal components to start from, a halting head."""

import math

import pytest
import torch
import torch.nn.functional as F
from tiny_tokenizers import TINY

from vtc.tokenizers import TokenSequence, build


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


def upsampled(small, side):
    """Thumbnail (3, s, s) to (3, side, side), bicubic with a = -0.75, one pixel after the other."""
    s = small.shape[1]

    def weights(i):
        at = (i + 0.5) * s / side - 0.5
        first = math.floor(at) - 1
        out = torch.zeros(s)
        for j in range(first, first + 4):
            d = abs(at - j)
            near, far = 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * (d**3 - 5 * d**2 + 8 * d - 4)
            out[min(max(j, 0), s - 1)] += near if d <= 1 else far
        return out

    matrix = torch.stack([weights(i) for i in range(side)])
    return matrix @ small @ matrix.T


def restated(t, image, k):
    """Hidden states, values of k tokens, the draft and the picture from them."""
    c, n = t.config, (t.config.image_size // t.config.patch) ** 2
    side, p, w, s, dim = t.grid, c.patch, c.width, c.thumbnail, t.quantize.dim

    def patches(picture, embed, position):
        cut = [
            (picture[:, y * p : y * p + p, x * p : x * p + p] * 2 - 1).flatten()
            for y in range(side)
            for x in range(side)
        ]
        return torch.stack(cut) @ embed.weight.flatten(1).T + embed.bias + position

    f = c.image_size // s
    small = torch.stack(
        [image[:, y * f : y * f + f, x * f : x * f + f].mean((1, 2)) for y in range(s) for x in range(s)],
        1,
    ).flatten()  # (3 s s,)
    linear = ((small - t.linear.mean) @ t.linear.analysis).view(c.tokens, dim)[:k]
    x = patches(image, t.patch_embed, t.patch_position)
    x = torch.cat([x, t.registers[:k] + linear @ t.from_linear.weight.T + t.from_linear.bias])
    seen = [list(range(n)) if i < n else list(range(i + 1)) for i in range(n + k)]
    for block in t.encoder:
        x = attend(x, block, seen)
    hidden = F.layer_norm(x[n:], (w,), t.encoder_norm.weight, t.encoder_norm.bias)
    values = t.quantize(hidden @ t.to_latent.weight.T + t.to_latent.bias + linear).values
    small = t.linear.mean.clone()
    for i in range(k):
        small = small + values[i] @ t.linear.synthesis[i * dim : (i + 1) * dim]
    draft = upsampled(small.view(3, s, s), c.image_size)
    tokens = values @ t.from_latent.weight.T + t.from_latent.bias + t.token_position[:k]
    x = torch.cat([patches(draft, t.draft_embed, t.draft_position), tokens])
    for block in t.decoder:
        x = attend(x, block, [list(range(n + k))] * (n + k))
    x = F.layer_norm(x[:n], (w,), t.decoder_norm.weight, t.decoder_norm.bias)
    x = x @ t.to_pixels.weight.T + t.to_pixels.bias  # (N, 3 p p), channels first
    out = draft.clone()
    for i in range(n):
        y, z = divmod(i, side)
        out[:, y * p : y * p + p, z * p : z * p + p] += x[i].view(3, p, p)
    return hidden, values, draft, out


@pytest.mark.parametrize("k", [1, 4, 6])
def test_it_is_what_it_says(k):
    t, images = made(), pictures()
    with torch.no_grad():
        tokens = t.encode(images, k)
        decoded = t.decode_values(tokens.values, tokens.valid, tokens.index)
        for i, image in enumerate(images):
            _, values, _, picture = restated(t, image, k)
            torch.testing.assert_close(tokens.values[i], values, atol=1e-5, rtol=0)
            torch.testing.assert_close(decoded[i], picture, atol=1e-4, rtol=1e-5)


def test_tokens_do_not_depend_on_later_ones():
    t, images = made(bottleneck="none", dim=6), pictures()
    with torch.no_grad():
        full = t.encode(images).values
        for k in range(1, 7):
            torch.testing.assert_close(t.encode(images, k).values, full[:, :k], atol=1e-5, rtol=1e-5)
    hidden, _ = t.read(images, 6)
    (gradient,) = torch.autograd.grad(hidden[:, 2].sum(), t.registers)
    assert gradient[:3].abs().sum(1).all() and not gradient[3:].any()


def test_it_starts_as_principal_components():
    """Without a bottleneck's rounding a fresh one is the best linear code, for every number of tokens."""
    torch.manual_seed(0)
    t = build("ordered", **TINY["ordered"] | {"bottleneck": "none", "dim": 2, "thumbnail": 16}).eval()
    scale = torch.tensor([10.0, 5, 3, 2, 1.5, 1.2, 1, 0.8, 0.5, 0.3, 0.2, 0.1] + [0.01] * 188)
    basis = torch.linalg.qr(torch.randn(768, 200)).Q
    images = 0.5 + (torch.randn(200, 200) * scale * 0.05 @ basis.T).view(200, 3, 16, 16)
    t.start_from(images)
    flat = images.flatten(1) - images.flatten(1).mean(0)
    _, _, v = torch.linalg.svd(flat, full_matrices=False)
    with torch.no_grad():
        for k in range(1, 7):
            tokens = t.encode_images(images, k)
            decoded = t.decode_values(tokens.values, tokens.valid, tokens.index).flatten(1)
            wanted = flat @ v[: 2 * k].T @ v[: 2 * k]
            torch.testing.assert_close(decoded - images.flatten(1).mean(0), wanted, atol=2e-4, rtol=0)


def test_the_start_is_ordered_for_codes_too():
    torch.manual_seed(0)
    t = build("ordered", **TINY["ordered"] | {"thumbnail": 8}).eval()
    images = F.interpolate(torch.rand(64, 3, 4, 4), (16, 16), mode="bilinear")
    before = (t(images) - images).square().mean()
    t.start_from(images)
    with torch.no_grad():
        errors = [(t(images, k) - images).square().mean() for k in range(1, 7)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * before


def wrong(t, picture, image, times=1.0):
    """Log of the share of pixels of which a channel is off by more than the tolerance, and 0.002."""
    picture = picture.detach()
    off = [
        any(abs(float(picture[c, y, x] - image[c, y, x])) > times * t.config.tolerance for c in range(3))
        for y in range(image.shape[1])
        for x in range(image.shape[2])
    ]
    return math.log(sum(off) / len(off) + 0.002)


def foretold(t, image, k):
    """What the halting head says after k tokens: location and scale of the log share."""
    hidden, _, draft, _ = restated(t, image, k)
    size = math.log(float((draft.detach() - image).square().mean()) + 1e-6)
    middle = torch.stack([channel.flatten().sort().values[(channel.numel() - 1) // 2] for channel in image])
    plain = middle[:, None, None].expand_as(image)
    known = [wrong(t, plain, image, times) for times in (0.5, 1.0, 1.5, 2.0)]
    known += [wrong(t, draft, image), size]
    location, scale = t.halting(torch.cat([hidden[-1], torch.tensor(known)]))
    return known[1] + location, F.softplus(scale) + 0.05


def test_halting_is_monotone_in_epsilon_and_confidence():
    t, images = made(), pictures(4)
    with torch.no_grad():
        told = [[foretold(t, image, k) for k in range(1, 7)] for image in images]
        before = torch.zeros(4, dtype=torch.long)
        for epsilon in (0.9, 0.5, 0.2, 0.05, 0.001):
            tokens = t.halt(images, epsilon, confidence=0.8)
            for i in range(4):
                chance = [torch.sigmoid((math.log(epsilon + 0.002) - at) / scale) for at, scale in told[i]]
                found = [k for k in range(6) if chance[k] >= 0.8]
                assert tokens.lengths[i] == (found[0] + 1 if found else 6)
                error = tokens.extras["error"][i]
                wanted = torch.stack([at.exp() - 0.002 for at, _ in told[i]]).clamp(min=0)
                torch.testing.assert_close(error, wanted, atol=1e-3, rtol=1e-3)
            assert bool((tokens.lengths >= before).all())
            before = tokens.lengths
            sure = t.halt(images, epsilon, confidence=0.99).lengths
            assert bool((sure >= tokens.lengths).all())
            single = torch.cat([t.halt(image[None], epsilon, confidence=0.8).lengths for image in images])
            assert torch.equal(single, tokens.lengths)
        assert torch.equal(t.halt(images).lengths, t.halt(images, t.config.epsilon, 0.5).lengths)
    for options in ({"epsilon": 0.0}, {"epsilon": -1.0}, {"confidence": 1.0}):
        with pytest.raises(ValueError, match="epsilon is positive"):
            t.halt(images, **options)


def test_losses_are_log_errors_and_their_likelihood():
    t, images = made(), pictures(4)
    lengths = torch.tensor([1, 6, 3, 2])
    losses = t.training_loss(images, lengths)
    likelihood = t.halting_loss(images, torch.stack([lengths, lengths.flip(0)], 1))
    errors, unlikely = [], []
    for i, (image, k) in enumerate(zip(images, lengths.tolist())):
        errors.append((restated(t, image, k)[3] - image).square().mean().log())
        for own in (k, lengths.flip(0)[i].item()):
            location, scale = foretold(t, image, own)
            logistic = torch.distributions.TransformedDistribution(
                torch.distributions.Uniform(0.0, 1.0),
                [
                    torch.distributions.SigmoidTransform().inv,
                    torch.distributions.AffineTransform(location, scale),
                ],
            )
            error = wrong(t, restated(t, image, own)[3], image)
            unlikely.append(-logistic.log_prob(torch.tensor(error)))
    torch.testing.assert_close(losses["reconstruction"], torch.stack(errors).mean(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(likelihood, torch.stack(unlikely).mean(), atol=1e-3, rtol=1e-3)
    likelihood.backward()
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
        assert t.linear.analysis.grad.abs().sum() > 0 and t.to_latent.weight.grad.abs().sum() > 0
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
