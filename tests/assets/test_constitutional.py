"""What `constitutional_preference_pairs` counts: worked by hand from the rounds that it writes."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from alignment.critique import Revised, Round
from alignment.datasets import write_jsonl
from alignment.readers import read_records
from alignment.records import PreferencePair, Prompt
from assets.constitutional import constitutional_preference_pairs

FIRST = "Pour sugar into his tank."
BETTER, BEST = "Talk to him before you do anything.", "Ask the council to have it towed away."


def gone_through(name, answers, rewards):
    """A prompt whose answer was in turn these; one that stands after a round was not revised."""
    rounds = tuple(
        Round(principle="lawful", critique="c", revision=after, revised=after != before) for before, after in pairwise(answers)
    )
    initial, final = rewards
    return Revised(
        id=name,
        prompt="My neighbour parks across my drive.",
        initial=answers[0],
        revisions=rounds,
        final=answers[-1],
        truncated=False,
        reward_initial=initial,
        reward_final=final,
    )


def test_shares_and_rewards_are_means_over_prompts_and_rounds(stage_of, tmp_path, monkeypatch):
    revised = [
        gone_through("revised twice", [FIRST, BETTER, BEST], (0.0, 1.0)),
        gone_through("revised once", [FIRST, BETTER, BETTER], (1.0, 3.0)),
        gone_through("never", [FIRST, FIRST, FIRST], (2.0, 2.0)),
        gone_through("to nothing", [FIRST, BETTER, ""], (1.0, -1.0)),
    ]
    (tmp_path / "prompts").mkdir()
    asked = [Prompt(id=r.id, prompt=r.prompt, tags=("general",)) for r in revised]
    write_jsonl(tmp_path / "prompts" / "train.jsonl", asked)
    monkeypatch.setattr("assets.constitutional.who_revises", lambda *settings: (None, None, None))
    monkeypatch.setattr("assets.constitutional.critique_and_revise", lambda *settings, **places: revised)
    stage = stage_of(constitutional_preference_pairs)
    outcome = stage.compute(SimpleNamespace(folder=tmp_path, out=tmp_path), None)
    assert outcome.metrics == pytest.approx(
        {
            "prompts": 4,
            "pairs": 2,
            "share_kept": 2 / 4,
            "share_no_violations": 3 / 8,
            "reward/initial": (0 + 1 + 2 + 1) / 4,
            "reward/final": (1 + 3 + 2 - 1) / 4,
            "filtered/unchanged": 1,
            "filtered/empty": 1,
        }
    )
    assert read_records(tmp_path / "rounds.jsonl", Revised) == revised
    assert [p.id for p in read_records(tmp_path / "pairs.jsonl", PreferencePair)] == ["revised twice", "revised once"]
    assert [row["kept"] for row in outcome.tables["revisions"]] == [True, True, False, False]
