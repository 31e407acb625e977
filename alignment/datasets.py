"""The curated data sets as stages see them: read, deduplicated, split by prompt, written as JSON lines.

One split for all (`alignment.splits`): what is held out for evaluation is in no training part of any data set. Rows are
duplicates if all that is said in them is the same but for case and white space.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import BaseModel, Field

from alignment.critique import critique_conversation
from alignment.models import Config
from alignment.progress import SILENT, Log
from alignment.readers import (
    DataError,
    deduplicate,
    read_conversations,
    read_critiques,
    read_preferences,
    read_problems,
    read_prompts,
)
from alignment.records import (
    PIPELINE_SOURCES,
    Conversation,
    CritiqueDemonstration,
    Message,
    PreferencePair,
    Problem,
    Prompt,
)
from alignment.splits import folded, position, split_of, split_of_turns

CODE_VERSION = "2"
MAX_SKIPPED = 0.05  # share of a Hub data set's rows that may be unusable
_SHOWN = 3  # reasons why rows were skipped, in the log


class SftDatasetConfig(Config):
    """What the SFT checkpoint is trained on."""

    demonstrations: list[str] = Field(
        ["data/demonstrations.jsonl"],
        description="Conversations: files or Hub data-set ids, in any format readers accept",
    )
    critiques: list[str] = Field(
        ["data/critiques.jsonl"], description="Worked critiques that teach the critic's craft; may be empty"
    )
    heldout_fraction: float = Field(
        0.25, gt=0, lt=1, description="Share of prompts held out; must be the same in all three data-set stages"
    )


class HumanPreferencesConfig(Config):
    """Human comparisons for reward model and evaluator."""

    preferences: list[str] = Field(["data/preferences.jsonl"], description="Files or Hub data-set ids")
    critiques: list[str] = Field(
        ["data/critiques.jsonl"],
        description="Worked critiques: a person's revision is preferred to the answer it mends; may be empty",
    )
    heldout_fraction: float = Field(0.25, gt=0, lt=1, description="Share of prompts held out")
    evaluator_share: float = Field(
        0.5,
        gt=0,
        lt=1,
        description="Share of the training pairs kept for the evaluator alone (split by prompt, disjoint)",
    )


class PromptsConfig(Config):
    """Prompts for critique-and-revise and reinforcement learning (train) and for the reports (held-out)."""

    prompts: list[str] = Field(["data/prompts.jsonl"], description="Files or Hub data-set ids")
    problems: list[str] = Field(
        ["data/reasoning.jsonl"], description="Problems with a known answer, for verifiable rewards; may be empty"
    )
    heldout_fraction: float = Field(0.25, gt=0, lt=1, description="Share of prompts held out")


def build_sft_dataset(config: SftDatasetConfig, sources: dict[str, str], out: Path, *, log: Log = SILENT) -> dict[str, float]:
    """Write `train.jsonl` and `heldout.jsonl` (conversations). `sources` maps a configured name to what is to be read.

    A worked critique is on the side of the prompt it criticises an answer to; held-out critiques are left out, so that
    `heldout.jsonl` holds plain demonstrations only. An answer in which a worked critique finds nothing is a demonstration,
    too: a person wrote it to be right.
    """
    reading, taken = _Reading(sources, log), set()
    demonstrations, twice = reading.records(read_conversations, config.demonstrations, _said, taken)
    critiques, twice_critiques = reading.records(read_critiques, config.critiques, _criticised, taken)
    train = [c for c in demonstrations if split_of_turns(c.user_turns, config.heldout_fraction) == "train"]
    heldout = [c for c in demonstrations if split_of_turns(c.user_turns, config.heldout_fraction) == "heldout"]
    taught = [c for c in critiques if split_of(c.prompt, config.heldout_fraction) == "train"]
    # Without held-out conversations nobody would know what perplexity a policy costs, which promotion asks for.
    for rows, what in ((train, "training conversation"), (heldout, "held-out conversation")):
        _need(rows, what, "sft_dataset.demonstrations", config.demonstrations)
    shown = {folded(c.prompt) for c in train}
    approved = [c for c in map(approved_answer, taught) if c is not None and folded(c.prompt) not in shown]
    write_jsonl(out / "train.jsonl", [*train, *_with_own_ids(approved, taken), *map(critique_conversation, taught)])
    write_jsonl(out / "heldout.jsonl", heldout)
    return {
        "rows/train": len(train) + len(approved) + len(taught),
        "rows/train_demonstrations": len(train),
        "rows/train_approved_answers": len(approved),
        "rows/train_critiques": len(taught),
        "rows/heldout": len(heldout),
        "rows/duplicates_removed": twice + twice_critiques,
        **reading.counts(),
    }


def build_human_preferences(
    config: HumanPreferencesConfig, sources: dict[str, str], out: Path, *, log: Log = SILENT
) -> dict[str, float]:
    """Write `reward_train.jsonl`, `evaluator_train.jsonl` and `heldout.jsonl` (pairs), disjoint by prompt.

    Comparisons come from two places: preferences, and worked critiques, whose revision a person wrote to be better than the
    answer. The latter are what teaches a scorer that declining well beats complying.
    A column `source` in a user's file may say anything, such as where a prompt comes from; the comparison is a person's all the
    same, unless the pipeline made it.
    """
    reading, taken = _Reading(sources, log), set()
    pairs, twice = reading.records(read_preferences, config.preferences, _compared, taken)
    worked, twice_critiques = reading.records(read_critiques, config.critiques, _criticised, taken)
    pairs = [pair if pair.source in PIPELINE_SOURCES else pair.model_copy(update={"source": "human"}) for pair in pairs]
    pairs += [revision_preferred(c) for c in worked if c.revision is not None]
    parts: dict[str, list] = {"reward_train": [], "evaluator_train": [], "heldout": []}
    for pair in pairs:
        if split_of_turns(pair.user_turns, config.heldout_fraction) == "heldout":
            parts["heldout"].append(pair)
        elif position(pair.prompt, "evaluator") < config.evaluator_share:
            parts["evaluator_train"].append(pair)
        else:
            parts["reward_train"].append(pair)
    for name, rows in parts.items():
        settings = "heldout_fraction or evaluator_share"
        _need(rows, f"{name} pair", "human_preferences.preferences", config.preferences, settings)
        write_jsonl(out / f"{name}.jsonl", rows)
    longer = sum(len(p.chosen) > len(p.rejected) for p in pairs) / len(pairs)
    counts = {f"rows/{name}": float(len(rows)) for name, rows in parts.items()}
    return {
        **counts,
        "rows/from_critiques": sum(p.source == "critique" for p in pairs),
        "rows/duplicates_removed": twice + twice_critiques,
        "share_chosen_longer": longer,
        **reading.counts(),
    }


def approved_answer(critique: CritiqueDemonstration) -> Conversation | None:
    """The demonstration in a worked critique that finds nothing: its prompt and its answer. None where it finds something."""
    if critique.revision is not None:
        return None
    turns = (Message(role="user", content=critique.prompt), Message(role="assistant", content=critique.response))
    return Conversation(id=f"{critique.id}-approved", messages=turns, category="approved")


def revision_preferred(critique: CritiqueDemonstration) -> PreferencePair:
    """The comparison that a worked critique with a revision implies: the revision over the answer it mends."""
    return PreferencePair(
        id=critique.id,
        prompt=critique.prompt,
        chosen=critique.revision,
        rejected=critique.response,
        domain=critique.constitution,
        source="critique",
    )


def build_prompts(config: PromptsConfig, sources: dict[str, str], out: Path, *, log: Log = SILENT) -> dict[str, float]:
    """Write `train.jsonl` and `heldout.jsonl` (prompts with tags), `problems_train.jsonl` and `problems_heldout.jsonl`."""
    reading = _Reading(sources, log)
    prompts, twice = reading.records(read_prompts, config.prompts, lambda p: [p.prompt], set())
    # Ordered by a hash, so that "the first n" (max_prompts) is a random sample whatever order the file has.
    prompts = sorted(prompts, key=_anywhere)
    sides = {side: [p for p in prompts if split_of(p.prompt, config.heldout_fraction) == side] for side in ("train", "heldout")}
    for side, rows in sides.items():
        _need(rows, f"{side} prompt", "prompts.prompts", config.prompts)
        write_jsonl(out / f"{side}.jsonl", rows)
    problems, twice_problems = reading.records(read_problems, config.problems, lambda p: [p.prompt, p.answer], set())
    problems = sorted(problems, key=_anywhere)
    counts = {}
    for side in ("train", "heldout"):
        rows = [p for p in problems if split_of(p.prompt, config.heldout_fraction) == side]
        write_jsonl(out / f"problems_{side}.jsonl", rows)
        counts[f"rows/problems_{side}"] = len(rows)
    return {
        "rows/train": len(sides["train"]),
        "rows/heldout": len(sides["heldout"]),
        "rows/duplicates_removed": twice,
        **counts,
        "rows/problems_duplicates_removed": twice_problems,
        **reading.counts(),
    }


def write_jsonl(path: Path, rows: Iterable[BaseModel]) -> None:
    """Records as JSON lines."""
    path.write_text("".join(row.model_dump_json() + "\n" for row in rows), encoding="utf-8")


@dataclass
class _Reading:
    """Reads the sources of a data set. Files are read strictly; bad rows of a Hub data set, which nobody can mend there, are
    skipped: `skipped` counts them by source."""

    sources: dict[str, str]
    log: Log
    skipped: dict[str, int] = field(default_factory=dict)

    def records(self, reader: Callable, names: Sequence[str], texts: Callable, taken: set[str]) -> tuple[list, int]:
        """The records of some sources without duplicates, of which there were so many; their ids are entered in `taken`."""
        records, twice = deduplicate([record for name in names for record in self._source(reader, name)], texts)
        return _with_own_ids(records, taken), twice

    def counts(self) -> dict[str, float]:
        """How many rows were skipped, if any source is on the Hub."""
        return {"rows/skipped": sum(self.skipped.values())} if self.skipped else {}

    def _source(self, reader: Callable, name: str) -> list:
        source = self.sources[name]
        if os.path.exists(source):
            return reader(source)
        errors: list[DataError] = []
        records = reader(source, skipped=errors)
        self.skipped[name] = len(errors)
        total = len(records) + len(errors)
        if len(errors) > MAX_SKIPPED * total:
            raise DataError(
                name,
                f"{len(errors)} of {total} rows cannot be used, and more than {MAX_SKIPPED:.0%} is too many to skip; the first: "
                f"{errors[0].finding}",
                "name another data set or split, or save the data as .jsonl and mend these rows",
            )
        if errors:
            self.log.say(f"{name}: skipped {len(errors)} of {total} rows, which cannot be used")
        for error in errors[:_SHOWN]:
            self.log.say(f"skipped: {error.finding}")
        return records


def _with_own_ids(records: Iterable, taken: set[str]) -> list:
    """The records, with a number behind each id that is in `taken` already, where all ids are entered.

    Ids are unique in a file only, and many files number their rows from 1. What follows a record does not change its id.
    """
    out = []
    for record in records:
        numbered = (f"{record.id}-{n}" for n in itertools.count(2))
        own = record.id if record.id not in taken else next(name for name in numbered if name not in taken)
        taken.add(own)
        out.append(record if own == record.id else record.model_copy(update={"id": own}))
    return out


def _anywhere(row: Prompt | Problem) -> tuple[float, str]:
    return position(row.prompt, "order"), folded(row.prompt)


def _said(conversation: Conversation) -> list[str]:
    return [text for m in conversation.messages for text in (m.role, m.content)]


def _compared(pair: PreferencePair) -> list[str]:
    return [*(text for m in pair.history for text in (m.role, m.content)), pair.prompt, pair.chosen, pair.rejected]


def _criticised(critique: CritiqueDemonstration) -> list[str]:
    return [critique.prompt, critique.principle, critique.response]


def _need(rows: Sequence, what: str, key: str, names: Sequence[str], settings: str = "heldout_fraction") -> None:
    """Refuse a part without rows. `names` are the sources that stand under `key`, `settings` what else decides the part."""
    if rows:
        return
    if not names:
        raise DataError(key, "names no file", "name a file or a Hub data set")
    raise DataError(", ".join(names), f"leaves not a single {what} after the split", f"add rows, or change {settings}")
