import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from transformers import SamVisionConfig, SamVisionModel

from vtc.tokenizers import checkpoints, from_pretrained
from vtc.tokenizers.parts import mask_losses
from vtc.tokenizers.parts.mask_vit import (
    LengthHead,
    adaptive_mask,
    expected_place,
    predicted_lengths,
    prefix_mask,
)
from vtc.tokenizers.systems.alto import ALTo

K, WIDTH, HEADS, SIDE, PATCH = 8, 32, 4, 16, 4
TINY = {
    "image_size": SIDE,
    "patch": PATCH,
    "tokens": K,
    "encoder": (WIDTH, 2, HEADS),
    "decoder": (WIDTH, 2, HEADS),
    "codes": 32,
    "dim": 4,
    "source_channels": 8,
    "pixel_codes": 16,
    "pixel_hidden": 32,
    "pixel_multipliers": (1, 1, 2),
    "pixel_blocks": 1,
}
N = (SIDE // PATCH) ** 2


def make(**options):
    torch.manual_seed(0)
    made = ALTo(ALTo.Config(**TINY | options)).eval()
    with torch.no_grad():  # norms and biases that cannot be overlooked
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        # masks differ in what latents read, and lengths are in the middle in spite of the peaked scale
        made.encoder.patch_embed.weight.mul_(4)
        for block in made.encoder.transformer:
            block.attn.out_proj.weight.mul_(8)
        made.encoder.length_encoder.fc3.weight.mul_(0.5)
        made.encoder.length_encoder.fc3.bias.zero_()
        made.pixel_decoder.conv_out.weight.mul_(0.03)  # pixels between 0 and 1
        made.pixel_decoder.conv_out.bias.add_(0.5)
    return made


@pytest.fixture
def alto():
    return make()


@pytest.fixture
def masks():
    torch.manual_seed(1)
    blobs = F.interpolate(torch.randn(5, 1, 4, 4), SIDE, mode="bilinear")
    return (blobs > 0).float().expand(-1, 3, -1, -1).contiguous()


@pytest.fixture
def source():
    torch.manual_seed(2)
    return torch.randn(5, 8, 4 * SIDE // PATCH, 4 * SIDE // PATCH)


# -- names and shapes


def trunk_shapes(side, width, depth, patches, tokens):
    shapes = {f"{side}.class_embedding": (1, width), f"{side}.positional_embedding": (patches + 1, width)}
    shapes[f"{side}.latent_token_positional_embedding"] = (tokens, width)
    for norm in ("ln_pre", "ln_post"):
        shapes |= {f"{side}.{norm}.weight": (width,), f"{side}.{norm}.bias": (width,)}
    for i in range(depth):
        block = f"{side}.transformer.{i}"
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"{block}.{norm}.weight": (width,), f"{block}.{norm}.bias": (width,)}
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * width, width),
            f"{block}.attn.in_proj_bias": (3 * width,),
        }
        for name, rows, columns in (
            ("attn.out_proj", width, width),
            ("mlp.c_fc", 4 * width, width),
            ("mlp.c_proj", width, 4 * width),
        ):
            shapes |= {f"{block}.{name}.weight": (rows, columns), f"{block}.{name}.bias": (rows,)}
    return shapes


