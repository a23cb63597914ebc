"""Uses of a compressed encoder that are rare, and right or refused in a sentence."""

from dataclasses import dataclass

import pytest
import timm
import torch
import transformers
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


@pytest.mark.parametrize("method", ["tome", "mctf", "evit", "atc"])
@torch.no_grad()
def test_records_say_in_which_order_tokens_come_out(method):
    model, pixels = tiny(), torch.randn(2, 3, 32, 32)
    with vtc.compress(model, method, keep=0.4) as handle:
        found, records = model.forward_features(pixels)[:, 1:], handle.last
    with vtc.compress(model, method, keep=0.4, restore="unmerge"):
        expected = model.forward_features(pixels)[:, 1:]
    for x, record, full in zip(found, records, expected):
        torch.testing.assert_close(x[record.order.argsort()][record.source], full)


class OwnBackbone(transformers.Dinov2Backbone):
    """A class of the user's own."""


@torch.no_grad()
def test_a_class_that_inherits_from_a_backbone_makes_full_maps():
    size = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 32}
    config = transformers.Dinov2Config(**size, patch_size=8, out_features=["stage2", "stage3"])
    model = OwnBackbone(config).eval()
    with vtc.compress(model, "tome", keep=4):
        maps = model(torch.randn(2, 3, 32, 32)).feature_maps
    assert [m.shape for m in maps] == [(2, 32, 4, 4)] * 2


class PoolsItself(VisionTransformer):
    """As fine-tuning code of MAE has it."""

    def forward_features(self, x, attn_mask=None, is_causal=False):
        x = self.blocks(self._pos_embed(self.patch_embed(x)))
        return self.fc_norm(x[:, 1:].mean(dim=1))

    def forward_head(self, x, pre_logits=False):
        return self.head(x)


@torch.no_grad()
def test_a_class_that_pools_by_itself_is_to_find_all_patches():
    torch.manual_seed(0)
    model = PoolsItself(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=5, global_pool="avg"
    ).eval()
    with pytest.raises(ValueError, match=r"its own forward_features.*restore='unmerge'"):
        vtc.compress(model, "tome", keep=0.3)
    usual = tiny(global_pool="avg")
    usual.load_state_dict(model.state_dict())
    pixels = torch.randn(2, 3, 32, 32)
    with vtc.compress(model, "tome", keep=0.3, restore="unmerge"), vtc.compress(usual, "tome", keep=0.3):
        torch.testing.assert_close(model(pixels), usual(pixels))


@dataclass
class Sloppy(vtc.Merge):
    """Returns something wrong where few tokens are to stay."""

    name = "test-sloppy"
    stages = ("encoder",)
    kind: str = "few"

    def assign(self, tokens, k):
        every = torch.arange(tokens.n).expand(len(tokens.x), -1)
        fewer = k if k > 5 else k - 1
        right = vtc.Reduction.select(every[:, :k], tokens.n)
        return {
            "few": lambda: vtc.Reduction.select(every[:, :fewer], tokens.n),
            "none": lambda: None,
            "tensor": lambda: every[:, :k],
            "combine": lambda: vtc.Reduction(right.index, right.source, combine="max"),
            "slot": lambda: vtc.Reduction(right.index, right.source - 1),
            "mix": lambda: vtc.Reduction(right.index, right.source, mix=torch.ones(len(every), tokens.n, k)),
        }[self.kind]()


@torch.no_grad()
def test_wrong_reductions_are_found_at_any_budget():
    model, pixels = tiny(), torch.randn(2, 3, 32, 32)
    with vtc.compress(model, Sloppy(), keep=8, schedule="once") as handle:
        model(pixels)
        handle.keep = 4
        with pytest.raises(RuntimeError, match=r"method 'test-sloppy' returned .* mend its reduce"):
            model(pixels)
    for kind in ("none", "tensor", "combine", "slot", "mix"):
        with (
            vtc.compress(model, Sloppy(kind), keep=8),
            pytest.raises(RuntimeError, match=r"method 'test-sloppy' returned .* mend its reduce"),
        ):
            model(pixels)


def test_what_would_mean_nothing_is_refused():
    model = tiny()
    with pytest.raises(ValueError, match="leave schedule out"):
        vtc.compress(model, "tome", keep=[-2] * 3, schedule="once")
    with pytest.raises(ValueError, match="one block only"):
        vtc.compress(model, "expedit", keep=0.5, schedule="constant")
    with pytest.raises(ValueError, match=r"it runs at none that this model has; 'encoder' has atc, "):
        vtc.compress(model, "vtc-cls", keep=0.5)
    with vtc.compress(model, "tome", keep={1: 0.5}) as handle:
        assert "schedule" not in handle.describe() and "schedule" not in handle.plan[0][1]
        handle.keep = {"2": 0.5}
        assert handle.keep == {2: 0.5}
    with pytest.raises(RuntimeError, match="was removed"), handle:
        pass
    assert not [name for name in vars(model) if "vtc" in name]


@dataclass
class Misspelt(vtc.Select):
    """Needs what is not."""

    name = "test-misspelt"
    stages = ("encoder",)
    needs = (vtc.method.Need("cls_attentions", (-1,)),)


def test_an_unknown_need_is_refused():
    with pytest.raises(
        ValueError, match=r"'test-misspelt' needs .*cls_attentions.*there are cls_attention, "
    ):
        vtc.compress(tiny(), Misspelt(), keep=0.5)


@torch.no_grad()
def test_drawing_a_block_that_does_not_exist():
    from PIL import Image

    model = tiny()
    with vtc.compress(model, "tome", keep=0.5) as handle:
        model(torch.randn(1, 3, 32, 32))
        with pytest.raises(ValueError, match="there is no block 99: this encoder has blocks 0 to 2"):
            vtc.draw(Image.new("RGB", (32, 32)), handle, block=99)


def test_a_folder_of_splits_is_no_folder_of_classes(tmp_path):
    from vtc.evaluation.pictures import load_pictures

    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match="hold folders and no pictures"):
        load_pictures(f"imagefolder:{tmp_path}")
