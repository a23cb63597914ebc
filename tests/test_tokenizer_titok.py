"""TiTok: published names, the same numbers as written out by hand, the layout of its first weights."""

import json

import pytest
import titok_oracle as oracle
import torch
import torch.nn.functional as F
from maskgit_oracle import scrambled
from safetensors.torch import save_file
from titok_oracle import pictures

from vtc.tokenizers.parts import latent_vit
from vtc.tokenizers.parts.latent_vit import legacy_layout
from vtc.tokenizers.systems.titok import TiTok

# encoder, decoder, tokens, codes, numbers per token, trained in two stages
PUBLISHED = {
    "l32": ("l", "l", 32, 4096, 12, True),
    "b64": ("b", "b", 64, 4096, 12, True),
    "s128": ("s", "s", 128, 4096, 12, True),
    "bl64_vq8k": ("b", "l", 64, 8192, 64, False),
    "bl128_vq8k": ("b", "l", 128, 8192, 64, False),
    "sl256_vq8k": ("s", "l", 256, 8192, 64, False),
    "ll32_vae_c16": ("l", "l", 32, None, 16, False),
    "bl64_vae_c16": ("b", "l", 64, None, 16, False),
    "bl128_vae_c16": ("b", "l", 128, None, 16, False),
}
KINDS = {
    "legacy": {},
    "legacy, plain codes": {"l2": False},
    "legacy VAE": {"bottleneck": "kl"},
    "current": {"legacy_layout": False},
    "current, plain codes": {"legacy_layout": False, "l2": False},
    "current VAE": {"legacy_layout": False, "bottleneck": "kl"},
}


def made(**options):
    return oracle.made(TiTok, **options)


@pytest.fixture(params=KINDS)
def titok(request):
    return made(**KINDS[request.param])


# -- conformance


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    config = TiTok.published[f"yucornetto/tokenizer_titok_{name}_imagenet"]
    assert oracle.has_shapes(TiTok, config, oracle.shapes(*PUBLISHED[name]))
    assert TiTok.config_from(oracle.official(*PUBLISHED[name])) == config
    assert len(TiTok.published) == len(PUBLISHED)


def test_encode(titok):
    s, c = titok.state_dict(), titok.config
    tokens = titok.encode(pictures())
    z = oracle.latents(s, pictures(), 2, 4, c.legacy_layout)
    if c.bottleneck == "kl":
        assert tokens.ids is None
        values = z[..., : c.dim]
    else:
        values, ids, _ = oracle.quantised(s, z, c.l2)
        assert torch.equal(tokens.ids, ids)
        assert len(ids.unique(dim=0)) == 4  # not the same for all pictures
    assert tokens.values.shape == (4, 6, 4)
    torch.testing.assert_close(tokens.values.double(), values, atol=1e-5, rtol=0)


def test_decode(titok):
    s = titok.state_dict()
    tokens = titok.encode(pictures())
    wanted = oracle.decoded(s, tokens.values.double(), 2, 4)
    if titok.config.legacy_layout:
        assert wanted.shape == (4, 16, 4, 4)
        wanted = oracle.painted(s, wanted, 3, 1)
    found = titok.decode_values(tokens.values, tokens.valid, tokens.index)
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    assert torch.equal(titok.decode(tokens), found.clamp(0, 1))
    assert torch.equal(titok(pictures()), titok.decode(tokens))


