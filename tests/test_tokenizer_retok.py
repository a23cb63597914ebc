import dataclasses
import json
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from vtc.tokenizers import from_pretrained
from vtc.tokenizers.bottlenecks import VQ
from vtc.tokenizers.parts.gigatok import RotatedVQ, pooled
from vtc.tokenizers.schedules import DropSchedule
from vtc.tokenizers.systems.retok import ReTok

N, M, WIDTH, HEADS, GRID = 16, 14, 32, 4, 8
TINY = {
    "image_size": 16,
    "channels": 32,
    "multipliers": (1, 2),
    "z_channels": 16,
    "encoder": (WIDTH, 2, HEADS),
    "decoder": (WIDTH, 3, HEADS),
    "tokens": N,
    "padding": M,
    "codes": 64,
    "dim": 4,
    "semantic_depth": 2,
    "semantic_dim": 12,
}


def make(**options):
    torch.manual_seed(0)
    made = ReTok(ReTok.Config(**TINY | options)).eval()
    with torch.no_grad():  # norms and biases that cannot be overlooked
        for p in made.parameters():
            p.add_(torch.randn_like(p) * 0.1)
        # images differ in what queries read
        for block in (*made.s2to1encoder.transformer, *made.s1to2decoder.transformer):
            block.multihead_attn.out_proj.weight.mul_(4)
            block.self_attn.out_proj.weight.mul_(4)
        made.decoder.conv_out.weight.mul_(0.1)
        # and queries in what they say
        reader = made.s2to1encoder
        reader.encoder_embed.weight.mul_(5)
        reader.global_proj.weight.mul_(5)
        for layer in (reader.encoder_embed, reader.ln_post, reader.conv_out, made.quant_conv):
            layer.bias.mul_(0.1)
    return made


@pytest.fixture
def retok():
    return make()


@pytest.fixture
def images():
    torch.manual_seed(1)
    return F.interpolate(torch.rand(4, 3, 4, 4), 16, mode="bilinear")


# -- names and shapes


def affine(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def res_block_shapes(name, start, width):
    shapes = affine(f"{name}.norm1", start) | affine(f"{name}.norm2", width)
    shapes |= affine(f"{name}.conv1", width, start, 3, 3) | affine(f"{name}.conv2", width, width, 3, 3)
    return shapes | (affine(f"{name}.nin_shortcut", width, start, 1, 1) if start != width else {})


def published_shapes():
    """VQ_SB256: encoder small, decoder base, 256 tokens and 224 redundant ones, 16,384 codes of 8 numbers."""
    shapes = {"quantize.embedding.weight": (16384, 8)}
    shapes |= affine("quant_conv", 8, 256, 1, 1) | affine("post_quant_conv", 256, 8, 1, 1)
    down, up = [128, 128, 256, 256, 512], [512, 256, 256, 128, 128]
    shapes |= affine("encoder.conv_in", 128, 3, 3, 3) | affine("encoder.conv_out", 256, 512, 3, 3)
    shapes |= affine("decoder.conv_in", 512, 256, 3, 3) | affine("decoder.conv_out", 3, 128, 3, 3)
    shapes |= affine("encoder.norm_out", 512) | affine("decoder.norm_out", 128)
    for side in ("encoder", "decoder"):
        for i in range(2):
            shapes |= res_block_shapes(f"{side}.mid.{i}", 512, 512)
    for i in range(5):
        for j in range(2):
            start = down[max(i - 1, 0)] if j == 0 else down[i]
            shapes |= res_block_shapes(f"encoder.conv_blocks.{i}.res.{j}", start, down[i])
        for j in range(3):
            start = up[max(i - 1, 0)] if j == 0 else up[i]
            shapes |= res_block_shapes(f"decoder.conv_blocks.{i}.res.{j}", start, up[i])
        shapes |= affine(f"decoder.adaptive.{i}.gamma", up[max(i - 1, 0)], 256)
        shapes |= affine(f"decoder.adaptive.{i}.beta", up[max(i - 1, 0)], 256)
        if i < 4:
            shapes |= affine(f"encoder.conv_blocks.{i}.downsample.conv", down[i], down[i], 3, 3)
            shapes |= affine(f"decoder.conv_blocks.{i}.upsample.conv1", 4 * up[i], up[i], 3, 3)
    for side, embed, w, depth in (
        ("s2to1encoder", "encoder_embed", 512, 6),
        ("s1to2decoder", "decoder_embed", 768, 12),
    ):
        shapes |= (
            affine(f"{side}.{embed}", w, 256) | affine(f"{side}.ln_pre", 256) | affine(f"{side}.ln_post", w)
        )
        shapes[f"{side}.positional_embedding"] = (256, 1, w)
        shapes[f"{side}.latent_token_positional_embedding"] = (256, 1, w)
        shapes[f"{side}.latent_token_positional_embedding_comp"] = (224, 1, w)
        for i in range(depth):
            block = f"{side}.transformer.{i}"
            for attention in ("self_attn", "multihead_attn"):
                shapes[f"{block}.{attention}.in_proj_weight"] = (3 * w, w)
                shapes[f"{block}.{attention}.in_proj_bias"] = (3 * w,)
                shapes |= affine(f"{block}.{attention}.out_proj", w, w)
            shapes |= affine(f"{block}.linear1", 4 * w, w) | affine(f"{block}.linear2", w, 4 * w)
            for j in (1, 2, 3):
                shapes |= affine(f"{block}.norm{j}", w)
    shapes |= affine("s2to1encoder.global_proj", 512, 512) | affine("s2to1encoder.conv_out", 256, 512, 1, 1)
    shapes |= affine("s1to2decoder.conv_out", 256, 768, 3, 3)
    shapes |= affine("s1to2decoder.distill_mlp.0", 3072, 768) | affine(
        "s1to2decoder.distill_mlp.2", 3072, 3072
    )
    return shapes | affine("s1to2decoder.distill_mlp.4", 768, 3072)


def test_published_names_and_shapes():
    with torch.device("meta"):
        state = ReTok(ReTok.Config()).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == published_shapes()


# -- plain restatement


def linear(s, name, x):
    return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]


