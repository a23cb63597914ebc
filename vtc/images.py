"""Opening any picture a person has as an upright RGB image that every image processor can take."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

LONGEST_SIDE = 4096  # pixels: more than any processor looks at
SHORTEST_SIDE = 4  # pixels: an image of 1 or 3 rows is mistaken for an array of 1 or 3 channels
STEEPEST_ASPECT = 32  # processors that resize the short side would blow a longer strip up to gigabytes


def open_image(source: str | Path | Image) -> Image:
    """Returns a PNG, JPEG or WebP file, or a PIL image, as RGB.

    Turned upright by its EXIF tag, transparency laid on white, 16 bits brought to 8, a long side above 4096
    pixels scaled down, a strip steeper than 32 : 1 padded with white, a side under 4 pixels scaled up.
    Raises ValueError in one sentence for a file that is missing, no image, or damaged.
    """
    from PIL import Image, ImageOps

    given = isinstance(source, Image.Image)
    name = (getattr(source, "filename", "") or "the given image") if given else str(source)
    if not given and not Path(source).is_file():
        raise ValueError(f"there is no image file '{name}'")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", Image.DecompressionBombWarning
            )  # 10,000 x 10,000 pixels are welcome
            image = source if given else Image.open(source)
            image.draft(
                "RGB", (LONGEST_SIDE, LONGEST_SIDE)
            )  # lets a large JPEG be decoded at a fraction of its size
            image = ImageOps.exif_transpose(image)
    except Exception as error:  # decoders of damaged files raise a dozen kinds of exception
        raise ValueError(
            f"cannot read '{name}' as an image: it is damaged or no image file ({error})"
        ) from error
    return _bounded(_to_rgb(image))


def _to_rgb(image: Image) -> Image:
    import numpy as np
    from PIL import Image

    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip at 255 instead of scaling
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype("uint8"))
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def _bounded(image: Image) -> Image:
    from PIL import Image, ImageOps

    longest = max(image.size)
    if longest > LONGEST_SIDE:
        image = image.resize(
            [max(1, round(side * LONGEST_SIDE / longest)) for side in image.size], Image.LANCZOS
        )
    shortest = -(-max(image.size) // STEEPEST_ASPECT)
    if min(image.size) < shortest:
        image = ImageOps.pad(image, [max(side, shortest) for side in image.size], color="white")
    if min(image.size) < SHORTEST_SIDE:
        factor = -(-SHORTEST_SIDE // min(image.size))
        image = image.resize([side * factor for side in image.size], Image.NEAREST)
    return image
