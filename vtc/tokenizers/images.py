"""Pictures as tokenizers take them, and back."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..images import open_image

if TYPE_CHECKING:
    from PIL.Image import Image

SUFFIXES = (".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pgm", ".png", ".pnm", ".ppm", ".tif",
            ".tiff", ".webp")  # fmt: skip
FITS = ("crop", "pad", "stretch")
ORIENTATION = 0x0112  # the EXIF tag; from 5 on the picture lies on its side


def load_images(
    images: str | Path | Image | Sequence[str | Path | Image], size: int, fit: str = "crop"
) -> Tensor:
    """Pictures from files, or PIL images, as floats in [0, 1]: (B, 3, size, size).

    They are turned upright by their EXIF tag and brought to RGB and 8 bits, transparency on white; of an
    animation the first frame is taken. fit says how a picture becomes a square:

    "crop"     the largest square in its middle
    "pad"      all of it, in the middle of a white square
    "stretch"  all of it, with another ratio of width to height

    and then `size` pixels wide: bicubic, antialiased.
    Raises ValueError in one sentence for a file that is missing or no image, and for another `fit`.
    """
    images = [images] if isinstance(images, (str, Path)) or hasattr(images, "convert") else images
    pixels = [_pixels(open_image(image), size, fit) for image in images]
    return to_floats(torch.stack(pixels)) if pixels else torch.empty(0, 3, size, size)


def read_image(file: Path, size: int, fit: str = "crop") -> tuple[Tensor, tuple[int, int]]:
    """A picture's pixels (3, size, size) uint8, and the width and height it had, upright.

    Raises ValueError in one sentence, which names no path, for whatever cannot be read.
    """
    from PIL import Image

    try:
        if not file.stat().st_size:
            raise ValueError("the file is empty")
        with Image.open(file) as image:
            width, height = image.size
            if image.getexif().get(ORIENTATION, 1) >= 5:
                width, height = height, width
            return _pixels(open_image(image), size, fit), (width, height)
    except Exception as error:  # decoders of damaged files raise a dozen kinds of exception
        reason = " ".join(str(error.__cause__ or error).split()) or type(error).__name__
        raise ValueError(reason.replace(str(file), file.name)) from error


def to_floats(pixels: Tensor) -> Tensor:
    """uint8 pixels as floats in [0, 1]."""
    return pixels.float() / 255


def to_images(images: Tensor) -> list[Image]:
    """PIL images from a tensor (B, 3, H, W) with values in [0, 1], as `Tokenizer.decode` gives it.

    Raises ValueError for a tensor of another shape.
    """
    from PIL import Image

    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"pictures are made of a tensor (B, 3, H, W), not {tuple(images.shape)}")
    pixels = (images.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    return [Image.fromarray(one) for one in pixels.cpu().contiguous().numpy()]


def check_fit(fit: str) -> str:
    if fit not in FITS:
        raise ValueError(f"a picture becomes a square by {', '.join(FITS)}, not by {fit!r}")
    return fit


def _pixels(image: Image, size: int, fit: str) -> Tensor:
    import numpy as np
    from PIL import Image, ImageOps

    square = (size, size)
    if check_fit(fit) == "crop":
        image = ImageOps.fit(image, square, Image.BICUBIC)
    elif fit == "pad":
        image = ImageOps.pad(image, square, Image.BICUBIC, color="white")
    else:
        image = image.resize(square, Image.BICUBIC)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
