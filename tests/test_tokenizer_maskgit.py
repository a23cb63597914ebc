"""The convolutional coder of MaskGIT's VQGAN: names, and the same pictures as written out by hand."""

import pytest
import torch
import torch.nn.functional as F
from maskgit_oracle import decode, decoder_shapes, encode, encoder_shapes, scrambled

from vtc.tokenizers.parts.maskgit import Decoder, Encoder, SoftCodes

SMALL = {"hidden": 32, "multipliers": (1, 2, 2, 4), "res_blocks": 2, "z_channels": 5}


@pytest.mark.parametrize("size", [(16, 24), (32, 32)])
def test_encoder(size):
    encoder = scrambled(Encoder(**SMALL))
    x = torch.rand(2, 3, *size)
    z = encoder(x)
    assert z.shape == (2, 5, size[0] // 8, size[1] // 8)
    torch.testing.assert_close(z, encode(encoder.state_dict(), x, 4, 2), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [(2, 3), (3, 5)])
def test_decoder(size):
    decoder = scrambled(Decoder(**SMALL))
    z = torch.randn(2, 5, *size)
    x = decoder(z)
    assert x.shape == (2, 3, size[0] * 8, size[1] * 8)
    torch.testing.assert_close(x, decode(decoder.state_dict(), z, 4, 2), atol=1e-5, rtol=1e-5)


def test_one_level_has_nothing_to_scale():
    one = {"hidden": 32, "multipliers": (1,), "res_blocks": 1}
    assert Encoder(**one)(torch.rand(1, 3, 7, 5)).shape == (1, 256, 7, 5)
    assert Decoder(**one)(torch.rand(1, 256, 7, 5)).shape == (1, 3, 7, 5)


def test_published_names():
    with torch.device("meta"):
        coders = Encoder(), Decoder()
    for coder, wanted in zip(coders, (encoder_shapes(), decoder_shapes()), strict=True):
        assert {name: tuple(p.shape) for name, p in coder.state_dict().items()} == wanted


def test_soft_codes_of_a_sure_choice_are_its_entry():
    codes = SoftCodes(6, 4)
    ids = torch.tensor([[[0, 5], [2, 3]]])
    logits = F.one_hot(ids, 6).permute(0, 3, 1, 2) * 1000.0
    torch.testing.assert_close(codes(logits), codes.embedding.weight[ids].permute(0, 3, 1, 2))
    even = codes(torch.zeros(1, 6, 1, 1)).flatten()
    torch.testing.assert_close(even, codes.embedding.weight.mean(0))
