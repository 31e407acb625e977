"""Intervals for small held-out sets: paired bootstrap for differences, Wilson's for proportions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

_DRAWN_AT_ONCE = 2**20
"""Pairs that the bootstrap draws at a time: 16 MB."""


class Interval(NamedTuple):
    """An estimate and its two-sided 95 % interval."""

    value: float
    low: float
    high: float


def paired_bootstrap(a: Sequence[float], b: Sequence[float], resamples: int = 10_000, seed: int = 0) -> Interval:
    """Mean of a_i - b_i with a percentile bootstrap interval over the pairs (Koehn 2004), lengths N each.

    Raises:
        ValueError: no pairs, or different lengths.
    """
    import numpy as np

    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired samples of equal, non-zero length are needed, got {len(a)} and {len(b)}")
    difference = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    rng = np.random.default_rng(seed)
    # In blocks, which draw the numbers that one matrix of all resamples would; for 250,000 pairs that takes 40 GB.
    rows = max(_DRAWN_AT_ONCE // len(difference), 1)
    blocks = [min(rows, resamples - start) for start in range(0, resamples, rows)]
    means = [difference[rng.integers(0, len(difference), size=(n, len(difference)))].mean(axis=1) for n in blocks]
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(difference.mean()), float(low), float(high))


def wilson(successes: float, trials: int) -> Interval:
    """A proportion with Wilson's score interval (Wilson 1927), sensible near 0 and 1 and for few trials.

    >>> wilson(8, 10)
    Interval(value=0.8, low=0.4901624715, high=0.9433178485)
    """
    if trials == 0:
        raise ValueError("a proportion needs at least one trial")
    z, p = 1.959963984540054, successes / trials
    centre = (p + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(p * (1 - p) / trials + z * z / (4 * trials * trials))
    return Interval(p, round(centre - half, 10), round(centre + half, 10))
