"""Pictures of reconstructions: PSNR against bytes beside codecs, and what tokens leave of images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from ..sheet import INK as BLACK
from ..sheet import PAPER
from ..tokenizers import Tokenizer
from ..tokenizers.images import to_images
from .image_metrics import psnr
from .plot import FONT, GRID, INK, SOFT, blank_figure
from .reconstruction import ladder, rounded
from .reconstruction_tables import CODECS, CONTAINERS
from .results import Row
from .style import COLOURS

DASHED = {"file": "-", "payload": (0, (4, 2))}
SIDE = 192  # pixels of an image on the sheet, about: its own are squares of a whole number, sharp at any zoom
GAP, LINE, SIZE = 14, 34, 26  # pixels between images, of a line of text, and its font's size
OWN = (213, 94, 0)  # the colour of what the tokenizer chooses


def plot_curves(rows: Sequence[Row], path: str | Path) -> None:
    """A panel for each set of pictures. Codecs' curves begin where all pictures have a setting."""
    import matplotlib

    lengths = [row for row in rows if row["kind"] == "lengths"]
    with matplotlib.rc_context(FONT):
        figure = blank_figure(max(4.4, 3.9 * len(lengths)), 3.9)
        panels = figure.subplots(1, len(lengths), squeeze=False)[0]
        for axes, row in zip(panels, lengths, strict=True):
            _curves(
                axes, row, [other for other in rows if other.get("codec") and other["data"] == row["data"]]
            )
        panels[0].set_ylabel("PSNR (dB)")
        handles, names = panels[0].get_legend_handles_labels()
        handles.insert(
            1, handles[0].__class__([], [], linestyle="")
        )  # a column for each of tokens and codecs
        names.insert(1, "")
        figure.legend(handles, names, loc="outside lower center", ncols=3, frameon=False, handlelength=2.8)
        figure.savefig(path, dpi=200)


def _curves(axes, row: Row, codecs: Sequence[Row]) -> None:
    per_token = row["bits_per_token"] / 8
    own = [k * per_token for k in row["k"]]
    marks = [row["k"].index(k) for k in row["ladder"]]
    (line,) = axes.plot(own, row["psnr"]["mean"], color=COLOURS[0], linewidth=2.4, label="tokens", zorder=3)
    line.set(marker="o", markersize=5, markevery=marks)
    for (place, codec), count in product(enumerate(CODECS, 1), DASHED):
        for other in (one for one in codecs if one["codec"] == codec):
            cells = zip(other["budgets"], other[count]["cells"], strict=True)
            drawn = [(budget, cell["psnr"]) for budget, cell in cells if cell["fits"] == other["n"]]
            if drawn:
                (line,) = axes.plot(*zip(*drawn), color=COLOURS[place], linewidth=1.6)
                line.set(linestyle=DASHED[count], label=f"{CODECS[codec]}{CONTAINERS[count]}")
    axes.set_title(f"{row['n']} {row['data']}", loc="left", fontsize=10.5, fontweight="bold", pad=10)
    last = max([own[-1], *(other["budgets"][-1] for other in codecs)])
    _ticks(axes, "bytes", [2.0**i for i in range(1, 24, 2) if 0.9 * own[0] <= 2**i <= 1.1 * last])
    above = axes.secondary_xaxis("top", functions=(lambda x: x / per_token, lambda k: k * per_token))
    _ticks(above, "tokens", row["ladder"])
    above.xaxis.label.set_position((0, 0))
    above.xaxis.label.set_ha("left")
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)


def _ticks(axes, label: str, ticks: Sequence[float]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [f"{tick:,.0f}" for tick in ticks])
    axes.set_xlabel(label, color=INK)
    axes.minorticks_off()
    axes.tick_params(length=0, colors=SOFT)
    axes.spines["top"].set_visible(False)


@torch.inference_mode()
def reconstructions(tokenizer: Tokenizer, images: torch.Tensor, names: Sequence[str]) -> Image.Image:
    """A row for each image (N, 3, H, W): itself, what 1, 2, 4, ... tokens leave of it, and, framed, what the
    number of tokens leaves that the tokenizer's halting head chooses."""
    steps = ladder(list(tokenizer.lengths))
    per_token = tokenizer.bits_per_token / 8
    columns = [("picture", "")]
    cells: list[list[Image.Image]] = [to_images(images)]
    captions: list[list[str]] = [list(names)]
    for k in steps:
        decoded = rounded(tokenizer(images, k))
        columns.append((f"{k} token{'s' * (k > 1)}", f"{k * per_token:.0f} bytes"))
        cells.append(to_images(decoded))
        captions.append([f"{db:.1f} dB" for db in psnr(decoded, images).tolist()])
    if tokenizer.halts:
        tokens = tokenizer.halt(images)
        decoded = rounded(tokenizer.decode(tokens))
        epsilon = getattr(tokenizer.config, "epsilon", None)
        columns.append(("halting head", f"error {epsilon:g}" if epsilon else ""))
        cells.append(to_images(decoded))
        told = zip(tokens.lengths.tolist(), psnr(decoded, images).tolist(), strict=True)
        captions.append([f"{k} token{'s' * (k > 1)}\n{db:.1f} dB" for k, db in told])
    return _sheet(columns, cells, captions, framed=len(columns) - 1 if tokenizer.halts else None)


def _sheet(
    columns: list[tuple[str, str]],
    cells: list[list[Image.Image]],
    captions: list[list[str]],
    framed: int | None,
) -> Image.Image:
    """Images laid out by column, each with a heading, under every image its caption of up to two lines."""
    side = cells[0][0].width * max(1, round(SIDE / cells[0][0].width))
    lines = max(caption.count("\n") + 1 for column in captions for caption in column)
    top, height = 2 * LINE + GAP, side + lines * LINE + 2 * GAP
    sheet = Image.new("RGB", (len(columns) * (side + GAP) + GAP, top + len(cells[0]) * height + GAP), PAPER)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(SIZE)
    for place, (heading, images, under) in enumerate(zip(columns, cells, captions, strict=True)):
        left, colour = GAP + place * (side + GAP), OWN if place == framed else BLACK
        for line, text in enumerate(heading):
            pen.text((left + side // 2, GAP // 2 + line * LINE), text, colour, font, anchor="ma")
        for number, (image, caption) in enumerate(zip(images, under, strict=True)):
            y = top + number * height
            sheet.paste(image.resize((side, side), Image.NEAREST), (left, y))
            if place == framed:
                pen.rectangle((left - 5, y - 5, left + side + 4, y + side + 4), outline=OWN, width=5)
            at = (left + side // 2, y + side + 8)
            pen.multiline_text(at, caption, colour, font, anchor="ma", align="center", spacing=6)
    return sheet
