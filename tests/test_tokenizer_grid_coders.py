"""The frozen coders under KARL and ALIT: published names, and the same numbers as written out by hand."""

import pytest
import torch
from distillation_oracle import base_names, decode_base, encode_base, random_state, shapes

from vtc.tokenizers.parts.grid_coders import KLVAE, VQGAN

TINY = {
    "vqgan": {"hidden": 32, "mults": (1, 2, 1), "dim": 8, "codes": 16},
    "vae": {"hidden": 32, "mults": (1, 2, 1), "dim": 6},
}
CLASSES = {"vqgan": VQGAN, "vae": KLVAE}


def made(base):
    """A coder and the published state dict that it was loaded from."""
    state = random_state(base_names(base, **TINY[base]))
    coder = CLASSES[base](*TINY[base].values()).eval()
    coder.load_state_dict(renamed(base, state))
    return coder, state


def renamed(base, state):
    return {
        CLASSES[base].rename(name).removeprefix(f"base_tokenizer.{base}."): value
        for name, value in state.items()
    }


@pytest.mark.parametrize("base", CLASSES)
def test_the_published_names_and_shapes(base):
    with torch.device("meta"):
        assert shapes(CLASSES[base]().state_dict()) == renamed(base, base_names(base))


@pytest.mark.parametrize("base", CLASSES)
@torch.no_grad()
def test_encodes_and_decodes_as_written_out(base):
    coder, state = made(base)
    coder, state = coder.double(), {name: value.double() for name, value in state.items()}
    images = torch.rand(2, 3, 16, 16).double()
    latents = coder.encode(images)
    assert latents.shape == (2, 16, coder.dim)
    torch.testing.assert_close(latents, encode_base(state, base, images))
    told = torch.randn(2, 16, coder.outputs).double()
    picture = coder.decode(coder.code(told))
    assert picture.shape == images.shape
    torch.testing.assert_close(picture, decode_base(state, base, told))


def test_losses_of_the_vqgan():
    coder, state = made("vqgan")
    latents, told = torch.randn(2, 16, 8), torch.randn(2, 16, 16, requires_grad=True)
    codes = state["base_tokenizer.vqgan.quantize.embedding.weight"]
    nll = square = 0.0
    for b in range(2):
        for n in range(16):
            right = (codes - latents[b, n]).square().sum(1).argmin()
            chances = told[b, n].softmax(0)
            nll -= chances[right].log() / 32
            square += (chances @ codes - codes[right]).square().mean() / 32
    losses = coder.losses(told, latents)
    torch.testing.assert_close(losses, {"nll": nll, "code": square}, rtol=1e-5, atol=1e-6)
    sum(losses.values()).backward()
    assert coder.quantize.embedding.weight.grad is None


def test_the_loss_of_the_vae():
    coder, _ = made("vae")
    latents, told = torch.randn(2, 16, 6), torch.randn(2, 16, 6)
    torch.testing.assert_close(coder.losses(told, latents), {"code": (told - latents).square().mean()})
