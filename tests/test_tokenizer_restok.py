import copy
import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from vtc.tokenizers.parts.hierarchical import level_mask, merge, residual_pool
from vtc.tokenizers.systems.restok import ResTok

# three stages on a grid of 4 x 4, levels of 1, 1, 2 and 4
TINY = {
    "image_size": 16, "encoder": (32, 4, 2), "decoder": (16, 2, 1), "tokens": 8, "min_tokens": 2,
    "codes": 32, "dim": 4, "stages": 3, "hidden": 32, "multipliers": (1, 1, 2),
}  # fmt: skip
SIZES, GRIDS = [1, 1, 2, 4], [(1, 1), (1, 1), (1, 2), (2, 2)]
MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


def make(**options):
    torch.manual_seed(0)
    made = ResTok(ResTok.Config(**TINY | options)).eval()
    with torch.no_grad():  # nothing that could be overlooked, and nothing that grows
        for p in made.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.dim() == 1 else 0.3 * p[0].numel() ** -0.5))
    return made


@pytest.fixture(scope="module")
def restok():
    return make()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# -- names and shapes


def pixel_coder(name, hidden, multipliers, side, z=256):
    """Shapes of the MaskGIT coder's parameters."""
    widths, shapes = [hidden * m for m in multipliers], {}

    def conv(to, start, width, kernel, bias=True):
        shapes[f"{name}.{to}.weight"] = (width, start, kernel, kernel)
        if bias:
            shapes[f"{name}.{to}.bias"] = (width,)

    def norm(to, width):
        shapes[f"{name}.{to}.weight"] = shapes[f"{name}.{to}.bias"] = (width,)

    def block(to, start, width):
        norm(f"{to}.norm1", start), norm(f"{to}.norm2", width)
        conv(f"{to}.conv1", start, width, 3, False), conv(f"{to}.conv2", width, width, 3, False)
        if start != width:
            conv(f"{to}.nin_shortcut", width, width, 1, False)

    down = side == "encoder"
    conv("conv_in", *((3, hidden) if down else (z, widths[-1])), 3, bias=not down)
    for i, width in enumerate(widths):
        start = [hidden, *widths][i] if down else [*widths, widths[-1]][i + 1]
        for j in range(2):
            block(f"{'down' if down else 'up'}.{i}.block.{j}", start if j == 0 else width, width)
        if i and not down:
            conv(f"up.{i}.upsample_conv", width, width, 3)
    for j in range(2):
        block(f"mid.{j}", widths[-1], widths[-1])
    end = widths[-1] if down else widths[0]
    norm("norm_out", end)
    conv("conv_out", end, z if down else 3, 1 if down else 3)
    return shapes


