"""What a tokenizer leaves of images at each length, beside codecs.

Four kinds of rows, each about one set of images:

lengths   error, PSNR and the other metrics at every number of tokens
codec     what JPEG or WebP make of as many bytes, see vtc.evaluation.codecs
policies  lengths by policies, at the same mean, see vtc.evaluation.adaptivity
objects   how many tokens policies give to scenes with few and with many objects, see there

Decoded images are rounded to 8 bits first, as a codec's are. Tokens take k * bits_per_token / 8 bytes; where
the length differs from image to image, it has to be told, too, which is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..tokenizers import Tokenizer
from ..tokenizers.errors import wrong
from ..tokenizers.images import to_images
from .codecs import SETTINGS, best, coded
from .image_metrics import FID, MOST, ms_ssim, scales, ssim
from .results import Row

Metric = Callable[[Tensor, Tensor], Tensor]
MANY = 64  # a tokenizer with more lengths is measured at so many of them, ever farther apart
BEYOND = (1.5, 2, 3, 4, 6, 8, 12, 16)  # times the bytes of all tokens: how far codecs are measured


@dataclass(frozen=True)
class Pictures:
    """A set of images (N, 3, H, W) with values in [0, 1], and how many objects are seen on each, if known."""

    name: str
    images: Tensor
    objects: np.ndarray | None = None  # (N,)

    def to(self, device: torch.device | str) -> Pictures:
        return Pictures(self.name, self.images.to(device), self.objects)


@dataclass(frozen=True)
class Reconstruction:
    """Errors of N images at L lengths: mean squared error and share of wrong pixels (N, L). The metrics are
    those at some of the lengths, `ladder`: (N, steps)."""

    lengths: np.ndarray  # (L,)
    ladder: list[int]
    mse: np.ndarray
    wrong: np.ndarray
    metrics: dict[str, np.ndarray]
    fid: list[float] | None = None  # at the ladder's lengths

    @property
    def psnr(self) -> np.ndarray:
        return decibels(self.mse)

    def at(self, chosen: np.ndarray) -> np.ndarray:
        """The columns (N,) of lengths, each rounded up to one that was measured."""
        return np.searchsorted(self.lengths, chosen)

    @staticmethod
    def cat(parts: Sequence[Reconstruction]) -> Reconstruction:
        """Several sets as one, without the metrics."""
        mse, wrong = (np.concatenate([getattr(part, name) for part in parts]) for name in ("mse", "wrong"))
        return Reconstruction(parts[0].lengths, parts[0].ladder, mse, wrong, {})


def decibels(mse: np.ndarray | float) -> np.ndarray:
    """PSNR of a mean squared error, at most 100."""
    return -10 * np.log10(np.maximum(mse, 10 ** (-MOST / 10)))


def measured_lengths(tokenizer: Tokenizer, most: int = MANY) -> list[int]:
    """All lengths, or of many the first and ever fewer of the longer ones."""
    own = np.array(tokenizer.lengths)
    if len(own) <= most:
        return own.tolist()
    places = np.searchsorted(own, np.geomspace(own[0], own[-1], most).round())
    return sorted(set(own[places].tolist()))


def ladder(lengths: Sequence[int]) -> list[int]:
    """1, 2, 4, ... and the longest, of the lengths that there are."""
    powers = [2**i for i in range(lengths[-1].bit_length())]
    return sorted({*(k for k in powers if k in lengths), lengths[-1]})


@torch.inference_mode()
def reconstruct(
    tokenizer: Tokenizer,
    images: Tensor,
    lengths: Sequence[int],
    metrics: dict[str, Metric] | None = None,
    fid: FID | None = None,
    batch: int = 50,
) -> Reconstruction:
    """Decodes images (N, 3, H, W) at all of the lengths, and measures the metrics at those of the ladder.

    metrics: by name what takes decoded and given images to (B,); SSIM and MS-SSIM unless told.
    """
    metrics = {"ssim": ssim, "ms_ssim": ms_ssim} if metrics is None else metrics
    steps = ladder(lengths)
    parts = images.split(batch)
    codes = [tokenizer.encode(part) for part in parts] if tokenizer.prefix_stable else None
    mse, bad = np.empty((2, len(images), len(lengths)))
    found = {name: np.empty((len(images), len(steps))) for name in metrics}
    distances = []
    for column, k in enumerate(lengths):
        for number, part in enumerate(parts):
            rows = slice(number * batch, number * batch + len(part))
            tokens = codes[number].truncate(k) if codes else tokenizer.encode(part, k)
            decoded = rounded(tokenizer.decode(tokens))
            mse[rows, column] = (decoded - part).square().mean((1, 2, 3)).cpu()
            bad[rows, column] = wrong(decoded, part).cpu()
            if k in steps:
                for name, metric in metrics.items():
                    found[name][rows, steps.index(k)] = metric(decoded, part).cpu()
                if fid:
                    fid.add(decoded)
        if fid and k in steps:
            distances.append(fid.distance())
    return Reconstruction(np.array(lengths), steps, mse, bad, found, distances or None)


def rounded(images: Tensor) -> Tensor:
    """Values in [0, 1] as 8 bits can tell them."""
    return (images.float() * 255).round() / 255


def length_row(data: Pictures, found: Reconstruction, bits: float) -> Row:
    """Means over images at every length, with how much images differ."""
    row = {"kind": "lengths", "data": data.name, "n": len(data.images), "bits_per_token": bits}
    row |= {"size": list(data.images.shape[-2:])}
    row |= {"k": found.lengths.tolist(), "mse": found.mse.mean(0).tolist(), "psnr": spread(found.psnr)}
    row |= {"ladder": found.ladder, "ms_ssim_scales": scales(data.images)}
    row |= {name: spread(values) for name, values in found.metrics.items()}
    return row | ({"rfid": found.fid} if found.fid else {})


def spread(values: np.ndarray) -> dict[str, list[float]]:
    """Over images (N, L): mean, standard deviation, and what all but 5 % exceed."""
    return {
        "mean": values.mean(0).tolist(),
        "std": values.std(0).tolist(),
        "low": np.quantile(values, 0.05, axis=0).tolist(),
    }


# -- beside codecs


def codec_row(codec: str, data: Pictures, found: Reconstruction, bits: float) -> Row:
    """The best a codec does with as many bytes as tokens take, and with more; and the bytes that it takes for
    the PSNR that tokens reach."""
    steps = [k * bits / 8 for k in found.ladder]
    budgets = steps + [steps[-1] * times for times in BEYOND]
    settings = [coded(image, codec, math.floor(budgets[-1])) for image in to_images(data.images)]
    psnr = found.psnr[:, found.at(np.array(found.ladder))]  # (N, steps)
    row: Row = {"kind": "codec", "codec": codec, "data": data.name, "n": len(data.images)}
    row |= {"ladder": found.ladder, "tokens_psnr": psnr.mean(0).tolist(), "budgets": budgets}
    row |= {"settings": SETTINGS[codec]}
    for count in ("file", "payload"):
        cells, needed = [], []
        for budget in budgets:
            chosen = [best(some, budget, count) for some in settings]
            fits = [one.psnr for one in chosen if one]
            cells.append({"fits": len(fits), "psnr": float(np.mean(fits)) if fits else None})
        for column in psnr.T:  # (N,)
            sizes = [
                min((getattr(one, count) for one in some if one.psnr >= wanted), default=math.inf)
                for some, wanted in zip(settings, column, strict=True)
            ]
            median = float(np.median(sizes))
            needed.append(median if math.isfinite(median) else None)
        least = min((getattr(one, count) for some in settings for one in some), default=None)
        row[count] = {"cells": cells, "needed": needed, "least": least}
    return row
