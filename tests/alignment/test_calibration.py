"""From rewards to helpfulness: the scale means what it says, never turns around, and is honest about what it does not know."""

import math
import random

import pytest

from alignment.calibration import Calibration, fit, read_calibration, write_calibration
from alignment.errors import UserError


def calibration(location=0.0, scale=1.0):
    return Calibration(location=location, scale=scale, pairs=1, fitted_on="heldout", dtype="float32", quantization="none")


def test_the_map_by_hand():
    scale = calibration(location=2.0, scale=0.5)
    assert scale.helpfulness(2.0) == 5.5  # the median answer
    assert scale.helpfulness(2.0 + 0.5 * math.log(3)) == pytest.approx(1 + 9 * 0.75)  # preferred to it 3 times of 4
    assert scale.helpfulness(2.0 - 0.5 * math.log(3)) == pytest.approx(1 + 9 * 0.25)


def test_it_never_falls_and_never_leaves_the_scale():
    scale = calibration(location=-0.3, scale=0.7)
    rewards = sorted([*(random.Random(0).gauss(0, 5) for _ in range(2000)), -1e6, 1e6, -40.0, 40.0, -0.3])
    rated = [scale.helpfulness(r) for r in rewards]
    assert rated == sorted(rated)
    assert (rated[0], rated[-1]) == (1.0, 10.0)
    middle = [r for r in rewards if abs(r) < 5]
    assert len({scale.helpfulness(r) for r in middle}) == len(set(middle))  # and rises where there is something to tell


def test_fit_by_hand():
    # Four pairs, all rewards 1 apart, three the right way round. Platt's target is 5/6 for "right", so with a = 1 / scale the
    # derivative is 3 (s(a) - 5/6) - (s(-a) - 5/6) = 4 s(a) - 3 + (1 - 5/6) * ... = 0; s(-a) = 1 - s(a) gives s(a) = 2/3.
    # 3 s - 3 * 5/6 - 1 + s + 5/6 = 0  =>  4 s = 1 + 10/6  =>  s = 2/3  =>  a = log 2.
    location, scale = fit([1.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0])
    assert location == 0.5
    assert scale == pytest.approx(1 / math.log(2), rel=1e-6)


def simulated(n, stretch, seed=0):
    """Rewards of pairs of which the better one was chosen by chance, as Bradley and Terry say; `stretch` times too large."""
    rng = random.Random(seed)
    chosen, rejected = [], []
    for _ in range(n):
        a, b = rng.gauss(1, 1), rng.gauss(1, 1)
        if rng.random() > 1 / (1 + math.exp(b - a)):
            a, b = b, a
        chosen.append(a * stretch)
        rejected.append(b * stretch)
    return chosen, rejected


@pytest.mark.parametrize("stretch", [0.2, 1.0, 30.0])
def test_an_overconfident_or_timid_reward_model_is_set_right(stretch):
    location, scale = fit(*simulated(4000, stretch))
    assert scale == pytest.approx(stretch, rel=0.1)
    assert location == pytest.approx(stretch, rel=0.1)


def test_the_number_is_the_share_of_people_who_prefer_the_answer_to_the_median_one():
    location, scale = fit(*simulated(4000, 3.0))
    rated = calibration(location, scale).helpfulness(3.0 * (1 + math.log(4)))  # true odds against the median answer: 4 to 1
    assert (rated - 1) / 9 == pytest.approx(0.8, abs=0.03)


def test_no_error_in_few_pairs_is_no_certainty():
    _, few = fit([1.0] * 5, [0.0] * 5)
    _, many = fit([1.0] * 500, [0.0] * 500)
    assert many < few
    assert few == pytest.approx(1 / math.log(6), rel=1e-6)  # s(a) = 6/7, so a = log 6: a preference of six to one


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [([0.0, 1.0, 0.0, 1.0], [1.0, 0.0, 1.0, 0.0]), ([0.0] * 8, [1.0] * 8), ([0.7] * 8, [0.7] * 8)],
    ids=["chance", "worse than chance", "one score for all"],
)
def test_a_model_that_tells_nothing_apart_rates_everything_in_the_middle(chosen, rejected):
    location, scale = fit(chosen, rejected)
    assert scale > 0
    for reward in (0.0, 1.0):
        assert calibration(location, scale).helpfulness(reward) == pytest.approx(5.5, abs=0.8)


def test_saved_and_read_back_to_the_last_digit(tmp_path):
    saved = calibration(location=0.1 + 0.2, scale=math.pi / 3)
    write_calibration(saved, tmp_path)
    assert read_calibration(tmp_path) == saved


@pytest.mark.parametrize("content", [None, "{", '{"location": 1}', '{"location": 0, "scale": -1}'])
def test_a_missing_or_broken_file_is_named(tmp_path, content):
    if content is not None:
        (tmp_path / "calibration.json").write_text(content)
    with pytest.raises(UserError, match=r"calibration\.json: no calibration can be read there .*Remedy"):
        read_calibration(tmp_path)
