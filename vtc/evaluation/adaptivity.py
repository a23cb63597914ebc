"""What it is worth to choose the number of tokens of each image, and whether more objects get more of them.

Makes the rows "policies" and "objects" of vtc.evaluation.reconstruction.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
import torch
from torch import Tensor

from ..tokenizers import Tokenizer
from ..tokenizers.complexity import Complexity
from ..tokenizers.oracle import allocate
from ..tokenizers.policies import Halting, Policy, least
from .ranks import bootstrap, rank_correlation
from .reconstruction import Pictures, Reconstruction, decibels
from .results import Row

SHARES = (8, 4, 2)  # policies are compared near an eighth, a quarter and half of all tokens


def lengths_by(tokenizer: Tokenizer, images: Tensor, policy: Policy, batch: int = 50) -> np.ndarray:
    """(N,) how many tokens a policy gives to each image."""
    with torch.inference_mode():
        parts = [tokenizer.encode(part, policy).lengths for part in images.split(batch)]
    return torch.cat(parts).cpu().numpy()


def epsilons(tokenizer: Tokenizer, images: Tensor, some: int = 48) -> list[float | None]:
    """Errors to ask a halting head for: with them some of the images have about an eighth, a quarter and half
    of all tokens on average.

    A head that never halts so early is asked for fewer, and left to itself, [None], where there is none.
    """
    few, found = images[:: -(-len(images) // some)], []
    for share in SHARES:
        mean = max(tokenizer.lengths[0], tokenizer.max_tokens / share)
        with suppress(ValueError):  # of a head that takes no epsilon, too
            found.append(Halting().calibrate(tokenizer, few, mean).epsilon)
    return sorted(set(found), reverse=True) or [None]


def policies_row(
    tokenizer: Tokenizer, data: Pictures, found: Reconstruction, asked: Sequence[float | None]
) -> Row:
    """Every policy at the mean length of halting with each epsilon `asked` for; where none is, at an eighth,
    a quarter and half of all tokens. Gains are over as many tokens for all images: where the mean is no whole
    number, a share of them has one more.

    Complexity, quality and the oracle are set to the mean on these very images; halting knows none of them.
    """
    points = []
    if asked:
        for epsilon in asked:
            lengths = lengths_by(tokenizer, data.images, Halting(epsilon))
            mean = float(found.lengths[found.at(lengths)].mean())
            halted = {
                "halting": outcome(found, lengths),
                "halting, shuffled": outcome(found, lengths, shuffled=True),
            }
            points.append(_point(tokenizer, data, found, mean, halted) | {"epsilon": epsilon})
    else:
        for share in SHARES:
            mean = float(max(found.lengths[0], found.lengths[-1] / share))
            points.append(_point(tokenizer, data, found, mean, {}))
    return {"kind": "policies", "data": data.name, "n": len(data.images), "points": points}


def _point(
    tokenizer: Tokenizer, data: Pictures, found: Reconstruction, mean: float, halted: dict[str, Row]
) -> Row:
    own = found.lengths.tolist()
    lines = {"fixed": summary(found, fixed(found, mean), mean), **halted}
    for score in ("gradient", "jpeg"):
        tuned = Complexity(score).calibrate(own, data.images, mean)
        lines[f"complexity, {score}"] = outcome(found, tuned.choose(tokenizer, data.images).cpu().numpy())
    lines["quality"] = outcome(found, at_quality(found.lengths, found.mse, mean))
    lines["quality, wrong"] = outcome(found, at_quality(found.lengths, found.wrong, mean))
    lines["oracle"] = outcome(found, allocate(torch.from_numpy(found.mse), own, mean).numpy())
    return {"mean": mean, "policies": lines}


def at_quality(lengths: np.ndarray, errors: np.ndarray, mean: float) -> np.ndarray:
    """(N,) the fewest tokens with which images reach an error (N, L), so set that the mean holds."""

    def reaching(error: float) -> Tensor:
        reached = errors <= error
        reached[:, -1] = True
        return torch.from_numpy(lengths[reached.argmax(1)])

    return reaching(least(reaching, -1e-9, float(errors.max()), mean)).numpy()


def fixed(found: Reconstruction, mean: float) -> list[np.ndarray]:
    """Expected error, PSNR and share of wrong pixels (N,) where all images have that length, or by chance one
    of its neighbours."""
    at = np.interp(mean, found.lengths, np.arange(len(found.lengths)))
    low, share = int(at), at - int(at)
    high = min(low + 1, len(found.lengths) - 1)
    return [(1 - share) * table[:, low] + share * table[:, high] for table in tables(found)]


def tables(found: Reconstruction) -> tuple[np.ndarray, ...]:
    return found.mse, found.psnr, found.wrong


def outcome(found: Reconstruction, chosen: np.ndarray, shuffled: bool = False) -> Row:
    """What comes of lengths (N,); shuffled: expected where they are dealt to the images by chance."""
    columns = found.at(chosen)
    lengths = found.lengths[columns]
    if shuffled:
        each = [table[:, columns].mean(1) for table in tables(found)]
    else:
        each = [table[np.arange(len(columns)), columns] for table in tables(found)]
    return summary(found, each, float(lengths.mean()), float(lengths.std()))


def summary(found: Reconstruction, each: Sequence[np.ndarray], mean: float, std: float = 0.0) -> Row:
    """Means over images, each of which has an error, a PSNR and a share of wrong pixels (N,). of_mean: PSNR
    of
    the mean squared error of all. Gains are over fixed lengths."""
    (mse, psnr, wrong), (mse_beside, psnr_beside, wrong_beside) = each, fixed(found, mean)

    def gain(one: np.ndarray, other: np.ndarray) -> float:
        return float(decibels(one.mean()) - decibels(other.mean()))

    def gain_each(one: np.ndarray, other: np.ndarray) -> float:
        return float((one - other).mean())

    return {
        "mean": mean,
        "std": std,
        "of_mean": float(decibels(mse.mean())),
        "gain": gain(mse, mse_beside),
        "gain_interval": bootstrap(gain, mse, mse_beside),
        "psnr": float(psnr.mean()),
        "psnr_gain": gain_each(psnr, psnr_beside),
        "psnr_gain_interval": bootstrap(gain_each, psnr, psnr_beside),
        "wrong": float(wrong.mean()),
        "wrong_gain": gain_each(wrong, wrong_beside),
        "wrong_gain_interval": bootstrap(gain_each, wrong, wrong_beside),
        "low": float(np.quantile(psnr, 0.05)),
    }


def objects_row(tokenizer: Tokenizer, data: Pictures, asked: Sequence[float | None]) -> Row:
    """Tokens by number of objects, and their rank correlation, for halting with each epsilon asked for, and
    for complexity, which is set to a quarter of all tokens on these images."""
    policies: list[tuple[str, float | None, Policy]] = [("halting", e, Halting(e)) for e in asked]
    mean = max(tokenizer.lengths[0], tokenizer.max_tokens / 4)
    for score in ("gradient", "jpeg"):
        tuned = Complexity(score).calibrate(tokenizer, data.images, mean)
        policies.append((f"complexity, {score}", None, tuned))
    points = []
    for name, epsilon, policy in policies:
        lengths = lengths_by(tokenizer, data.images, policy)
        by = {}
        for count in np.unique(data.objects).tolist():
            own = lengths[data.objects == count]
            by[str(count)] = {"n": len(own), "mean": float(own.mean()), "std": float(own.std())}
        points.append(
            {"policy": name, "epsilon": epsilon, "mean": float(lengths.mean()), "std": float(lengths.std())}
            | {"by": by, "correlation": rank_correlation(data.objects, lengths)}
            | {"interval": bootstrap(rank_correlation, data.objects, lengths)}
        )
    return {"kind": "objects", "data": data.name, "n": len(data.images), "points": points}
