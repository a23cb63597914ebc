"""FlexTok: names and shapes, a plain restatement, prefixes, masks, codes, training, published weights."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from vtc.tokenizers import checkpoints
from vtc.tokenizers.bottlenecks import FSQ
from vtc.tokenizers.parts.flextok_parts import Readout
from vtc.tokenizers.schedules import DropSchedule
from vtc.tokenizers.systems.flextok import FlexTok

SMALL = {
    "image_size": 24, "tokens": 8, "levels": (8, 5, 4), "encoder_width": 16, "encoder_depth": 2,
    "decoder_width": 24, "decoder_depth": 3, "head_dim": 8, "latent_channels": 4, "vae_channels": (8, 16),
    "vae_layers": 1, "vae_groups": 4, "scaling_factor": 0.4, "time_frequencies": 10, "steps": 3,
    "guidance": 2.0,
}  # fmt: skip
CHANNELS, WIDTH, GRID, TOKENS = 4, 24, 6, 8  # 24 pixels: latents of 12, patches of 2


def made(**options):
    """A tokenizer of which every parameter that is learned is random."""
    torch.manual_seed(0)
    tokenizer = FlexTok(FlexTok.Config(**(SMALL | options))).eval()
    for name, parameter in tokenizer.named_parameters():
        if not name.startswith("vae.") and parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.25)
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return made()


@pytest.fixture(scope="module")
def images():
    return torch.rand(3, 3, 24, 24, generator=torch.Generator().manual_seed(1))


# -- names and shapes of the published weights


def blocks(width, depth, hidden, sets):
    for i in range(depth):
        for name in ("wq", "wk", "wv", "proj"):
            yield f"blocks.{i}.attn.{name}.weight", (width, width)
        yield f"blocks.{i}.mlp.fc1.weight", (hidden, width)
        yield f"blocks.{i}.mlp.fc2.weight", (width, hidden)
        yield f"blocks.{i}.mlp.fc3.weight", (hidden, width)
        if sets:
            yield f"blocks.{i}.adaLN_modulation.1.weight", (sets * 6 * width, width)
            yield f"blocks.{i}.adaLN_modulation.1.bias", (sets * 6 * width,)


def linear(name, inputs, outputs):
    return [(f"{name}.weight", (outputs, inputs)), (f"{name}.bias", (outputs,))]


def parameters(encoder, decoder, encoder_hidden, decoder_hidden):
    """All but the VAE's, for depths; the width is 64 times the depth."""
    w = 64 * encoder
    e = "encoder.module_dict."
    yield from linear(e + "enc_patch_emb.patch_proj", 64, w)
    yield e + "enc_posemb_module.posembs", (1, w, 16, 16)
    yield e + "enc_register_module.registers", (256, w)
    for name, shape in blocks(w, encoder, encoder_hidden, 0):
        yield f"{e}enc_transformer.{name}", shape
    yield from linear(e + "enc_to_latents.proj", w, 6)
    w = 64 * decoder
    d = "decoder.module_dict."
    yield from linear(d + "dec_from_latents.proj", 6, w)
    yield d + "dec_registers_posemb_module.posembs", (1, 1, w, 256)
    yield d + "dec_nested_dropout.dropout_mask_token", (w,)
    yield d + "dec_latent_dropout.nullcond", (w,)
    yield from linear(d + "dec_noise_patch_emb.patch_proj", 64, w)
    yield d + "dec_patches_posemb_module.posembs", (1, w, 16, 16)
    yield from linear(d + "dec_time_embedder.mlp.0", 256, w)
    yield from linear(d + "dec_time_embedder.mlp.2", w, w)
    for name, shape in blocks(w, decoder, decoder_hidden, 2):
        yield f"{d}dec_transformer.{name}", shape
    yield from linear(d + "dec_to_patches.adaLN_modulation.1", w, 2 * w)
    yield from linear(d + "dec_to_patches.proj", w, 64)


