"""ALIT: published names, iterations as written out by hand from such weights, halting, and its losses."""

import argparse
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from distillation_oracle import (
    base_names,
    block_names,
    decode_base,
    encode_base,
    layer_norm,
    linear,
    linear_names,
    norm_names,
    quantised,
    random_state,
    shapes,
    transformer,
)
from tiny_tokenizers import TINY

from vtc.tokenizers import from_pretrained
from vtc.tokenizers.systems.alit import ALIT

SIZES = {
    "w": 32,
    "d": 24,
    "depth": (2, 2),
    "dim": 4,
    "codes": 32,
    "n": 16,
    "tokens": 2,
    "iterations": 3,
    "patch": 4,
}
KINDS = [("vqgan", True), ("vae", True), ("vqgan", False)]
N, HEADS, ADDED, TIMES = 16, 2, 2, 3
LARGE = {
    "base": {"w": 768, "d": 768, "depth": (12, 12)},
    "small": {"w": 1024, "d": 1024, "depth": (8, 8)},
    "semilarge": {"w": 1024, "d": 1024, "depth": (16, 16)},
}


def names(base, quantized, bases, w, d, depth, dim=12, codes=4096, n=256, tokens=32, iterations=8, patch=16):
    inner = bases["dim"] if bases else {"vqgan": 256, "vae": 16}[base]
    outputs = (bases or {}).get("codes", 1024) if base == "vqgan" else inner
    found = {
        "encoder_positional_embedding": (n + 1, w), "decoder_positional_embedding": (n + 1, d),
        "encoder_class_embedding": (1, w), "decoder_class_embedding": (1, d),
        "encoder_mask_token": (1, 1, w), "decoder_mask_token": (1, 1, d),
        "latent_tokens": (tokens, w), "latent_token_positional_embedding": (tokens, w),
        "timestep_embedding": (iterations, tokens, w),
        "decoder.latent_token_positional_embedding": (tokens * iterations, d),
        "patch_embed.weight": (w - inner, 3, patch, patch), "patch_embed.bias": (w - inner,),
        **block_names("encoder.transformer", w, depth[0]), **block_names("decoder.transformer", d, depth[1]),
        **linear_names("pre_quantizer_mlp", w, dim), **linear_names("decoder.decoder_embed", dim, d),
        **linear_names("decoder.ffn.0", d, 2 * d), **linear_names("decoder.ffn.2", 2 * d, outputs),
        **base_names(base, **(bases or {})),
    }  # fmt: skip
    for norm in ("encoder_ln_pre", "encoder_ln_post", "encoder_ln_recursive"):
        found |= norm_names(norm, w)
    found |= norm_names("decoder.ln_pre", d) | norm_names("decoder.ln_post", d)
    return found | ({"quantize.embedding.weight": (codes, dim)} if quantized else {})


def made(base="vqgan", quantized=True, change=None, **options):
    """A tiny ALIT and the published state dict that it was loaded from; change: of the state."""
    bases = {"hidden": 32, "mults": (1, 1, 1), "dim": 8} | ({"codes": 16} if base == "vqgan" else {})
    state = random_state(names(base, quantized, bases, **SIZES))
    if change:
        change(state)
    alit = ALIT(ALIT.Config(**TINY["alit"] | {"base": base, "quantized": quantized} | options)).eval()
    alit.load_state_dict(ALIT.rename(state))
    return alit, state


def pictures(n):
    """Noise of another brightness and contrast in each."""
    g = torch.Generator().manual_seed(3)
    low, high = torch.rand(2, n, 3, 1, 1, generator=g).sort(0).values
    return low + (high - low) * torch.rand(n, 3, 16, 16, generator=g)


def plain_hidden(s, base, images, replaced=None):
    """What latents are after each iteration. replaced(i, hidden): (B, N), which places become mask tokens."""
    b = len(images)
    patches = F.conv2d(images, s["patch_embed.weight"], s["patch_embed.bias"], stride=4)
    grid = torch.cat([encode_base(s, base, images), patches.permute(0, 2, 3, 1).flatten(1, 2)], -1)
    grid = grid / grid.norm(dim=-1, keepdim=True)
    x = torch.cat([s["encoder_class_embedding"].expand(b, 1, -1), grid], 1)
    x = x + s["encoder_positional_embedding"]
    found = []
    for i in range(TIMES):
        new = s["latent_tokens"] + s["latent_token_positional_embedding"] + s["timestep_embedding"][i]
        x = torch.cat([x, new.expand(b, -1, -1)], 1)
        x = layer_norm(s, "encoder_ln_recursive" if i else "encoder_ln_pre", x)
        x = transformer(s, "encoder.transformer", x, HEADS)
        found.append(x[:, 1 + N :])
        if replaced:
            x = x.clone()
            blank = (s["encoder_mask_token"][0] + s["encoder_positional_embedding"][1:]).expand(b, -1, -1)
            gone = replaced(i, found[-1])
            x[:, 1 : 1 + N][gone] = blank[gone]
    return found


