"""More tokens for images that look complex, seen before a token is made."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .policies import Images, Policy, batches, check_count, check_number

if TYPE_CHECKING:
    from .base import Tokenizer

Score = Callable[[Tensor], Tensor]


def gradient_energy(images: Tensor) -> Tensor:
    """Mean squared difference of neighbours, across and down, of the grey picture: (B, 3, H, W) to (B,)."""
    grey = images.float().mean(1)
    across, down = grey.diff(dim=2).square(), grey.diff(dim=1).square()
    return across.flatten(1).mean(1) + down.flatten(1).mean(1)


def jpeg_bytes(images: Tensor) -> Tensor:
    """Bytes per pixel of the picture as JPEG of quality 75, header included: (B, 3, H, W) to (B,)."""
    from PIL import Image

    sizes = []
    for picture in (images.float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu():
        file = io.BytesIO()
        Image.fromarray(picture.numpy()).save(file, "JPEG", quality=75)
        sizes.append(file.tell() / picture[..., 0].numel())
    return torch.tensor(sizes, device=images.device)


SCORES: dict[str, Score] = {"gradient": gradient_energy, "jpeg": jpeg_bytes}


@dataclass(frozen=True)
class Complexity(Policy):
    """A length by a score of the image: the first of `lengths` below the first threshold, the next one from
    there on, and so forth (CAT, arXiv:2501.03120, where a language model rates a caption of the image).

    score       "gradient", "jpeg", or a function of images (B, 3, H, W) to (B,), the higher the more complex
    lengths     ascending; None: the powers of two up to the tokenizer's longest, and that
    thresholds  ascending, one fewer than lengths; `calibrate` finds them for a mean
    """

    name = "complexity"
    knob = "thresholds"
    score: str | Score = "gradient"
    lengths: Sequence[int] | None = None
    thresholds: Sequence[float] | None = None

    def __post_init__(self) -> None:
        if not callable(self.score) and self.score not in SCORES:
            raise ValueError(f"a score is one of {', '.join(SCORES)} or a function, not {self.score!r}")
        for field in ("lengths", "thresholds"):
            value = getattr(self, field)
            object.__setattr__(self, field, None if value is None else tuple(value))
        for k in self.lengths or ():
            check_count("a length", k)
        if self.lengths is not None and (not self.lengths or not _ascending(self.lengths)):
            raise ValueError(f"lengths ascend, one or more of them, not {self.lengths}")
        if self.thresholds is None:
            return
        cuts = [check_number("a threshold", cut) for cut in self.thresholds]
        if not all(map(math.isfinite, cuts)) or not _ascending(cuts):
            raise ValueError(f"thresholds are ascending finite numbers, not {self.thresholds}")
        if self.lengths is None or len(cuts) != len(self.lengths) - 1:
            raise ValueError(f"lengths are one more than thresholds: {len(cuts) + 1}, not {self.lengths}")

    def choose(self, tokenizer: Tokenizer, images: Tensor) -> Tensor:
        if self.thresholds is None:
            raise ValueError(
                "a complexity policy needs lengths and thresholds, or a mean budget that finds them: "
                "MeanBudget(mean, Complexity(score)).calibrate(tokenizer, images)"
            )
        cuts = torch.tensor(self.thresholds, dtype=torch.float64, device=images.device)
        place = torch.searchsorted(cuts, self.scores(images), right=True)
        return torch.tensor(self.lengths, device=images.device)[place]

    def scores(self, images: Tensor) -> Tensor:
        """(B,) float64. Raises ValueError where the function does not give a number for each image."""
        found = (self.score if callable(self.score) else SCORES[self.score])(images)
        found = torch.as_tensor(found, dtype=torch.float64, device=images.device)
        if found.shape != (len(images),) or not bool(found.isfinite().all()):
            raise ValueError(
                f"a score is one finite number for each of {len(images)} images, "
                f"not {tuple(found.shape)} of which {int(found.isfinite().sum())} are finite"
            )
        return found

    @torch.no_grad()
    def calibrate(self, tokenizer: Tokenizer | Sequence[int], images: Images, mean: float) -> Complexity:
        """Thresholds with which images (B, 3, H, W), or batches of them, have `mean` tokens or a little less.

        tokenizer   or the lengths to choose from

        The lengths are used as evenly as the mean allows: their shares have the highest entropy. No further
        image can get the next length without going beyond the mean; images of equal score stay together.
        Lengths that no image gets are left out. Raises ValueError for a mean below the shortest length.
        """
        lengths = self._lengths_of(list(getattr(tokenizer, "lengths", tokenizer)))
        if mean < lengths[0]:
            raise ValueError(f"a mean of {mean:g} tokens is below the shortest length, {lengths[0]}")
        scores = torch.cat([self.scores(batch) for batch in batches(images)]).sort().values.tolist()
        bounds = [0, *cut_points(scores, lengths, mean), len(scores)]
        used = [j for j in range(len(lengths)) if bounds[j] < bounds[j + 1]]
        cuts = [bounds[j] for j in used[1:]]
        thresholds = [(scores[cut - 1] + scores[cut]) / 2 for cut in cuts]
        return replace(self, lengths=[lengths[j] for j in used], thresholds=thresholds)

    def _lengths_of(self, own: list[int]) -> list[int]:
        """The lengths to choose from, of those that there are."""
        powers = [2**i for i in range(own[-1].bit_length()) if 2**i >= own[0]]
        wanted = self.lengths or (*powers, own[-1])
        if wanted[-1] > own[-1]:
            raise ValueError(f"the longest length there is is {own[-1]}, not {wanted[-1]}")
        return sorted({next(k for k in own if k >= length) for length in wanted})


def cut_points(scores: Sequence[float], lengths: Sequence[int], mean: float) -> list[int]:
    """Where ascending scores are cut, so that what lies between two cuts has a length: one number fewer than
    lengths, of scores in front of each cut. `Complexity.calibrate` says how."""
    n = len(scores)
    places = [0, *(i for i in range(1, n) if scores[i] > scores[i - 1]), n]  # equal scores stay together
    wanted = [n * share for share in itertools.accumulate(_even_shares(lengths, mean))][:-1]
    at = [next(i for i, place in enumerate(places) if place >= cut - 1e-6) for cut in wanted]
    steps = [longer - shorter for shorter, longer in itertools.pairwise(lengths)]
    left = (mean - lengths[-1]) * n + sum(step * places[i] for step, i in zip(steps, at, strict=True))
    while True:  # what rounding left over goes to the images that are farthest from their share
        moves = []
        for j, i in enumerate(at):
            if i > (at[j - 1] if j else 0):
                cost = steps[j] * (places[i] - places[i - 1])
                if cost <= left + 1e-6:
                    moves.append((places[i] - wanted[j], j, cost))
        if not moves:
            return [places[i] for i in at]
        _, j, cost = max(moves)
        at[j] -= 1
        left -= cost


def _even_shares(lengths: Sequence[int], mean: float) -> list[float]:
    """The shares of highest entropy with that mean: they rise or fall exponentially with the length."""
    if mean >= lengths[-1] or len(lengths) == 1:
        return [0.0] * (len(lengths) - 1) + [1.0]
    k = torch.tensor(lengths, dtype=torch.float64)
    scaled = (k - k[0]) / (k[-1] - k[0])
    low, high = -1e4, 1e4
    for _ in range(100):
        rate = (low + high) / 2
        mean_there = float((rate * scaled).softmax(0) @ k)
        low, high = (rate, high) if mean_there <= mean else (low, rate)
    return (low * scaled).softmax(0).tolist()


def _ascending(values: Sequence[float]) -> bool:
    return all(low < high for low, high in itertools.pairwise(values))
