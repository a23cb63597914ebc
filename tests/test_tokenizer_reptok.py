import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vtc.tokenizers.parts.dinov2 import DINOv2
from vtc.tokenizers.parts.flow_transformer import FlowTransformer
from vtc.tokenizers.systems.reptok import RepTok

TINY = {
    "image_size": 16, "encoder": (16, 2, 2), "encoder_size": 12, "encoder_patch": 4, "positions": 4,
    "registers": 2, "width": 32, "depth": 2, "head_dim": 16, "mapping": (8, 1), "vae_channels": (8, 16),
    "vae_layers": 1, "vae_groups": 4, "steps": 3,
}  # fmt: skip
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


def make():
    torch.manual_seed(0)
    made = RepTok(RepTok.Config(**TINY)).eval()
    with torch.no_grad():  # nothing that could be overlooked, and nothing that grows
        for p in made.parameters():
            p.add_(torch.randn_like(p) * (0.15 if p.dim() == 1 else 0.5 * p[0].numel() ** -0.5))
        made.encoder["dino"].frozen_cls_token.copy_(made.encoder["dino"].model.cls_token)
    return made


@pytest.fixture(scope="module")
def reptok():
    return make()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


# -- names and shapes


def expected_shapes(width, depth, patch, positions, registers, flow_width, flow_depth, head_dim, mapping):
    """All but the VAE's, which are diffusers'."""
    e, shapes = "encoder.dino.model", {}
    for name in (*(f"blocks.{i}.norm{n}" for i in range(depth) for n in (1, 2)), "norm"):
        shapes |= {f"{e}.{name}.weight": (width,), f"{e}.{name}.bias": (width,)}
    for i in range(depth):
        for name, out, start in (
            ("attn.qkv", 3 * width, width), ("attn.proj", width, width),
            ("mlp.fc1", 4 * width, width), ("mlp.fc2", width, 4 * width),
        ):  # fmt: skip
            shapes |= {f"{e}.blocks.{i}.{name}.weight": (out, start), f"{e}.blocks.{i}.{name}.bias": (out,)}
        shapes |= {f"{e}.blocks.{i}.ls{n}.gamma": (width,) for n in (1, 2)}
    shapes |= {f"{e}.cls_token": (1, 1, width), f"{e}.register_tokens": (1, registers, width)}
    shapes |= {f"{e}.pos_embed": (1, positions**2 + 1, width)}
    shapes |= {f"{e}.patch_embed.proj.weight": (width, 3, patch, patch)}
    shapes |= {f"{e}.patch_embed.proj.bias": (width,), "encoder.dino.frozen_cls_token": (1, 1, width)}
    shapes |= {"encoder.dino.temp_pos_embed": (1, 1, 1, width)}
    shapes |= {"encoder.dino.backbone.fc.weight": (flow_width, width)}
    shapes |= {f"encoder.dino.backbone.{n}": (flow_width,) for n in ("fc.bias", "ln.weight", "ln.bias")}
    m, w, heads = mapping[0], flow_width, flow_width // head_dim
    for i in range(flow_depth):
        b = f"backbone.mid_level.{i}"
        shapes |= {f"{b}.self_attn.norm.linear.weight": (w, m), f"{b}.ff.norm.linear.weight": (w, m)}
        shapes |= {f"{b}.self_attn.qkv_proj.weight": (3 * w, w), f"{b}.self_attn.out_proj.weight": (w, w)}
        shapes |= {f"{b}.self_attn.scale": (heads,)}
        shapes |= {f"{b}.self_attn.pos_emb.freqs": (2, heads, head_dim // 8)}
        shapes |= {f"{b}.ff.up_proj.weight": (6 * w, w), f"{b}.ff.down_proj.weight": (w, 3 * w)}
    shapes |= {"backbone.mid_merge.proj.weight": (w, w), "backbone.mid_merge.pre_proj.proj.weight": (w, 16)}
    shapes |= {"backbone.mid_split.post_proj.norm.scale": (w,)}
    shapes |= {"backbone.mid_split.post_proj.proj.weight": (16, w)}
    shapes |= {"time_emb.weight": (m // 2, 1), "time_in_proj.weight": (m, m)}
    shapes |= {"mapping.in_norm.scale": (m,), "mapping.out_norm.scale": (m,)}
    for i in range(mapping[1]):
        shapes |= {f"mapping.blocks.{i}.norm.scale": (m,), f"mapping.blocks.{i}.up_proj.weight": (6 * m, m)}
        shapes |= {f"mapping.blocks.{i}.down_proj.weight": (m, 3 * m)}
    return shapes


@pytest.mark.parametrize(
    "config, expected",
    [
        (RepTok.Config(), expected_shapes(768, 12, 14, 37, 4, 1152, 28, 72, (1024, 2))),
        (RepTok.Config(**TINY), expected_shapes(16, 2, 4, 4, 2, 32, 2, 16, (8, 1))),
    ],
)
def test_names_and_shapes(config, expected):
    with torch.device("meta"):
        state = RepTok(config).state_dict()
    assert {k: tuple(v.shape) for k, v in state.items() if not k.startswith("ae.vae.")} == expected
    vae = {k: tuple(v.shape) for k, v in state.items() if k.startswith("ae.vae.")}
    assert vae["ae.vae.post_quant_conv.weight"] == (4, 4, 1, 1)
    assert vae["ae.vae.quant_conv.weight"] == (8, 8, 1, 1)
    assert vae["ae.vae.decoder.conv_in.weight"][0] == config.vae_channels[-1]


# -- the forward pass, once more in plain operations


class Plain:
    def __init__(self, made):
        self.s = made.state_dict()

    def linear(self, name, x):
        return x @ self.s[f"{name}.weight"].T + self.s.get(f"{name}.bias", 0)

    def norm(self, name, x, eps=1e-6):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt()
        return x * self.s[f"{name}.weight"] + self.s[f"{name}.bias"]

    def token(self, image):
        """One picture (3, 16, 16) in [0, 1] to its token (16,)."""
        e, d = "encoder.dino.model", 16
        x = F.interpolate(image[None] * 2 - 1, (12, 12), mode="bilinear")[0]
        x = ((x + 1) / 2 - MEAN) / STD
        kernel = self.s[f"{e}.patch_embed.proj.weight"]
        patches = [x[:, r : r + 4, c : c + 4] for r in (0, 4, 8) for c in (0, 4, 8)]
        patches = torch.stack([(kernel * p).sum((1, 2, 3)) for p in patches])
        patches = patches + self.s[f"{e}.patch_embed.proj.bias"]
        places = self.s[f"{e}.pos_embed"][0]
        grid = places[1:].view(4, 4, d).permute(2, 0, 1)[None]
        grid = F.interpolate(grid, (3, 3), mode="bicubic", antialias=True)[0].permute(1, 2, 0)
        first = self.s[f"{e}.cls_token"][0] + places[:1]
        x = torch.cat([first, self.s[f"{e}.register_tokens"][0], patches + grid.reshape(9, d)])
        for i in range(2):
            b = f"{e}.blocks.{i}"
            q, k, v = self.linear(f"{b}.attn.qkv", self.norm(f"{b}.norm1", x)).split(d, 1)
            heads = [(q[:, s] @ k[:, s].T / 8**0.5).softmax(1) @ v[:, s] for s in (slice(0, 8), slice(8, 16))]
            x = x + self.s[f"{b}.ls1.gamma"] * self.linear(f"{b}.attn.proj", torch.cat(heads, 1))
            hidden = F.gelu(self.linear(f"{b}.mlp.fc1", self.norm(f"{b}.norm2", x)))
            x = x + self.s[f"{b}.ls2.gamma"] * self.linear(f"{b}.mlp.fc2", hidden)
        return self.norm(f"{e}.norm", x)[0]

    def project(self, token):
        token = token + self.s["encoder.dino.temp_pos_embed"][0, 0, 0]
        read = self.norm("encoder.dino.backbone.ln", self.linear("encoder.dino.backbone.fc", token), 1e-5)
        return torch.cat([token, torch.zeros(16)]) + read

    def rms(self, x, scale):
        return x * scale / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    def swiglu(self, name, x):
        told, gate = self.linear(f"{name}.up_proj", x).chunk(2, -1)
        return self.linear(f"{name}.down_proj", told * gate * gate.sigmoid())

    def condition(self, t):
        angles = 2 * math.pi * t * self.s["time_emb.weight"][:, 0]
        x = self.linear("time_in_proj", torch.cat([angles.cos(), angles.sin()]))
        x = self.rms(x, self.s["mapping.in_norm.scale"])
        x = x + self.swiglu("mapping.blocks.0", self.rms(x, self.s["mapping.blocks.0.norm.scale"]))
        return self.rms(x, self.s["mapping.out_norm.scale"])

    def velocity(self, x, token, t):
        """One picture's latents x (4, 8, 8), its token (16,) and a time to the velocity (4, 8, 8)."""
        condition = self.condition(t)
        patches, places = [], [(0.0, 0.0)]
        for r in range(4):
            for c in range(4):
                patch = x[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2]
                patches.append(patch.permute(1, 2, 0).flatten())  # channels last
                places.append(((r + 0.5) / 2 - 1, (c + 0.5) / 2 - 1))
        places = torch.tensor(places)
        h = self.linear("backbone.mid_merge.pre_proj.proj", torch.stack(patches))
        h = self.linear("backbone.mid_merge.proj", torch.cat([self.project(token)[None], h]))
        for i in range(2):
            b = f"backbone.mid_level.{i}"
            normed = self.rms(h, 1 + self.linear(f"{b}.self_attn.norm.linear", condition))
            q, k, v = self.linear(f"{b}.self_attn.qkv_proj", normed).split(32, 1)
            out = []
            for head in range(2):
                own, scale = slice(16 * head, 16 * head + 16), self.s[f"{b}.self_attn.scale"][head]
                turned = []
                for part in (q[:, own], k[:, own]):
                    part = part / (part.square().sum(1, keepdim=True) + 1e-6).sqrt()
                    rotated = part.clone()
                    for axis in range(2):
                        for n in range(2):
                            angle = places[:, axis] * self.s[f"{b}.self_attn.pos_emb.freqs"][axis, head, n]
                            a, o = part[:, 2 * axis + n], part[:, 4 + 2 * axis + n]
                            rotated[:, 2 * axis + n] = a * angle.cos() - o * angle.sin()
                            rotated[:, 4 + 2 * axis + n] = o * angle.cos() + a * angle.sin()
                    turned.append(rotated)
                out.append((scale * turned[0] @ turned[1].T).softmax(1) @ v[:, own])
            h = h + self.linear(f"{b}.self_attn.out_proj", torch.cat(out, 1))
            h = h + self.swiglu(f"{b}.ff", self.rms(h, 1 + self.linear(f"{b}.ff.norm.linear", condition)))
        h = self.rms(h[1:], self.s["backbone.mid_split.post_proj.norm.scale"])
        h = self.linear("backbone.mid_split.post_proj.proj", h)
        x = torch.zeros(4, 8, 8)
        for r in range(4):
            for c in range(4):
                patch = h[4 * r + c].view(2, 2, 4).permute(2, 0, 1)
                x[:, 2 * r : 2 * r + 2, 2 * c : 2 * c + 2] = patch
        return x


@torch.no_grad()
def test_the_encoder_is_the_papers(reptok, images):
    tokens, plain = reptok.encode(images), Plain(reptok)
    assert tokens.values.shape == (3, 1, 16) and tokens.ids is None and tokens.lengths.tolist() == [1] * 3
    for i, image in enumerate(images):
        torch.testing.assert_close(tokens.values[i, 0], plain.token(image), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_decoder_is_the_papers(reptok, images):
    tokens, plain = reptok.encode(images[:2]), Plain(reptok)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(7))[0]
    decoded = reptok.decode_values(tokens.values, tokens.valid, tokens.index, seed=7)
    for i in range(2):
        z = noise
        for t in (1, 2 / 3, 1 / 3):
            z = z - plain.velocity(z, tokens.values[i, 0], t) / 3
        expected = reptok.ae.vae.decode(z[None] / 0.18215).sample[0] / 2 + 0.5
        torch.testing.assert_close(decoded[i], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(reptok.decode(tokens, seed=7), decoded.clamp(0, 1))


@torch.no_grad()
def test_velocity_of_each_image_at_its_own_time(reptok, images):
    tokens, plain = reptok.encode(images[:2]), Plain(reptok)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.8])
    velocities = reptok.velocities(tokens.values)(x, t)
    for i in range(2):
        expected = plain.velocity(x[i], tokens.values[i, 0], t[i])
        torch.testing.assert_close(velocities[i], expected, atol=1e-5, rtol=1e-5)


def test_frequencies_of_the_rotation():
    freqs = FlowTransformer(4, 1152, 1, 72, 8).mid_level[0].self_attn.pos_emb.freqs
    every = torch.linspace(math.log(math.pi), math.log(10 * math.pi), 16 * 9 + 1)[:-1].exp()
    torch.testing.assert_close(freqs[1], torch.stack([every[h::16] for h in range(16)]))
    assert torch.equal(freqs[0], freqs[1])


def test_a_new_decoder_predicts_nothing_and_a_new_projection_is_padding(images):
    made = RepTok(RepTok.Config(**TINY))
    tokens = made.encode(images).values
    assert not made.velocities(tokens)(torch.randn(3, 4, 8, 8), torch.rand(3)).any()
    projected = made.encoder["dino"].project(tokens)
    assert torch.equal(projected, F.pad(tokens, (0, 16)))


# -- what is frozen


def test_only_the_class_token_of_the_encoder_is_learned(images):
    made = make()
    frozen = [made.encoder["dino"].model, made.ae]
    learned = [n for module in frozen for n, p in module.named_parameters() if p.requires_grad]
    assert learned == ["cls_token"]
    before = {n: v.clone() for n, v in made.state_dict().items()}
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.01, weight_decay=0.1)
    losses = made.train().training_loss(images, torch.Generator().manual_seed(0))
    sum(losses.values()).backward()
    optimizer.step()
    changed = {n for n, v in made.state_dict().items() if not torch.equal(v, before[n])}
    assert {n for n in changed if n.startswith(("encoder.dino.model", "ae."))} == {
        "encoder.dino.model.cls_token"
    }
    others = {n for n, p in made.named_parameters() if p.requires_grad}
    assert changed == others and "backbone.mid_merge.proj.weight" in others
    assert not made.ae.training


@torch.no_grad()
def test_the_first_class_token_gives_the_frozen_encoder(images):
    made = make()
    dino = made.encoder["dino"]
    at_first = dino(images)
    assert torch.equal(at_first, dino.frozen(images))
    dino.model.cls_token.add_(torch.randn(1, 1, 16))
    assert not torch.allclose(dino(images), at_first, atol=1e-3)
    assert torch.equal(dino.frozen(images), at_first)
    dino.model.cls_token.copy_(dino.frozen_cls_token)
    assert torch.equal(dino(images), at_first)


def test_the_cosine_is_0_at_first_and_rises(images):
    made = make()
    assert abs(float(made.training_loss(images)["cosine"].detach())) < 1e-6
    with torch.no_grad():
        made.encoder["dino"].model.cls_token.add_(torch.randn(1, 1, 16))
    dino = made.encoder["dino"]
    a, b = dino(images), dino.frozen(images)
    expected = 1 - ((a * b).sum(1) / a.norm(dim=1) / b.norm(dim=1)).mean()
    cosine = made.training_loss(images)["cosine"]
    assert cosine > 0.001
    torch.testing.assert_close(cosine, expected)
    (gradient,) = torch.autograd.grad(cosine, dino.model.cls_token)
    assert gradient.abs().max() > 1e-5


def test_the_flow_loss(reptok, images):
    generator = torch.Generator().manual_seed(4)
    flow = reptok.training_loss(images, generator)["flow"]
    generator.manual_seed(4)
    posterior = reptok.ae.vae.encode(images * 2 - 1).latent_dist
    data = posterior.sample(generator) * 0.18215
    noise = torch.randn(data.shape, generator=generator)
    t = torch.randn(3, generator=generator).sigmoid()
    tokens, plain = reptok.encode(images).values[:, 0], Plain(reptok)
    errors = []
    for i in range(3):
        point = (1 - t[i]) * data[i] + t[i] * noise[i]
        told = plain.velocity(point, tokens[i], t[i])
        errors.append((told - (noise[i] - data[i])).square().mean())
    torch.testing.assert_close(flow, torch.stack(errors).mean())


# -- use


@torch.no_grad()
def test_batches_equal_single_images(reptok, images):
    tokens = reptok.encode(images)
    decoded = reptok.decode(tokens)
    for i in range(3):
        alone = reptok.encode(images[i : i + 1])
        torch.testing.assert_close(alone.values, tokens.values[i : i + 1], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(reptok.decode(alone), decoded[i : i + 1], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_decoding_is_deterministic_and_a_seed_changes_it(reptok, images):
    tokens = reptok.encode(images)
    assert torch.equal(reptok.encode(images).values, tokens.values)
    assert torch.equal(reptok.decode(tokens), reptok.decode(tokens))
    assert not torch.equal(reptok.decode(tokens), reptok.decode(tokens, seed=1))
    assert torch.equal(reptok.decode(tokens), reptok.decode(tokens, steps=3))
    assert not torch.equal(reptok.decode(tokens), reptok.decode(tokens, steps=5))
    with pytest.raises(ValueError, match="a flow takes 1 or more steps, not 0"):
        reptok.decode(tokens, steps=0)


def test_there_is_one_token(reptok, images):
    assert reptok.lengths == (1,) and reptok.bits_per_token == 16 * 16
    with pytest.raises(ValueError, match="reptok encodes to 1 tokens, not to 2"):
        reptok.encode(images, 2)


def test_larger_pictures_are_averaged_before_they_are_resized():
    torch.manual_seed(0)
    made = RepTok(RepTok.Config(**TINY | {"image_size": 48})).eval()
    images = torch.rand(1, 3, 48, 48)
    seen = []
    made.encoder["dino"].model.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made.encode(images)
    assert seen[0].shape == (1, 3, 12, 12)
    torch.testing.assert_close(seen[0], (F.avg_pool2d(images, 4) - MEAN) / STD)


def test_bad_configurations():
    with pytest.raises(ValueError, match="width is a multiple of head_dim"):
        RepTok(RepTok.Config(**TINY | {"head_dim": 12}))
    with pytest.raises(ValueError, match="encoder_size is a multiple of 4, image_size one of 4"):
        RepTok(RepTok.Config(**TINY | {"encoder_size": 14}))


# -- weights


def test_dinov2_weights_are_the_start(images):
    torch.manual_seed(5)
    made, dinov2 = make(), DINOv2(16, 2, 2, 4, 4, 2)
    for p in dinov2.parameters():
        nn.init.normal_(p, std=0.3)
    made.load_dinov2({**dinov2.state_dict(), "mask_token": torch.zeros(1, 16)})
    expected = dinov2((F.interpolate(images, (12, 12), mode="bilinear") - MEAN) / STD)
    torch.testing.assert_close(made.encode(images).values[:, 0], expected)
    torch.testing.assert_close(made.encoder["dino"].frozen(images), expected)
    trained = [n for n, p in made.encoder["dino"].model.named_parameters() if p.requires_grad]
    assert trained == ["cls_token"]


def test_the_published_configuration():
    model = {
        "_target_": "reptok.encoder.encoder.RepTokLatentRF2D",
        "val_shape": [4, 32, 32],
        "mapping": {"depth": 2, "width": 1024, "d_ff": "${mul:${.width},3}"},
        "encoder": {
            "dino": {"model_version": "dinov2_vitb14_reg", "target_key": "x_norm_clstoken", "model_size": 224}
        },
        "backbone": {
            "in_features": 4,
            "main_level": {"width": 1152, "depth": 28, "layer_params": {"d_head": 72}},
        },
    }
    assert RepTok.config_from({"model": model}) == RepTok.Config()
    assert RepTok.config_from({"model": {"vq_model": {}}}) is None
    model["encoder"]["dino"]["model_version"] = "dinov2_vitl14_reg"
    with pytest.raises(ValueError, match="not dinov2_vitl14_reg"):
        RepTok.config_from({"model": model})


@torch.no_grad()
def test_a_published_checkpoint_is_loaded(reptok, images, tmp_path):
    inner = {}
    for name, value in reptok.state_dict().items():
        if name == "encoder.dino.frozen_cls_token":
            name, value = "encoder.dino.target_model.cls_token", value + 1
        inner[name.replace("ae.vae.", "ae.ae.")] = value.clone()
    inner |= {"encoder.dino.target_model.norm.weight": torch.ones(16)}
    inner |= {
        "encoder.dino.new_reg": torch.ones(1, 2, 16),
        "encoder.dino.model.mask_token": torch.ones(1, 16),
    }
    state = {f"first_stage.decoder.decoder.{name}": value for name, value in inner.items()}
    state |= {"first_stage.encoder.encoder.cls_token": torch.ones(1, 1, 16), "model.x": torch.ones(1)}
    state |= {"ema_model.net.y": torch.ones(1)}
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "reptok.ckpt")
    loaded = RepTok.from_pretrained(tmp_path / "reptok.ckpt", **TINY)
    assert torch.equal(loaded(images), reptok(images))
    first = reptok.encoder["dino"].frozen_cls_token
    torch.testing.assert_close(loaded.encoder["dino"].frozen_cls_token, first + 1)
    torch.save(inner, tmp_path / "inner.pt")
    again = RepTok.from_pretrained(tmp_path / "inner.pt", **TINY)
    assert torch.equal(again(images), reptok(images))


@torch.no_grad()
def test_saved_and_loaded(reptok, images, tmp_path):
    reptok.save_pretrained(tmp_path)
    again = RepTok.from_pretrained(tmp_path, steps=2)
    assert again.config.steps == 2
    assert torch.equal(again.decode(again.encode(images), steps=3), reptok(images))
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in reptok.named_parameters() if p.requires_grad
    ]