def plain_code(s, hidden, quantized):
    z = linear(s, "pre_quantizer_mlp", layer_norm(s, "encoder_ln_post", hidden))
    return quantised(s, z) if quantized else (z, None)


def plain_told(s, values):
    place = s["decoder.latent_token_positional_embedding"][: values.shape[1]]
    tokens = linear(s, "decoder.decoder_embed", values) + place
    grid = torch.cat([s["decoder_class_embedding"], s["decoder_mask_token"][0].expand(N, -1)])
    grid = (grid + s["decoder_positional_embedding"]).expand(len(values), -1, -1)
    x = layer_norm(s, "decoder.ln_pre", torch.cat([grid, tokens], 1))
    x = transformer(s, "decoder.transformer", x, HEADS)[:, 1 : 1 + N]
    x = layer_norm(s, "decoder.ln_post", x)
    return linear(s, "decoder.ffn.2", torch.tanh(linear(s, "decoder.ffn.0", x)))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("file", ALIT.published)
def test_names_and_shapes_of_the_published_weights(file):
    size = next(name for name in ("semilarge", "small", "base") if name in file)
    base, quantized = "vae" if "vae" in file else "vqgan", "quantized" in file
    wanted = names(base, quantized, None, **LARGE[size])
    wanted = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    with torch.device("meta"):
        alit = ALIT(ALIT.published[file])
    assert shapes(alit.state_dict()) == shapes(ALIT.rename(wanted))
    heads = {"small": 8, "base": 12, "semilarge": 16}[size]
    assert {block.attn.heads for block in (*alit.encoder.transformer, *alit.decoder.transformer)} == {heads}
    assert list(alit.lengths) == [32, 64, 96, 128, 160, 192, 224, 256]


@pytest.mark.parametrize("base, quantized", KINDS)
@torch.no_grad()
def test_every_iteration_as_written_out(base, quantized):
    alit, s = made(base, quantized)
    images = pictures(2)
    for i, hidden in enumerate(plain_hidden(s, base, images)):
        values, ids = plain_code(s, hidden, quantized)
        tokens = alit.encode(images, ADDED * (i + 1))
        assert tokens.lengths.tolist() == [ADDED * (i + 1)] * 2
        close(tokens.values, values)
        assert tokens.ids is None if ids is None else torch.equal(tokens.ids, ids)
        told = alit._tell(tokens.values, tokens.valid, tokens.index)
        close(told, plain_told(s, values))
        close(alit.decode(tokens), decode_base(s, base, told).clamp(0, 1), 1e-4)


@torch.no_grad()
def test_stopping_at_an_iteration_is_running_no_further():
    alit, _ = made()
    images = pictures(2)
    all_codes = [code.ids for code in alit.codes(images, TIMES)]
    assert [ids.shape[1] for ids in all_codes] == [2, 4, 6]
    for i, ids in enumerate(all_codes):
        assert torch.equal(alit.encode(images, ADDED * (i + 1)).ids, ids)
    # the weights of the loop are shared: more iterations are more places, and nothing else
    longer = {name: p.shape for name, p in ALIT(replace(alit.config, iterations=5)).named_parameters()}
    other = {name for name, p in alit.named_parameters() if p.shape != longer[name]}
    assert other == {"timestep_embedding", "decoder.latent_token_positional_embedding"}


@torch.no_grad()
def test_earlier_tokens_change():
    alit, _ = made("vqgan", False)
    assert ALIT.prefix_stable is False and ALIT.ordered is False
    images = pictures(2)
    assert (alit.encode(images, 6).values[:, :2] - alit.encode(images, 2).values).abs().max() > 0.1
    # so that images of several lengths are encoded each for its own
    ragged = alit.encode(images, [2, 6])
    close(ragged[0].values, alit.encode(images[:1], 2).values)
    close(ragged[1].values, alit.encode(images[1:], 6).values)


