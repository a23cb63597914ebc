"""The frozen autoencoder of flow decoders against diffusers' own."""

import pytest
import torch
from diffusers import AutoencoderKL

from vtc.tokenizers.parts.vae import LatentVAE, published_vae


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return LatentVAE(latent_channels=4, channels=(8, 16, 16), layers=1, groups=4, scale=0.5, shift=0.25)


def test_latents_are_shifted_and_scaled(vae):
    images = torch.rand(2, 3, 16, 24)
    posterior = vae.vae.encode(images * 2 - 1).latent_dist
    torch.testing.assert_close(vae.encode(images), (posterior.mean - 0.25) * 0.5)
    assert vae.factor == 4 and vae.encode(images).shape == (2, 4, 4, 6)


def test_latents_may_be_drawn(vae):
    images = torch.rand(1, 3, 16, 16)
    posterior = vae.vae.encode(images * 2 - 1).latent_dist
    noise = torch.randn(posterior.mean.shape, generator=torch.Generator().manual_seed(3))
    drawn = vae.encode(images, sample=True, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(drawn, (posterior.mean + posterior.std * noise - 0.25) * 0.5)
    assert torch.equal(vae.encode(images), vae.encode(images)), "without sample it is the same every time"


def test_images_come_back_from_latents(vae):
    latents = torch.randn(2, 4, 4, 6)
    plain = vae.vae.decode(latents / 0.5 + 0.25).sample
    torch.testing.assert_close(vae.decode(latents), (plain + 1) / 2)
    assert vae.decode(latents).shape == (2, 3, 16, 24)


def test_no_images(vae):
    assert vae.encode(torch.zeros(0, 3, 16, 24)).shape == (0, 4, 4, 6)
    assert vae.decode(torch.zeros(0, 4, 4, 6)).shape == (0, 3, 16, 24)


def test_it_is_frozen(vae):
    vae.train()
    assert not any(module.training for module in vae.modules())
    assert not any(parameter.requires_grad for parameter in vae.parameters())


def test_stable_diffusions_weights_fit():
    with torch.device("meta"):
        ours, theirs = LatentVAE(), AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[128, 256, 512, 512], layers_per_block=2, latent_channels=4,
        )  # fmt: skip
    wanted = {f"vae.{name}": value.shape for name, value in theirs.state_dict().items()}
    assert {name: value.shape for name, value in ours.state_dict().items()} == wanted


def test_a_published_configuration_is_read(vae, tmp_path):
    vae.vae.save_config(tmp_path)
    config = published_vae(str(tmp_path))
    assert config["block_out_channels"] == [8, 16, 16] and config["latent_channels"] == 4
    with pytest.raises(OSError):
        published_vae(str(tmp_path / "none"))
