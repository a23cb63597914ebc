"""Tiny random vision encoders: `make(name)` builds one, `ENCODERS[name]` says how it is called and made up.

Patches are 8 x 8 pixels, pictures 32 x 48 where an encoder takes them, so that rows and columns differ.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .parts import noise

Call = Callable[[nn.Module, Tensor], Any]


def _plainly(model: nn.Module, pixels: Tensor, **more: Any) -> Any:
    return model(pixels, **more)


def _by_name(model: nn.Module, pixels: Tensor, **more: Any) -> Any:
    return model(pixel_values=pixels, **more)


def _image_features(model: nn.Module, pixels: Tensor, **more: Any) -> Any:
    return model.get_image_features(pixel_values=pixels, **more)


def _encode_image(model: nn.Module, pixels: Tensor, **more: Any) -> Any:
    return model.encode_image(pixels, **more)


@dataclass(frozen=True)
class Encoder:
    """build    makes it, with weights still to be drawn
    library  "timm", "open_clip" or "transformers"
    blocks   the path of its list of blocks
    prefix   how many CLS, distillation and register tokens stand in front of the patches
    cls      whether there is a CLS token
    size     height and width of its pictures
    call     (model, pixels) -> output
    pooled   the fields of the output that a pooling head makes; all of it where empty
    """

    build: Callable[[], nn.Module]
    library: str
    blocks: str = "blocks"
    prefix: int = 1
    cls: bool = True
    size: tuple[int, int] = (32, 48)
    call: Call = _plainly
    pooled: tuple[str, ...] = field(default=())

    @property
    def grid(self) -> tuple[int, int]:
        return self.size[0] // 8, self.size[1] // 8

    @property
    def n(self) -> int:
        return self.grid[0] * self.grid[1]

    def images(self, count: int = 2, first: int = 0, seed: int = 0) -> Tensor:
        """Pictures number `first` and following: the same alone as in any batch."""
        return torch.stack([noise((3, *self.size), seed, first + i) for i in range(count)])

    def blocks_of(self, model: nn.Module) -> list[nn.Module]:
        return list(model.get_submodule(self.blocks))


ENCODERS: dict[str, Encoder] = {}
REFUSED: dict[str, Callable[[], nn.Module]] = {}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return randomise(ENCODERS[name].build())


def refused(name: str) -> nn.Module:
    torch.manual_seed(0)
    return REFUSED[name]().eval()


def randomise(model: nn.Module) -> nn.Module:
    """Weights under which every token, scale and bias makes a difference."""
    for name, parameter in model.named_parameters():
        last = name.rsplit(".", 1)[-1]
        if last.startswith(("gamma", "lambda")):  # LayerScale
            nn.init.uniform_(parameter, 0.1, 0.5)
        elif parameter.ndim >= 2 or last == "class_embedding":
            nn.init.normal_(parameter, std=0.2)
        elif last == "bias" or last.endswith("_bias"):
            nn.init.normal_(parameter, std=0.1)
        elif parameter.ndim == 1:  # norms
            nn.init.uniform_(parameter, 0.7, 1.3)
    return model.eval()


def _add(name: str, library: str, **facts: Any):
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert name not in ENCODERS
        ENCODERS[name] = Encoder(build, library, **facts)
        return build

    return add


# -- timm


def _timm_vit(cls: str = "vision_transformer.VisionTransformer", **options: Any) -> nn.Module:
    import importlib

    module, _, name = cls.partition(".")
    model = getattr(importlib.import_module(f"timm.models.{module}"), name)
    shape = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 4}
    return model(**{**shape, "num_classes": 5, "mlp_ratio": 2.0, **options})


_eva = partial(_timm_vit, "eva.Eva")

for name, facts, options in (
    ("timm-deit", {}, {}),
    ("timm-augreg", {}, {"drop_path_rate": 0.1, "pre_norm": True, "depth": 3}),
    ("timm-deit3", {}, {"init_values": 0.1, "no_embed_class": True}),
    ("timm-dinov2", {"prefix": 5}, {"init_values": 0.1, "no_embed_class": True, "reg_tokens": 4}),
    ("timm-qk-norm", {}, {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True, "depth": 3}),
    ("timm-avg", {}, {"global_pool": "avg", "fc_norm": True}),
    ("timm-avg-all", {}, {"global_pool": "avg", "pool_include_prefix": True, "depth": 3}),
    ("timm-siglip", {"prefix": 0, "cls": False}, {"class_token": False, "global_pool": "map"}),
    ("timm-map-cls", {}, {"global_pool": "map", "depth": 3}),
    ("timm-dynamic", {}, {"img_size": 32, "dynamic_img_size": True, "depth": 3}),
):
    _add(name, "timm", **facts)(partial(_timm_vit, **options))

_add("timm-distilled", "timm", prefix=2)(
    partial(_timm_vit, "deit.VisionTransformerDistilled", init_values=0.1)
)
_add("timm-eva02", "timm")(
    partial(_eva, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True, ref_feat_shape=(4, 4))
)
_add("timm-eva-split", "timm")(  # EVA-02 of larger sizes: queries, keys and values apart, inner norms
    partial(_eva, qkv_fused=False, scale_attn_inner=True, use_rot_pos_emb=True, global_pool="token", depth=3)
)
_add("timm-dinov3", "timm", prefix=5)(
    partial(
        _eva,
        dynamic_img_size=True,
        qkv_bias=False,
        init_values=0.1,
        rope_type="dinov3",
        rope_temperature=100,
        rope_rotate_half=True,
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        num_reg_tokens=4,
        use_fc_norm=False,
    )
)
_add("timm-pe", "timm")(
    partial(
        _eva,
        global_pool="map",
        attn_type="rope",
        use_pre_transformer_norm=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
        rope_grid_offset=1.0,
        rope_grid_indexing="xy",
        attn_pool_num_heads=4,
        depth=3,
    )
)
_add("timm-rope-mixed", "timm")(
    partial(
        _eva,
        attn_type="rope",
        init_values=0.1,
        global_pool="token",
        use_abs_pos_emb=False,
        use_rot_pos_emb=True,
        rope_grid_indexing="xy",
        rope_temperature=10.0,
        rope_type="mixed",
    )
)


# -- open_clip


def _open_clip(**options: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    shape = {"image_size": (32, 48), "patch_size": 8, "width": 32, "layers": 4, "heads": 4, "mlp_ratio": 2.0}
    return VisionTransformer(**{**shape, "output_dim": 16, **options})


def _open_clip_model(cls: str, **vision: Any) -> nn.Module:
    import open_clip

    vision = {"layers": 4, "width": 32, "head_width": 8, "patch_size": 8, "image_size": (32, 48), **vision}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 4, "layers": 2}
    return getattr(open_clip.model, cls)(16, vision_cfg=vision, text_cfg=text)


_resblocks = partial(_add, library="open_clip", blocks="transformer.resblocks")
_of_visual = partial(_add, library="open_clip", blocks="visual.transformer.resblocks", call=_encode_image)

for name, options in (
    ("open_clip-tok", {"output_tokens": False}),
    ("open_clip-scaled", {"ls_init_value": 0.1, "final_ln_after_pool": True, "layers": 3}),
    ("open_clip-avg", {"pool_type": "avg"}),
    ("open_clip-pooler", {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 4}),
    (
        "open_clip-parallel",
        {"attentional_pool": "parallel", "attn_pooler_queries": 3, "attn_pooler_heads": 4, "output_dim": 32},
    ),
):
    _resblocks(name)(partial(_open_clip, **options))
_of_visual("open_clip-CLIP")(partial(_open_clip_model, "CLIP"))
_of_visual("open_clip-CustomTextCLIP")(partial(_open_clip_model, "CustomTextCLIP", ls_init_value=0.1))


# -- transformers

_TRUNK = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_TEXT = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"vocab_size": 50, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}


def _of_config(cls: str, config: str, **options: Any) -> nn.Module:
    import transformers

    made = getattr(transformers, config)(**{**_TRUNK, **options})
    return getattr(transformers, cls)(made)


def _two_towers(family: str, **vision: Any) -> nn.Module:
    import transformers

    config = getattr(transformers, f"{family}Config")(
        vision_config={**_TRUNK, **vision}, text_config={**_TEXT, "projection_size": 32}
    )
    return getattr(transformers, f"{family}Model")(config)


def _with_spatial_shapes(model: nn.Module, pixels: Tensor, **more: Any) -> Any:
    """SigLIP2 takes flattened patches, a mask of those that are real, and their rows and columns."""
    rows, cols = pixels.shape[-2] // 8, pixels.shape[-1] // 8
    patches = pixels.unfold(2, 8, 8).unfold(3, 8, 8).permute(0, 2, 3, 4, 5, 1)  # (B, rows, cols, 8, 8, 3)
    return model(
        pixel_values=patches.reshape(len(pixels), rows * cols, -1),
        pixel_attention_mask=torch.ones(len(pixels), rows * cols, dtype=torch.long),
        spatial_shapes=torch.tensor([[rows, cols]] * len(pixels)),
        **more,
    )


_hf = partial(_add, library="transformers", call=_by_name)
_pooled = {"pooled": ("pooler_output",)}
_logits = {"pooled": ("logits",)}
_square = {"size": (32, 32)}
_layers, _layer = {"blocks": "encoder.layers"}, {"blocks": "encoder.layer"}
_bare = {"prefix": 0, "cls": False}

for name, cls, config, facts, options in (
    ("CLIPVisionModel", "CLIPVisionModel", "CLIPVisionConfig", {**_layers, **_square, **_pooled}, {}),
    (
        "CLIPVisionModelWithProjection",
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        {"blocks": "vision_model.encoder.layers", **_square, "pooled": ("image_embeds",)},
        {"num_hidden_layers": 3},
    ),
    (
        "SiglipVisionModel",
        "SiglipVisionModel",
        "SiglipVisionConfig",
        {**_layers, **_square, **_bare, **_pooled},
        {},
    ),
    (
        "Siglip2VisionModel",
        "Siglip2VisionModel",
        "Siglip2VisionConfig",
        {**_layers, **_bare, **_pooled, "call": _with_spatial_shapes},
        {"num_patches": 16},
    ),
    ("Dinov2Model", "Dinov2Model", "Dinov2Config", {**_layer, **_pooled}, {"mlp_ratio": 2}),
    (
        "Dinov2ForImageClassification",
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {"blocks": "dinov2.encoder.layer", **_logits},
        {"mlp_ratio": 2, "use_swiglu_ffn": True, "num_labels": 5},
    ),
    (
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersConfig",
        {**_layer, "prefix": 5, **_pooled},
        {"mlp_ratio": 2},
    ),
    (
        "DINOv3ViTModel",
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"blocks": "model.layer", "prefix": 5, **_pooled},
        # Its training mode scales positions at random, so that no forward equals another.
        {"num_register_tokens": 4, "pos_embed_rescale": None},
    ),
    ("ViTModel", "ViTModel", "ViTConfig", {"blocks": "layers", **_pooled}, {"image_size": (32, 48)}),
    (
        "ViTForImageClassification",
        "ViTForImageClassification",
        "ViTConfig",
        {"blocks": "vit.layers", **_logits},
        {"image_size": (32, 48), "num_labels": 5, "num_hidden_layers": 3},
    ),
    ("DeiTModel", "DeiTModel", "DeiTConfig", {"blocks": "layers", "prefix": 2, **_square, **_pooled}, {}),
    (
        "DeiTForImageClassificationWithTeacher",
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {
            "blocks": "deit.layers",
            "prefix": 2,
            **_square,
            "pooled": ("logits", "cls_logits", "distillation_logits"),
        },
        {"num_labels": 5, "num_hidden_layers": 3},
    ),
    (
        "InternVLVisionModel",
        "InternVLVisionModel",
        "InternVLVisionConfig",
        {**_layer, **_square},
        {
            "image_size": (32, 32),
            "patch_size": (8, 8),
            "use_qk_norm": True,
            "norm_type": "rms_norm",
            "use_mean_pooling": False,
        },
    ),
):
    _hf(name, **facts)(partial(_of_config, cls, config, **options))

_features = {"call": _image_features, "pooled": ("pooler_output",), **_square}
_hf("CLIPModel", **{"blocks": "vision_model.encoder.layers", **_features})(partial(_two_towers, "CLIP"))
_hf("SiglipModel", **{"blocks": "vision_model.encoder.layers", **_features, **_bare})(
    partial(_two_towers, "Siglip")
)


# -- what cannot be compressed


def _refuse(name: str):
    def add(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        REFUSED[name] = build
        return build

    return add


@_refuse("post-norm")
def _post_norm():
    from timm.models.vision_transformer import ResPostBlock

    return _timm_vit(block_fn=ResPostBlock, init_values=0.1)


@_refuse("parallel")
def _parallel():
    from timm.models.vision_transformer import ParallelScalingBlock

    return _timm_vit(block_fn=ParallelScalingBlock)


@_refuse("parallel-differential")
def _parallel_differential():
    from timm.models.vision_transformer import DiffParallelScalingBlock

    return _timm_vit(block_fn=DiffParallelScalingBlock)


@_refuse("parallel-things")
def _parallel_things():
    from timm.models.vision_transformer import ParallelThingsBlock

    return _timm_vit(block_fn=ParallelThingsBlock)


@_refuse("eva-post-norm")
def _eva_post_norm():
    return _eva(use_post_norm=True)


@_refuse("open_clip-custom")
def _open_clip_custom():
    return _open_clip(qk_norm=True, scale_attn=True)


@_refuse("swin")
def _swin():
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=32, patch_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 2), window_size=4, num_classes=5
    )


@_refuse("swin-transformers")
def _swin_transformers():
    from transformers import SwinConfig, SwinModel

    return SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 2], window_size=4)
    )


@_refuse("convnext")
def _convnext():
    from timm.models.convnext import ConvNeXt

    return ConvNeXt(depths=(1, 1, 1, 1), dims=(8, 8, 16, 16), num_classes=5)


@_refuse("sequential")
def _sequential():
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))


@_refuse("text")
def _text():
    from transformers import BertConfig, BertModel

    return BertModel(
        BertConfig(
            vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
        )
    )
