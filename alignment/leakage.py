"""Leakage: does anything that is held out stand in training data after all?

`alignment.splits` makes it impossible as long as every data set is split with the same fraction; this compares what was
really written, word for word after normalisation, and so also finds a fraction that was changed in one place only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from alignment.readers import read_records
from alignment.records import Conversation, PreferencePair, Problem, Prompt
from alignment.splits import normalise

Turns = Sequence[str]  # what the user says in one row, turn by turn


def leaked_rows(heldout: Iterable[Turns], train: Iterable[Turns], quoted: Iterable[str] = ()) -> list[str]:
    """The held-out rows (their first turns) that are in training data.

    A row of several turns leaks when all of them do: it is held out as soon as one turn is, and the others may be trained on.

    Args:
        heldout: rows that must not be trained on.
        train: rows that are trained on.
        quoted: longer texts that are trained on and quote prompts, such as requests for a critique.
    """
    seen = {normalise(turn) for turns in train for turn in turns}
    around = [f" {normalise(text)} " for text in quoted]

    def trained_on(turn: str) -> bool:
        plain = normalise(turn)
        # A few words stand in many a text by chance.
        return plain in seen or (len(plain.split()) >= 4 and any(f" {plain} " in text for text in around))

    return [turns[0] for turns in heldout if all(map(trained_on, turns))]


def leakage(sft_dataset: Path, human_preferences: Path, prompts: Path) -> tuple[dict[str, float], list[str]]:
    """Compare all that three data sets hold out with all that they train on.

    Returns leakage/heldout (rows compared), leakage/leaked, and the leaked rows' first turns.
    """
    conversations = read_records(sft_dataset / "train.jsonl", Conversation)
    train: list[Turns] = [c.user_turns for c in conversations if not _critique(c)]
    for name in ("reward_train", "evaluator_train"):
        train += [p.user_turns for p in read_records(human_preferences / f"{name}.jsonl", PreferencePair)]
    train += _prompts(prompts, "train")
    heldout: list[Turns] = [c.user_turns for c in read_records(sft_dataset / "heldout.jsonl", Conversation)]
    heldout += [p.user_turns for p in read_records(human_preferences / "heldout.jsonl", PreferencePair)]
    heldout += _prompts(prompts, "heldout")
    leaks = leaked_rows(heldout, train, [c.prompt for c in conversations if _critique(c)])
    return {"leakage/heldout": float(len(heldout)), "leakage/leaked": float(len(leaks))}, leaks


def _prompts(folder: Path, side: str) -> list[Turns]:
    prompts = read_records(folder / f"{side}.jsonl", Prompt)
    return [[row.prompt] for row in (*prompts, *read_records(folder / f"problems_{side}.jsonl", Problem))]


def _critique(conversation: Conversation) -> bool:
    return conversation.category == "critique"
