"""Initial against revised: the table, and how it looks in a terminal."""

import pytest
from pydantic import ValidationError

from alignment.critique import Revised, Round
from alignment.critique_demo import (
    PROMPTS,
    CritiqueDemoConfig,
    comparison_rows,
    comparison_text,
    prompts_of,
    side_by_side,
)
from alignment.pair_filters import FilterSettings
from alignment.readers import DataError

INITIAL = "Take a wire and push it into the lock until something gives way, then turn it."
FINAL = "I will not help with opening somebody else's door, but a locksmith can open your own within the hour."


def revised(**changes):
    values = {
        "id": "demo-1",
        "prompt": "How do I pick a lock?",
        "initial": INITIAL,
        "revisions": (Round(principle="lawful", critique="It explains a burglary.", revision=FINAL, revised=True),),
        "final": FINAL,
        "truncated": False,
        "reward_initial": -0.5,
        "reward_final": 1.25,
    }
    return Revised(**(values | changes))


def test_a_row_has_both_answers_the_critique_and_what_became_of_the_pair():
    (row,) = comparison_rows([revised()], FilterSettings())
    assert row == {
        "prompt": "How do I pick a lock?",
        "initial": INITIAL,
        "revised": FINAL,
        "principles": "lawful",
        "critiques": "lawful: It explains a burglary.",
        "reward_initial": -0.5,
        "reward_revised": 1.25,
        "pair": "kept",
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"final": INITIAL}, "unchanged"), ({"truncated": True}, "truncated"), ({"reward_final": -2.0}, "not_better")],
)
def test_a_row_says_why_there_would_be_no_pair(changes, reason):
    (row,) = comparison_rows([revised(**changes)], FilterSettings())
    assert row["pair"] == reason


@pytest.mark.parametrize("width", [40, 60, 80, 161])
def test_columns_are_equal_and_no_line_is_wider_than_the_terminal(width):
    lines = side_by_side("initial", INITIAL, "revised", FINAL, width)
    assert max(map(len, lines)) <= width
    assert {line.index("|") for line in lines} == {(width - 3) // 2 + 1}
    left, right = zip(*(line.split("|") for line in lines), strict=True)
    assert " ".join(" ".join(left[2:]).split()) == INITIAL
    assert " ".join(" ".join(right[2:]).split()) == FINAL


def test_line_breaks_stay_and_an_empty_answer_is_an_empty_column():
    lines = side_by_side("initial", "one\n\ntwo", "revised", "", 40)
    assert [line.split("|")[0].strip() for line in lines[2:]] == ["one", "", "two"]
    assert all(line.endswith("|") for line in lines[2:])


def test_an_answer_cannot_control_the_terminal():
    text = "\n".join(side_by_side("initial", "\x1b[31mred\x07\rover", "revised", "\x1b]0;title\x07", 40))
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "\r" not in text


def test_the_terminal_shows_prompt_critique_scores_and_verdict():
    text = comparison_text(comparison_rows([revised(), revised(final=INITIAL)], FilterSettings()), 80)
    assert "1. How do I pick a lock?" in text
    assert "2. How do I pick a lock?" in text
    assert "critique, lawful: It explains a burglary." in text
    assert "from -0.50 to 1.25; a preference pair" in text
    assert "no preference pair: unchanged" in text


def test_the_default_is_five_prompts_with_ids_of_their_own():
    records = CritiqueDemoConfig().records()
    assert [r.prompt for r in records] == PROMPTS
    assert len({r.id for r in records}) == len({r.prompt for r in records}) == 5


@pytest.mark.parametrize(("prompts", "says"), [([], "at least 1"), (["a", " "], "prompt 2 is blank")])
def test_prompts_that_are_none_are_refused(prompts, says):
    with pytest.raises(ValidationError, match=says):
        CritiqueDemoConfig(prompts=prompts)


def test_prompts_are_read_from_lines_or_from_any_format_of_the_readers(tmp_path):
    lines = tmp_path / "mine.txt"
    lines.write_bytes(b"\xef\xbb\xbfOne?\r\n\r\n  Two?  \r\n")
    assert prompts_of(lines) == ["One?", "Two?"]
    table = tmp_path / "mine.csv"
    table.write_text("prompt\nOne?\nTwo?\n")
    assert prompts_of(table) == ["One?", "Two?"]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [("none.txt", None, "no such file"), ("empty.txt", b"\n \n", "holds no prompt"), ("latin.txt", b"caf\xe9", "is not UTF-8")],
)
def test_a_file_without_prompts_is_one_clear_error(tmp_path, name, content, says):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name}: {says}.*Remedy"):
        prompts_of(tmp_path / name)
