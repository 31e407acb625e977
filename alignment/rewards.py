"""What reinforcement learning maximises: a weighted sum of a reward model and of functions that a program can verify.

A reward function takes sampled answers and returns a number each, NaN where it does not apply (a chat prompt has no known
answer): such an answer is judged by the others alone, never as wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pydantic import Field

from alignment.errors import UserError
from alignment.models import Config
from alignment.records import Problem, Prompt
from alignment.reward import score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ASK_FOR_ANSWER = "Think step by step, then end with a line of the form: Answer: <answer>"


@dataclass(frozen=True)
class Task:
    """A conversation that ends with a user turn, and the known answer if there is one."""

    messages: tuple[dict[str, str], ...]
    answer: str | None = None


@dataclass(frozen=True)
class Rollout:
    """A sampled answer to a task. `ended` says whether the model stopped by itself, with EOS."""

    task: Task
    completion: str
    ended: bool = True


RewardFunction = Callable[[Sequence[Rollout]], list[float]]


class RewardWeights(Config):
    """How much each source of reward counts; 0 leaves it out."""

    reward_model: float = Field(1.0, description="Weight of the reward model's score; a negative one turns the aim around")
    exact_answer: float = Field(0.0, description="Weight of 1 for the right answer, 0 for a wrong or no answer (problems only)")
    answer_format: float = Field(0.0, description="Weight of 1 for one closing line `Answer: ...`, else 0 (problems only)")


def chat_task(prompt: Prompt) -> Task:
    """A prompt as a task without a known answer."""
    return Task(({"role": "user", "content": prompt.prompt},))


def problem_task(problem: Problem) -> Task:
    """A problem as a task: the question, how to end, and the known answer."""
    return Task(({"role": "user", "content": f"{problem.prompt}\n{ASK_FOR_ANSWER}"},), problem.answer)


def model_reward(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> RewardFunction:
    """The score of a reward model, which reads texts and so may have another tokenizer than the policy."""

    def reward(rollouts: Sequence[Rollout]) -> list[float]:
        finished = [[*r.task.messages, {"role": "assistant", "content": r.completion or " "}] for r in rollouts]
        return score(model, tokenizer, finished, batch_size)

    return reward


def exact_answer(rollouts: Sequence[Rollout]) -> list[float]:
    """1 where the stated answer equals the known one, 0 where not; NaN without a known answer."""
    return [math.nan if r.task.answer is None else float(stated_answer(r.completion) == _plain(r.task.answer)) for r in rollouts]


def answer_format(rollouts: Sequence[Rollout]) -> list[float]:
    """1 where the last line, and no other, states the answer as it was asked for; NaN without a known answer."""
    return [math.nan if r.task.answer is None else float(_well_formed(r.completion)) for r in rollouts]


def stated_answer(text: str) -> str | None:
    """The answer a text gives: what follows the last `Answer:`, else the last number; None if there is neither."""
    said = _ANSWER.findall(text)
    if said:
        return _plain(said[-1])
    numbers = _NUMBER.findall(text)
    return _plain(numbers[-1]) if numbers else None


def reward_functions(weights: RewardWeights, of_model: RewardFunction | None) -> dict[str, tuple[float, RewardFunction]]:
    """The functions with a weight other than 0, by name, with their weights.

    Raises:
        UserError: no function has a weight, or the reward model has one and is not there.
    """
    known = {"reward_model": of_model, "exact_answer": exact_answer, "answer_format": answer_format}
    used = {name: (weight, known[name]) for name, weight in weights.model_dump().items() if weight}
    if not used:
        raise UserError("rewards: every weight is 0. Remedy: give at least one reward function a weight.")
    if used.get("reward_model", (0, True))[1] is None:
        raise UserError("rewards.reward_model: there is no reward model here. Remedy: set its weight to 0.")
    return used


def total_rewards(
    functions: Mapping[str, tuple[float, RewardFunction]], rollouts: Sequence[Rollout]
) -> tuple[list[float], dict[str, list[float]]]:
    """Weighted sums over the functions that apply, and each function's own values.

    Raises:
        UserError: no function applies to some rollout.
    """
    values = {name: function(rollouts) for name, (_, function) in functions.items()}
    totals = []
    for i, rollout in enumerate(rollouts):
        terms = [weight * values[name][i] for name, (weight, _) in functions.items() if not math.isnan(values[name][i])]
        if not terms:
            raise UserError(
                f"rewards: none of {', '.join(functions)} applies to the prompt {rollout.task.messages[-1]['content'][:80]!r}. "
                "Remedy: give rewards.reward_model a weight, or train on problems only."
            )
        totals.append(sum(terms))
    return totals, values


_ANSWER = re.compile(r"answer\s*(?:is)?\s*:\s*([^\n]+)", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d(?:[\d,]*\d)?(?:\.\d+)?")


def _well_formed(text: str) -> bool:
    lines = [line.strip() for line in text.strip().splitlines()]
    stating = [bool(re.match(r"answer:\s*\S", line, re.IGNORECASE)) for line in lines]
    return bool(lines) and stating[-1] and sum(stating) == 1


def _plain(answer: str) -> str:
    text = answer.strip().lstrip("*`$").rstrip("*`$.! ").strip().lower()
    return text.replace(",", "") if re.fullmatch(r"-?\d{1,3}(,\d{3})*(\.\d+)?", text) else text
