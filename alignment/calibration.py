"""Helpfulness on a scale from 1 to 10: what a reward model's unbounded scores mean to people.

A difference of two rewards is, by the Bradley-Terry loss, the log-odds that a person prefers one answer to the other. Hence

    helpfulness = 1 + 9 * sigmoid((reward - location) / scale)

- `location` is the median reward of all answers in the pairs it is fitted on: 5.5 is as good as their median answer.
- `scale` is the temperature (arXiv 1706.04599) under which these pairs are likeliest, with Platt's targets (1999), n + 1 of
  n + 2 preferences right, so that a model that errs nowhere does not claim certainty.

So (helpfulness - 1) / 9 is the probability that a person prefers the answer to the median one: 7.75 means in three cases of
four. A reward model that tells held-out answers apart no better than chance gets a large scale, and rates everything 5.5.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from alignment.errors import UserError
from alignment.models import LoadSettings
from alignment.records import Record

FILE = "calibration.json"
# Bounds of 1 / scale, in units of the rewards' own spread: nearly blind, and nearly a step.
FLATTEST, STEEPEST = 0.01, 100.0


class Calibration(Record):
    """The map from rewards to the scale, and how the model that gives the rewards is to be loaded."""

    location: float = Field(description="Reward of the median answer, which rates 5.5")
    scale: float = Field(gt=0, description="Rewards that divide two answers when e is to 1 that the higher one is preferred")
    pairs: int = Field(ge=1, description="Pairs it was fitted on")
    fitted_on: Literal["heldout", "train"] = Field(description="Held-out pairs; training pairs, and too sure, without any")
    dtype: Literal["float32", "bfloat16"] = Field(description="Precision in which the rewards were computed")
    quantization: Literal["none", "nf4"] = Field(description="Quantisation of the base under which they were computed")

    def helpfulness(self, reward: float) -> float:
        """The reward on the scale: a number in [1, 10] that never falls when the reward rises."""
        return 1 + 9 * _sigmoid((reward - self.location) / self.scale)

    @property
    def load(self) -> LoadSettings:
        """How to load the model so that its rewards are those of the fit."""
        return LoadSettings(dtype=self.dtype, quantization=self.quantization)


def fit(chosen: Sequence[float], rejected: Sequence[float]) -> tuple[float, float]:
    """Location and scale for the rewards of N chosen and N rejected answers, N >= 1."""
    rewards = [*chosen, *rejected]
    spread = statistics.pstdev(rewards) or 1.0
    differences = [c - r for c, r in zip(chosen, rejected, strict=True)]
    right = (len(differences) + 1) / (len(differences) + 2)

    def slope(inverse: float) -> float:
        # Derivative of the negative log-likelihood; it rises with 1 / scale, so its root is the minimum.
        return math.fsum(d * (_sigmoid(inverse * d) - right) for d in differences)

    low, high = FLATTEST / spread, STEEPEST / spread
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if slope(middle) >= 0 else (middle, high)
    return statistics.median(rewards), 2 / (low + high)


def write_calibration(calibration: Calibration, folder: Path) -> None:
    """Put it into the reward model's folder."""
    (folder / FILE).write_text(calibration.model_dump_json(indent=2), encoding="utf-8")


def read_calibration(folder: Path) -> Calibration:
    """The calibration in a reward model's folder.

    Raises:
        UserError: there is none, or it cannot be read.
    """
    path = folder / FILE
    try:
        return Calibration.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValidationError) as error:
        raise UserError(
            f"{path}: no calibration can be read there ({type(error).__name__}). Remedy: name the folder `model` of a reward "
            "model's artifact; one that was trained before there were calibrations has to be trained again."
        ) from error


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
