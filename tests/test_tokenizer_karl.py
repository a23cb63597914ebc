"""KARL: published names, forwards as written out by hand from such weights, halting, and its training."""

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
from vtc.tokenizers.systems.karl import BINS, KARL

SIZES = {"w": 32, "d": 24, "depth": (2, 2), "dim": 4, "codes": 32, "latents": 10, "grid": 8, "patch": 4}
KINDS = [("vqgan", True), ("vae", True), ("vqgan", False)]
T, N, HEADS = 6, 16, 2


LARGE = {"w": 1024, "d": 1024, "depth": (8, 8)}


def names(base, quantized, bases, w, d, depth, dim=12, codes=4096, latents=512, grid=64, patch=16):
    inner = bases["dim"] if bases else {"vqgan": 256, "vae": 16}[base]
    outputs = (bases or {}).get("codes", 1024) if base == "vqgan" else inner
    found = {
        "encoder_positional_embedding": (w, grid, grid), "decoder_positional_embedding": (d, grid, grid),
        "decoder_mask_token": (1, 1, d), "decoder_latent_tokens_timestep_embed": (latents, d),
        "latent_tokens": (latents, w), "rec_loss_embeddings": (19, w),
        "patch_embed.weight": (w - inner, 3, patch, patch), "patch_embed.bias": (w - inner,),
        **block_names("encoder.transformer", w, depth[0]), **block_names("decoder.transformer", d, depth[1]),
        **linear_names("pre_quantizer_mlp", w, dim), **linear_names("decoder_embed", dim, d),
        **linear_names("halting_mlp.0", w, 512), **linear_names("halting_mlp.2", 512, 1),
        **linear_names("decoder.ffn.0", d, 2 * d), **linear_names("decoder.ffn.2", 2 * d, outputs),
        **base_names(base, **(bases or {})),
    }  # fmt: skip
    for norm in ("encoder_ln_pre", "encoder_ln_post", "encoder_ln_post_halt"):
        found |= norm_names(norm, w)
    found |= norm_names("decoder.ln_pre", d) | norm_names("decoder.ln_post", d)
    return found | ({"quantize.embedding.weight": (codes, dim)} if quantized else {})


def made(base="vqgan", quantized=True, seed=0, **options):
    """A tiny KARL and the published state dict that it was loaded from."""
    bases = {"hidden": 32, "mults": (1, 1, 1), "dim": 8} | ({"codes": 16} if base == "vqgan" else {})
    state = random_state(names(base, quantized, bases, **SIZES), seed)
    # about as many tokens halt as stay, and not the same of every picture
    state["halting_mlp.2.weight"] *= 8
    state["patch_embed.weight"] *= 4
    karl = KARL(KARL.Config(**TINY["karl"] | {"base": base, "quantized": quantized} | options)).eval()
    karl.load_state_dict(KARL.rename(state))
    return karl, state


def pictures(n):
    """Noise of another brightness and contrast in each."""
    g = torch.Generator().manual_seed(3)
    low, high = torch.rand(2, n, 3, 1, 1, generator=g).sort(0).values
    return low + (high - low) * torch.rand(n, 3, 16, 16, generator=g)


def plain_hidden(s, base, images, k, epsilon):
    """What k latents become: (B, k, width)."""
    latents = encode_base(s, base, images)
    patches = F.conv2d(images, s["patch_embed.weight"], s["patch_embed.bias"], stride=4)
    grid = torch.cat([patches.permute(0, 2, 3, 1).flatten(1, 2), latents], -1)
    grid = grid + s["encoder_positional_embedding"][:, ::2, ::2].flatten(1).T  # 4 of 8 places, the nearest
    number = min([i for i, b in enumerate(BINS) if b >= epsilon], default=18)
    condition = s["rec_loss_embeddings"][number].expand(len(images), 1, -1)
    x = torch.cat([condition, grid, s["latent_tokens"][:k].expand(len(images), -1, -1)], 1)
    x = transformer(s, "encoder.transformer", layer_norm(s, "encoder_ln_pre", x), HEADS)
    return x[:, 1 + N :]


def plain_code(s, hidden, quantized):
    z = linear(s, "pre_quantizer_mlp", layer_norm(s, "encoder_ln_post", hidden))
    return quantised(s, z) if quantized else (z, None)


