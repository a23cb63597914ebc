"""Pictures laid out on sheets of paper, in rows and with captions."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image

GAP = 16  # pixels between pictures
INK, PAPER = (36, 41, 47), (255, 255, 255)


def contact_sheet(images: list[Image], captions: list[str] | None = None, columns: int = 4) -> Image:
    """Lays pictures out in rows, centred in cells of one size, under each a caption of one or more lines."""
    from PIL import Image, ImageDraw, ImageFont

    captions = [""] * len(images) if captions is None else captions
    if len(captions) != len(images):
        raise ValueError(f"{len(images)} pictures need as many captions, not {len(captions)}")
    font = ImageFont.load_default(15)
    lines = max(len(caption.splitlines()) for caption in captions)
    widest = max(font.getlength(line) for caption in captions for line in caption.split("\n"))
    width = max([math.ceil(widest)] + [image.width for image in images])
    height = max(image.height for image in images)
    footer = 10 + 20 * lines if lines else 0
    columns = max(1, min(columns, len(images)))
    rows = math.ceil(len(images) / columns)
    size = columns * (width + GAP) + GAP, rows * (height + footer + GAP) + GAP
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        row, column = divmod(i, columns)
        left, top = GAP + column * (width + GAP), GAP + row * (height + footer + GAP)
        sheet.paste(image, (left + (width - image.width) // 2, top + (height - image.height) // 2))
        under = left + width // 2, top + height + 8
        pen.multiline_text(under, caption, INK, font, anchor="ma", align="center", spacing=5)
    return sheet


def side_by_side(panels: list[Image]) -> Image:
    from PIL import Image

    width = sum(panel.width for panel in panels) + GAP * (len(panels) - 1)
    row = Image.new("RGB", (width, max(panel.height for panel in panels)), PAPER)
    left = 0
    for panel in panels:
        row.paste(panel, (left, 0))
        left += panel.width + GAP
    return row


def below_each_other(rows: list[Image]) -> Image:
    from PIL import Image

    height = sum(row.height for row in rows) + GAP * (len(rows) - 1)
    sheet = Image.new("RGB", (max(row.width for row in rows), height), PAPER)
    top = 0
    for row in rows:
        sheet.paste(row, (0, top))
        top += row.height + GAP
    return sheet
