"""LLaVA 1.5: every image is one square of patches, in raster order."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .host import Layout, whole_image


def llava_layout(base: nn.Module, arguments: dict[str, Any], features: list[Tensor]) -> list[Layout]:
    """Raises ValueError where the features are not the tower's patches one by one."""
    size = base.vision_tower.config.patch_size
    rows, cols = (pixels // size for pixels in arguments["pixel_values"].shape[-2:])
    layouts = []
    for row, feature in enumerate(features):
        first = len(feature) - rows * cols  # strategy "full" lets CLS through, in front of the patches
        if first not in (0, 1):
            raise ValueError(
                f"image {row} has {len(feature)} features for {rows} x {cols} patches: "
                "check vision_feature_select_strategy, it must fit the vision tower"
            )
        layouts.append(whole_image(row, (rows, cols), first, feature.device))
    return layouts