def plain_halting(s, hidden):
    y = torch.tanh(linear(s, "halting_mlp.0", layer_norm(s, "encoder_ln_post_halt", hidden)))
    return torch.sigmoid(linear(s, "halting_mlp.2", y))[..., 0]


def plain_told(s, values, halted=None):
    """What is told of each place; halted (B, T): tokens that are neither attended to nor attend."""
    k = values.shape[1]
    tokens = linear(s, "decoder_embed", values) + s["decoder_latent_tokens_timestep_embed"][:k]
    grid = s["decoder_mask_token"] + s["decoder_positional_embedding"][:, ::2, ::2].flatten(1).T
    x = torch.cat([grid.expand(len(values), -1, -1), tokens], 1)
    blocked = None
    if halted is not None:
        gone = torch.cat([torch.zeros(len(values), N, dtype=torch.bool), halted], 1)
        blocked = (gone[:, :, None] | gone[:, None, :]) & ~torch.eye(N + k, dtype=torch.bool)
    x = transformer(s, "decoder.transformer", layer_norm(s, "decoder.ln_pre", x), HEADS, blocked)
    x = layer_norm(s, "decoder.ln_post", x[:, :N])
    return linear(s, "decoder.ffn.2", torch.tanh(linear(s, "decoder.ffn.0", x)))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("file", KARL.published)
def test_names_and_shapes_of_the_published_weights(file):
    config = KARL.published[file]
    base, quantized = file.split("_")[2], "quantized" in file
    wanted = {
        name: torch.empty(shape, device="meta")
        for name, shape in names(base, quantized, None, **LARGE).items()
    }
    with torch.device("meta"):
        assert shapes(KARL(config).state_dict()) == shapes(KARL.rename(wanted))


def test_a_size_with_another_decoder():
    config = replace(KARL.Config(), encoder_width=512, decoder_width=768, decoder_depth=12, decoder_heads=12)
    wanted = names("vqgan", True, None, w=512, d=768, depth=(8, 12))
    wanted = {name: torch.empty(shape, device="meta") for name, shape in wanted.items()}
    with torch.device("meta"):
        assert shapes(KARL(config).state_dict()) == shapes(KARL.rename(wanted))


@pytest.mark.parametrize("base, quantized", KINDS)
@torch.no_grad()
def test_encodes_and_decodes_as_written_out(base, quantized):
    karl, s = made(base, quantized)
    images = pictures(2)
    for k in (1, 4, T):
        tokens = karl.encode(images, k)
        values, ids = plain_code(s, plain_hidden(s, base, images, k, 0.05), quantized)
        close(tokens.values, values)
        assert tokens.ids is None if ids is None else torch.equal(tokens.ids, ids)
        wanted = decode_base(s, base, plain_told(s, values))
        close(karl.decode(tokens), wanted.clamp(0, 1), 1e-4)
        told = karl._tell(tokens.values, tokens.valid, tokens.index)
        close(told, plain_told(s, values))


@pytest.mark.parametrize("base, quantized", KINDS)
@torch.no_grad()
def test_tokens_that_halt_are_absent_as_if_they_were_masked(base, quantized):
    karl, s = made(base, quantized)
    images = pictures(6)
    seen = set()
    for epsilon in (0.01, 0.38):
        found = karl.halt(images, epsilon)
        for i, one in enumerate(images):
            hidden = plain_hidden(s, base, one[None], T, epsilon)
            halting = plain_halting(s, hidden)
            close(found.extras["halting"][i : i + 1], halting)
            halted = halting > 0.75
            if halted.all():
                halted[0, halting.argmin()] = False
            places = (~halted[0]).nonzero()[:, 0]
            seen.add(tuple(places.tolist()))
            assert found.lengths[i] == len(places)
            assert found.index[i, : len(places)].tolist() == places.tolist()
            values, _ = plain_code(s, hidden, quantized)
            close(found.values[i, : len(places)], values[0, places])
            told = karl._tell(found.values, found.valid, found.index.clamp(min=0))[i : i + 1]
            close(told, plain_told(s, values, halted))
            close(karl.decode(found)[i : i + 1], decode_base(s, base, told).clamp(0, 1), 1e-4)
    assert len(seen) > 2 and any(max(places) >= len(places) for places in seen)  # not the last ones only