@pytest.mark.parametrize("length", [1, 3, 8])
def test_lengths_are_multiples(length):
    alit, _ = made()
    with pytest.raises(ValueError, match="encodes to 2 or 4 or 6 tokens"):
        alit.encode(pictures(1), length)


@torch.no_grad()
def test_each_image_halts_where_its_own_error_allows():
    alit, _ = made()
    images = pictures(4)
    errors = []
    for k in alit.lengths:
        errors.append((alit.decode(alit.encode(images, k)) - images).abs().mean((1, 2, 3)))
    errors = torch.stack(errors, 1)  # (B, iterations)
    for epsilon in (0.0, *errors.flatten().quantile(torch.tensor([0.3, 0.7])).tolist(), 1.0):
        found = alit.halt(images, epsilon)
        for i, row in enumerate(errors.tolist()):
            below = [j for j, error in enumerate(row) if error < epsilon - 1e-7]
            at = below[0] if below else row.index(min(row))
            assert found.lengths[i] == ADDED * (at + 1)
            assert torch.equal(found[i].ids, alit.encode(images[i : i + 1], ADDED * (at + 1)).ids)
            assert float(found.extras["error"][i]) == pytest.approx(row[at], abs=1e-5)
            alone = alit.halt(images[i : i + 1], epsilon)
            assert torch.equal(alone.ids, found[i].ids)
            close(alit.decode(found)[i], alit.decode(alone)[0])
        if 0 < epsilon < 1:
            assert len(set(found.lengths.tolist())) > 1
    assert alit.halt(images, 1.0).lengths.tolist() == [ADDED] * 4
    assert torch.equal(alit.halt(images).ids, alit.halt(images, 0.07).ids)
    with pytest.raises(ValueError, match="0 or more"):
        alit.halt(images, math.nan)


def peak(s, height, code=3):
    """The decoder tells one code everywhere; the pictures' nearest code is it."""
    s["decoder.ffn.2.bias"][code] += height
    s["base_tokenizer.vqgan.encoder.conv_out.bias"].copy_(
        s["base_tokenizer.vqgan.quantize.embedding.weight"][code]
    )
    s["base_tokenizer.vqgan.encoder.conv_out.weight"].zero_()


@torch.no_grad()
def test_well_decoded_places_are_replaced_by_mask_tokens():
    images = pictures(3)
    sure, s = made("vqgan", False, lambda s: peak(s, 60.0), mask_decoded=True)
    wanted = plain_hidden(s, "vqgan", images, lambda i, hidden: torch.ones(3, N, dtype=torch.bool))
    for code, hidden in zip(sure.codes(images, TIMES), wanted, strict=True):
        close(code.values, plain_code(s, hidden, False)[0])
    off, s = made("vqgan", False, lambda s: peak(s, 60.0))
    close(off.encode(images).values, plain_code(s, plain_hidden(s, "vqgan", images)[-1], False)[0])
    assert not torch.allclose(off.encode(images).values, sure.encode(images).values, atol=1e-2)
    # what the first iteration gives comes before anything is replaced
    assert torch.equal(off.encode(images, ADDED).values, sure.encode(images, ADDED).values)
    # no place is known well: nothing is replaced
    unsure, _ = made("vqgan", False, lambda s: peak(s, -60.0), mask_decoded=True)
    same, _ = made("vqgan", False, lambda s: peak(s, -60.0))
    assert torch.equal(unsure.encode(images).values, same.encode(images).values)


@torch.no_grad()
def test_replacing_is_drawn_from_the_seed_and_alike_for_every_image():
    # a probability between the threshold and 1, the same at all places
    def level(s):
        peak(s, 0.0)
        s["decoder.ffn.2.weight"].zero_()
        s["decoder.ffn.2.bias"].zero_()[3] = math.log(0.7 / 0.3 * 15)

    images = pictures(3)
    alit, s = made("vqgan", False, level, mask_decoded=True, seed=5)
    draw = torch.rand(TIMES, 1, N, generator=torch.Generator().manual_seed(5))
    assert 0 < (draw[:-1] >= 0.7).sum() < draw[:-1].numel()
    wanted = plain_hidden(s, "vqgan", images, lambda i, hidden: (draw[i] < 0.7).expand(3, N))
    for i, hidden in enumerate(wanted):
        close(alit.encode(images, ADDED * (i + 1)).values, plain_code(s, hidden, False)[0])
    for i in range(3):
        close(alit.encode(images[i : i + 1]).values[0], alit.encode(images).values[i])
    other, _ = made("vqgan", False, level, mask_decoded=True, seed=6)
    assert not torch.allclose(other.encode(images).values, alit.encode(images).values, atol=1e-3)


