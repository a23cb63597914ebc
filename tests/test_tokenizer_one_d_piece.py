"""One-D-Piece: published names, the same numbers as written out by hand, any number of leading tokens."""

import json
from itertools import pairwise

import pytest
import titok_oracle as oracle
import torch
from maskgit_oracle import scrambled
from safetensors.torch import save_file
from titok_oracle import pictures

from vtc.tokenizers.parts import latent_vit
from vtc.tokenizers.systems.one_d_piece import OneDPiece
from vtc.tokenizers.systems.titok import TiTok

PUBLISHED = {name: (name.lower(), name.lower(), 256, 4096, 12, True) for name in "SBL"}


def made(**options):
    return oracle.made(OneDPiece, **options)


@pytest.fixture
def piece():
    return made()


def official(name):
    content = oracle.official(*PUBLISHED[name], strict_length_assertion=False)
    content["model"]["type"] = "one_d_piece"
    return content


def by_hand(piece, values):
    s = piece.state_dict()
    return oracle.painted(s, oracle.decoded(s, values.double(), 2, 4), 3, 1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names(name):
    config = OneDPiece.published[f"turing-motors/One-D-Piece-{name}-256"]
    assert oracle.has_shapes(OneDPiece, config, oracle.shapes(*PUBLISHED[name]))
    assert OneDPiece.config_from(official(name)) == config
    assert TiTok.config_from(official(name)) is None
    assert OneDPiece.config_from(oracle.official(*PUBLISHED[name])) is None
    assert len(OneDPiece.published) == len(PUBLISHED)


def test_encode(piece):
    s = piece.state_dict()
    values, ids, _ = oracle.quantised(s, oracle.latents(s, pictures(), 2, 4, legacy=True), l2=True)
    tokens = piece.encode(pictures())
    assert torch.equal(tokens.ids, ids) and len(ids.unique(dim=0)) == 4
    torch.testing.assert_close(tokens.values.double(), values, atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_decode(piece, k):
    tokens = piece.encode(pictures())
    given = tokens.truncate(k)
    found = piece.decode_values(given.values, given.valid, given.index)
    torch.testing.assert_close(found, by_hand(piece, tokens.values[:, :k]), atol=1e-9, rtol=0)


# -- invariants


@pytest.mark.parametrize("legacy", [True, False])
def test_prefixes_do_not_depend_on_their_length(legacy):
    piece = made(legacy_layout=legacy)
    assert list(piece.lengths) == list(range(1, 9)) and piece.ordered and piece.prefix_stable
    full = piece.encode(pictures())
    for k in piece.lengths:
        tokens = piece.encode(pictures(), k)
        assert torch.equal(tokens.ids, full.ids[:, :k])
        assert torch.equal(tokens.values, full.values[:, :k])


def test_decoding_some_is_decoding_the_first(piece):
    tokens = piece.encode(pictures())
    pictured = []
    for k in piece.lengths:
        found = piece.decode(tokens, length=k)
        assert torch.equal(found, piece.decode(tokens.truncate(k)))
        assert torch.equal(found, piece(pictures(), k))
        torch.testing.assert_close(found, by_hand(piece, tokens.values[:, :k]).clamp(0, 1), atol=1e-9, rtol=0)
        pictured.append(found)
    assert (pictured[0] - pictured[-1]).abs().max() > 1e-3
    for wrong in (0, 9):
        with pytest.raises(ValueError, match="one-d-piece encodes to 1 to 8 tokens"):
            piece.decode(tokens, length=wrong)


def test_all_tokens_are_those_of_titok(piece):
    titok = TiTok(TiTok.Config(**vars(piece.config))).double()
    titok.load_state_dict(piece.state_dict())
    tokens = piece.encode(pictures())
    assert torch.equal(tokens.values, titok.encode(pictures()).values)
    assert torch.equal(piece.decode(tokens, length=8), titok.decode(tokens))


def test_ids_are_enough(piece):
    tokens = piece.encode(pictures(), [8, 1, 5, 2])
    again = piece.tokens_of(tokens.ids)
    assert torch.equal(again.lengths, tokens.lengths)
    torch.testing.assert_close(again.values, tokens.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(piece.decode(again), piece.decode(tokens), atol=1e-4, rtol=0)


def test_ragged_batch_equals_singles(piece):
    lengths = [3, 8, 1, 5]
    tokens = piece.encode(pictures(), lengths)
    assert tokens.lengths.tolist() == lengths
    decoded = piece.decode(tokens)
    for i, k in enumerate(lengths):
        alone = piece.encode(pictures()[i : i + 1], k)
        assert torch.equal(alone.ids, tokens[i].ids)
        torch.testing.assert_close(piece.decode(tokens[i]), decoded[i : i + 1], atol=1e-9, rtol=0)


# -- training


def watched(piece, steps):
    """How many tokens of each image were decoded in each step, and the losses."""
    kept, losses, decode = [], [], piece.decode_values

    def watch(values, valid, index):
        kept.append(valid.sum(1).tolist())
        assert values.shape[1] == kept[-1][0]  # cut off, not masked
        return decode(values, valid, index)

    piece.decode_values = watch
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        losses.append(piece.training_loss(pictures(2), generator=generator))
    return kept, losses


def test_training_draws_every_length_and_one_for_all(piece):
    kept, _ = watched(piece, 100)
    assert all(first == second for first, second in kept)
    assert {first for first, _ in kept} == set(range(1, 9))


def test_bottleneck_loss_is_of_all_tokens():
    piece = made(legacy_layout=False)
    s = piece.state_dict()
    wanted = oracle.quantised(s, oracle.latents(s, pictures(2), 2, 4, False), True)[2]
    kept, losses = watched(piece, 10)
    assert len({first for first, _ in kept}) > 3
    for loss in losses:
        torch.testing.assert_close(loss["bottleneck"].double(), wanted, atol=0, rtol=1e-5)


def test_training_loss_is_of_the_tokens_kept():
    piece = made(legacy_layout=False)
    tokens = piece.encode(pictures(2))
    kept, losses = watched(piece, 10)
    for (k, _), loss in zip(kept, losses, strict=True):
        decoded = oracle.decoded(piece.state_dict(), tokens.values[:, :k].double(), 2, 4)
        error = (decoded - pictures(2)).square().mean()
        torch.testing.assert_close(loss["reconstruction"], error, atol=0, rtol=1e-5)


def test_first_stage_drops_too(piece):
    codes, generator = torch.randint(16, (4, 4, 4)), torch.Generator().manual_seed(0)
    draws = OneDPiece.drop.draw(8, 4, torch.Generator().manual_seed(0))
    loss = piece.training_loss(pictures(), codes, generator)
    s, values = piece.state_dict(), piece.encode(pictures()).values[:, : draws[0]].double()
    assert draws[0] < 8
    wanted = -oracle.decoded(s, values, 2, 4).log_softmax(1).gather(1, codes[:, None]).mean()
    torch.testing.assert_close(loss["reconstruction"], wanted, atol=0, rtol=1e-5)


def test_training_mode_alone_drops_nothing(piece):
    tokens = piece.encode(pictures())
    assert torch.equal(piece.train().decode(tokens), piece.eval().decode(tokens))


def halves(n, seed):
    """Two halves, each of one of eight colours: more than one token can say."""
    g = torch.Generator().manual_seed(seed)
    colours = (torch.rand(n, 3, 2, 1, generator=g) > 0.5).float()
    return colours.repeat_interleave(8, 2).expand(n, 3, 16, 16)


def test_error_falls_with_tokens_once_trained():
    options = {"encoder": (64, 1, 4), "decoder": (64, 1, 4), "bottleneck": "kl", "legacy_layout": False}
    piece = OneDPiece(OneDPiece.Config(image_size=16, patch=8, tokens=8, dim=8, **options))
    for p in piece.parameters():  # the published start takes a million steps
        if p.dim() > 1:
            p.data.normal_(0, p[0].numel() ** -0.5)
    piece.encoder.conv_out.bias.data[8:] = -8  # log-variance
    optimiser = torch.optim.AdamW(piece.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    for step in range(500):
        optimiser.zero_grad()
        sum(piece.training_loss(halves(32, step), generator=generator).values()).backward()
        optimiser.step()
    images = halves(96, 10_000)
    with torch.no_grad():
        tokens = piece.eval().encode(images)
        errors = [(piece.decode(tokens, k) - images).square().mean().item() for k in (1, 2, 4, 8)]
    for fewer, more in pairwise(errors):
        assert more < fewer * 1.03, errors  # where nothing is left to tell, by chance a little more
    assert errors[-1] < 0.3 * errors[0] < 0.06, errors


# -- weights


def test_save_and_load(piece, tmp_path):
    piece.float().save_pretrained(tmp_path)
    again, images = OneDPiece.from_pretrained(tmp_path), pictures().float()
    assert again.config == piece.config
    assert torch.equal(again(images, 3), piece(images, 3))


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_official_folder(file, tmp_path, monkeypatch):
    for size, (_, depth, _) in latent_vit.SIZES.items():
        monkeypatch.setitem(latent_vit.SIZES, size, (16, depth, 2))
    content = official("S")
    content["dataset"]["preprocessing"]["crop_size"] = 32
    (tmp_path / "config.json").write_text(json.dumps(content))
    small = {"pixel_hidden": 32, "pixel_blocks": 1, "pixel_codes": 16}
    config = OneDPiece.config_from(content)
    piece = scrambled(OneDPiece(OneDPiece.Config(**(vars(config) | small))))
    state = {name: p.contiguous() for name, p in piece.state_dict().items()}
    (save_file if file.endswith("safetensors") else torch.save)(state, tmp_path / file)
    again = OneDPiece.from_pretrained(tmp_path, **small)
    images = torch.rand(1, 3, 32, 32)
    for k in (1, 100, 256):
        assert torch.equal(again(images, k), piece(images, k))