# -- invariants


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "VAE" not in kind])
def test_ids_are_enough(kind):
    titok = made(**KINDS[kind])
    tokens = titok.encode(pictures())
    again = titok.tokens_of(tokens.ids)
    torch.testing.assert_close(again.values, tokens.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(titok.decode(again), titok.decode(tokens), atol=1e-4, rtol=0)


@pytest.mark.parametrize("l2", [True, False])
def test_a_code_is_nearest_to_itself(l2):
    titok = made(l2=l2)
    ids = torch.arange(32)
    assert torch.equal(titok.quantize(titok.quantize.lookup(ids)).ids, ids)


def test_legacy_layout_moves_every_number_somewhere():
    k, width = 6, 16
    x = torch.arange(2.0 * k * width).reshape(2, k, width)
    moved = legacy_layout(x)
    assert moved.shape == x.shape
    for old, new in zip(x, moved, strict=True):
        assert not torch.equal(old, new)
        assert torch.equal(old.flatten(), new.flatten().sort().values)
    one = torch.rand(3, 1, 1)
    assert torch.equal(legacy_layout(one), one)


def test_legacy_token_has_channels_of_every_latent():
    k, width = 4, 12  # k divides width
    latent, channel = torch.meshgrid(torch.arange(k), torch.arange(width), indexing="ij")
    whose = legacy_layout(torch.stack([latent, channel]))  # of every number: from which latent, which channel
    for token in range(k):
        pairs = set(zip(*(part[token].tolist() for part in whose), strict=True))
        assert pairs == {(i, c) for i in range(k) for c in range(token, width, k)}


def test_legacy_and_current_weights_differ_by_the_layout_only():
    legacy, current = (
        latent_vit.LatentEncoder((16, 2, 2), 16, 4, 6, 4, legacy=legacy) for legacy in (True, False)
    )
    current.load_state_dict(scrambled(legacy).state_dict())
    queries, images = torch.randn(6, 16), pictures().float()
    found = [encoder(images, queries) for encoder in (legacy, current)]
    assert (found[0] - found[1]).abs().max() > 0.1
    legacy.legacy = False
    assert torch.equal(legacy(images, queries), found[1])


def test_all_tokens_or_none(titok):
    assert titok.lengths == (6,) and not titok.ordered
    tokens = titok.encode(pictures())
    with pytest.raises(ValueError, match="titok encodes to 6 tokens, not to 5"):
        titok.encode(pictures(), 5)
    for fewer in (tokens.truncate(5), tokens.truncate([6, 2, 6, 6])):
        with pytest.raises(ValueError, match="titok decodes all 6 tokens of an image, not"):
            titok.decode(fewer)


def test_batch_equals_singles(titok):
    tokens = titok.encode(pictures())
    decoded = titok.decode(tokens)
    for i, image in enumerate(pictures()):
        alone = titok.encode(image[None])
        torch.testing.assert_close(alone.values, tokens.values[i : i + 1], atol=1e-6, rtol=0)
        torch.testing.assert_close(titok.decode(tokens[i]), decoded[i : i + 1], atol=1e-9, rtol=0)


def test_vae_gives_means_or_draws():
    mean, drawn = (made(**KINDS["current VAE"], sample=sample) for sample in (False, True))
    assert torch.equal(mean.encode(pictures()).values, mean.encode(pictures()).values)
    draws = torch.stack([drawn.encode(pictures()).values for _ in range(200)])
    z = oracle.latents(mean.state_dict(), pictures(), 2, 4, False)
    deviation = (z[..., 4:] / 2).exp()
    offset = (draws.mean(0) - z[..., :4]) / deviation
    assert offset.abs().max() < 5 / 200**0.5
    assert ((draws.std(0) / deviation).log().abs() < 0.3).all()


# -- training


def learning(titok, losses):
    sum(losses.values()).backward()
    return {name.split(".")[0] for name, p in titok.named_parameters() if p.grad is not None}


def close(losses, reconstruction, bottleneck):
    assert losses["reconstruction"].item() == pytest.approx(reconstruction.item(), rel=1e-5)
    assert losses["bottleneck"].item() == pytest.approx(bottleneck.item(), rel=1e-5)


def test_single_stage_loss():
    titok = made(legacy_layout=False)
    s = titok.state_dict()
    losses = titok.training_loss(pictures())
    values, _, loss = oracle.quantised(s, oracle.latents(s, pictures(), 2, 4, False), True)
    error = (oracle.decoded(s, values, 2, 4) - pictures()).square().mean()
    close(losses, error, loss)
    assert learning(titok, losses) == {"latent_tokens", "encoder", "decoder", "quantize"}


def test_first_stage_learns_codes():
    titok = made()
    s = titok.state_dict()
    codes = torch.randint(16, (4, 4, 4))
    losses = titok.training_loss(pictures(), codes)
    values, _, loss = oracle.quantised(s, oracle.latents(s, pictures(), 2, 4, True), True)
    logits = oracle.decoded(s, values, 2, 4)
    wanted = -logits.log_softmax(1).gather(1, codes[:, None]).mean()
    close(losses, wanted, loss)
    assert learning(titok, losses) == {"latent_tokens", "encoder", "decoder", "quantize"}


def test_second_stage_paints():
    titok = made()
    losses = titok.training_loss(pictures())
    tokens = titok.encode(pictures())
    error = (titok.decode_values(tokens.values, tokens.valid, tokens.index) - pictures()).square().mean()
    close(losses, error, torch.zeros(()))
    assert learning(titok, losses) == {"decoder", "pixel_quantize", "pixel_decoder"}


def test_vae_loss_is_of_draws():
    titok = made(**KINDS["current VAE"])
    losses, others = titok.training_loss(pictures()), titok.training_loss(pictures())
    assert losses["reconstruction"] != others["reconstruction"]
    mean, logvar = oracle.latents(titok.state_dict(), pictures(), 2, 4, False).chunk(2, -1)
    divergence = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).sum((1, 2)).mean()  # of a whole picture
    close(losses, losses["reconstruction"], 1e-6 * divergence)
    assert learning(titok, losses) == {"latent_tokens", "encoder", "decoder"}