@torch.no_grad()
def test_a_batch_is_its_images():
    karl, _ = made()
    images = pictures(5)
    together = karl.halt(images)
    apart = [karl.halt(one[None]) for one in images]
    assert together.lengths.tolist() == [int(one.lengths) for one in apart]
    assert len(set(together.lengths.tolist())) > 1
    for i, one in enumerate(apart):
        assert torch.equal(together[i].index, one.index) and torch.equal(together[i].ids, one.ids)
        close(karl.decode(together)[i], karl.decode(one)[0])
    lengths = [1, 3, 6, 2, 3]
    ragged = karl.encode(images, lengths)
    for i, k in enumerate(lengths):
        assert torch.equal(ragged[i].ids, karl.encode(images[i : i + 1], k).ids)


@torch.no_grad()
def test_codes_and_their_places_are_all_that_is_needed():
    karl, _ = made()
    tokens = karl.halt(pictures(5))
    again = karl.tokens_of(tokens.ids, tokens.lengths, tokens.index)
    close(karl.decode(again), karl.decode(tokens))
    shifted = karl.tokens_of(tokens.ids, tokens.lengths)  # as if they were the first
    assert not torch.allclose(karl.decode(shifted), karl.decode(tokens), atol=1e-3)


@torch.no_grad()
def test_monotone_halting_leaves_a_prefix():
    karl, _ = made()
    images = pictures(8)
    cut, free = karl.halt(images, monotone=True), karl.halt(images)
    for i in range(len(images)):
        halted = (cut.extras["halting"][i] > 0.75).tolist()
        first = halted.index(True) if True in halted else T
        assert cut.lengths[i] == max(first, 1)
        assert cut[i].index.tolist() == [list(range(max(first, 1)))]
    assert cut.lengths.sum() < free.lengths.sum()
    always, _ = made(monotone=True)
    assert torch.equal(always.halt(images).ids, cut.ids)


@torch.no_grad()
def test_one_token_stays_where_all_would_halt():
    karl, _ = made()
    karl.halting_mlp[2].bias += 1000
    karl.halting_mlp[2].weight *= 10
    images = pictures(3)
    karl.config = replace(karl.config, threshold=-1.0)
    found, first = karl.halt(images), karl.halt(images, monotone=True)
    assert found.lengths.tolist() == first.lengths.tolist() == [1, 1, 1]
    assert first.index.tolist() == [[0], [0], [0]]
    assert torch.equal(found.index[:, 0], found.extras["halting"].argmin(1))
    assert karl.decode(found).isfinite().all()


def test_epsilon_is_rounded_up_to_a_bin():
    karl, _ = made()
    values = torch.linspace(0, 0.5, 2001)
    found = karl.bin_of(values)
    bins = torch.tensor(BINS)
    assert (found.diff() >= 0).all()
    assert torch.equal(karl.bin_of(bins), torch.arange(19))
    assert torch.equal(karl.bin_of(bins[found]), found)
    below = values <= 0.38
    assert (bins[found] >= values)[below].all() and (found[~below] == 18).all()
    lower = torch.cat([torch.tensor([-1.0]), bins])[found]
    assert (values > lower)[below].all()
    for value, bin in ((0.0, 0.005), (0.005, 0.005), (0.0051, 0.01), (0.08, 0.09), (0.37, 0.38), (9.0, 0.38)):
        assert BINS[karl.bin_of(torch.tensor(value))] == bin
    assert torch.equal(KARL(karl.config).rec_loss_embeddings, bins[:, None].expand(19, 32))


@torch.no_grad()
def test_epsilons_of_one_bin_are_one():
    karl, _ = made()
    images = pictures(2)
    assert torch.equal(karl.halt(images, 0.075).values, karl.halt(images, 0.09).values)
    here, next_bin = (karl.halt(images, epsilon).extras["halting"] for epsilon in (0.09, 0.1))
    assert not torch.equal(here, next_bin)