def published_shapes():
    """ALTo as its checkpoint has it: two TiTok-L, its own parts, MaskGIT's pixel decoder of 1024 channels."""
    w, k, n = 1024, 32, 256
    shapes = trunk_shapes("encoder", w, 24, n, k) | trunk_shapes("decoder", w, 24, n, k)
    shapes |= {"latent_tokens": (k, w), "decoder.mask_token": (1, 1, w), "encoder.attn_mask": (289, 289)}
    shapes |= {"quantize.embedding.weight": (1024, 12), "quantize.embedding_proj.weight": (12, 12)}
    layers = {"encoder.patch_embed": (w, 3, 16, 16), "encoder.conv_out": (12, w, 1, 1)}
    layers |= {f"encoder.length_encoder.fc{i}": (w, w) for i in (1, 2, 3)}
    layers |= {"decoder.decoder_embed": (w, 12), "decoder.ffn.0": (2048, w, 1, 1)}
    layers |= {"decoder.ffn.2": (1024, 2048, 1, 1), "decoder.spatial_mapper": (256, 256, 4, 4)}
    layers |= {"decoder.vae_project.0": (w, 256), "pixel_decoder.conv_in": (512, 1024, 3, 3)}
    layers |= {"pixel_decoder.norm_out": (128,), "pixel_decoder.conv_out": (3, 128, 3, 3)}
    widths = [128, 128, 256, 256, 512]
    blocks = {f"mid.{i}": (512, 512) for i in range(2)}
    for level, width in enumerate(widths):
        start = widths[min(level + 1, 4)]
        blocks |= {f"up.{level}.block.0": (start, width), f"up.{level}.block.1": (width, width)}
        if level:
            layers[f"pixel_decoder.up.{level}.upsample_conv"] = (width, width, 3, 3)
    for name, (start, width) in blocks.items():
        name = f"pixel_decoder.{name}"
        layers |= {f"{name}.norm1": (start,), f"{name}.norm2": (width,)}
        shapes |= {f"{name}.conv1.weight": (width, start, 3, 3), f"{name}.conv2.weight": (width, width, 3, 3)}
        if start != width:
            shapes[f"{name}.nin_shortcut.weight"] = (width, width, 1, 1)
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


def test_published_names_and_shapes():
    with torch.device("meta"):
        state = ALTo(ALTo.published["yayafengzi/ALToLLM-8B"]).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == published_shapes()