def test_codes_need_a_head_for_them():
    with pytest.raises(ValueError, match="codes are learnt with legacy_layout"):
        made(legacy_layout=False).training_loss(pictures(), torch.zeros(4, 4, 4, dtype=torch.long))


# -- weights


def test_save_and_load(titok, tmp_path):
    titok.float().save_pretrained(tmp_path)
    again, images = TiTok.from_pretrained(tmp_path), pictures().float()
    assert again.config == titok.config and not again.training
    assert torch.equal(again(images), titok(images))


@pytest.fixture
def narrow(monkeypatch):
    """Transformers of the published depth, but so narrow that tests can hold them."""
    for name, (_, depth, _) in latent_vit.SIZES.items():
        monkeypatch.setitem(latent_vit.SIZES, name, (16, depth, 2))


@pytest.mark.parametrize("name", ["s128", "bl64_vq8k", "bl64_vae_c16"])
def test_official_folder(name, tmp_path, narrow):
    content = oracle.official(*PUBLISHED[name])
    content["dataset"]["preprocessing"]["crop_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(content))
    small = {"pixel_hidden": 32, "pixel_blocks": 1, "pixel_codes": 16}
    config = TiTok.config_from(content)
    titok = scrambled(TiTok(TiTok.Config(**(vars(config) | small))))
    state = {key: p.contiguous() for key, p in titok.state_dict().items()}
    state["quantize.embed_prob"] = torch.rand(8192)
    save_file(state, tmp_path / "model.safetensors")
    again = TiTok.from_pretrained(tmp_path, **small)
    images = torch.rand(1, 3, 32, 32)
    assert torch.equal(again(images), titok(images))

    save_file({key: p for key, p in state.items() if key != "latent_tokens"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="without latent_tokens"):
        TiTok.from_pretrained(tmp_path, **small)


def test_other_configurations():
    plain = PUBLISHED["b64"]
    one_stage = PUBLISHED["bl64_vq8k"]
    assert TiTok.config_from(oracle.official(*plain, num_min_tokens=4)) is None  # of a descendant
    assert TiTok.config_from(oracle.official(*plain, quantize_mode="softvq")) is None
    assert TiTok.config_from({"model_type": "clip", "model": "other"}) is None
    assert TiTok.config_from(oracle.official(*plain, strict_length_assertion=False)) is None
    with pytest.raises(ValueError, match="first training stage"):
        TiTok.config_from(oracle.official(*plain, finetune_decoder=False))
    with pytest.raises(ValueError, match="no codes to paint"):
        TiTok.config_from(oracle.official(*one_stage, finetune_decoder=True))
    with pytest.raises(ValueError, match="patches of different sizes"):
        TiTok.config_from(oracle.official(*plain, vit_dec_patch_size=8))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch": 5}, "patch 5 does not divide"),
        ({"bottleneck": "fsq"}, "vq or kl"),
        ({"sample": True}, "sample goes with"),
        ({"pixel_multipliers": (1, 1)}, "do not paint patches of 4"),
        ({"encoder": "huge"}, "small, base, large"),
        ({"decoder": (16, 1, 3)}, "3 heads do not divide"),
    ],
)
def test_configurations_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        made(**options)


def test_half_precision():
    titok = made()
    exact = titok(pictures())
    half = titok.bfloat16()(pictures().bfloat16())
    assert half.dtype == torch.bfloat16
    assert F.l1_loss(half.double(), exact) < 0.1