@pytest.mark.parametrize("base", ["vqgan", "vae"])
def test_the_losses_of_both_phases(base):
    karl, s = made(base)
    images = pictures(2)

    def losses(phase, hidden, halted):
        values, _ = plain_code(s, hidden, True)
        z = F.normalize(linear(s, "pre_quantizer_mlp", layer_norm(s, "encoder_ln_post", hidden)), dim=-1)
        told = plain_told(s, values, halted)
        latents = encode_base(s, base, images)
        found = {f"{phase}_bottleneck": 1.25 * (values - z).square().mean()}
        if base == "vae":
            return told, found | {f"{phase}_code": (told - latents).square().mean()}
        codes = s["base_tokenizer.vqgan.quantize.embedding.weight"]
        right = torch.cdist(latents, codes[None]).argmin(-1)
        chances = told.softmax(-1)
        found[f"{phase}_nll"] = -chances.gather(2, right[..., None]).log().mean()
        return told, found | {f"{phase}_code": (chances @ codes - codes[right]).square().mean()}

    k, epsilon = 4, torch.tensor([0.03, 0.03])
    estimate, error = karl.estimate_loss(images, k, epsilon)
    hidden = plain_hidden(s, base, images, k, 0.03)
    told, wanted = losses("estimate", hidden, None)
    wanted["estimate_active"] = -(1 - plain_halting(s, hidden)).log().mean()
    close(estimate, {name: wanted[name] for name in estimate}, 1e-4)
    assert estimate.keys() == wanted.keys() and not error.requires_grad
    close(error, (decode_base(s, base, told) - images).abs().mean((1, 2, 3)), 1e-4)

    learn = karl.learn_loss(images, k, torch.tensor([0.1, 0.1]))
    hidden = plain_hidden(s, base, images, T, 0.1)
    halting = plain_halting(s, hidden)
    _, wanted = losses("learn", hidden, halting > 0.75)
    wanted["learn_active"] = -(1 - halting[:, :k]).log().mean()
    wanted["learn_halted"] = -halting[:, k:].log().mean()
    close(learn, {name: wanted[name] for name in learn}, 1e-4)
    assert learn.keys() == wanted.keys()
    # as many tokens as there are, or more: none is to halt
    for k in (T, T + 2):
        found = karl.learn_loss(images, k, torch.tensor([0.1, 0.1]))
        assert "learn_halted" not in found
        close(found["learn_active"], -(1 - halting).log().mean(), 1e-4)


def test_no_gradient_of_the_picture_reaches_the_halting_head():
    karl, _ = made()
    head = [*karl.halting_mlp.parameters(), *karl.encoder_ln_post_halt.parameters()]
    losses = karl.learn_loss(pictures(3), 3, torch.tensor([0.02, 0.1, 0.3]))
    for name, loss in losses.items():
        grads = torch.autograd.grad(loss, head, retain_graph=True, allow_unused=True)
        if name in ("learn_active", "learn_halted"):
            assert all(grad.abs().sum() > 0 for grad in grads)
        else:
            assert all(grad is None for grad in grads), name
    sum(losses.values()).backward()
    assert all(p.grad is None for p in karl.base_tokenizer.parameters())
    assert karl.rec_loss_embeddings.grad.abs().sum(1).nonzero()[:, 0].tolist() == [2, 9, 17]


def test_a_step_draws_lengths_and_epsilons_and_remembers_what_was_reached():
    karl, _ = made()
    assert (karl.chances[:5] == 0.2).all() and (karl.chances[5:] == 0).all()
    asked = {"k": [], "epsilon": []}

    def estimate(images, k, epsilon):
        asked["k"].append(k)
        asked["epsilon"] += epsilon.tolist()
        return {"estimate_code": images.mean()}, torch.tensor([0.5, 0.025])

    def learn(images, k, error):
        assert k == asked["k"][-1] and error.tolist() == pytest.approx([0.5, 0.025])
        return {"learn_code": images.mean()}

    karl.estimate_loss, karl.learn_loss = estimate, learn
    g = torch.Generator().manual_seed(0)
    steps = 200
    for _ in range(steps):
        assert karl.training_loss(pictures(2), g).keys() == {"estimate_code", "learn_code"}
    assert set(asked["k"]) == set(range(1, 11))  # no more than there are latents
    assert {round(e, 3) for e in asked["epsilon"]} == {0.005, 0.01, 0.02, 0.03, 0.04}
    rarer = 0.99**steps
    wanted = torch.tensor([1, 1, 1, rarer, rarer]) / (3 + 2 * rarer)
    close(karl.chances[:5], wanted, 1e-4)
    assert "chances" not in karl.state_dict()
    with torch.device("meta"):
        big = KARL(KARL.Config())
    drawn = set()
    big.chances = torch.full((19,), 1 / 19)
    big.bins = torch.tensor(BINS)
    big.estimate_loss = lambda images, k, epsilon: drawn.add(k) or ({}, torch.ones(1))
    big.learn_loss = lambda images, k, error: {}
    for _ in range(400):
        big.training_loss(torch.zeros(1, 3, 256, 256), g)
    assert drawn == set(range(16, 369, 16))


