"""TA-TiTok: published names, the same numbers as written out by hand, a caption for every picture."""

import json

import pytest
import titok_oracle as oracle
import torch
from maskgit_oracle import both, scrambled
from safetensors.torch import save_file
from titok_oracle import pictures

from vtc.tokenizers.parts import latent_vit
from vtc.tokenizers.systems.ta_titok import TATiTok
from vtc.tokenizers.systems.titok import TiTok

# encoder, decoder, tokens, codes, numbers per token, trained in two stages
PUBLISHED = {
    "bl32_vq": ("b", "l", 32, 8192, 64, False),
    "bl64_vq": ("b", "l", 64, 8192, 64, False),
    "bl128_vq": ("b", "l", 128, 8192, 64, False),
    "bl32_vae": ("b", "l", 32, None, 16, False),
    "bl64_vae": ("b", "l", 64, None, 16, False),
    "sl128_vae": ("s", "l", 128, None, 16, False),
}


@pytest.fixture(params=["vq", "kl"])
def titok(request):
    return oracle.made(TATiTok, bottleneck=request.param)


def captions(n=4):
    return torch.randn(n, 5, 12, generator=torch.Generator().manual_seed(3)).double()


def official(name):
    content = oracle.official(*PUBLISHED[name])
    content["experiment"]["tokenizer_checkpoint"] = f"tatitok_{name}.bin"
    if PUBLISHED[name][3]:
        content["model"]["vq_model"]["clustering_vq"] = False
    return content


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    config = TATiTok.published[f"turkeyju/tokenizer_tatitok_{name}"]
    wanted = oracle.shapes(*PUBLISHED[name]) | both("decoder.text_guidance_proj", 1024, 768)
    assert oracle.has_shapes(
        TATiTok, config, wanted | {"decoder.text_guidance_positional_embedding": (77, 1024)}
    )
    assert TATiTok.config_from(official(name)) == config
    assert len(TATiTok.published) == len(PUBLISHED)


def test_encode(titok):
    s = titok.state_dict()
    z = oracle.latents(s, pictures(), 2, 4, legacy=False)
    values = oracle.quantised(s, z, l2=False)[0] if titok.quantize.size else z[..., :4]
    found = titok.encode(pictures()).values
    torch.testing.assert_close(found.double(), values, atol=1e-5, rtol=0)


def test_decode(titok):
    tokens = titok.encode(pictures())
    wanted = oracle.decoded(titok.state_dict(), tokens.values.double(), 2, 4, captions())
    found = titok.decode_values(tokens.values, tokens.valid, tokens.index, text=captions())
    torch.testing.assert_close(found, wanted, atol=1e-9, rtol=0)
    assert torch.equal(titok.decode(tokens, text=captions()), found.clamp(0, 1))
    assert torch.equal(titok(pictures(), text=captions()), found.clamp(0, 1))


def test_a_caption_changes_its_own_picture_only(titok):
    tokens, text = titok.encode(pictures()), captions()
    before = titok.decode(tokens, text=text)
    text[1, 2] += 1
    after = titok.decode(tokens, text=text)
    changed = (after - before).abs().flatten(1).max(1).values
    assert changed[1] > 1e-3 and changed[[0, 2, 3]].max() < 1e-9


def test_batch_equals_singles(titok):
    tokens = titok.encode(pictures())
    decoded = titok.decode(tokens, text=captions())
    for i, text in enumerate(captions()):
        torch.testing.assert_close(
            titok.encode(pictures()[i : i + 1]).values, tokens[i].values, atol=1e-6, rtol=0
        )
        alone = titok.decode(tokens[i], text=text[None])
        torch.testing.assert_close(alone, decoded[i : i + 1], atol=1e-9, rtol=0)


def test_ids_are_enough():
    titok = oracle.made(TATiTok)
    tokens = titok.encode(pictures())
    again = titok.tokens_of(tokens.ids)
    found, wanted = (titok.decode(t, text=captions()) for t in (again, tokens))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)
    ids = torch.arange(32)
    assert torch.equal(titok.quantize(titok.quantize.lookup(ids)).ids, ids)


def test_every_picture_needs_a_caption(titok):
    tokens = titok.encode(pictures())
    with pytest.raises(ValueError, match=r"give text= \(4, 5, 12\), not none, .* CLIP ViT-L/14-336"):
        titok.decode(tokens)
    with pytest.raises(ValueError, match=r"give text= \(4, 5, 12\), not \(1, 5, 12\)"):
        titok.decode(tokens, text=captions(1))
    with pytest.raises(ValueError, match="not none"):
        titok(pictures())


def test_all_tokens_or_none(titok):
    assert titok.lengths == (6,) and not titok.ordered
    with pytest.raises(ValueError, match="ta-titok decodes all 6 tokens of an image, not 5"):
        titok.decode(titok.encode(pictures()).truncate(5), text=captions())


def test_training_loss(titok):
    losses = titok.training_loss(pictures(), text=captions())
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in titok.parameters())
    if titok.quantize.size:
        decoded = titok.decode_values(*parts(titok.encode(pictures())), text=captions())
        error = (decoded - pictures()).square().mean()
        torch.testing.assert_close(losses["reconstruction"], error, atol=0, rtol=1e-6)


def parts(tokens):
    return tokens.values, tokens.valid, tokens.index


def test_legacy_layout_is_refused():
    with pytest.raises(ValueError, match="ta-titok has no legacy_layout"):
        TATiTok.Config(legacy_layout=True)


def test_save_and_load(titok, tmp_path):
    titok.float().save_pretrained(tmp_path)
    again, images = TATiTok.from_pretrained(tmp_path), pictures().float()
    assert again.config == titok.config
    assert torch.equal(again(images, text=captions()), titok(images, text=captions()))


@pytest.mark.parametrize("name", ["bl32_vq", "sl128_vae"])
def test_official_folder(name, tmp_path, monkeypatch):
    for size, (_, depth, _) in latent_vit.SIZES.items():
        monkeypatch.setitem(latent_vit.SIZES, size, (16, depth, 2))
    content = official(name)
    content["dataset"]["preprocessing"]["crop_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(content))
    titok = scrambled(TATiTok(TATiTok.config_from(content)))
    state = dict(titok.state_dict())
    if titok.quantize.size:  # where codes were trained with clustering_vq
        state["quantize.embed_prob"] = torch.rand(titok.quantize.size)
    save_file(state, tmp_path / "model.safetensors")
    again = TATiTok.from_pretrained(tmp_path)
    images, text = torch.rand(1, 3, 32, 32), torch.randn(1, 77, 768)
    assert torch.equal(again(images, text=text), titok(images, text=text))


def test_whose_configuration_it_is():
    assert TiTok.config_from(official("bl32_vq")) is None
    plain = oracle.official(*PUBLISHED["bl32_vq"])
    assert TATiTok.config_from(plain) is None
    plain["model"]["vq_model"]["text_context_length"] = 50
    assert TATiTok.config_from(plain) == TATiTok.Config(text_length=50)