def transformer(name, width, depth, heads):
    shapes = {f"{name}.ln_{w}.{p}": (width,) for w in ("pre", "post") for p in ("weight", "bias")}
    for i in range(depth):
        b = f"{name}.blocks.{i}"
        shapes |= {f"{b}.norm{n}.{p}": (width,) for n in (1, 2) for p in ("weight", "bias")}
        shapes |= {f"{b}.gamma_{n}": (width,) for n in (1, 2)}
        shapes |= {f"{b}.attn.{n}_bias": (width,) for n in "qv"}
        shapes |= {f"{b}.attn.{n}_norm.{p}": (width // heads,) for n in "qk" for p in ("weight", "bias")}
        shapes |= {f"{b}.attn.qkv.weight": (3 * width, width), f"{b}.attn.proj.weight": (width, width)}
        shapes |= {f"{b}.attn.proj.bias": (width,), f"{b}.mlp.fc1.weight": (4 * width, width)}
        shapes |= {f"{b}.mlp.fc1.bias": (4 * width,), f"{b}.mlp.fc2.weight": (width, 4 * width)}
        shapes |= {f"{b}.mlp.fc2.bias": (width,)}
    return shapes


def expected_shapes(encoder, decoder, levels, codes, dim, stages, hidden, multipliers, features=0):
    (w, *_), (v, *_) = encoder, decoder
    shapes = pixel_coder("pixel_encoder", hidden, multipliers, "encoder")
    shapes |= pixel_coder("pixel_decoder", hidden, multipliers, "decoder")
    shapes |= transformer("encoder", *encoder) | transformer("decoder", *decoder)
    shapes |= {"quantize.embedding.weight": (codes, dim)}
    shapes |= {"encoder.patch_embed.weight": (w, 256, 1, 1), "encoder.patch_embed.bias": (w,)}
    shapes |= {f"encoder.level_embedding.{i}": (1, w) for i in range(stages)}
    for i in range(levels):
        shapes |= {f"encoder.latent_token_level_embedding.{i}": (1, w)}
        shapes |= {f"decoder.latent_token_level_embedding.{i}": (1, v)}
        shapes |= {f"encoder.conv_out.{i}.weight": (dim, w, 1, 1), f"encoder.conv_out.{i}.bias": (dim,)}
        shapes |= {f"decoder.decoder_embed.{i}.weight": (v, dim), f"decoder.decoder_embed.{i}.bias": (v,)}
    shapes |= {"decoder.latent_mask_token": (1, 1, dim), "decoder.mask_token": (1, 1, v)}
    shapes |= {"decoder.ffn.weight": (256, v, 1, 1), "decoder.ffn.bias": (256,)}
    if features:
        shapes |= {"decoder.feat_mask_token": (1, 1, v)}
        shapes |= {"vf_proj.weight": (features, w, 1, 1), "vf_proj_dec.weight": (features, v, 1, 1)}
    return shapes


LARGE = {"levels": 8, "codes": 8192, "dim": 8, "stages": 4, "hidden": 128, "multipliers": (1, 1, 2, 2, 4)}


@pytest.mark.parametrize(
    "config, expected",
    [
        (
            ResTok.published["xushu-me/restok_l_128.r256_in1k"],
            expected_shapes((1024, 24, 16), (1024, 24, 16), **LARGE),
        ),
        (
            ResTok.Config(encoder=(512, 6, 8), decoder=(768, 12, 12), features=1024),
            expected_shapes((512, 6, 8), (768, 12, 12), **LARGE, features=1024),
        ),
        (ResTok.Config(**TINY), expected_shapes((32, 4, 2), (16, 2, 1), 4, 32, 4, 3, 32, (1, 1, 2))),
    ],
)
def test_names_and_shapes(config, expected):
    with torch.device("meta"):
        state = ResTok(config).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items()} == expected


def test_the_published_one_has_662_million_parameters_and_128_tokens():
    with torch.device("meta"):
        made = ResTok(ResTok.Config(features=1024))
    assert round(sum(p.numel() for p in made.parameters()) / 1e6) == 662
    assert made.lengths == (4, 8, 16, 32, 64, 128)
    assert made.bits_per_token == 13
    assert made.encoder.merges == [5, 11, 17]
    assert made.encoder.sizes == [1, 1, 2, 4, 8, 16, 32, 64]


# -- the forward pass, once more in plain operations


class Plain:
    def __init__(self, made):
        self.s = made.state_dict()

    def linear(self, name, x, bias=True):
        return x @ self.s[f"{name}.weight"].flatten(1).T + (self.s[f"{name}.bias"] if bias else 0)

    def norm(self, name, x):
        return F.layer_norm(x, x.shape[-1:], self.s[f"{name}.weight"], self.s[f"{name}.bias"])

    def conv(self, name, x):
        w = self.s[f"{name}.weight"]
        return F.conv2d(x, w, self.s.get(f"{name}.bias"), padding=w.shape[-1] // 2)

    def group_norm(self, name, x):
        return F.group_norm(x, 32, self.s[f"{name}.weight"], self.s[f"{name}.bias"], 1e-6)

    def res_block(self, name, x):
        h = self.conv(f"{name}.conv1", F.silu(self.group_norm(f"{name}.norm1", x)))
        h = self.conv(f"{name}.conv2", F.silu(self.group_norm(f"{name}.norm2", h)))
        changed = f"{name}.nin_shortcut.weight" in self.s
        return h + (self.conv(f"{name}.nin_shortcut", h) if changed else x)

    def to_map(self, images):
        x = (images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1)
        x = self.conv("pixel_encoder.conv_in", x)
        for i in range(3):
            for j in range(2):
                x = self.res_block(f"pixel_encoder.down.{i}.block.{j}", x)
            x = F.avg_pool2d(x, 2) if i < 2 else x
        for j in range(2):
            x = self.res_block(f"pixel_encoder.mid.{j}", x)
        return self.conv("pixel_encoder.conv_out", F.silu(self.group_norm("pixel_encoder.norm_out", x)))

    def to_pixels(self, x):
        x = self.conv("pixel_decoder.conv_in", x)
        for j in range(2):
            x = self.res_block(f"pixel_decoder.mid.{j}", x)
        for i in (2, 1, 0):
            for j in range(2):
                x = self.res_block(f"pixel_decoder.up.{i}.block.{j}", x)
            if i:
                x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                x = self.conv(f"pixel_decoder.up.{i}.upsample_conv", x)
        return self.conv("pixel_decoder.conv_out", F.silu(self.group_norm("pixel_decoder.norm_out", x)))

    def attention(self, name, x, places, heads, levels=None):
        """One picture x (T, width), token by token; levels: of each token, None: all see all."""
        width = x.shape[1]
        d = width // heads
        bias = torch.cat([self.s[f"{name}.q_bias"], torch.zeros(width), self.s[f"{name}.v_bias"]])
        q, k, v = (x @ self.s[f"{name}.qkv.weight"].T + bias).split(width, 1)
        out = torch.zeros_like(x)
        for h in range(heads):
            own = slice(h * d, (h + 1) * d)
            turned = []
            for part, norm in ((q, "q_norm"), (k, "k_norm")):
                part = self.norm(f"{name}.{norm}", part[:, own]).clone()
                for axis in range(2):
                    for i in range(d // 4):
                        a = axis * d // 2 + 2 * i
                        angle = places[:, axis].double() * 10000.0 ** (-2 * i / (d // 2))
                        cos, sin = angle.cos().float(), angle.sin().float()
                        x0, x1 = part[:, a].clone(), part[:, a + 1].clone()
                        part[:, a] = x0 * cos - x1 * sin
                        part[:, a + 1] = x0 * sin + x1 * cos
                turned.append(part)
            logits = turned[0] @ turned[1].T / d**0.5
            if levels is not None:
                logits[levels[:, None] < levels[None, :]] = -torch.inf
            out[:, own] = logits.softmax(1) @ v[:, own]
        return self.linear(f"{name}.proj", out)

    def mlp(self, name, x):
        hidden = F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        return x + self.s[f"{name}.gamma_2"] * self.linear(f"{name}.mlp.fc2", hidden)

    def attend(self, name, x, *rest):
        return x + self.s[f"{name}.gamma_1"] * self.attention(
            f"{name}.attn", self.norm(f"{name}.norm1", x), *rest
        )

    def encode(self, image):
        """One picture (3, H, W): latents before they are quantised (8, 4), and the coarsest image tokens."""
        grid, width, heads, depth = 4, 32, 2, 4
        x = self.to_map(image[None])[0].flatten(1).T
        x = self.linear("encoder.patch_embed", x)  # (16, width)
        rest, latents = x.view(grid, grid, width), []
        for level, (h, w) in enumerate(GRIDS):
            cells = rest.view(h, grid // h, w, grid // w, width).mean((1, 3))  # (h, w, width)
            rest = rest - cells.repeat_interleave(grid // h, 0).repeat_interleave(grid // w, 1)
            embedding = self.s[f"encoder.latent_token_level_embedding.{level}"]
            latents.append(cells.reshape(h * w, width) + embedding)
        x = torch.cat([x + self.s["encoder.level_embedding.0"], *latents])
        x = self.norm("encoder.ln_pre", x)
        columns, merges = [grid], [int(depth / 3) - 1, int(2 / 3 * depth) - 1]
        for i in range(depth):
            places, levels, start = [], [], 0
            for w in columns:
                places += [(start + r, start + c) for r in range(grid) for c in range(w)]
                start += grid * w
            places += [(start + j, start + j) for j in range(8)]
            for n in [grid * w for w in columns] + SIZES:
                levels += [levels[-1] + 1 if levels else 0] * n
            x = self.attend(
                f"encoder.blocks.{i}", x, torch.tensor(places).float(), heads, torch.tensor(levels)
            )
            n = grid * columns[0]
            if i in merges:
                coarse = x[:n][0::2]
                residual = torch.stack([x[t] - x[t - t % 2] for t in range(n)])
                x = torch.cat([coarse, residual, x[n:]])
            x = self.mlp(f"encoder.blocks.{i}", x)
            if i in merges:
                x[: n // 2] += self.s[f"encoder.level_embedding.{len(columns)}"]
                columns = [columns[0] // 2, *columns]
        flat = self.norm("encoder.ln_post", x[-8:]).flatten()
        codes, start = [], 0
        for level, n in enumerate(SIZES):
            for place in range(
                start, start + n
            ):  # number c * 8 + place of them all is channel c of the place
                codes.append(self.linear(f"encoder.conv_out.{level}", flat[place::8]))
            start += n
        return torch.stack(codes), x[: grid * columns[0]]

    def decode(self, values):
        """Values (k, 4) of one picture: (3, H, W)."""
        width, grid, dim = 16, 4, 4
        values = torch.cat([values, self.s["decoder.latent_mask_token"][0].expand(8 - len(values), dim)])
        x, start = [], 0
        for level, n in enumerate(SIZES):
            embedded = self.linear(f"decoder.decoder_embed.{level}", values[start : start + n])
            x.append(embedded + self.s[f"decoder.latent_token_level_embedding.{level}"])
            start += n
        x = self.norm("decoder.ln_pre", torch.cat([*x, self.s["decoder.mask_token"][0].expand(16, width)]))
        places = [(j, j) for j in range(8)] + [(8 + r, 8 + c) for r in range(grid) for c in range(grid)]
        for i in range(2):
            x = self.attend(f"decoder.blocks.{i}", x, torch.tensor(places).float(), 1)
            x = self.mlp(f"decoder.blocks.{i}", x)
        x = self.linear("decoder.ffn", self.norm("decoder.ln_post", x[8:]))
        return self.to_pixels(x.T.reshape(1, 256, grid, grid))[0]


@torch.no_grad()
def test_the_encoder_is_the_papers(restok, images):
    plain = Plain(restok)
    z, image_tokens = restok.latents(images)
    tokens = restok.encode(images)
    codebook = F.normalize(restok.quantize.embedding.weight, dim=1)
    for i, image in enumerate(images):
        expected, coarsest = plain.encode(image)
        torch.testing.assert_close(z[i], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(image_tokens[i], coarsest, atol=1e-5, rtol=1e-5)
        nearest = [int((codebook - F.normalize(v, dim=0)).norm(dim=1).argmin()) for v in expected]
        assert tokens.ids[i].tolist() == nearest
        torch.testing.assert_close(tokens.values[i], codebook[nearest])


@pytest.mark.parametrize("k", [2, 4, 8])
@torch.no_grad()
def test_the_decoder_is_the_papers(restok, images, k):
    # in double precision: random maps are so flat that group norms enlarge what float32 rounds off
    tokens, restok = restok.encode(images, k), copy.deepcopy(restok).double()
    values = tokens.values.double()
    decoded = restok.decode_values(values, tokens.valid, tokens.index)
    for i in range(3):
        torch.testing.assert_close(decoded[i], Plain(restok).decode(values[i]), atol=1e-8, rtol=1e-8)
    torch.testing.assert_close(restok.decode(replace(tokens, values=values)), decoded.clamp(0, 1))


# -- levels


def test_the_level_mask_is_block_lower_triangular():
    mask = level_mask([2, 1, 3])
    expected = torch.tensor([[1, 1, 0, 0, 0, 0]] * 2 + [[1, 1, 1, 0, 0, 0]] + [[1] * 6] * 3).bool()
    assert torch.equal(mask, expected)


@torch.no_grad()
def test_a_level_is_not_touched_by_later_ones(images):
    made = make()
    features = made.pixel_encoder((images - MEAN.view(3, 1, 1)) / STD.view(3, 1, 1))
    latents, image_tokens = made.encoder.read(features)
    codes = make(legacy_layout=False).latents(images)[0]
    for level in range(4):
        changed, turned = make(), make(legacy_layout=False)
        for other in (changed, turned):
            for later in range(level, 4):
                other.encoder.latent_token_level_embedding[later].add_(torch.randn(32))
        read, image_read = changed.encoder.read(features)
        start = sum(SIZES[:level])
        assert torch.equal(read[:, :start], latents[:, :start]) and torch.equal(image_read, image_tokens)
        assert ((read[:, start:] - latents[:, start:]).abs().amax(-1) > 1e-4).all()
        # without the legacy layout codes are as causal as the levels they come from; with it none is
        assert torch.equal(turned.latents(images)[0][:, :start], codes[:, :start])
        legacy = (changed.latents(images)[0] - made.latents(images)[0]).abs().amax(-1)
        assert (legacy > 1e-5).all()


@torch.no_grad()
def test_the_coarsest_image_level_is_not_touched_by_finer_ones():
    """What a merge leaves behind does not come back into the tokens that it made."""
    torch.manual_seed(0)
    made = make()
    features = torch.randn(2, 256, 4, 4)
    _, coarsest = made.encoder.read(features)
    hooked = made.encoder.blocks[made.encoder.merges[-1] + 1]
    n = coarsest.shape[1]

    def disturb(_, args):
        x = args[0].clone()
        x[:, n:] += torch.randn_like(x[:, n:])
        return x, *args[1:]

    handle = hooked.register_forward_pre_hook(disturb)
    _, again = made.encoder.read(features)
    handle.remove()
    assert torch.equal(coarsest, again)


def test_merging_conserves():
    x = torch.randn(2, 12, 5)
    coarse, residual = merge(x)
    torch.testing.assert_close(F.interpolate(coarse.transpose(1, 2), 12).transpose(1, 2) + residual, x)
    assert torch.equal(coarse, F.interpolate(x.transpose(1, 2), 6).transpose(1, 2))
    assert not residual[:, ::2].any()


def test_pooled_residuals_add_up_to_the_map():
    x = torch.randn(2, 3, 4, 4)
    grids = [(1, 1), (1, 1), (1, 2), (2, 2), (2, 4), (4, 4)]
    pooled, total = residual_pool(x, grids), 0
    for part, grid in zip(pooled.split([h * w for h, w in grids], 1), grids):
        total = total + F.interpolate(part.transpose(1, 2).unflatten(2, grid), (4, 4))
    torch.testing.assert_close(total, x)
    torch.testing.assert_close(pooled[:, 1], torch.zeros(2, 3), atol=1e-6, rtol=0)  # all is in the first mean


# -- lengths


@torch.no_grad()
def test_truncation_at_a_level_is_decoding_that_length(restok, images):
    tokens = restok.encode(images)
    for k in (2, 4, 8):
        cut = tokens.truncate(k)
        assert torch.equal(cut.ids, restok.encode(images, k).ids)
        assert torch.equal(restok.decode(tokens, k), restok.decode(cut))
        filled = restok.decoder.fill(cut.values, cut.valid, cut.index)
        assert torch.equal(filled[:, k:], restok.decoder.latent_mask_token.expand(3, 8 - k, 4))
        assert torch.equal(restok.decoder.fill(filled, torch.ones(3, 8).bool(), tokens.index), filled)


@torch.no_grad()
def test_lengths_between_levels_are_rejected(restok, images):
    for k in (1, 3, 7, 9):
        with pytest.raises(ValueError, match=f"restok encodes to 2 or 4 or 8 tokens, not to {k}"):
            restok.encode(images, k)
    tokens = restok.encode(images)
    with pytest.raises(ValueError, match="not to 3"):
        restok.decode(tokens, 3)
    with pytest.raises(ValueError, match="not to 3"):
        restok.decode(tokens.truncate(3))


@torch.no_grad()
def test_a_ragged_batch_equals_single_images(restok, images):
    k = [8, 2, 4]
    together, exact = restok.encode(images, k), copy.deepcopy(restok).double()
    decoded = exact.decode(replace(together, values=together.values.double()))
    for i, n in enumerate(k):
        alone = restok.encode(images[i : i + 1], n)
        assert torch.equal(alone.ids, together[i].ids)
        again = exact.decode(replace(alone, values=alone.values.double()))
        torch.testing.assert_close(again, decoded[i : i + 1], atol=1e-6, rtol=1e-6)


@torch.no_grad()
def test_ids_decode_to_the_same(restok, images):
    tokens = restok.encode(images, [8, 4, 2])
    torch.testing.assert_close(restok.decode(restok.tokens_of(tokens.ids)), restok.decode(tokens))


# -- training


def test_how_often_tokens_are_dropped():
    with torch.device("meta"):
        schedule = ResTok(ResTok.Config()).schedule
    weights = dict(zip(schedule.levels, schedule.weights))
    assert weights == {4: 1, 8: 2, 16: 4, 32: 8, 64: 16, 128: 124}
    drawn = schedule.draw(128, 20000, torch.Generator().manual_seed(0))
    for k, share in ((128, 0.8), (64, 0.103), (4, 0.0065)):
        assert abs(float((drawn == k).float().mean()) - share) < 0.1 * share + 0.003


def test_training_loss(images):
    made = make(features=6)
    draws = made.schedule.draw(8, 3, torch.Generator().manual_seed(3))
    whole, patches = torch.randn(3, 6), torch.randn(3, 6, 4, 4)
    losses = made.training_loss(images, (whole, patches), torch.Generator().manual_seed(3))
    tokens = made.encode(images, draws)
    decoded = made.decode_values(tokens.values, tokens.valid, tokens.index)
    torch.testing.assert_close(losses["reconstruction"], (decoded - images).square().mean())
    z = F.normalize(made.latents(images)[0], dim=-1)
    entries = F.normalize(made.quantize.embedding.weight, dim=-1)[made.encode(images).ids]
    torch.testing.assert_close(losses["bottleneck"], 1.25 * (z - entries).square().mean())

    seen = made.latents(images)[1].mean(1) @ made.vf_proj.weight[..., 0, 0].T
    near = F.cosine_similarity(whole, seen, dim=1)
    filled = made.decoder.fill(tokens.values, tokens.valid, tokens.index)
    swapped = make(features=6)
    swapped.decoder.mask_token.data = made.decoder.feat_mask_token.data
    last = []
    swapped.decoder.ln_post.register_forward_pre_hook(lambda _, args: last.append(args[0]))
    swapped.decoder(filled)
    made_of = (last[0] @ made.vf_proj_dec.weight[..., 0, 0].T).transpose(1, 2).reshape(3, 6, 4, 4)
    far = torch.relu(0.75 - near).mean() + torch.relu(0.75 - F.cosine_similarity(patches, made_of)).mean()
    torch.testing.assert_close(losses["features"], far)

    sum(losses.values()).backward()
    without = {name for name, p in made.named_parameters() if p.grad is None}
    assert not without


def test_features_that_were_not_asked_for(restok, images):
    assert set(restok.training_loss(images)) == {"reconstruction", "bottleneck"}
    with pytest.raises(ValueError, match="made without features"):
        restok.training_loss(images, (torch.randn(3, 6), torch.randn(3, 6, 4, 4)))


# -- weights


def published_config(**changes):
    return {
        "experiment": {"project": "restok_l_128"},
        "model": {
            "vq_model": {
                "codebook_size": 8192, "token_size": 8, "use_l2_norm": True, "commitment_cost": 0.25,
                "entropy_loss_ratio": 0.0, "vit_enc_model_size": "large", "vit_dec_model_size": "large",
                "vit_enc_patch_size": 16, "vit_dec_patch_size": 16, "rope_base_len": 10000,
                "num_latent_tokens": 128, "num_min_tokens": 4, "test_num_latent_tokens": 128,
                "merge_tokens": True, "hierarchy_stages": 4, "reduction_ratio": 0.5,
                "residual_image_tokens": True, "residual_latent_tokens": True, "learnable_latent_tokens":
                False, "learnable_dec_image_tokens": True, "multi_quant": True, "vae_encoder": True,
                "drop_latent_tokens": True, "drop_prob": 0.2, "latent_hierarchy": True,
                "encoder_feature_supervision": True, "decoder_feature_supervision": True,
                "learnable_dec_feat_tokens": True, "use_vf": "dinov3",
            }
            | changes
        },
        "dataset": {"preprocessing": {"crop_size": 256}},
    }  # fmt: skip


def test_the_published_configuration():
    assert ResTok.config_from(published_config()) == ResTok.Config()
    assert ResTok.config_from(published_config(drop_prob=0.0)) == ResTok.Config()  # for inference
    small = ResTok.config_from(published_config(vit_enc_model_size="small", num_latent_tokens=64))
    assert small == ResTok.Config(encoder=(512, 6, 8), tokens=64)
    assert ResTok.config_from({"model": {"vq_model": {"num_latent_tokens": 32}}}) is None
    with pytest.raises(ValueError, match="differs from the published one in multi_quant, is_legacy"):
        ResTok.config_from(published_config(multi_quant=False, is_legacy=False))


@torch.no_grad()
def test_a_published_folder_is_loaded(tmp_path, images, monkeypatch):
    from safetensors.torch import save_file

    monkeypatch.setattr(
        "vtc.tokenizers.systems.restok.SIZES", {"large": TINY["encoder"], "base": TINY["decoder"]}
    )
    made = make(features=6, min_tokens=2)
    config = published_config(
        vit_dec_model_size="base", num_latent_tokens=8, num_min_tokens=2, codebook_size=32, token_size=4,
        hierarchy_stages=3,
    )  # fmt: skip
    config["dataset"]["preprocessing"]["crop_size"] = 16
    (tmp_path / "config.json").write_text(json.dumps(config))
    state = {name: value.clone() for name, value in made.state_dict().items()}
    state["foundation_model.model.norm.weight"] = torch.ones(3)
    save_file(state, tmp_path / "model.safetensors")
    loaded = ResTok.from_pretrained(tmp_path, hidden=32, multipliers=(1, 1, 2))
    assert not loaded.training and set(made.state_dict()) - set(loaded.state_dict()) == {
        "vf_proj.weight", "vf_proj_dec.weight", "decoder.feat_mask_token"
    }  # fmt: skip
    assert torch.equal(loaded.encode(images).ids, made.encode(images).ids)
    assert torch.equal(loaded(images, 4), made(images, 4))


@torch.no_grad()
def test_saved_and_loaded(restok, images, tmp_path):
    restok.save_pretrained(tmp_path)
    again = ResTok.from_pretrained(tmp_path)
    assert again.config == restok.config
    assert torch.equal(again(images, 4), restok(images, 4))


def test_bad_configurations():
    with pytest.raises(ValueError, match="add up to a power of two, not to 12"):
        make(tokens=12)
    with pytest.raises(ValueError, match="image_size is a multiple of 4, not 18"):
        make(image_size=18)
    with pytest.raises(ValueError, match="4 stages take 4 or more blocks and a grid that is halved 3 times"):
        make(stages=4)
    with pytest.raises(ValueError, match="drop is a share above 0 and up to 1"):
        make(drop=0.0)
