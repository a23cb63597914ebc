"""Uses of a compressed encoder that are rare, and right or refused in a sentence."""

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import vtc


def tiny(**options) -> VisionTransformer:
    torch.manual_seed(0)
    how = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4, "num_classes": 5}
    model = VisionTransformer(**{**how, **options})
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.mark.parametrize("options", [{"global_pool": "avg"}, {"global_pool": "map", "class_token": False}])
@torch.no_grad()
def test_a_head_may_be_called_after_other_forwards(options):
    model, (one, two) = tiny(**options), torch.randn(2, 2, 3, 32, 32)
    with vtc.compress(model, "tome", keep=0.4):
        expected = [model(one), model(two)]
        features = [model.forward_features(one), model.forward_features(two)]
        for found, logits in zip(features, expected):
            assert torch.equal(model.forward_head(found), logits)
        with pytest.raises(RuntimeError, match="one of its last 16 forwards"):
            model.forward_head(torch.randn_like(features[0]))


@torch.no_grad()
def test_no_pictures_are_no_error():
    model = tiny()
    with vtc.compress(model, "tome", keep=0.4) as handle:
        assert model(torch.randn(0, 3, 32, 32)).shape == (0, 5) and handle.last == []


def test_an_empty_budget_set_later_is_refused():
    with vtc.compress(tiny(), "tome", keep=0.4) as handle:
        with pytest.raises(ValueError, match="empty budget"):
            handle.keep = {}
        assert handle.keep == 0.4
        handle.keep = {1: 0.5}
        assert handle.keep == {1: 0.5}


def test_a_model_around_a_transformer_is_told_where_that_is():
    model = nn.Sequential(nn.Identity(), tiny())
    with pytest.raises(ValueError, match=r"Sequential is no known host, .* compress model\.1"):
        vtc.compress(model, "tome", keep=0.5)


@torch.no_grad()
def test_patches_of_a_convolutional_stem():
    model = timm.create_model("vit_small_r26_s32_224", embed_dim=48, num_heads=4, depth=3).eval()
    with vtc.compress(model, "tome", keep=0.5) as handle:
        model(torch.randn(1, 3, 224, 224))
        assert handle.last[0].grid == (7, 7) and len(handle.last[0].index) == 25