def norm(s, name, x):
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return scaled * s[f"{name}.weight"] + s[f"{name}.bias"]


def attend(s, name, query, key, value, blocked=None):
    (wq, wk, wv), (bq, bk, bv) = s[f"{name}.in_proj_weight"].chunk(3), s[f"{name}.in_proj_bias"].chunk(3)
    q, k, v = query @ wq.T + bq, key @ wk.T + bk, value @ wv.T + bv
    heads, d = [], WIDTH // HEADS
    for h in range(0, WIDTH, d):
        scores = q[:, h : h + d] @ k[:, h : h + d].T / d**0.5
        scores = scores if blocked is None else scores.masked_fill(blocked, -torch.inf)
        heads.append(scores.softmax(-1) @ v[:, h : h + d])
    return linear(s, f"{name}.out_proj", torch.cat(heads, 1))


def block(s, name, x, memory, place, memory_place, blocked=None):
    y = norm(s, f"{name}.norm1", x)
    x = x + attend(s, f"{name}.self_attn", y + place, y + place, y, blocked)
    y = norm(s, f"{name}.norm2", x)
    x = x + attend(s, f"{name}.multihead_attn", y + place, memory + memory_place, memory)
    y = F.gelu(linear(s, f"{name}.linear1", norm(s, f"{name}.norm3", x)))
    return x + linear(s, f"{name}.linear2", y)


def conv(s, name, x, **options):
    return F.conv2d(x[None], s[f"{name}.weight"], s[f"{name}.bias"], **options)[0]


