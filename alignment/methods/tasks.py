"""The tasks that reinforcement learning samples answers to: a constitution's prompts, problems with known answers, or both."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from alignment.readers import read_records
from alignment.records import Problem, Prompt
from alignment.rewards import Task, chat_task, problem_task
from alignment.sft import NothingToTrain

TaskKind = Literal["prompts", "problems", "both"]


def training_tasks(prompts: Path, kind: TaskKind, prompt_tags: Sequence[str], max_tasks: int, seed: int) -> list[Task]:
    """Training tasks in a seeded order, at most `max_tasks` of them (0: all).

    Args:
        prompts: the folder of the `prompts` asset.
        kind: prompts with one of `prompt_tags`, problems, or both.

    Raises:
        NothingToTrain: there are none.
    """
    tasks = []
    if kind != "problems":
        tasks += [chat_task(p) for p in read_records(prompts / "train.jsonl", Prompt) if set(p.tags) & set(prompt_tags)]
    if kind != "prompts":
        tasks += [problem_task(p) for p in read_records(prompts / "problems_train.jsonl", Problem)]
    if not tasks:
        tagged = f"training prompts (tags {', '.join(prompt_tags)})"
        among = {"prompts": tagged, "problems": "training problems", "both": f"{tagged} and problems"}[kind]
        files = " or ".join(f"prompts.{name}" for name in ("prompts", "problems") if kind in (name, "both"))
        raise NothingToTrain(
            f"tasks: {kind}: there is none among the {among}. Remedy: add some to the files of {files}, or choose other tasks."
        )
    random.Random(seed).shuffle(tasks)
    return tasks[: max_tasks or None]