@pytest.mark.parametrize(
    "name, encoder, decoder, encoder_hidden, decoder_hidden",
    [
        ("d12_d12_in1k", 12, 12, 2048, 2048),
        ("d18_d18_in1k", 18, 18, 3072, 3072),
        ("d18_d28_in1k", 18, 28, 3072, 4778),
        ("d18_d28_dfn", 18, 28, 3072, 4778),
    ],
)
def test_names_and_shapes_of_published_sizes(name, encoder, decoder, encoder_hidden, decoder_hidden):
    config = FlexTok.published[f"EPFL-VILAB/flextok_{name}"]
    with torch.device("meta"):
        tokenizer = FlexTok(config)
    state = {key: tuple(value.shape) for key, value in tokenizer.state_dict().items()}
    vae = {key: shape for key, shape in state.items() if key.startswith("vae.vae.")}
    wanted = dict(parameters(encoder, decoder, encoder_hidden, decoder_hidden))
    assert {key: shape for key, shape in state.items() if key not in vae} == wanted
    assert len(vae) == 248 and vae["vae.vae.quant_conv.weight"] == (32, 32, 1, 1)
    assert vae["vae.vae.decoder.conv_in.weight"] == (512, 16, 3, 3)
    assert tokenizer.max_tokens == 256 and tokenizer.bits_per_token == math.log2(64000)
    assert (config.steps, config.guidance, config.projected) == (20, 7.5, True)


# -- the same numbers from a plain restatement


def plain_norm(x):
    x = x - x.mean(-1, keepdim=True)
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def plain_attention(state, name, x, seen, heads):
    """One image: x (T, width), seen[i][j] whether i sees j."""
    q, k, v = (x @ state[f"{name}.{w}.weight"].T for w in ("wq", "wk", "wv"))
    d, out = x.shape[1] // heads, []
    for h in range(heads):
        part = slice(h * d, (h + 1) * d)
        scores = plain_norm(q[:, part]) @ plain_norm(k[:, part]).T * 8 / d
        out.append(scores.masked_fill(~seen, -torch.inf).softmax(1) @ v[:, part])
    return torch.cat(out, 1) @ state[f"{name}.proj.weight"].T


def plain_mlp(state, name, x):
    a, b = (x @ state[f"{name}.{fc}.weight"].T for fc in ("fc1", "fc3"))
    return (a * a.sigmoid() * b) @ state[f"{name}.fc2.weight"].T


def plain_linear(state, name, x):
    return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]