@torch.no_grad()
def test_with_a_vae_places_of_a_small_error_are_replaced():
    images = pictures(2)
    off, s = made("vae", False)
    hidden = next(off.rollout(images, off.coder.encode(images), 1))
    told = plain_told(s, plain_code(s, hidden, False)[0])
    # the pictures' latents are made what is told of the first image's first 6 places, about
    latents = told.clone()
    latents[0, 6:] += 0.03
    latents[1] -= 1.0
    gone = torch.zeros(2, N, dtype=torch.bool)
    gone[0, :6] = True
    assert torch.equal(off._found(hidden, latents + 0.02, torch.zeros(1, N)), gone)


@pytest.mark.parametrize("base", ["vqgan", "vae"])
def test_the_losses_of_all_iterations(base):
    alit, s = made(base)
    images = pictures(2)
    found = alit.training_loss(images, mask_decoded=False)
    latents, wanted = encode_base(s, base, images), {}
    for i, hidden in enumerate(plain_hidden(s, base, images)):
        values, _ = plain_code(s, hidden, True)
        told = plain_told(s, values)
        z = F.normalize(linear(s, "pre_quantizer_mlp", layer_norm(s, "encoder_ln_post", hidden)), dim=-1)
        wanted[f"bottleneck_{i}"] = 1.25 * (values - z).square().mean()
        weight = (2.5, 2.0, 1.5)[i]
        if base == "vae":
            wanted[f"code_{i}"] = weight * (told - latents).square().mean()
            continue
        codes = s["base_tokenizer.vqgan.quantize.embedding.weight"]
        right = torch.cdist(latents, codes[None]).argmin(-1)
        chances = told.softmax(-1)
        wanted[f"nll_{i}"] = -weight * chances.gather(2, right[..., None]).log().mean()
        wanted[f"code_{i}"] = (chances @ codes - codes[right]).square().mean()
    assert found.keys() == wanted.keys()
    close(found, {name: wanted[name] for name in found}, 1e-4)
    sum(found.values()).backward()
    assert all(p.grad is None for p in alit.base_tokenizer.parameters())
    idle = {name for name, p in alit.named_parameters() if p.requires_grad and p.grad is None}
    assert idle == {"encoder_mask_token"}


def test_losses_of_eight_iterations_weigh_as_published():
    eight = ALIT(ALIT.Config(**TINY["alit"] | {"iterations": 8}))
    images = pictures(1)
    eight.coder.losses = lambda told, latents: {"nll": told.sum() * 0 + 1, "code": told.sum() * 0 + 1}
    losses = eight.training_loss(images, torch.Generator().manual_seed(0))
    weights = [float(losses[f"nll_{i}"].detach()) for i in range(8)]
    assert weights == [2.5, 2.0, 1.5, 1.25, 1.0, 1.0, 1.0, 1.0]
    assert all(losses[f"code_{i}"] == 1 for i in range(8))


def test_training_replaces_places_at_random():
    alit, _ = made("vqgan", True, lambda s: peak(s, 5.0))
    images = pictures(2)

    def total(**options):
        return float(sum(alit.training_loss(images, **options).values()).detach())

    off, one, again, two = (
        total(mask_decoded=False),
        *(total(generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)),
    )
    assert one == again and len({off, one, two}) == 3


def test_published_files_load_with_their_own_names(tmp_path):
    alit, s = made()
    junk = {"gan_losses.3.discriminator.main.0.weight": torch.ones(2)}
    path = tmp_path / "alit_small_vqgan_quantized_latents.pth"
    torch.save({"model": {}, "ema": s | junk, "args": argparse.Namespace(epochs=2)}, path)
    for load in (ALIT.from_pretrained, from_pretrained):
        loaded = load(path, **TINY["alit"])
        with torch.no_grad():
            assert torch.equal(loaded.encode(pictures(2)).ids, alit.encode(pictures(2)).ids)


def test_what_is_saved_is_loaded(tmp_path):
    alit, _ = made("vae", False, epsilon=0.3)
    alit.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == alit.config
    with torch.no_grad():
        assert torch.equal(loaded.halt(pictures(2)).values, alit.halt(pictures(2)).values)


def test_sizes_that_cannot_be():
    with pytest.raises(ValueError, match="1 or more iterations"):
        ALIT.Config(iterations=0)
