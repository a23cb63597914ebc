"""JPEG and WebP as they are best used with few bytes: of all qualities and sizes the one nearest the image.

A picture is scaled down (Lanczos), coded, decoded and scaled up again (bicubic). At tens of bytes most of a
file is its headers, and one who sends many pictures of one kind can agree on those once. So every setting has
two sizes: that of the file, and its `payload`.

jpeg  file: Huffman tables made for the picture. Payload: the entropy-coded scan behind the SOS segment,
      without the EOI marker, coded with the standard's own Huffman tables. What stands before it follows from
      quality, size and subsampling: markers, quantisation tables, Huffman tables.
webp  lossy, method 6. Payload: the VP8 bitstream, without the RIFF and chunk headers (20 bytes).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from PIL.Image import BICUBIC, LANCZOS, Image
from PIL.Image import open as open_image

from .image_metrics import MOST

CODECS = ("jpeg", "webp")
QUALITIES = (0, 1, 3, 5, 8, 11, 14, 18, 22, 27, 32, 38, 45, 52, 60, 68, 76, 84, 92)
FACTORS = (1, 5 / 6, 2 / 3, 1 / 2, 5 / 12, 1 / 3, 1 / 4, 1 / 6, 1 / 12)  # at 96 pixels 96 to 8, by blocks
SUBSAMPLING = ("4:2:0", "4:4:4")  # of JPEG; WebP has 4:2:0 only
SETTINGS = {"jpeg": len(QUALITIES) * len(FACTORS) * len(SUBSAMPLING), "webp": len(QUALITIES) * len(FACTORS)}


@dataclass(frozen=True)
class Coded:
    """An image by one setting of a codec: bytes of the file, bytes of its payload, and dB."""

    file: int
    payload: int
    psnr: float
    quality: int
    factor: float
    subsampling: str = "4:2:0"


def coded(image: Image, codec: str, limit: int | None = None) -> list[Coded]:
    """What the settings of a codec make of an RGB image.

    limit: leave out those with a larger payload, which takes less time.
    Raises ValueError for an unknown codec.
    """
    if codec not in CODECS:
        raise ValueError(f"a codec is one of {', '.join(CODECS)}, not {codec!r}")
    encode = _jpeg if codec == "jpeg" else _webp
    original = np.asarray(image, dtype=np.float32)
    found = []
    for factor, subsampling in product(FACTORS, SUBSAMPLING if codec == "jpeg" else SUBSAMPLING[:1]):
        small = image.resize([max(1, round(factor * side)) for side in image.size], LANCZOS)
        for quality in QUALITIES:
            data, file, payload = encode(small, quality, subsampling)
            if limit is not None and payload > limit:  # higher qualities take more, but for a byte or two
                break
            mse = float(np.square(_decoded(data, image.size) - original).mean()) / 255**2
            psnr = min(-10 * math.log10(mse), MOST) if mse else MOST
            found.append(Coded(file, payload, psnr, quality, factor, subsampling))
    return found


def best(settings: Sequence[Coded], budget: float, count: str = "file") -> Coded | None:
    """The setting with the highest PSNR among those with at most `budget` bytes; None where there is none.

    count: "file" or "payload", which of the two sizes has to be in the budget.
    """
    fitting = [setting for setting in settings if getattr(setting, count) <= budget]
    return max(fitting, key=lambda setting: setting.psnr, default=None)


def _jpeg(image: Image, quality: int, subsampling: str) -> tuple[bytes, int, int]:
    standard, own = (
        _encoded(image, "JPEG", quality=quality, subsampling=subsampling, optimize=optimize)
        for optimize in (False, True)
    )
    return standard, len(own), scan_bytes(standard)


def _webp(image: Image, quality: int, _: str) -> tuple[bytes, int, int]:
    data = _encoded(image, "WEBP", quality=quality, method=6)
    return data, len(data), vp8_bytes(data)


def _encoded(image: Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _decoded(data: bytes, size: tuple[int, int]) -> np.ndarray:
    image = open_image(io.BytesIO(data)).convert("RGB")
    return np.asarray(image if image.size == size else image.resize(size, BICUBIC), dtype=np.float32)


def scan_bytes(data: bytes) -> int:
    """Entropy-coded bytes of a baseline JPEG file: what lies between its SOS segment and the EOI marker."""
    place = 2  # behind SOI
    while data[place : place + 2] != b"\xff\xda":
        place += 2 + int.from_bytes(data[place + 2 : place + 4])  # a segment's length counts itself
    place += 2 + int.from_bytes(data[place + 2 : place + 4])
    return len(data) - 2 - place


def vp8_bytes(data: bytes) -> int:
    """Bytes of the VP8 bitstream in a lossy WebP file, as its chunk's header says."""
    if data[12:16] != b"VP8 ":
        raise ValueError(f"this is no simple lossy WebP file: its first chunk is {data[12:16]!r}")
    return int.from_bytes(data[16:20], "little")