def plain_patches(latents):
    """One image: latents (C, h, w) to patches (N, 4 C)."""
    rows = []
    for y in range(GRID):
        for x in range(GRID):
            patch = latents[:, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
            rows.append(torch.stack([patch[:, i, j] for i in range(2) for j in range(2)]).flatten())
    return torch.stack(rows)


def plain_sincos(width):
    out = torch.zeros(GRID * GRID, width)
    for place in range(GRID * GRID):
        y, x = divmod(place, GRID)
        for i in range(width // 4):
            omega = 1 / 10000 ** (i / (width // 4))
            wave = [math.sin(y * omega), math.cos(y * omega), math.sin(x * omega), math.cos(x * omega)]
            for part in range(4):
                out[place, part * width // 4 + i] = wave[part]
    return out


def plain_encode(tokenizer, image, k):
    """Numbers before rounding, (k, levels)."""
    state, heads = tokenizer.state_dict(), 2
    latents = tokenizer.vae.vae.encode(image[None] * 2 - 1).latent_dist.mean[0] * 0.4
    e = "encoder.module_dict."
    x = plain_linear(state, e + "enc_patch_emb.patch_proj", plain_patches(latents)) + plain_sincos(16)
    n = len(x)
    x = torch.cat([x, state[e + "enc_register_module.registers"][:k]])
    seen = torch.tensor([[j < n or (i >= n and j <= i) for j in range(n + k)] for i in range(n + k)])
    for i in range(2):
        name = f"{e}enc_transformer.blocks.{i}"
        x = x + plain_attention(state, name + ".attn", plain_norm(x), seen, heads)
        x = x + plain_mlp(state, name + ".mlp", plain_norm(x))
    return plain_linear(state, e + "enc_to_latents.proj", plain_norm(x[n:]))


def plain_condition(tokenizer, values):
    """values (k, levels) of one image to all places, (TOKENS, WIDTH)."""
    state, d = tokenizer.state_dict(), "decoder.module_dict."
    places = []
    for place in range(TOKENS):
        if place < len(values):
            token = plain_linear(state, d + "dec_from_latents.proj", values[place])
            places.append(token + state[d + "dec_registers_posemb_module.posembs"][0, 0, :, place])
        else:
            places.append(state[d + "dec_nested_dropout.dropout_mask_token"])
    return torch.stack(places)


def plain_velocity(tokenizer, latents, t, condition, sets=2, max_time=1.0):
    """One image: latents (C, h, w) at time t."""
    state, d, heads = tokenizer.state_dict(), "decoder.module_dict.", 3
    x = plain_linear(state, d + "dec_noise_patch_emb.patch_proj", plain_patches(latents)) + plain_sincos(
        WIDTH
    )
    x, n = torch.cat([x, condition]), len(x)
    angles = torch.tensor([t * 1000 / max_time * math.exp(-math.log(256) * i / 5) for i in range(5)])
    time = plain_linear(state, d + "dec_time_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()]))
    time = F.silu(plain_linear(state, d + "dec_time_embedder.mlp.2", F.silu(time)))
    seen = torch.ones(len(x), len(x), dtype=torch.bool)
    for i in range(3):
        name = f"{d}dec_transformer.blocks.{i}"
        all_sets = plain_linear(state, name + ".adaLN_modulation.1", time).view(sets, 6, WIDTH)
        own = torch.stack([all_sets[0 if j < n else sets - 1] for j in range(len(x))])  # (T, 6, WIDTH)
        gate_attn, gate_mlp, shift_attn, scale_attn, shift_mlp, scale_mlp = own.unbind(1)
        h = plain_norm(x) * (1 + scale_attn) + shift_attn
        x = x + gate_attn * plain_attention(state, name + ".attn", h, seen, heads)
        x = x + gate_mlp * plain_mlp(state, name + ".mlp", plain_norm(x) * (1 + scale_mlp) + shift_mlp)
    shift, scale = plain_linear(state, d + "dec_to_patches.adaLN_modulation.1", time).view(2, WIDTH)
    patches = plain_linear(state, d + "dec_to_patches.proj", plain_norm(x[:n]) * (1 + scale) + shift)
    out = torch.zeros_like(latents)
    for place, patch in enumerate(patches):
        y, x = divmod(place, GRID)
        for i in range(2):
            for j in range(2):
                at = (2 * i + j) * CHANNELS
                out[:, 2 * y + i, 2 * x + j] = patch[at : at + CHANNELS]
    return out


def plain_decode(tokenizer, values, steps, guidance, projected, seed=0):
    """One image from values (k, levels)."""
    x = torch.randn(1, CHANNELS, 12, 12, generator=torch.Generator().manual_seed(seed))[0]
    condition = plain_condition(tokenizer, values)
    null = tokenizer.state_dict()["decoder.module_dict.dec_latent_dropout.nullcond"].expand(TOKENS, -1)
    average = 0
    for step in range(steps, 0, -1):
        t = step / steps
        v = plain_velocity(tokenizer, x, t, condition)
        if guidance != 1:
            difference = v - plain_velocity(tokenizer, x, t, null)
            if projected:
                average = difference - 0.5 * average
                difference = average * min(1.0, 2.5 / float(average.norm()))
                along = v / v.norm()
                difference = difference - (difference * along).sum() * along
            v = v + (guidance - 1) * difference
        x = x - v / steps
    return (tokenizer.vae.vae.decode(x[None] / 0.4).sample[0] / 2 + 0.5).clamp(0, 1)


def test_encoder_equals_a_plain_one(tokenizer, images):
    with torch.no_grad():
        latents = tokenizer.latents(images)
        for k in (1, 5, 8):
            plain = torch.stack([plain_encode(tokenizer, image, k) for image in images])
            torch.testing.assert_close(tokenizer.encoder(latents, k), plain, atol=1e-5, rtol=1e-5)
            tokens = tokenizer.encode(images, k)
            assert torch.equal(tokens.ids, tokenizer.quantize(plain).ids)
            assert torch.equal(tokens.values, tokenizer.quantize.lookup(tokens.ids))


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_decoder_equals_a_plain_one(tokenizer, images, guidance, projected):
    tokens = tokenizer.encode(images, [1, 5, 8])
    with torch.no_grad():
        decoded = tokenizer.decode(tokens, steps=2, guidance=guidance, projected=projected, seed=3)
        for i, k in enumerate((1, 5, 8)):
            plain = plain_decode(tokenizer, tokens.values[i, :k], 2, guidance, projected, seed=3)
            torch.testing.assert_close(decoded[i], plain, atol=1e-5, rtol=1e-5)
    assert decoded.std() > 0.02


def test_one_set_of_modulations_and_another_time_scale():
    tokenizer = made(modulation_sets=1, max_time=1000.0)
    x, condition = torch.randn(2, CHANNELS, 12, 12), torch.randn(2, TOKENS, WIDTH)
    with torch.no_grad():
        velocity = tokenizer.decoder(x, torch.tensor([0.3, 1.0]), condition)
        for i, t in enumerate((0.3, 1.0)):
            plain = plain_velocity(tokenizer, x[i], t, condition[i], sets=1, max_time=1000.0)
            torch.testing.assert_close(velocity[i], plain, atol=1e-5, rtol=1e-5)


def test_learned_positions_of_a_grid():
    for kind, together in (("learnable_sum", torch.add), ("learnable_prod", torch.mul)):
        tokenizer = made(encoder_positions=kind)
        positions = tokenizer.encoder.module_dict["enc_posemb_module"]
        assert positions.posembs.shape == (2, 1, 16, GRID)
        rows, columns = positions.posembs[:, 0]
        wanted = [together(rows[:, y], columns[:, x]) for y in range(GRID) for x in range(GRID)]
        torch.testing.assert_close(positions(), torch.stack(wanted))


def test_mup_readout_divides_its_input(tokenizer, images):
    shrunk = made(mup_readout=True, mup_base_width=4)
    shrunk.load_state_dict(tokenizer.state_dict())
    for old, new in zip(tokenizer.modules(), shrunk.modules()):
        if isinstance(old, Readout):
            x, bias = torch.randn(2, 3, old.proj.in_features), old.proj.bias
            with torch.no_grad():
                wanted = (old(x) - bias) * 4 / old.proj.in_features + bias
                torch.testing.assert_close(new(x), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.equal(shrunk.encode(images).ids, tokenizer.encode(images).ids)
    with pytest.raises(ValueError, match="mup_base_width"):
        made(mup_readout=True)


# -- codes


def test_all_codes_come_back():
    fsq = FSQ()
    ids = torch.arange(64000)
    values = fsq.lookup(ids)
    basis = torch.tensor([1, 8, 64, 512, 2560, 12800])
    half = torch.tensor([4, 4, 4, 2, 2, 2])
    assert torch.equal(((values * half + half).round().long() * basis).sum(1), ids)
    assert values.min() == -1 and values[:, 3:].max() == 1
    assert values[:, :3].max() == 0.75, "an even number of levels does not reach 1"
    assert len(values.unique(dim=0)) == 64000


def test_latents_that_are_rounded_to_a_code_have_its_number():
    """From what comes before tanh to ids and back, for every level of every number."""
    fsq = FSQ()
    bounded = fsq.lookup(torch.arange(64000)) * (fsq.level // 2)
    half, offset = (fsq.level - 1) * 1.001 / 2, torch.where(fsq.level % 2 == 0, 0.5, 0.0)
    z = ((bounded + offset) / half).double().clamp(-1 + 1e-6, 1 - 1e-6).atanh() - (offset / half).atanh()
    code = fsq(z)
    assert torch.equal(code.ids, torch.arange(64000))
    torch.testing.assert_close(code.values, fsq.lookup(code.ids))
    assert code.values.dtype == torch.float32


def test_codes_are_not_to_be_quantised_again():
    fsq = FSQ()
    assert fsq(torch.full((6,), -1.0)).values[0] == -0.75
    values = fsq.lookup(torch.arange(64000))
    assert (fsq(values).ids != torch.arange(64000)).float().mean() > 0.5


# -- invariants


def test_fewer_registers_give_the_first_tokens(tokenizer, images):
    with torch.no_grad():
        latents = tokenizer.latents(images)
        full = tokenizer.encoder(latents, TOKENS)
        for k in range(1, TOKENS + 1):
            torch.testing.assert_close(tokenizer.encoder(latents, k), full[:, :k], atol=1e-5, rtol=0)
            assert torch.equal(tokenizer.encode(images, k).ids, tokenizer.encode(images).truncate(k).ids)


def test_only_so_many_registers_are_computed(tokenizer, images):
    lengths = []
    hook = (
        tokenizer.encoder.module_dict["enc_transformer"]
        .blocks[0]
        .register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    )
    tokenizer.encode(images, 3)
    tokenizer.encode(images, [1, 5, 2])
    hook.remove()
    assert lengths == [GRID**2 + 3, GRID**2 + 5]


def test_a_batch_gives_what_single_images_give(tokenizer, images):
    lengths = [2, 8, 5]
    tokens = tokenizer.encode(images, lengths)
    decoded = tokenizer.decode(tokens)
    for i, k in enumerate(lengths):
        alone = tokenizer.encode(images[i : i + 1], k)
        assert torch.equal(alone.ids[0], tokens.ids[i, :k])
        torch.testing.assert_close(tokenizer.decode(alone)[0], decoded[i], atol=1e-5, rtol=0)


def test_the_decoder_is_given_the_first_tokens_and_masks(tokenizer):
    values = torch.rand(2, TOKENS, 3) * 2 - 1
    index = torch.arange(TOKENS).expand(2, -1)
    mask = tokenizer.decoder.module_dict["dec_nested_dropout"].dropout_mask_token
    for k in range(1, TOKENS + 1):
        kept, other = values.clone(), values.clone()
        other[:, k:] = torch.randn(2, TOKENS - k, 3)
        condition = tokenizer.decoder.condition(values, index < k, index)
        assert condition.shape == (2, TOKENS, WIDTH)
        assert torch.equal(values, kept), "nothing happens in place"
        assert torch.equal(condition, tokenizer.decoder.condition(other, index < k, index))
        short = tokenizer.decoder.condition(values[:, :k], index[:, :k] >= 0, index[:, :k])
        torch.testing.assert_close(condition, short)
        assert torch.equal(condition[:, k:], mask.expand(2, TOKENS - k, WIDTH))
        assert not torch.equal(condition[:, k - 1], mask.expand(2, -1))


def test_tokens_stand_at_their_places(tokenizer):
    """A sequence that has lost tokens in the middle: masks stand there."""
    values = torch.rand(1, TOKENS, 3)
    index = torch.arange(TOKENS)[None]
    full = tokenizer.decoder.condition(values, index >= 0, index)
    left = torch.tensor([[0, 3, 7]])
    some = tokenizer.decoder.condition(values[:, left[0]], left >= 0, left)
    torch.testing.assert_close(some[:, left[0]], full[:, left[0]])
    mask = tokenizer.decoder.module_dict["dec_nested_dropout"].dropout_mask_token
    gone = [i for i in range(TOKENS) if i not in left]
    assert torch.equal(some[:, gone], mask.expand(1, len(gone), WIDTH))


def test_decoding_k_tokens_is_decoding_the_first_k(tokenizer, images):
    tokens = tokenizer.encode(images)
    for k in (1, 4, 8):
        assert torch.equal(tokenizer.decode(tokens, k), tokenizer.decode(tokens.truncate(k)))
    assert not torch.allclose(tokenizer.decode(tokens, 1), tokenizer.decode(tokens, 8), atol=1e-3)


def test_decoding_is_deterministic_and_has_a_seed(tokenizer, images):
    twice = torch.cat([images[:1], images[:1]])
    decoded = tokenizer(twice)
    torch.testing.assert_close(decoded[0], decoded[1], atol=1e-6, rtol=0)
    assert torch.equal(tokenizer(twice), decoded)
    tokens = tokenizer.encode(twice)
    assert not torch.allclose(tokenizer.decode(tokens, seed=1), decoded, atol=1e-3)
    assert torch.equal(tokenizer.decode(tokens, steps=3, guidance=2.0, projected=True, seed=0), decoded)
    assert not torch.allclose(tokenizer.decode(tokens, guidance=5.0), decoded, atol=1e-3)


def test_no_images(tokenizer):
    tokens = tokenizer.encode(torch.zeros(0, 3, 24, 24))
    assert tokens.ids.shape == (0, TOKENS)
    assert tokenizer.decode(tokens).shape == (0, 3, 24, 24)


# -- training


@pytest.mark.parametrize(
    "kind, wanted",
    [
        ("uniform", dict.fromkeys(range(1, 17), 1 / 16)),
        ("pow2", dict.fromkeys((1, 2, 4, 8, 16), 1 / 5)),
        ("uniform_pow2", {1: 1 / 16, 2: 1 / 16, 4: 2 / 16, 8: 4 / 16, 16: 8 / 16}),
    ],
)
def test_drop_schedules(kind, wanted):
    drawn = DropSchedule(kind).draw(16, 40000, torch.Generator().manual_seed(0)).tolist()
    assert set(drawn) == set(wanted)
    for k, share in wanted.items():
        assert drawn.count(k) / len(drawn) == pytest.approx(share, abs=0.01)


def test_all_but_the_vae_learns(images):
    tokenizer = made().train()
    assert not any(module.training for module in tokenizer.vae.modules())
    losses = tokenizer.training_loss(images.repeat(8, 1, 1, 1), torch.Generator().manual_seed(0))
    losses["flow"].backward()
    for name, parameter in tokenizer.named_parameters():
        if name.startswith("vae.") or name in (
            "encoder.module_dict.enc_posemb_module.posembs",
            "decoder.module_dict.dec_patches_posemb_module.posembs",
        ):
            assert not parameter.requires_grad and parameter.grad is None
        else:
            assert parameter.grad.abs().sum() > 0, name


def test_the_loss_is_that_of_a_plain_flow(images):
    """All tokens kept: the noise, the times and the velocity, restated."""
    tokenizer = made(schedule="full", drop_condition=0.0)
    with torch.no_grad():
        loss = tokenizer.training_loss(images, torch.Generator().manual_seed(5))["flow"]
        generator, total = torch.Generator().manual_seed(5), 0.0
        torch.rand(3, generator=generator)
        times = torch.randn(3, generator=generator).sigmoid()
        noise = torch.randn(3, CHANNELS, 12, 12, generator=generator)
        values = tokenizer.encode(images).values
        for i, latents in enumerate(tokenizer.latents(images)):
            noisy = times[i] * noise[i] + (1 - times[i]) * latents
            condition = plain_condition(tokenizer, values[i])
            velocity = plain_velocity(tokenizer, noisy, float(times[i]), condition)
            total += (velocity - (noise[i] - latents)).square().mean() / 3
    torch.testing.assert_close(loss, total, atol=1e-5, rtol=1e-5)


def test_what_is_dropped_has_no_say(images):
    """With a null condition for all, tokens get no gradient; with one token kept, only the first register."""
    tokenizer = made(drop_condition=1.0)
    tokenizer.training_loss(images)["flow"].backward()
    assert not tokenizer.encoder.module_dict["enc_to_latents"].proj.weight.grad.any()
    assert tokenizer.decoder.module_dict["dec_latent_dropout"].nullcond.grad.any()
    tokenizer = made(drop_condition=0.0)
    tokenizer.drop_schedule = DropSchedule("levels", (1,))
    tokenizer.training_loss(images)["flow"].backward()
    grad = tokenizer.encoder.module_dict["enc_register_module"].registers.grad
    assert grad[0].any() and not grad[1:].any()


def test_rounding_is_skipped_for_some_images():
    z = torch.randn(64, TOKENS, 3)
    rounded = made()._disturbed(z, None)
    fsq = FSQ(SMALL["levels"])
    assert torch.equal(rounded, fsq(z).values)
    loose = made(drop_quantiser=1.0)._disturbed(z, None)
    torch.testing.assert_close(loose, fsq.bound(z) / (fsq.level // 2))
    assert not torch.allclose(loose, rounded)
    some = made(drop_quantiser=0.25)._disturbed(z, torch.Generator().manual_seed(0))
    own = (some == rounded).flatten(1).all(1)
    assert torch.equal(some[~own], loose[~own]) and 0.1 < float((~own).float().mean()) < 0.4


def test_codes_of_some_images_are_corrupted():
    z = torch.randn(400, TOKENS, 3)
    tokenizer = made(corrupt=0.5, corrupt_share=(0.25, 0.75))
    fsq = tokenizer.quantize
    values = tokenizer._disturbed(z, torch.Generator().manual_seed(0))
    wrong = (values != fsq(z).values).any(2).float().mean(1)  # the share of each image
    assert 0.4 < float((wrong > 0).float().mean()) < 0.6
    assert 0.4 < float(wrong[wrong > 0].mean()) < 0.6
    codes = ((values * (fsq.level // 2) + fsq.level // 2).round().long() * fsq.basis).sum(2)
    torch.testing.assert_close(fsq.lookup(codes), values)


# -- weights

TARGET = "_target_"


def published_config(**changes):
    """As it lies beside the weights, for SMALL; `changes` by "part/module": arguments."""
    t = "flextok.model."
    adder, embedder = (
        t + "utils.posembs.PositionalEmbeddingAdder",
        t + "preprocessors.patching.PatchEmbedder",
    )
    packer = {TARGET: t + "preprocessors.flex_seq_packing.BlockWiseSequencePacker"}
    encoder = {
        "enc_channels_to_last": {TARGET: t + "utils.dict_ops.PerSampleOp", "read_key": "vae_latents"},
        "enc_patch_emb": {TARGET: embedder, "channels_in": 4, "dim": 16, "patch_sizes": [2, 2]},
        "enc_posemb_module": {TARGET: adder, "dim": 16, "max_sizes": [6, 6], "posemb_type": "sincos"},
        "enc_register_module": {
            TARGET: t + "preprocessors.registers.Registers1D", "registers_write_key": "enc_registers",
            "dim": 16, "n_min": 8, "n_max": 8, "size_sampling_mode": "uniform", "ordering_mode": "nested",
        },
        "enc_seq_packer": packer | {
            "input_list_read_keys": ["enc_patches", "enc_registers"], "mask_mode": "causal_last",
        },
        "enc_transformer": {
            TARGET: t + "trunks.transformers.FlexTransformer", "dim": 16, "depth": 2, "head_dim": 8,
        },
        "enc_unpacker": {TARGET: t + "postprocessors.seq_unpacking.SequenceUnpacker"},
        "enc_to_latents": {
            TARGET: t + "postprocessors.heads.LinearHead", "dim": 16, "dim_out": 3,
            "use_mup_readout": False, "weight_init_style": "zero",
        },
    }  # fmt: skip
    decoder = {
        "dec_from_latents": {TARGET: t + "preprocessors.linear.LinearLayer", "dim_in": 3, "dim": 24},
        "dec_registers_posemb_module": {
            TARGET: adder, "dim": 24, "max_sizes": [8], "posemb_type": "learnable_sum",
        },
        "dec_nested_dropout": {
            TARGET: t + "preprocessors.token_dropout.MaskedNestedDropout", "dim": 24,
            "read_write_key": "dec_registers", "size_sampling_mode": "uniform_pow2",
        },
        "dec_latent_dropout": {
            TARGET: t + "preprocessors.nullcond.LearnedNullCond", "dim": 24,
            "read_write_key": "dec_registers", "dropout_prob": 0.2,
        },
        "dec_noise_patch_emb": {TARGET: embedder, "channels_in": 4, "dim": 24, "patch_sizes": [2, 2]},
        "dec_patches_posemb_module": {TARGET: adder, "dim": 24, "max_sizes": [6, 6], "posemb_type": "sincos"},
        "dec_seq_packer": packer | {
            "input_list_read_keys": ["dec_patches", "dec_registers"], "mask_mode": "full",
            "per_subseq_embs": True,
        },
        "dec_time_embedder": {
            TARGET: t + "preprocessors.time_embedding.TimestepEmbedder", "dim": 24,
            "time_embedding_write_key": "dec_temb", "frequency_embedding_size": 10, "max_timestep": 1.0,
        },
        "dec_transformer": {
            TARGET: t + "trunks.transformers.FlexTransformer", "dim": 24, "depth": 3, "head_dim": 8,
            "adaLN_emb_read_key": "dec_temb", "adaLN_packing_fn_read_key": "f", "adaLN_expansion": 2,
        },
        "dec_unpacker": {TARGET: t + "postprocessors.seq_unpacking.SequenceUnpacker"},
        "dec_to_patches": {
            TARGET: t + "postprocessors.heads.ToPatchesLinearHead", "dim": 24, "channels_out": 4,
            "patch_sizes": [2, 2], "use_mup_readout": False, "adaLN_emb_read_key": "dec_temb",
        },
        "dec_repa_head": {TARGET: t + "postprocessors.heads.MLPHead", "dim": 24, "dim_out": 5},
    }  # fmt: skip
    config = {
        "vae": {
            TARGET: "flextok.vae_wrapper.StableDiffusionVAE",
            "latent_channels": 4,
            "scaling_factor": 0.4,
        },
        "encoder": {"module_dict": encoder},
        "decoder": {"module_dict": decoder},
        "regularizer": {
            TARGET: "flextok.regularizers.quantize_fsq.FSQ",
            "levels": [8, 5, 4],
            "drop_quant_p": 0.1,
        },
    }
    for place, arguments in changes.items():
        part, _, module = place.partition("__")
        (config[part]["module_dict"][module] if module else config[part]).update(arguments)
    return config


@pytest.fixture()
def official(tmp_path):
    """A folder as its authors publish it, and the tokenizer that it holds."""
    tokenizer = made()
    vae = tmp_path / "vae"
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[8, 16], latent_channels=4, layers_per_block=1, norm_num_groups=4,
        scaling_factor=0.4,
    ).save_config(vae)  # fmt: skip
    config = published_config(vae={"hf_hub_path": str(vae), "scaling_factor": None})
    decoder = config["decoder"]["module_dict"]
    config["decoder"]["module_dict"] = {  # a name that is not ours
        ("trunk" if name == "dec_transformer" else name): module for name, module in decoder.items()
    }
    state = {}
    for name, value in tokenizer.state_dict().items():
        name = name.replace("blocks.0.", "blocks.0._checkpoint_wrapped_module.")
        state[name.replace("dec_transformer", "trunk")] = value.clone()
    state["vae.logvar"] = torch.zeros(())
    state["decoder.module_dict.dec_repa_head.mlp.0.weight"] = torch.zeros(7, 24)
    state["decoder.module_dict.dec_repa_head.out_proj.weight"] = torch.zeros(5, 7)
    folder = tmp_path / "published"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors")
    return folder, tokenizer


def test_published_weights_are_loaded(official, images):
    folder, tokenizer = official
    loaded = FlexTok.from_pretrained(folder, steps=3, guidance=2.0)
    assert loaded.config.decoder_names[7] == "trunk" and not loaded.training
    for option, value in SMALL.items():
        assert getattr(loaded.config, option) == value, option
    c = loaded.config
    assert (c.schedule, c.drop_condition, c.drop_quantiser) == ("uniform_pow2", 0.2, 0.1)
    assert torch.equal(loaded.encode(images).ids, tokenizer.encode(images).ids)
    torch.testing.assert_close(loaded(images), tokenizer(images))


def test_the_configuration_beside_the_weights_wins(official, monkeypatch):
    folder, _ = official
    monkeypatch.setattr(checkpoints, "_local", lambda name, revision: folder)
    loaded = FlexTok.from_pretrained("EPFL-VILAB/flextok_d18_d28_dfn")
    assert loaded.config.image_size == 24 and loaded.config.scaling_factor == 0.4


def test_published_weights_that_lack_one_are_refused(official):
    folder, _ = official
    state = load_file(folder / "model.safetensors")
    del state["encoder.module_dict.enc_to_latents.proj.bias"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"without encoder\.module_dict\.enc_to_latents\.proj\.bias"):
        FlexTok.from_pretrained(folder)


def test_saved_and_loaded(tokenizer, images, tmp_path):
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = FlexTok.from_pretrained(tmp_path / "saved")
    assert loaded.config == tokenizer.config
    assert torch.equal(loaded.encode(images).ids, tokenizer.encode(images).ids)
    assert torch.equal(loaded(images), tokenizer(images))


def test_the_published_vae_is_as_stable_diffusions():
    config = FlexTok.config_from(published_config(vae={"latent_channels": 16}))
    assert config.vae_channels == (128, 256, 512, 512) and config.image_size == 6 * 2 * 8
    assert config.latent_channels == 16 and config.scaling_factor == 0.4


@pytest.mark.parametrize("content", [{}, {"model": {"vq_model": {}}}, {"encoder": "dino", "decoder": "dit"}])
def test_other_configurations_are_not_ours(content):
    assert FlexTok.config_from(content) is None


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"vae": {"scaling_factor": None}}, "scaling_factor"),
        ({"encoder__enc_transformer": {"qkv_bias": True}}, "qkv_bias"),
        ({"decoder__dec_transformer": {"head_dim": 4}}, "head_dim"),
        ({"decoder__dec_latent_dropout": {"replace_with_single_token": True}}, "replace_with_single_token"),
        ({"decoder__dec_latent_dropout": {"_target_": "x.ZeroNullCond"}}, "ZeroNullCond"),
        ({"encoder__enc_seq_packer": {"mask_mode": "causal"}}, "mask_mode"),
        ({"decoder__dec_seq_packer": {"input_list_read_keys": ["a", "b", "c"]}}, "sequences of patches"),
        ({"decoder__dec_to_patches": {"adaLN_emb_read_key": None}}, "time modulates"),
        ({"decoder__dec_registers_posemb_module": {"max_sizes": [9]}}, "max_sizes"),
        ({"decoder__dec_unpacker": {"_target_": "x.PerSampleReducer"}}, "PerSampleReducer"),
        ({"encoder__enc_to_latents": {"_target_": "x.SequenceUnpacker"}}, "without a module LinearHead"),
        ({"encoder__enc_register_module": {"extra_registers_write_key": "e"}}, "extra_registers_write_key"),
    ],
)
def test_published_configurations_of_another_kind_are_refused(changes, match):
    with pytest.raises(ValueError, match=match):
        FlexTok.config_from(published_config(**changes))


@pytest.mark.parametrize(
    "options, match",
    [
        ({"image_size": 30}, "image_size must be a multiple of 4"),
        ({"head_dim": 7}, "head_dim must divide"),
        ({"modulation_sets": 3}, "modulation_sets is 1 or 2"),
        ({"schedule": "sometimes"}, "drop schedule"),
        ({"encoder_positions": "rope"}, "positions are"),
        ({"encoder_names": ("a", "b")}, "different names"),
    ],
)
def test_options_that_do_not_fit(options, match):
    with pytest.raises(ValueError, match=match):
        FlexTok(FlexTok.Config(**(SMALL | options)))


def test_without_diffusers(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"vision-token-compression\[tokenizers\]"):
        FlexTok(FlexTok.Config(**SMALL))
