"""Vision transformers in whose blocks tokens can be reduced: timm, open_clip and transformers."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from torch import Tensor, nn

from .structure import ATTENTION_NAMES, extra_tokens

STAGE = "_vtc_encoder"  # where an encoder knows what reduces its tokens, also inside of a larger model
REPLACED = "_vtc_attention"  # where an attention module knows what stands in for it
NORM1 = ("norm1", "layer_norm1", "layernorm_before", "ln_1")
NORM2 = ("norm2", "layer_norm2", "layernorm_after", "ln_2")


@dataclass(frozen=True)
class Family:
    """What is known of one class of vision transformers, as data; paths are from the transformer itself.

    classes  its classes, or what their configs call it
    block    names of the classes of its blocks: x + attention(norm1(x)), then x + mlp(norm2(x)), where all
             that stands around attention and MLP works token by token
    entry    what turns pixels into tokens
    blocks   the list of blocks
    rope     the argument by which blocks are given rotary position embeddings of the patches
    grids    methods that make maps of the tokens and therefore need all of them
    pools    "timm", "open_clip", "probe" (an attention pool called head): how patches are pooled; else by CLS
    """

    name: str
    classes: tuple[str, ...]
    block: tuple[str, ...]
    entry: str = "embeddings"
    blocks: str = "encoder.layers"
    rope: str | None = None
    grids: tuple[str, ...] = ()
    pools: str | None = None


FAMILIES = (
    Family(
        "timm VisionTransformer", ("timm.models.vision_transformer.VisionTransformer",), ("Block",),
        entry="patch_embed", blocks="blocks", grids=("forward_intermediates",), pools="timm",
    ),
    Family(
        "timm Eva", ("timm.models.eva.Eva",), ("EvaBlock",), entry="patch_embed", blocks="blocks",
        rope="rope", grids=("forward_intermediates",), pools="timm",
    ),
    Family(
        "open_clip VisionTransformer", ("open_clip.transformer.VisionTransformer",),
        ("ResidualAttentionBlock",), entry="conv1", blocks="transformer.resblocks",
        grids=("forward_intermediates",), pools="open_clip",
    ),
    Family("CLIP", ("clip_vision_model",), ("CLIPEncoderLayer",)),
    Family("SigLIP", ("siglip_vision_model",), ("SiglipEncoderLayer",), pools="probe"),
    Family("SigLIP 2", ("siglip2_vision_model",), ("Siglip2EncoderLayer",), pools="probe"),
    Family("DINOv2", ("dinov2",), ("Dinov2Layer",), blocks="encoder.layer"),
    Family(
        "DINOv2 with registers", ("dinov2_with_registers",), ("Dinov2WithRegistersLayer",),
        blocks="encoder.layer",
    ),
    Family("DINOv3", ("dinov3_vit",), ("DINOv3ViTLayer",), blocks="model.layer", rope="position_embeddings"),
    Family("ViT", ("vit",), ("ViTLayer",), blocks="layers"),
    Family("DeiT", ("deit",), ("DeiTLayer",), blocks="layers"),
    Family("InternViT", ("internvl_vision",), ("InternVLVisionLayer",), blocks="encoder.layer"),
)  # fmt: skip

# Where a model that holds a vision transformer has it.
INSIDE = ("visual", "trunk", "vision_model", "vision_tower")


@dataclass
class Block:
    """The parts of a block that hooks are put on."""

    module: nn.Module
    norm1: nn.Module
    attention: nn.Module
    norm2: nn.Module
    mlp: nn.Module


@dataclass
class Trunk:
    """A vision transformer found in a loaded model.

    prefix, suffix  CLS, distillation and register tokens in front of the patches and behind them
    has_cls         the first of them is a CLS token
    """

    family: Family
    tower: nn.Module
    model: nn.Module
    entry: nn.Module
    blocks: list[Block] = field(repr=False)
    prefix: int = 0
    has_cls: bool = False

    @property
    def name(self) -> str:
        return f"{type(self.model).__name__} ({self.family.name})"

    @property
    def maps(self) -> bool:
        """Whether the model always makes maps of its tokens."""
        names = [c.__name__ for module in (self.tower, self.model) for c in type(module).__mro__]
        return any(name.endswith(("Backbone", "ForMaskedImageModeling")) for name in names)

    @property
    def pools_itself(self) -> bool:
        """Whether its class is of nobody we know, and works on its last tokens itself."""
        method = getattr(type(self.tower), "forward_features", None)
        return method is not None and not method.__module__.startswith("timm.")

    def grids(self, pixels: Tensor, args: tuple, kwargs: dict) -> list[tuple[int, int]]:
        """Rows and columns of patches of each picture, from what the entry is given: pixels (B, 3, H, W), or
        padded rows of patches (B, N, D) and their shapes."""
        if pixels.dim() == 3:
            shapes = kwargs["spatial_shapes"] if "spatial_shapes" in kwargs else args[1]
            return [tuple(shape) for shape in shapes.tolist()]
        sides = pixels.shape[-2:]
        if hasattr(self.entry, "dynamic_feat_size"):  # timm
            grid = tuple(self.entry.dynamic_feat_size(sides))
        else:
            size = (
                self.tower.patch_size if hasattr(self.tower, "patch_size") else self.tower.config.patch_size
            )
            size = (size, size) if isinstance(size, int) else size
            grid = tuple(side // patch for side, patch in zip(sides, size))
        return [grid] * max(1, len(pixels))


def find_tower(model: nn.Module) -> tuple[nn.Module, Family] | None:
    """The vision transformer that a model is or holds, and its family; None where there is none we know."""
    for family in FAMILIES:
        if _names(model) & set(family.classes) and _has(model, family.entry) and _has(model, family.blocks):
            return model, family
    inner = [getattr(model, name, None) for name in INSIDE]
    base = getattr(model, "base_model", None)  # of a model with a head in transformers
    inner += [base] if base is not model else []
    for module in inner:
        if isinstance(module, nn.Module) and (found := find_tower(module)):
            return found
    return None


def path_of_tower(model: nn.Module) -> str | None:
    """Where in a model there is a vision transformer that is known."""
    return next((name for name, module in model.named_modules() if name and find_tower(module)), None)


def open_trunk(model: nn.Module) -> Trunk:
    """Raises ValueError where a model holds no vision transformer in whose blocks tokens can be reduced."""
    found = find_tower(model)
    if found is None:
        raise ValueError(
            f"{type(model).__name__} holds no vision transformer that vtc knows: it reduces tokens inside of "
            f"{', '.join(family.name for family in FAMILIES)}"
        )
    tower, family = found
    blocks = list(tower.get_submodule(family.blocks))
    for block in blocks:
        if not _is_block(block, family):
            raise ValueError(
                f"the blocks of {type(model).__name__} are {type(block).__name__}s, and vtc reduces tokens "
                f"where an MLP just follows the attention, as in {' or '.join(family.block)}: compress() "
                "before blocks are wrapped"
            )
    prefix, has_cls = _prefix(tower)
    parts = [_block(block) for block in blocks]
    return Trunk(family, tower, model, tower.get_submodule(family.entry), parts, prefix, has_cls)


def _names(model: nn.Module) -> set[str]:
    """What a model may be called in the table: its classes by their full names, and its config's type."""
    names = {f"{cls.__module__}.{cls.__qualname__}" for cls in type(model).__mro__}
    return names | {getattr(getattr(model, "config", None), "model_type", "")}


def _is_block(block: nn.Module, family: Family) -> bool:
    """Whether a block is of a known class, or of one that inherits its forward."""
    known = [cls for cls in type(block).__mro__ if cls.__name__ in family.block]
    return any(type(block).forward is cls.forward for cls in known)


def _has(model: nn.Module, path: str) -> bool:
    """Whether there is a module at a path; a model with a head has the config of the one inside of it."""
    try:
        return model.get_submodule(path) is not None
    except AttributeError:
        return False


def _prefix(tower: nn.Module) -> tuple[int, bool]:
    if hasattr(tower, "num_prefix_tokens"):  # timm
        return tower.num_prefix_tokens, tower.cls_token is not None
    extra = extra_tokens(tower)
    return extra, extra > 0


def _block(block: nn.Module) -> Block:
    find = functools.partial(_part, block)
    return Block(block, find(NORM1), find(ATTENTION_NAMES), find(NORM2), find(("mlp",)))


def _part(block: nn.Module, names: tuple[str, ...]) -> nn.Module:
    return next(block._modules[name] for name in names if name in block._modules)