def test_what_needed_few_tokens_learns_to_take_few():
    """Larger epsilons give no more tokens, once the head has learnt which errors so many tokens reach."""
    torch.manual_seed(0)
    karl = KARL(KARL.Config(**TINY["karl"] | {"encoder_depth": 1, "decoder_depth": 1}))
    images = pictures(2)
    reached = {0.3: 1, 0.16: 3, 0.05: 5, 0.02: T}  # the errors of so many tokens
    optimizer = torch.optim.Adam((p for p in karl.parameters() if p.requires_grad), 5e-3)
    for step in range(80):
        error, k = list(reached.items())[step % 4]
        losses = karl.learn_loss(images, k, torch.full((2,), error))
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
    karl.eval()
    with torch.no_grad():
        mean = [karl.halt(images, e).lengths.float().mean() for e in sorted(reached)]
        assert mean == sorted(mean, reverse=True) and mean[0] > mean[-1] + 2, mean


def test_published_files_load_with_their_own_names(tmp_path):
    karl, s = made()
    images = pictures(2)
    junk = {"gan_losses.0.perceptual_loss.lin0.weight": torch.ones(3)}
    junk["gan_losses.7.discriminator.main.0.bias"] = torch.ones(1)
    other = {name: torch.zeros_like(value) for name, value in s.items()}
    path = tmp_path / "karl_tiny.pth"
    content = {"model": other | junk, "ema": s | junk, "epoch": 3, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, path)
    options = TINY["karl"]
    loaded = KARL.from_pretrained(path, **options)
    assert not loaded.training
    with torch.no_grad():
        assert torch.equal(loaded.halt(images).ids, karl.halt(images).ids)
    with pytest.raises(ValueError, match="does not say which tokenizer it is"):
        from_pretrained(path)
    torch.save({"ema": {name: value for name, value in s.items() if "halting" not in name}}, path)
    with pytest.raises(ValueError, match="without halting_mlp"):
        KARL.from_pretrained(path, **options)
    # a file that bears a published name needs no options but those that make it small here
    known = tmp_path / "karl_small_vqgan_quantized_latents.pth"
    torch.save(content, known)
    assert from_pretrained(known, **options).config == karl.config


def test_what_is_saved_is_loaded(tmp_path):
    karl, _ = made("vae", False, monotone=True, epsilon=0.1)
    karl.save_pretrained(tmp_path)
    loaded = from_pretrained(tmp_path)
    assert loaded.config == karl.config and loaded.config.base_dim == 8
    with torch.no_grad():
        assert torch.equal(loaded.halt(pictures(2)).values, karl.halt(pictures(2)).values)
    assert KARL.from_pretrained(tmp_path, epsilon=0.2).config.epsilon == 0.2


def test_what_karl_says_of_itself():
    assert KARL.halts and not KARL.prefix_stable
    karl, _ = made()
    assert list(karl.lengths) == [1, 2, 3, 4, 5, 6] and karl.bits_per_token == math.log2(32)
    assert KARL.Config().max_tokens == 256 and KARL.Config().epsilon == 0.05
    assert not any(p.requires_grad for p in karl.base_tokenizer.parameters())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"base": "vq"}, "'vqgan' or 'vae'"),
        ({"max_tokens": 11}, "max_tokens is 1 to 10"),
        ({"image_size": 18}, "multiple of 4"),
        ({"image_size": 64}, "at most 32"),
        ({"encoder_width": 8}, "more than base_dim"),
        ({"decoder_heads": 5}, "heads must divide"),
    ],
)
def test_sizes_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        KARL.Config(**TINY["karl"] | options)


@pytest.mark.parametrize("epsilon", [-0.1, math.nan])
def test_an_epsilon_that_is_no_error(epsilon):
    karl, _ = made()
    with pytest.raises(ValueError, match="0 or more"):
        karl.halt(pictures(1), epsilon)
