"""Leakage is found in what was written, however it came there."""

import pytest

from alignment.datasets import write_jsonl
from alignment.leakage import leakage, leaked_rows
from alignment.records import Conversation, Message, PreferencePair, Problem, Prompt


@pytest.mark.parametrize(
    ("heldout", "train", "leaks"),
    [
        ([["How do eggs boil?"]], [["Why is the sky blue?"]], 0),
        ([["How do eggs boil?"]], [["how DO eggs  boil"]], 1),
        ([["How do eggs boil?"]], [["Hello", "How do eggs boil?"]], 1),
        ([["Hello", "How do eggs boil?"]], [["Hello"]], 0),  # held out for its second turn, which is not trained on
        ([["Hello", "How do eggs boil?"]], [["Hello"], ["How do eggs boil?"]], 1),
        ([["a b"], ["c d"], ["a b"]], [["a, b"]], 2),
        ([], [["a"]], 0),
    ],
)
def test_rows_are_compared_after_normalisation(heldout, train, leaks):
    assert len(leaked_rows(heldout, train)) == leaks


def test_a_prompt_that_a_training_text_quotes_has_leaked():
    request = "Here is a question.\nQuestion: How do eggs boil, please?\nAnswer: In water."
    assert leaked_rows([["How do eggs boil, please?"]], [], [request]) == ["How do eggs boil, please?"]
    assert leaked_rows([["Do eggs boil, please tell?"]], [], [request]) == []
    assert leaked_rows([["In water."]], [], [request]) == []  # two words stand in many a text by chance


def talk(i, text, category=""):
    turns = (Message(role="user", content=text), Message(role="assistant", content="Yes."))
    return Conversation(id=f"c{i}", messages=turns, category=category)


def pair(i, text):
    return PreferencePair(id=f"p{i}", prompt=text, chosen="a", rejected="b")


@pytest.fixture
def folders(tmp_path):
    """Three small data sets without leaks; a test adds rows."""
    rows = {
        "sft_dataset/train": [talk(1, "Train talk one?"), talk(2, "Mend this: Train talk two is long?", "critique")],
        "sft_dataset/heldout": [talk(3, "Held talk?")],
        "human_preferences/reward_train": [pair(1, "Reward pair?")],
        "human_preferences/evaluator_train": [pair(2, "Evaluator pair?")],
        "human_preferences/heldout": [pair(3, "Held pair?")],
        "prompts/train": [Prompt(id="q1", prompt="Train prompt?")],
        "prompts/heldout": [Prompt(id="q2", prompt="Held prompt?")],
        "prompts/problems_train": [],
        "prompts/problems_heldout": [Problem(id="m1", prompt="Held problem?", answer="4")],
    }

    def write(**more):
        for name, content in rows.items():
            path = tmp_path / f"{name}.jsonl"
            path.parent.mkdir(exist_ok=True)
            write_jsonl(path, [*content, *more.get(name.replace("/", "__"), [])])
        return [tmp_path / name for name in ("sft_dataset", "human_preferences", "prompts")]

    return write


def test_clean_data_sets_are_clean(folders):
    counts, leaks = leakage(*folders())
    assert counts == {"leakage/heldout": 4, "leakage/leaked": 0}
    assert leaks == []


@pytest.mark.parametrize(
    ("place", "row"),
    [
        ("sft_dataset__train", talk(9, "HELD prompt")),
        ("sft_dataset__train", talk(9, "Mend: held talk of some length! Thanks", "critique")),
        ("human_preferences__reward_train", pair(9, "Held pair?")),
        ("human_preferences__evaluator_train", pair(9, "held talk")),
        ("prompts__train", Prompt(id="q9", prompt="Held problem?")),
        ("prompts__problems_train", Problem(id="m9", prompt="Held prompt?", answer="4")),
    ],
)
def test_a_held_out_row_is_found_in_any_training_part(folders, place, row):
    long = talk(8, "Held talk of some length?")
    counts, leaks = leakage(*folders(**{place: [row], "sft_dataset__heldout": [long]}))
    assert counts["leakage/leaked"] == len(leaks) == 1
    assert leaks[0].lower().startswith("held")