def grouped(x):
    groups = x.reshape(32, -1)
    return (
        (groups - groups.mean(1, keepdim=True)) / (groups.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    ).view_as(x)


def group_norm(s, name, x):
    return grouped(x) * s[f"{name}.weight"][:, None, None] + s[f"{name}.bias"][:, None, None]


def residual(s, name, x):
    y = conv(s, f"{name}.conv1", F.silu(group_norm(s, f"{name}.norm1", x)), padding=1)
    y = conv(s, f"{name}.conv2", F.silu(group_norm(s, f"{name}.norm2", y)), padding=1)
    return y + (conv(s, f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in s else x)


def finish(s, side, x):
    return conv(s, f"{side}.conv_out", F.silu(group_norm(s, f"{side}.norm_out", x)), padding=1)


def plain_map(s, image):
    x = conv(s, "encoder.conv_in", image * 2 - 1, padding=1)
    for name in ("conv_blocks.0.res.0", "conv_blocks.0.res.1"):
        x = residual(s, f"encoder.{name}", x)
    x = conv(s, "encoder.conv_blocks.0.downsample.conv", F.pad(x, (0, 1, 0, 1)), stride=2)
    for name in ("conv_blocks.1.res.0", "conv_blocks.1.res.1", "mid.0", "mid.1"):
        x = residual(s, f"encoder.{name}", x)
    return finish(s, "encoder", x)


def plain_pool(grid):
    """Averages of the map (C, 8, 8): the whole twice, then 1 x 2, 2 x 2 and 2 x 4 parts (rows x columns)."""
    means = []
    for rows, columns in ((1, 1), (1, 1), (1, 2), (2, 2), (2, 4)):
        h, w = GRID // rows, GRID // columns
        for row in range(rows):
            for column in range(columns):
                part = grid[:, row * h : (row + 1) * h, column * w : (column + 1) * w]
                means.append(part.flatten(1).mean(1))
    return torch.stack(means)


def plain_encode(s, image, padded=True, causal=False):
    """The codes and values of all tokens, the redundant ones last."""
    grid = plain_map(s, image)
    name = "s2to1encoder"
    memory = linear(s, f"{name}.encoder_embed", norm(s, f"{name}.ln_pre", grid.flatten(1).T))
    x = plain_pool(memory.T.view(WIDTH, GRID, GRID))
    place = s[f"{name}.latent_token_positional_embedding"][:, 0]
    if padded:
        x = torch.cat([x, x[2:]])
        place = torch.cat([place, s[f"{name}.latent_token_positional_embedding_comp"][:, 0]])
    x = linear(s, f"{name}.global_proj", x)
    blocked = torch.ones(len(x), len(x), dtype=torch.bool).triu(1) if causal else None
    for i in range(2):
        x = block(
            s, f"{name}.transformer.{i}", x, memory, place, s[f"{name}.positional_embedding"][:, 0], blocked
        )
    x = (
        norm(s, f"{name}.ln_post", x) @ s[f"{name}.conv_out.weight"][:, :, 0, 0].T
        + s[f"{name}.conv_out.bias"]
    )
    z = x @ s["quant_conv.weight"][:, :, 0, 0].T + s["quant_conv.bias"]
    codebook = F.normalize(s["quantize.embedding.weight"], dim=1)
    ids = (F.normalize(z, dim=1) @ codebook.T).argmax(1)
    return ids, codebook[ids]


def plain_decode(s, values):
    """The picture (3, H, W) from tokens (k, dim), the map it is painted from, and the inner features."""
    name = "s1to2decoder"
    x = values @ s["post_quant_conv.weight"][:, :, 0, 0].T + s["post_quant_conv.bias"]
    memory = linear(s, f"{name}.decoder_embed", norm(s, f"{name}.ln_pre", x))
    both = ("latent_token_positional_embedding", "latent_token_positional_embedding_comp")
    memory_place = torch.cat([s[f"{name}.{part}"][:, 0] for part in both])[: len(values)]
    x = memory[0].repeat(GRID**2, 1)
    for i in range(3):
        x = block(
            s, f"{name}.transformer.{i}", x, memory, s[f"{name}.positional_embedding"][:, 0], memory_place
        )
        if i == 1:
            inner = linear(s, f"{name}.distill_mlp.0", x)
            inner = linear(
                s, f"{name}.distill_mlp.4", F.silu(linear(s, f"{name}.distill_mlp.2", F.silu(inner)))
            )
    grid = norm(s, f"{name}.ln_post", x).T.reshape(WIDTH, GRID, GRID)
    grid = conv(s, f"{name}.conv_out", grid, padding=1)
    x = conv(s, "decoder.conv_in", grid, padding=1)
    x = residual(s, "decoder.mid.1", residual(s, "decoder.mid.0", x))
    style = grid.flatten(1)
    for level in range(2):
        scale = linear(s, f"decoder.adaptive.{level}.gamma", (style.var(1) + 1e-6).sqrt())
        shift = linear(s, f"decoder.adaptive.{level}.beta", style.mean(1))
        x = grouped(x) * scale[:, None, None] + shift[:, None, None]
        for j in range(3):
            x = residual(s, f"decoder.conv_blocks.{level}.res.{j}", x)
        if level == 0:
            y = conv(s, "decoder.conv_blocks.0.upsample.conv1", x, padding=1)
            c, h, w = x.shape
            x = y.new_zeros(c, 2 * h, 2 * w)
            for row in range(2):
                for column in range(2):
                    part = 2 * row + column
                    x[:, row::2, column::2] = y[part * c : (part + 1) * c]
    return finish(s, "decoder", x) / 2 + 0.5, grid, inner


@pytest.mark.parametrize("use", ["discard", "omit", "keep"])
@pytest.mark.parametrize("causal", [False, True])
def test_encoding_equals_plain_restatement(images, use, causal):
    retok = make(padding_use=use, causal=causal)
    tokens = retok.encode(images)
    for i, image in enumerate(images):
        ids, values = plain_encode(retok.state_dict(), image, use != "omit", causal)
        n = N + M if use == "keep" else N
        assert torch.equal(tokens.ids[i], ids[:n])
        torch.testing.assert_close(tokens.values[i], values[:n], atol=1e-5, rtol=0)
    assert len(tokens.ids.unique()) > 5 and not torch.equal(tokens.ids[0], tokens.ids[1])


def test_decoding_equals_plain_restatement(images):
    retok = make(padding_use="keep")
    tokens = retok.encode(images, [1, 7, N, N + M])
    decoded = retok.decode_values(tokens.values, tokens.valid, tokens.index)
    painted, inner = retok.paint(tokens.values, tokens.valid, tokens.index)
    for i, k in enumerate(tokens.lengths.tolist()):
        plain = plain_decode(retok.state_dict(), tokens.values[i, :k])
        for given, expected in zip((decoded[i], painted[i], inner[i]), plain):
            torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


# -- lengths


def test_any_length_up_to_all_queries_is_decoded_like_its_slice(images):
    retok = make(padding_use="keep")
    assert retok.max_tokens == N + M and list(retok.lengths) == list(range(1, N + M + 1))
    everything = retok.encode(images)
    for k in (1, 2, N, N + 1, N + M):
        sliced = dataclasses.replace(
            everything,
            values=everything.values[:, :k],
            ids=everything.ids[:, :k],
            index=everything.index[:, :k],
            lengths=torch.full((4,), k),
        )
        torch.testing.assert_close(retok.decode(everything, k), retok.decode(sliced), atol=1e-5, rtol=0)
        assert torch.equal(retok.encode(images, k).ids, everything.ids[:, :k])
    with pytest.raises(ValueError, match="encodes to 1 to 30 tokens"):
        retok.encode(images, N + M + 1)


def test_the_published_lengths():
    config = ReTok.Config()
    with torch.device("meta"):
        kept = ReTok(dataclasses.replace(config, padding_use="keep"))
        assert ReTok(config).max_tokens == 256 and kept.max_tokens == 480
    assert kept.bits_per_token == 14


def test_each_image_is_decoded_as_if_alone(retok, images):
    tokens = retok.encode(images, [3, N, 1, 9])
    together = retok.decode(tokens)
    for i in range(4):
        torch.testing.assert_close(together[i : i + 1], retok.decode(tokens[i]), atol=1e-5, rtol=0)
        assert torch.equal(retok.encode(images[i : i + 1]).ids[0], retok.encode(images).ids[i])


# -- redundant tokens


def test_redundant_tokens_change_the_others_unless_attention_is_causal(images):
    for causal in (False, True):
        encoded = {use: make(padding_use=use, causal=causal) for use in ("discard", "omit", "keep")}
        latents = {
            use: retok.read(retok.encoder(images * 2 - 1), N if use == "omit" else N + M)[:, :N]
            for use, retok in encoded.items()
        }
        assert all(retok.prefix_stable is causal for retok in encoded.values())
        assert torch.equal(latents["discard"], latents["keep"])
        difference = (latents["discard"] - latents["omit"]).abs().amax((0, 2))
        assert (difference > 1e-4).all() if not causal else (difference < 1e-5).all()
    fewer = encoded["discard"].read(encoded["discard"].encoder(images * 2 - 1), 5)
    torch.testing.assert_close(fewer, latents["discard"][:, :5], atol=1e-5, rtol=0)
    assert ReTok.prefix_stable is False


def test_redundant_queries_start_like_the_last_ones(retok, images):
    grid = torch.randn(4, WIDTH, GRID, GRID)
    queries = retok.s2to1encoder.queries(grid)
    assert queries.shape == (4, N + M, WIDTH)
    assert torch.equal(queries[:, N:], queries[:, N - M : N])


def test_initial_queries_are_linear_in_the_map(retok):
    torch.manual_seed(0)
    a, b = torch.randn(2, 3, WIDTH, GRID, GRID)
    mixed = pooled(2 * a - 3 * b, N)
    torch.testing.assert_close(mixed, 2 * pooled(a, N) - 3 * pooled(b, N), atol=1e-5, rtol=0)
    queries, bias = retok.s2to1encoder.queries, retok.s2to1encoder.global_proj.bias
    expected = 2 * (queries(a) - bias) - 3 * (queries(b) - bias)
    torch.testing.assert_close(queries(2 * a - 3 * b) - bias, expected, atol=1e-5, rtol=0)


def test_early_queries_are_coarse():
    torch.manual_seed(0)
    grid = torch.randn(1, 2, 16, 16)
    given = pooled(grid, 256)[0]
    assert given.shape == (256, 2)
    whole = grid[0].flatten(1).mean(1)
    torch.testing.assert_close(given[:2], whole.expand(2, 2))
    for level in range(8):  # each level's parts have the mean of the whole
        torch.testing.assert_close(given[2**level : 2 ** (level + 1)].mean(0), whole)
    torch.testing.assert_close(
        given[2:4], torch.stack([grid[0, :, :, :8], grid[0, :, :, 8:]]).flatten(2).mean(2)
    )
    last = grid[0].view(2, 8, 2, 16).mean(2)  # 8 rows of 16 parts
    torch.testing.assert_close(given[128:], last.flatten(1).T)


def test_the_last_token_is_activated_far_more_often():
    drawn = DropSchedule("uniform").draw(480, 200_000, torch.Generator().manual_seed(0))
    assert (drawn >= 256).float().mean().item() == pytest.approx(225 / 480, abs=0.005)
    alone = DropSchedule("uniform").draw(256, 200_000, torch.Generator().manual_seed(0))
    assert (alone >= 256).float().mean().item() == pytest.approx(1 / 256, abs=0.001)


def test_training_keeps_prefixes_of_all_queries(retok, images, monkeypatch):
    seen = []

    def paint(values, valid, index):
        seen.append(valid.sum(1))
        return torch.zeros(len(values), 16, GRID, GRID), None

    monkeypatch.setattr(retok, "paint", paint)
    monkeypatch.setattr(retok, "read", lambda grid, n: torch.zeros(len(grid), n, 4))
    with torch.no_grad():
        retok.training_loss(images.repeat(100, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    assert seen[0].min() == 1 and seen[0].max() == N + M
    # (M + 1) / (N + M) is 0.5
    assert (seen[0] >= N).float().mean().item() == pytest.approx(0.5, abs=0.08)


# -- losses


def test_training_losses_equal_plain_restatement(retok, images):
    features = torch.randn(4, GRID**2, 12)
    losses = retok.training_loss(images, features, torch.Generator().manual_seed(3))
    lengths = torch.randint(1, N + M + 1, (4,), generator=torch.Generator().manual_seed(3))
    s, expected = retok.state_dict(), torch.zeros(3)
    for image, feature, k in zip(images, features, lengths.tolist()):
        _, values = plain_encode(s, image)
        picture, grid, inner = plain_decode(s, values[:k])
        cosine = (F.normalize(inner, dim=1) * F.normalize(feature, dim=1)).sum(1)
        expected[0] += ((picture - image) * 2).square().mean() / 4
        expected[1] += (grid - plain_map(s, image)).square().mean() / 4
        expected[2] += 0.5 * (1 - k / (N + M)) * (1 - cosine).mean() / 4
    given = torch.stack([losses[name] for name in ("reconstruction", "map", "semantic")])
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-4)
    assert set(retok.training_loss(images)) == {"reconstruction", "bottleneck", "map"}


def test_semantics_weigh_less_the_more_tokens_are_kept(retok, images):
    inner, features = torch.randn(2, 4, GRID**2, 12)
    losses = [retok.semantic_loss(inner, features, torch.full((4,), k)).item() for k in range(1, N + M + 1)]
    assert all(a > b for a, b in pairwise(losses)) and losses[-1] == 0
    assert retok.semantic_loss(inner, 3 * inner, torch.ones(4)).item() == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="they must be"):
        retok.semantic_loss(inner, features[..., :3], torch.ones(4))
    without = make(semantic_depth=None)
    assert not any("distill_mlp" in name for name in without.state_dict())
    with pytest.raises(ValueError, match="semantic_depth is None"):
        without.training_loss(images, features)


def test_all_parts_learn(retok, images):
    losses = retok.training_loss(images, torch.randn(4, GRID**2, 12))
    sum(losses.values()).backward()
    # every parameter but those nothing depends on: attention does not change with the biases of its keys
    assert all(p.grad is not None and p.grad.isfinite().all() for p in retok.parameters())
    for part in ("encoder.conv_in", "quant_conv", "s1to2decoder.distill_mlp.0", "decoder.conv_out"):
        assert retok.get_parameter(f"{part}.weight").grad.abs().max() > 0


def test_gradients_are_rotated_and_values_are_the_entries():
    torch.manual_seed(0)
    rotated, straight = RotatedVQ(32, 4), VQ(32, 4, l2=True)
    straight.load_state_dict(rotated.state_dict())
    z = F.normalize(torch.randn(10, 4), dim=1).requires_grad_()
    code = rotated(z)
    assert torch.equal(code.ids, straight(z).ids)
    torch.testing.assert_close(code.values, rotated.lookup(code.ids), atol=1e-6, rtol=0)
    torch.testing.assert_close(code.loss, straight(z).loss)
    towards = torch.randn(10, 4)
    (given,) = torch.autograd.grad((code.values * towards).sum(), z)
    for i in range(10):
        u, q = z[i].detach(), code.values[i].detach()
        w = F.normalize(u + q, dim=0)
        rotation = torch.eye(4) - 2 * torch.outer(w, w) + 2 * torch.outer(q, u)
        torch.testing.assert_close(rotation @ u, q, atol=1e-5, rtol=0)
        torch.testing.assert_close(rotation @ rotation.T, torch.eye(4), atol=1e-5, rtol=0)
        expected = rotation.T @ towards[i]
        expected = expected - u * (u @ expected)  # through the normalisation of z
        torch.testing.assert_close(given[i], expected, atol=1e-5, rtol=0)


# -- weights and options


def test_saved_and_loaded_again(retok, images, tmp_path):
    retok.save_pretrained(tmp_path)
    again = from_pretrained(tmp_path)
    assert type(again) is ReTok and again.config == retok.config
    torch.testing.assert_close(again(images), retok(images))
    assert from_pretrained(tmp_path, padding_use="keep").max_tokens == N + M


PUBLISHED = {
    "model": {
        "model_cls": "VQVitModelPlus",
        "init_args": {
            "codebook_size": 16384,
            "codebook_embed_dim": 8,
            "codebook_l2_norm": True,
            "commit_loss_beta": 0.25,
            "encoder_ch_mult": [1, 1, 2, 2, 4],
            "decoder_ch_mult": [1, 1, 2, 2, 4],
            "model_size": None,
            "encoder_size": "small",
            "decoder_size": "base",
            "num_latent_tokens": 256,
            "z_channels": 256,
            "multi_level_query_init": True,
            "adaptive_gn": True,
            "d2s_up": True,
            "rot": True,
            "use_attn": False,
            "distill_depth": 3,
        },
    },
    "trainer": {"distill_loss": True},
}


def test_the_published_configuration_is_read():
    assert ReTok.config_from(PUBLISHED) == ReTok.Config()
    assert ReTok.config_from({"model": {"model_cls": "VQVitModel2DPlus"}}) is None
    assert ReTok.config_from({}) is None


def test_a_folder_as_the_authors_write_it_is_loaded(retok, images, tmp_path, monkeypatch):
    monkeypatch.setattr(ReTok, "config_from", classmethod(lambda cls, given: retok.config))
    state = retok.state_dict() | {"quantize.codebook_used": torch.zeros(65536)}
    other = {name: torch.zeros_like(value) for name, value in state.items()}
    torch.save({"model": other, "ema": state, "steps": 1}, tmp_path / "VQ_SB256_e250.pt")
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    again = ReTok.from_pretrained(tmp_path)
    torch.testing.assert_close(again(images), retok(images))


@pytest.mark.parametrize(
    "options",
    [
        {"tokens": 12},
        {"tokens": 256},
        {"padding": 17},
        {"padding_use": "drop"},
        {"image_size": 24},
        {"semantic_depth": 4},
    ],
)
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        ReTok(ReTok.Config(**TINY | options))
