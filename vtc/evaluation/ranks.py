"""Rank correlation, and how sure a statistic of images is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's: -1 to 1; ties share their mean rank; 0 where one of the two is the same everywhere."""
    a, b = (ranks(values) - (len(values) + 1) / 2 for values in (one, other))
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else 0.0


def ranks(values: np.ndarray) -> np.ndarray:
    """1 for the least; values that are equal share the mean of their ranks."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def bootstrap(
    statistic: Callable[..., float], *values: np.ndarray, resamples: int = 1000, seed: int = 0
) -> list[float]:
    """The 95 % interval [low, high] of a statistic of arrays (N, ...), images drawn anew with replacement."""
    generator, n = np.random.default_rng(seed), len(values[0])
    draws = [generator.integers(n, size=n) for _ in range(resamples)]
    found = [statistic(*(array[draw] for array in values)) for draw in draws]
    return [float(bound) for bound in np.quantile(found, (0.025, 0.975))]