# -- plain restatement


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def norm(s, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def transformer(s, side, x, blocked):
    """x (T, width) of one picture; blocked (T, T)."""
    d = WIDTH // HEADS
    x = norm(s, f"{side}.ln_pre", x)
    for i in range(2):
        block = f"{side}.transformer.{i}"
        qkv = (
            norm(s, f"{block}.ln_1", x) @ s[f"{block}.attn.in_proj_weight"].T
            + s[f"{block}.attn.in_proj_bias"]
        )
        heads = []
        for h in range(HEADS):
            q, k, v = (qkv[:, part * WIDTH + h * d : part * WIDTH + (h + 1) * d] for part in range(3))
            heads.append((q @ k.T / d**0.5).masked_fill(blocked, -torch.inf).softmax(-1) @ v)
        x = x + linear(s, f"{block}.attn.out_proj", torch.cat(heads, 1))
        x = x + linear(
            s, f"{block}.mlp.c_proj", F.gelu(linear(s, f"{block}.mlp.c_fc", norm(s, f"{block}.ln_2", x)))
        )
    return norm(s, f"{side}.ln_post", x)


def plain_encode(s, image, legacy=True):
    """Latents (K, dim), the codes, and what the length head says, for one mask (3, H, W)."""
    patches = []
    for row in range(0, SIDE, PATCH):
        for column in range(0, SIDE, PATCH):
            patch = image[:, row : row + PATCH, column : column + PATCH].flatten()
            patches.append(s["encoder.patch_embed.weight"].flatten(1) @ patch + s["encoder.patch_embed.bias"])
    x = torch.cat([s["encoder.class_embedding"], torch.stack(patches)]) + s["encoder.positional_embedding"]
    x = torch.cat([x, s["latent_tokens"] + s["encoder.latent_token_positional_embedding"]])
    blocked = torch.zeros(len(x), len(x), dtype=torch.bool)
    for i in range(len(x)):
        blocked[i, max(1 + N, i + 1) :] = True
    assert torch.equal(blocked, s["encoder.attn_mask"])
    x = transformer(s, "encoder", x, blocked)
    latents = x[1 + N :]
    head = "encoder.length_encoder"
    keys = linear(s, f"{head}.fc1", latents) * linear(s, f"{head}.fc2", latents).sigmoid()
    scores = keys @ linear(s, f"{head}.fc3", x[0]) * WIDTH**0.5
    expected = sum(i / K * p for i, p in enumerate(scores.softmax(0).tolist()))
    length = -int(-min(max(expected * K, 0), K - 1) // 1) + 1
    if legacy:  # the K x width numbers read as width x K
        latents = torch.stack([latents.flatten()[k::K] for k in range(K)])
    z = latents @ s["encoder.conv_out.weight"][:, :, 0, 0].T + s["encoder.conv_out.bias"]
    codebook = s["quantize.embedding.weight"] @ s["quantize.embedding_proj.weight"].T
    codebook = codebook / codebook.norm(dim=1, keepdim=True)
    ids = (z / z.norm(dim=1, keepdim=True) @ codebook.T).argmax(1)
    return ids, codebook[ids], scores, expected, length


def group_norm(s, name, x):
    groups = x.reshape(32, -1)
    groups = (groups - groups.mean(1, keepdim=True)) / (
        groups.var(1, unbiased=False, keepdim=True) + 1e-6
    ).sqrt()
    return groups.view_as(x) * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def conv(s, name, x):
    weight = s[f"{name}.weight"]
    return F.conv2d(x[None], weight, s.get(f"{name}.bias"), padding=weight.shape[-1] // 2)[0]


def residual(s, name, x):
    y = conv(s, f"{name}.conv1", F.silu(group_norm(s, f"{name}.norm1", x)))
    y = conv(s, f"{name}.conv2", F.silu(group_norm(s, f"{name}.norm2", y)))
    shortcut = f"{name}.nin_shortcut"
    return y + (conv(s, shortcut, y) if f"{shortcut}.weight" in s else x)


def plain_logits(s, values, source=None, mode="zero"):
    """Mask logits (H, W) from the first tokens (k, dim) of one mask."""
    k = len(values)
    x = linear(s, "decoder.decoder_embed", values)
    missing = {"zero": s["decoder.decoder_embed.bias"], "pad": torch.zeros(WIDTH)}.get(mode)
    if missing is not None:
        x = torch.cat([x, missing.expand(K - k, -1)])
    x = x + s["decoder.latent_token_positional_embedding"][: len(x)]
    patches = s["decoder.mask_token"][0].expand(N, -1)
    if source is not None:
        seen = F.conv2d(
            source[None], s["decoder.spatial_mapper.weight"], s["decoder.spatial_mapper.bias"], stride=4
        )
        patches = patches + linear(s, "decoder.vae_project.0", seen[0].flatten(1).T)
    first = torch.cat([s["decoder.class_embedding"], patches]) + s["decoder.positional_embedding"]
    x = torch.cat([first, x])
    x = transformer(s, "decoder", x, torch.zeros(len(x), len(x), dtype=torch.bool))[1 : 1 + N]
    x = x.T.reshape(WIDTH, SIDE // PATCH, SIDE // PATCH)
    x = conv(s, "decoder.ffn.2", conv(s, "decoder.ffn.0", x).tanh())
    x = residual(s, "pixel_decoder.mid.0", conv(s, "pixel_decoder.conv_in", x))
    for level in (2, 1, 0):
        x = residual(s, f"pixel_decoder.up.{level}.block.0", x)
        if level:
            x = x.repeat_interleave(2, 1).repeat_interleave(2, 2)
            x = conv(s, f"pixel_decoder.up.{level}.upsample_conv", x)
    x = conv(s, "pixel_decoder.conv_out", F.silu(group_norm(s, "pixel_decoder.norm_out", x)))
    return (x.mean(0) * 2 - 1) * 6


@pytest.mark.parametrize("legacy", [True, False])
def test_encoding_equals_plain_restatement(masks, legacy):
    alto = make(legacy_layout=legacy)
    tokens, halted = alto.encode(masks), alto.halt(masks)
    assert len(set(halted.lengths.tolist())) > 1  # or the head would not be seen
    for i, mask in enumerate(masks):
        ids, values, _, expected, length = plain_encode(alto.state_dict(), mask, legacy)
        assert torch.equal(tokens.ids[i], ids)
        torch.testing.assert_close(tokens.values[i], values, atol=1e-5, rtol=0)
        assert halted.lengths[i] == length
        assert halted.extras["expected"][i].item() == pytest.approx(expected * K, abs=1e-4)


@pytest.mark.parametrize("mode", ["zero", "pad", "truncate"])
def test_decoding_equals_plain_restatement(alto, masks, source, mode):
    tokens = alto.encode(masks, [1, 3, K, 5, 2])
    for given in (source, None):
        logits = alto.mask_logits(tokens, given, mode)
        decoded = alto.decode(tokens, source=given, drop_mode=mode)
        torch.testing.assert_close(decoded, logits.sigmoid().expand(-1, 3, -1, -1))
        for i, k in enumerate(tokens.lengths.tolist()):
            seen = None if given is None else given[i]
            plain = plain_logits(alto.state_dict(), tokens.values[i, :k], seen, mode)
            torch.testing.assert_close(logits[i, 0], plain, atol=1e-5, rtol=1e-5)


# -- missing tokens


@pytest.mark.parametrize("mode", ["zero", "pad", "truncate"])
def test_each_mask_is_decoded_as_if_alone(masks, source, mode):
    alto = make(drop_mode=mode)
    tokens = alto.encode(masks, [1, 3, K, 5, 2])
    together = alto.decode(tokens, source=source)
    for i in range(len(masks)):
        alone = alto.decode(tokens[i], source=source[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)


def test_zeroed_and_padded_tokens_differ_by_the_bias_of_the_embedding(alto, masks, source):
    tokens, seen = alto.encode(masks, 3), []
    hook = alto.decoder.ln_pre.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits = {mode: alto.mask_logits(tokens, source, mode) for mode in ("zero", "pad", "truncate")}
    hook.remove()
    difference = seen[0] - seen[1]
    assert torch.equal(difference[:, : 1 + N + 3], torch.zeros_like(difference[:, : 1 + N + 3]))
    bias = alto.decoder.decoder_embed.bias
    torch.testing.assert_close(difference[:, 1 + N + 3 :], bias.expand(5, K - 3, -1))
    assert (logits["zero"] - logits["pad"]).abs().max() > 1e-3
    assert (logits["pad"] - logits["truncate"]).abs().max() > 1e-3
    with torch.no_grad():
        bias.zero_()
    same = {mode: alto.mask_logits(tokens, source, mode) for mode in ("zero", "pad")}
    torch.testing.assert_close(same["zero"], same["pad"])


def test_with_all_tokens_the_modes_are_one(alto, masks, source):
    tokens = alto.encode(masks)
    zero, pad, truncate = (alto.mask_logits(tokens, source, mode) for mode in ("zero", "pad", "truncate"))
    torch.testing.assert_close(zero, pad)
    torch.testing.assert_close(zero, truncate)


def test_tokens_take_the_places_their_index_says(alto, masks):
    tokens = alto.encode(masks)
    chosen = torch.tensor([1, 4, 6])
    some = dataclasses.replace(
        tokens,
        values=tokens.values[:, chosen],
        ids=tokens.ids[:, chosen],
        index=chosen.expand(5, 3),
        lengths=torch.full((5,), 3),
    )
    values = torch.zeros_like(tokens.values)
    values[:, chosen] = tokens.values[:, chosen]
    all_places = dataclasses.replace(tokens, values=values)
    torch.testing.assert_close(alto.mask_logits(some), alto.mask_logits(all_places))


# -- causal latents


def latents_of(alto, masks, latent_tokens=None):
    return alto.encoder(masks, alto.latent_tokens if latent_tokens is None else latent_tokens)


def test_a_latent_sees_those_in_front_and_the_picture_sees_none(masks):
    alto = make(legacy_layout=False)
    changed = alto.latent_tokens.detach().clone()
    changed[5] += torch.randn(WIDTH)
    seen = []
    hook = alto.encoder.ln_post.register_forward_hook(lambda *given: seen.append(given[2]))
    before, after = latents_of(alto, masks)[0], latents_of(alto, masks, changed)[0]
    hook.remove()
    torch.testing.assert_close(before[:, :5], after[:, :5], atol=1e-6, rtol=0)
    assert ((before - after)[:, 5:].abs().amax(2) > 1e-4).all()
    torch.testing.assert_close(seen[0][:, : 1 + N], seen[1][:, : 1 + N], atol=1e-6, rtol=0)


def test_the_legacy_layout_undoes_the_causal_mask_for_tokens(alto, masks):
    changed = alto.latent_tokens.detach().clone()
    changed[K - 1] += torch.randn(WIDTH)
    before, after = latents_of(alto, masks)[0], latents_of(alto, masks, changed)[0]
    assert ((before - after).abs().amax(2) > 1e-5).all()


# -- lengths


def test_the_kept_tokens_are_a_prefix_as_long_as_predicted():
    torch.manual_seed(0)
    chances = torch.cat([(torch.randn(200, K) * 4).softmax(1), torch.eye(K)])
    lengths, mask = predicted_lengths(chances), adaptive_mask(chances)
    assert lengths.min() >= 1 and lengths.max() <= K
    torch.testing.assert_close(mask.sum(1), lengths.float())
    expected = torch.arange(K)[None] < lengths[:, None]
    torch.testing.assert_close(mask, expected.float())
    assert torch.equal(lengths[-K:], torch.arange(K) + 1)  # certain of the place: no token more


def test_gradients_of_the_mask_are_those_of_probabilities():
    torch.manual_seed(0)
    chances = torch.randn(4, K).softmax(1).requires_grad_()
    towards = torch.randn(4, K)
    (given,) = torch.autograd.grad((adaptive_mask(chances) * towards).sum(), chances)
    (soft,) = torch.autograd.grad((prefix_mask(chances) * towards).sum(), chances)
    torch.testing.assert_close(given, soft)
    # token j counts against being the last for every place before it
    later = torch.stack([-towards[:, i + 1 :].sum(1) for i in range(K)], 1)
    torch.testing.assert_close(given, later)


def test_the_mended_scale_keeps_the_order_and_changes_the_expectation():
    torch.manual_seed(0)
    published, plain = LengthHead(WIDTH), LengthHead(WIDTH, plain=True)
    plain.load_state_dict(published.state_dict())
    latents, picture = torch.randn(6, K, WIDTH), torch.randn(6, 1, WIDTH)
    peaked, flat = published(latents, picture), plain(latents, picture)
    assert torch.equal(peaked.argsort(1), flat.argsort(1))
    torch.testing.assert_close(
        (peaked / peaked[:, :1]).log(), (flat / flat[:, :1]).log() * WIDTH, atol=1e-3, rtol=1e-3
    )
    assert (expected_place(peaked) - expected_place(flat)).abs().min() > 1e-4
    assert (peaked.amax(1) > flat.amax(1)).all()


def test_the_option_reaches_the_head(masks):
    expected = [make(plain_scale=plain).halt(masks).extras["expected"] for plain in (False, True)]
    assert (expected[0] - expected[1]).abs().min() > 1e-3


def test_halting_takes_no_error(alto, masks):
    with pytest.raises(ValueError, match="takes no epsilon"):
        alto.halt(masks, 0.1)
    with pytest.raises(ValueError, match="takes float images"):
        alto.halt(masks[:, :1])


def test_halting_gives_the_first_tokens_of_all(alto, masks):
    tokens, halted = alto.encode(masks), alto.halt(masks)
    for i, k in enumerate(halted.lengths.tolist()):
        assert torch.equal(halted.ids[i, :k], tokens.ids[i, :k])
        assert alto.halt(masks[i : i + 1]).lengths.item() == k


# -- the picture


def sam():
    torch.manual_seed(3)
    return SamVisionModel(
        SamVisionConfig(
            hidden_size=16,
            output_channels=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=64,
            patch_size=4,
            mlp_dim=16,
            window_size=0,
            global_attn_indexes=[0],
            initializer_range=0.1,
        )
    )


def test_pixels_are_embedded_by_the_attached_sam(alto, masks):
    pixels, encoder = torch.rand(5, 3, 64, 64), sam()
    names = set(alto.state_dict())
    with pytest.raises(ValueError, match="pixels after attach_sam"):
        alto.decode(alto.encode(masks), source=pixels)
    alto.attach_sam(encoder)
    assert set(alto.state_dict()) == names and not any(m is encoder for m in alto.modules())
    mean, std = torch.tensor([123.675, 116.28, 103.53]), torch.tensor([58.395, 57.12, 57.375])
    scaled = (pixels * 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        embedding = encoder.eval()(scaled).last_hidden_state
    tokens = alto.encode(masks)
    decoded = alto.decode(tokens, source=pixels)
    torch.testing.assert_close(decoded, alto.decode(tokens, source=embedding), atol=1e-4, rtol=0)
    assert (decoded - alto.decode(tokens)).abs().max() > 1e-3
    with pytest.raises(ValueError, match="SAM takes pixels"):
        alto.decode(tokens, source=pixels[..., :32])


def test_a_wrong_source_or_mode_is_refused(alto, masks, source):
    tokens = alto.encode(masks)
    with pytest.raises(ValueError, match="SAM's embedding"):
        alto.decode(tokens, source=source[:3])
    with pytest.raises(ValueError, match="drop_mode is one of"):
        alto.decode(tokens, drop_mode="mask")
    for options in ({"drop_mode": "mask"}, {"patch": 8}, {"image_size": 18}):
        with pytest.raises(ValueError):
            ALTo.Config(**TINY | options)


# -- training


def length_gradients(alto, loss):
    alto.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in alto.encoder.length_encoder.named_parameters() if p.grad is not None}


def test_both_the_length_and_the_reconstruction_reach_the_length_head(alto, masks, source):
    losses = alto.training_loss(masks, source, "length")
    torch.testing.assert_close(
        losses["length"], 0.01 * torch.tensor([plain_encode(alto.state_dict(), m)[3] for m in masks]).mean()
    )
    for name in ("length", "reconstruction"):
        loss = alto.training_loss(masks, source, "length")[name]
        gradients = length_gradients(alto, loss)
        assert set(gradients) == {f"fc{i}.{kind}" for i in (1, 2, 3) for kind in ("weight", "bias")}
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())


def test_lengths_at_random_teach_the_head_nothing_of_the_reconstruction(alto, masks, source):
    loss = alto.training_loss(masks, source, "tokens")["reconstruction"]
    assert length_gradients(alto, loss) == {}
    assert alto.encoder.patch_embed.weight.grad.abs().max() > 0


def test_random_lengths_are_of_all_sizes(alto, masks, monkeypatch):
    seen = []
    monkeypatch.setattr(
        mask_losses, "edge_mse", lambda a, b, emphasis: seen.append(emphasis) or emphasis.sum()
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _ in range(40):
            alto.training_loss(masks, None, "tokens", edge_growth=1.0, generator=generator)
    lengths = (torch.cat(seen) / 4 * K).round().long()
    assert set(lengths.tolist()) == set(range(1, K + 1))
    assert torch.bincount(lengths)[1:].min() > 10  # 25 expected of each


def test_training_losses_equal_plain_restatement(alto, masks, source):
    losses = alto.training_loss(masks, source, "length")
    totals = torch.zeros(3)
    for mask, seen in zip(masks, source):
        _, values, _, _, length = plain_encode(alto.state_dict(), mask)
        values = values.clone()
        values[length:] = 0
        decoded = plain_logits(alto.state_dict(), values, seen).sigmoid()
        totals += torch.tensor(plain_losses(decoded, mask[0])) / len(masks)
    torch.testing.assert_close(losses["reconstruction"], totals[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(losses["edges"], 0.2 * totals[1], atol=1e-4, rtol=1e-4)


def correlate(picture, kernel):
    padded = F.pad(picture, [kernel.shape[0] // 2] * 4)
    return (padded.unfold(0, len(kernel), 1).unfold(1, len(kernel), 1) * kernel).sum((2, 3))


def plain_losses(decoded, mask, emphasis=4.0):
    strength = 0
    for size, weight in ((3, 1.0), (5, 0.5)):
        place = torch.arange(size) - size // 2
        bell = (-(place**2) / (2 * (size / 3) ** 2)).exp()
        kernel = torch.outer(place / (size // 2), bell / bell.sum())
        strength += weight * (correlate(mask, kernel) ** 2 + correlate(mask, kernel.T) ** 2 + 1e-8).sqrt()
    strength = ((strength - 0.1) * 5).sigmoid()
    strength = (strength - strength.min()) / (strength.max() - strength.min() + 1e-8)
    reconstruction = ((decoded - mask) * (1 + emphasis * strength)).square().mean()
    kernel = torch.tensor([[1.0, -1, -1]] * 3)
    found, wanted = (
        (correlate(x, kernel) ** 2 + correlate(x, kernel.T) ** 2 + 1e-6).sqrt() for x in (decoded, mask)
    )
    apart = (found - wanted).abs()
    robust = torch.where(apart < 0.4, apart**2 / 0.8, apart - 0.2)
    return [reconstruction.item(), (emphasis * (apart**2 + robust) / 2).mean().item(), strength.max().item()]


def test_edges_of_each_mask_are_its_own_and_grow_with_the_emphasis():
    torch.manual_seed(0)
    masks, decoded = (torch.rand(3, 1, 12, 12) > 0.6).float(), torch.rand(3, 1, 12, 12)
    emphasis = torch.tensor([4.0, 1.0, 0.0])
    plain = [plain_losses(d[0], m[0], e) for d, m, e in zip(decoded, masks, emphasis.tolist())]
    for column, loss in enumerate((mask_losses.edge_mse, mask_losses.edge_loss)):
        expected = sum(row[column] for row in plain) / 3
        assert loss(decoded, masks, emphasis).item() == pytest.approx(expected, rel=1e-4)
    torch.testing.assert_close(
        mask_losses.edge_mse(decoded, masks, torch.zeros(3)), F.mse_loss(decoded, masks)
    )
    edges = mask_losses.edge_map(masks)
    torch.testing.assert_close(edges.amin((1, 2, 3)), torch.zeros(3))
    torch.testing.assert_close(edges.amax((1, 2, 3)), torch.ones(3))
    torch.testing.assert_close(edges[1:2], mask_losses.edge_map(masks[1:2]))


def test_stages_train_what_the_authors_train(alto):
    alto.begin("tokens")
    learns = {name for name, p in alto.named_parameters() if p.requires_grad}
    assert learns == {
        name
        for name, _ in alto.named_parameters()
        if name.startswith(("encoder.", "quantize.", "decoder.")) and "length_encoder" not in name
    }
    before = alto.encoder.length_encoder.fc1.weight.detach().clone()
    alto.begin("length")
    learns = {name for name, p in alto.named_parameters() if p.requires_grad}
    assert learns == {name for name, _ in alto.named_parameters() if "length_encoder" in name}
    assert not torch.equal(before, alto.encoder.length_encoder.fc1.weight)  # started anew
    assert alto.encoder.length_encoder.fc1.bias.abs().max() == 0
    for call in (alto.begin, lambda stage: alto.training_loss(torch.rand(1, 3, SIDE, SIDE), stage=stage)):
        with pytest.raises(ValueError, match="a stage of training is one of"):
            call("sft")


def test_probabilities_are_mixed_into_tokens_and_certain_ones_are_the_codes(alto, masks, source):
    tokens = alto.encode(masks, 5)
    certain = F.one_hot(tokens.ids, 32).float()
    torch.testing.assert_close(alto.mix(certain), tokens.values, atol=1e-5, rtol=0)
    logits = torch.randn(5, 5, 32, requires_grad=True)
    mixed = alto.mix(logits.softmax(-1))
    decoded = alto.decode(dataclasses.replace(tokens, values=mixed), source=source)
    loss = mask_losses.overlap_loss(decoded[:, :1], masks[:, :1])
    loss.backward()
    assert logits.grad.abs().max() > 0
    d, m = decoded[:, :1].detach(), masks[:, :1]
    entropy = -(m * d.log() + (1 - m) * (1 - d).log()).mean()
    dice = 1 - (2 * (d * m).sum() + 1e-6) / (d.sum() + m.sum() + 1e-6)
    torch.testing.assert_close(loss.detach(), entropy + 0.25 * dice)


def test_the_reward_is_overlap_and_tokens_saved():
    masks = torch.zeros(3, 1, 4, 4)
    masks[0, :, :2] = masks[1, :, :, :2] = 1
    decoded = torch.zeros(3, 1, 4, 4)
    decoded[0, :, :3] = 0.9
    decoded[1] = 0.4
    given = mask_losses.reward(decoded, masks, torch.tensor([32, 2, 31]), 32, 0.1)
    torch.testing.assert_close(given, torch.tensor([8 / 12, 3.0, 1.1]))


# -- weights


def test_saved_and_loaded_again(alto, masks, tmp_path):
    alto.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is ALTo and again.config == alto.config
    torch.testing.assert_close(again.decode(again.encode(masks)), alto.decode(alto.encode(masks)))
    assert from_pretrained(tmp_path, drop_mode="pad").config.drop_mode == "pad"


PUBLISHED = {
    "experiment": {"sam_checkpoint": "sam_vit_l_0b3195.pth"},
    "model": {
        "vq_model": {
            "codebook_size": 1024,
            "token_size": 12,
            "use_l2_norm": True,
            "commitment_cost": 0.01,
            "vit_enc_model_size": "large",
            "vit_dec_model_size": "large",
            "vit_enc_patch_size": 16,
            "vit_dec_patch_size": 16,
            "num_latent_tokens": 32,
            "finetune_decoder": False,
            "finetune_encoder": False,
            "finetune_length": True,
        }
    },
    "dataset": {"preprocessing": {"resize_shorter_edge": 256, "crop_size": 256}},
}


def test_the_published_configuration_is_read():
    assert ALTo.config_from(PUBLISHED) == ALTo.published["yayafengzi/ALToLLM-8B"] == ALTo.Config()
    titok = json.loads(json.dumps(PUBLISHED))
    del titok["model"]["vq_model"]["finetune_length"]
    assert ALTo.config_from(titok) is None and ALTo.config_from({"model": "resnet"}) is None


def test_a_published_checkpoint_is_loaded_without_sam(alto, masks, tmp_path, monkeypatch):
    state = {f"module.{name}": value for name, value in alto.state_dict().items()}
    state["module.sam.image_encoder.pos_embed"] = torch.zeros(2)
    torch.save({"model": state, "step": 3}, tmp_path / "alto.pth")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "internvl_chat"}))
    again = ALTo.from_pretrained(tmp_path / "alto.pth", **TINY)
    torch.testing.assert_close(again.decode(again.encode(masks)), alto.decode(alto.encode(masks)))

    asked = []  # of the repository on the Hub, which holds a language model too, only this file is fetched
    monkeypatch.setattr(ALTo, "published", {"yayafengzi/ALToLLM-8B": alto.config})
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download",
        lambda *given, **options: asked.append(given) or str(tmp_path / "alto.pth"),
    )
    again = from_pretrained("yayafengzi/ALToLLM-8B")
    assert asked == [("yayafengzi/ALToLLM-8B", "alto.pth")] and again.config == alto.config
    assert checkpoints._published_file("yucornetto/tokenizer_titok_l32_imagenet") is None


def test_other_weights_are_refused(alto, tmp_path):
    alto.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="of another shape"):
        from_pretrained(tmp_path, tokens=4)
