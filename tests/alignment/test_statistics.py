"""Intervals against published values and against cases where the answer is known."""

import math
import random
import tracemalloc

import numpy as np
import pytest

from alignment.statistics import paired_bootstrap, wilson


def test_a_constant_difference_has_no_uncertainty():
    assert paired_bootstrap([2.5, 3.5, 4.5], [2.0, 3.0, 4.0]) == (0.5, 0.5, 0.5)
    assert paired_bootstrap([1.0], [3.0]) == (-2.0, -2.0, -2.0)


def test_the_interval_is_that_of_normal_theory_for_many_pairs():
    rng = random.Random(0)
    b = [rng.gauss(0, 10) for _ in range(400)]
    difference = [rng.gauss(0.3, 1) for _ in b]
    a = [x + d for x, d in zip(b, difference, strict=True)]
    mean = sum(difference) / 400
    error = math.sqrt(sum((d - mean) ** 2 for d in difference)) / 400
    value, low, high = paired_bootstrap(a, b)
    assert value == pytest.approx(mean)
    assert low == pytest.approx(mean - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(mean + 1.96 * error, abs=0.1 * error)


def test_pairing_matters():
    rng = random.Random(1)
    b = [rng.gauss(0, 10) for _ in range(50)]
    a = [x + 0.5 + rng.gauss(0, 0.1) for x in b]
    _, low, high = paired_bootstrap(a, b)
    assert 0.4 < low < high < 0.6
    shuffled = b[1:] + b[:1]
    _, low, high = paired_bootstrap(a, shuffled)
    assert low < -1
    assert high > 1


def test_two_halves_and_a_coin():
    # 10 wins and 10 losses: the resampled mean is Binomial(20, 1/2) scaled; its 2.5 % quantile is 6 of 20, so -0.4.
    value, low, high = paired_bootstrap([1] * 10 + [0] * 10, [0] * 10 + [1] * 10)
    assert (value, low, high) == pytest.approx((0.0, -0.4, 0.4))


def test_swapping_the_sides_turns_the_interval_around():
    a, b = [0.1, 2.0, 3.5, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.5]
    value, low, high = paired_bootstrap(a, b)
    assert paired_bootstrap(b, a) == pytest.approx((-value, -high, -low), abs=0.03)
    assert low < value < high


def test_the_seed_decides():
    a, b = [0.1, 2.0, 3.5, 1.0, 0.7], [1.0, 1.0, 1.0, 1.0, 1.5]
    assert paired_bootstrap(a, b, seed=3) == paired_bootstrap(a, b, seed=3)
    assert paired_bootstrap(a, b, resamples=50, seed=3) != paired_bootstrap(a, b, resamples=50, seed=4)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = random.Random(2)
    hits = 0
    for trial in range(300):
        a = [rng.gauss(0.5, 1) for _ in range(60)]
        _, low, high = paired_bootstrap(a, [0.0] * 60, resamples=800, seed=trial)
        hits += low <= 0.5 <= high
    assert 0.90 <= hits / 300 <= 0.98


# 1499 and 1501 pairs: several blocks, each of an odd and of an even count of draws, which the generator makes two at a time.
@pytest.mark.parametrize(("pairs", "resamples"), [(1, 10_000), (67, 10_000), (1499, 1500), (1501, 1500), (1_100_000, 3)])
def test_block_by_block_the_resamples_are_those_of_one_matrix(pairs, resamples):
    difference = np.random.default_rng(1).normal(size=pairs)
    means = difference[np.random.default_rng(3).integers(0, pairs, size=(resamples, pairs))].mean(axis=1)
    _, low, high = paired_bootstrap(difference, np.zeros(pairs), resamples, seed=3)
    assert (low, high) == tuple(np.quantile(means, [0.025, 0.975]))


def test_memory_is_bounded_however_many_pairs_there_are():
    difference = np.random.default_rng(1).normal(size=100_000)
    tracemalloc.start()
    try:
        paired_bootstrap(difference, np.zeros(100_000), resamples=200)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 50e6  # 160 MB of indices alone, if all were drawn at once


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_samples_that_are_no_pairs_are_an_error(a, b):
    with pytest.raises(ValueError, match=f"got {len(a)} and {len(b)}"):
        paired_bootstrap(a, b)


# Newcombe, Statistics in Medicine 17 (1998) 857-872, table I, method 3.
@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_as_published(successes, trials, low, high):
    interval = wilson(successes, trials)
    assert interval.value == successes / trials
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=5e-5)


def test_wilsons_interval_is_symmetric_and_stays_inside_zero_and_one():
    for trials in (1, 2, 10, 1000):
        for successes in (0, trials // 3, trials / 2, trials):
            here, mirrored = wilson(successes, trials), wilson(trials - successes, trials)
            assert 0 <= here.low <= here.value <= here.high <= 1
            assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((here.low, here.high))


def test_a_proportion_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one trial"):
        wilson(0, 0)
