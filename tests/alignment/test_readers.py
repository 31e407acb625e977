"""Readers: every accepted format becomes the same record, every kind of broken input one error that names the place."""

import contextlib
import csv
import gzip
import io
import json
import math
import os
import pickle
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignment.datasets import write_jsonl
from alignment.readers import (
    NO_VIOLATIONS,
    DataError,
    deduplicate,
    read_conversations,
    read_critiques,
    read_preferences,
    read_problems,
    read_prompts,
    read_records,
)
from alignment.records import Conversation, CritiqueDemonstration, Message, PreferencePair, Problem, Prompt

REPOSITORY = Path(__file__).parents[2]
HH_RLHF = REPOSITORY.parent / "shared" / "data" / "hh_rlhf_harmless_base_1800.jsonl.gz"

READERS = {
    "conversations": read_conversations,
    "preferences": read_preferences,
    "critiques": read_critiques,
    "prompts": read_prompts,
    "problems": read_problems,
}


def jsonl(*rows: object) -> bytes:
    """Rows as JSON lines; bytes are a line as it stands."""
    return b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows)


def parquet(**columns: list) -> bytes:
    import pyarrow
    import pyarrow.parquet

    stream = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table(columns), stream)
    return stream.getvalue()


def csv_bytes(*rows: list[str]) -> bytes:
    stream = io.StringIO(newline="")
    csv.writer(stream).writerows(rows)
    return stream.getvalue().encode()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def transcript(*turns: str) -> str:
    speakers = ("Human", "Assistant")
    return "".join(f"\n\n{speakers[i % 2]}: {turn}" for i, turn in enumerate(turns))


def write(folder: Path, name: str, content: bytes) -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


# --- What is wrong, and the place that the error must name ------------------------------------------------------------

GOOD = {"prompt": "How long do eggs boil?", "chosen": "Seven minutes.", "rejected": "An hour."}
TALK = {"messages": [user("Hello"), assistant("Good morning.")]}
CRITIQUE = {
    "constitution": "general",
    "principle": "Be kind.",
    "prompt": "Am I slow?",
    "response": "Yes.",
    "critique": "It is curt.",
    "revision": "You take your time, and that is fine.",
}


def pair(**changes: object) -> dict:
    return {**GOOD, "prompt": "And potatoes?", **changes}


def without(row: dict, *columns: str) -> dict:
    return {key: value for key, value in row.items() if key not in columns}


def talk(*messages: object) -> dict:
    return {"messages": list(messages)}


TRUNCATED_GZIP = gzip.compress(random.Random(0).randbytes(4000).hex().encode())[:1000]

# (name, kind of data, file name, its bytes, line, field, words that the message must hold)
CASES: list[tuple[str, str, str, bytes, int | None, str | None, str]] = [
    # files
    ("empty file", "preferences", "p.jsonl", b"", None, None, "is empty"),
    ("only blank lines", "preferences", "p.jsonl", b"\n  \r\n\n", None, None, "is empty"),
    ("csv with a header only", "preferences", "p.csv", b"prompt,chosen,rejected\n", None, None, "is empty"),
    ("parquet without rows", "prompts", "p.parquet", parquet(prompt=[]), None, None, "is empty"),
    ("unsupported suffix", "preferences", "p.txt", jsonl(GOOD), None, None, "(.txt)"),
    ("no suffix", "preferences", "pairs", jsonl(GOOD), None, None, "no suffix"),
    ("plain text named gzip", "preferences", "p.jsonl.gz", jsonl(GOOD), None, None, "gzip"),
    ("truncated gzip", "preferences", "p.jsonl.gz", TRUNCATED_GZIP, None, None, "gzip"),
    ("text named parquet", "preferences", "p.parquet", jsonl(GOOD), None, None, "Parquet"),
    ("truncated parquet", "prompts", "p.parquet", parquet(prompt=["Hello"])[:-20], None, None, "Parquet"),
    ("not utf-8", "preferences", "p.jsonl", jsonl(GOOD, b'{"prompt": "caf\xe9"}'), 2, None, "0xe9"),
    ("not utf-8 in csv", "problems", "p.csv", b"prompt,answer\n1+1,2\ncaf\xe9,3\n", 3, None, "0xe9"),
    ("utf-16", "preferences", "p.jsonl", json.dumps(GOOD).encode("utf-16"), 1, None, "UTF-8"),
    # lines
    ("bad json", "preferences", "p.jsonl", jsonl(GOOD, b"", b'{"prompt": "a",'), 3, None, "JSON"),
    ("two objects on a line", "preferences", "p.jsonl", jsonl(b"{} {}"), 1, None, "JSON"),
    ("pretty-printed json", "preferences", "p.jsonl", json.dumps(GOOD, indent=1).encode(), 1, None, "JSON"),
    ("json too deep", "preferences", "p.jsonl", jsonl(GOOD, b"[" * 100_000), 2, None, "JSON"),
    ("a list, not an object", "preferences", "p.jsonl", jsonl(GOOD, [GOOD]), 2, None, "not an object"),
    ("a key twice", "preferences", "p.jsonl", b'{"prompt": "a", "chosen": "b", "chosen": "c"}', 1, "chosen", "twice"),
    ("ragged csv, short", "problems", "p.csv", b"prompt,answer\n1+1,2\n\n2+2\n", 4, None, "1 cells"),
    ("ragged csv, long", "problems", "p.csv", b'prompt,answer\n"a\nb",2\na, b,2\n', 4, None, "3 cells"),
    ("csv with an open quote", "problems", "p.csv", b'prompt,answer\n1+1,2\n"2+2,4\n', 3, None, "CSV"),
    ("csv column twice", "problems", "p.csv", b"prompt,answer,answer\n1+1,2,3\n", 1, "answer", "twice"),
    ("duplicate ids", "preferences", "p.jsonl", jsonl({**GOOD, "id": 7}, pair(), pair(id="7")), 3, "id", "line 1"),
    # columns
    ("wrong columns", "preferences", "p.jsonl",
     jsonl({"text": "a", "label": 1}), 1, None, "found text, label; expected"),
    ("wrong columns in csv", "problems", "p.csv",
     b"\xef\xbb\xbfa;b\n1;2\n", 1, None, "found a;b; expected prompt, answer"),
    ("wrong columns in parquet", "prompts", "p.parquet", parquet(text=["a"]), None, None, "found text; expected"),
    ("misspelt column", "preferences", "p.jsonl", jsonl(GOOD, {**without(GOOD, "rejected"), "rejcted": "b"}), 2,
     "rejcted", "did you mean 'rejected'?"),
    ("misspelt optional column", "prompts", "p.jsonl", jsonl({"prompt": "a", "tag": ["b"]}), 1, "tag",
     "did you mean 'tags'?"),
    ("column in capitals", "problems", "p.csv", b"Prompt,Answer\n1+1,2\n", 1, "Prompt", "did you mean 'prompt'?"),
    ("one-sided pair", "preferences", "p.jsonl", jsonl(GOOD, without(pair(), "rejected")), 2, "rejected", "is missing"),
    ("bare answers without a prompt", "preferences", "p.jsonl", jsonl(without(GOOD, "prompt")), 1, "prompt", "missing"),
    # text
    ("null", "preferences", "p.jsonl", jsonl(GOOD, pair(rejected=None)), 2, "rejected", "has no value"),
    ("nan", "preferences", "p.jsonl", jsonl(GOOD, pair(chosen=math.nan)), 2, "chosen", "is NaN"),
    ("nan in parquet", "problems", "p.parquet", parquet(prompt=["a", "b"], answer=[math.nan, 1.0]), 1, "answer", "NaN"),
    ("null in parquet", "problems", "p.parquet",
     parquet(prompt=["a", "b"], answer=["1", None]), 2, "answer", "no value"),
    ("number for text", "problems", "p.jsonl",
     jsonl({"prompt": "1+1", "answer": 2}), 1, "answer", "a number, not text"),
    ("truth value", "problems", "p.jsonl", jsonl({"prompt": "1<2", "answer": True}), 1, "answer", "is true or"),
    ("object for text", "preferences", "p.jsonl",
     jsonl(pair(chosen={"text": "a"})), 1, "chosen", "an object, not text"),
    ("empty answer", "preferences", "p.jsonl",
     jsonl(GOOD, pair(rejected="")), 2, "rejected", "is empty. Remedy: write"),
    ("blank answer", "preferences", "p.jsonl", jsonl(GOOD, pair(chosen=" \n\t")), 2, "chosen", "is empty"),
    ("invisible answer", "preferences", "p.jsonl", jsonl(GOOD, pair(chosen="\u200b\ufeff")), 2, "chosen", "is empty"),
    ("empty csv cell", "problems", "p.csv", b"prompt,answer\n1+1,2\n2+2,\n", 3, "answer", "has no value"),
    ("lone surrogate", "preferences", "p.jsonl", jsonl(GOOD, pair(prompt="\ud83d!")), 2, "prompt", "U+D83D"),
    ("nul character", "preferences", "p.jsonl", jsonl(GOOD, pair(chosen="a\0b")), 2, "chosen", "NUL"),
    ("empty id", "prompts", "p.jsonl", jsonl({"id": "", "prompt": "a"}), 1, "id", "is empty"),
    # conversations
    ("unknown role", "conversations", "c.jsonl", jsonl(TALK, talk(user("a"), {"role": "robot", "content": "b"})), 2,
     "messages[1].role", "'robot'"),
    ("unknown sharegpt speaker", "conversations", "c.jsonl",
     jsonl({"conversations": [{"from": "cat", "value": "a"}]}), 1, "conversations[0].from", "'cat'"),
    ("role out of order", "conversations", "c.jsonl", jsonl(TALK, talk(user("a"), user("b"), assistant("c"))), 2,
     "messages[1].role", "out of order"),
    ("assistant begins", "conversations", "c.jsonl", jsonl(talk(assistant("a"), user("b"), assistant("c"))), 1,
     "messages[0].role", "must be the user's"),
    ("system in the middle", "conversations", "c.jsonl",
     jsonl(talk(user("a"), {"role": "system", "content": "b"}, assistant("c"))), 1, "messages[1].role", "out of order"),
    ("ends with user", "conversations", "c.jsonl", jsonl(TALK, talk(user("a"), assistant("b"), user("c"))), 2,
     "messages", "ends with a user turn"),
    ("system only", "conversations", "c.jsonl", jsonl(talk({"role": "system", "content": "a"})), 1, "messages",
     "no user turn"),
    ("no messages", "conversations", "c.jsonl", jsonl(TALK, talk()), 2, "messages", "is empty"),
    ("message without content", "conversations", "c.jsonl", jsonl(TALK, talk(user("a"), {"role": "assistant"})), 2,
     "messages[1].content", "is missing"),
    ("message with empty content", "conversations", "c.jsonl", jsonl(TALK, talk(user("a"), assistant(" "))), 2,
     "messages[1].content", "is empty"),
    ("message that is text", "conversations", "c.jsonl",
     jsonl(talk("a", "b")), 1, "messages[0]", "is text, not a message"),
    ("messages that are an object", "conversations", "c.jsonl", jsonl({"messages": user("a")}), 1, "messages",
     "not a list of messages"),
    ("list written by str()", "conversations", "c.csv", csv_bytes(["messages"], [str(TALK["messages"])]), 2, "messages",
     "not the JSON of a list"),
    ("empty output", "conversations", "c.jsonl", jsonl({"instruction": "a", "input": "", "output": " "}), 1, "output",
     "is empty"),
    ("prompt that ends with assistant", "conversations", "c.jsonl",
     jsonl({"prompt": [user("a"), assistant("b")], "completion": "c"}), 1, "prompt", "ends with an assistant turn"),
    ("completion that ends with user", "conversations", "c.jsonl",
     jsonl({"prompt": "a", "completion": [assistant("b"), user("c")]}), 1, "completion", "ends with a user turn"),
    ("json text of an object", "conversations", "c.jsonl", jsonl({"messages": json.dumps(user("a"))}), 1, "messages",
     "the JSON of an object"),
    # pairs
    ("identical answers", "preferences", "p.jsonl", jsonl(GOOD, pair(chosen="So.", rejected=" So.\n")), 2, "rejected",
     "identical"),
    ("transcripts of two prompts", "preferences", "p.jsonl",
     jsonl({"chosen": transcript("a", "b", "c", "d"), "rejected": transcript("a", "b", "x", "e")}), 1, "rejected",
     "turn 3"),
    ("transcript that ends with human", "preferences", "p.jsonl",
     jsonl({"chosen": transcript("a", "b", "c"), "rejected": transcript("a", "b", "c", "d")}), 1, "chosen",
     "user turn"),
    ("transcript with an empty answer", "preferences", "p.jsonl",
     jsonl({"chosen": transcript("a", "b"), "rejected": transcript("a", "")}), 1, "rejected", "is empty at turn 2"),
    ("messages of two prompts", "preferences", "p.jsonl",
     jsonl({"chosen": [user("a"), assistant("b")], "rejected": [user("x"), assistant("c")]}), 1, "rejected", "turn 1"),
    ("history that ends with user", "preferences", "p.jsonl", jsonl(pair(history=[user("a")])), 1, "history",
     "ends with a user turn"),
    ("prompt of another conversation", "preferences", "p.jsonl",
     jsonl({"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]}), 1,
     "prompt", "user turns"),
    # critiques and tags
    ("finding without a revision", "critiques", "c.jsonl", jsonl({**CRITIQUE, "revision": None}), 1, "revision",
     "found something"),
    ("no finding, yet a revision", "critiques", "c.jsonl",
     jsonl(CRITIQUE, {**CRITIQUE, "critique": "no violations found."}), 2, "revision", "found nothing"),
    ("empty revision", "critiques", "c.jsonl", jsonl({**CRITIQUE, "revision": ""}), 1, "revision", "is empty"),
    ("critique without a principle", "critiques", "c.jsonl", jsonl(CRITIQUE, without(CRITIQUE, "principle")), 2,
     "principle", "is missing"),
    ("tags of a wrong type", "prompts", "p.jsonl", jsonl({"prompt": "a", "tags": {"b": 1}}), 1, "tags", "not a list"),
    ("a tag of a wrong type", "prompts", "p.jsonl", jsonl({"prompt": "a", "tags": ["b", 1]}), 1, "tags[1]", "a number"),
]  # fmt: skip

BROKEN: list[tuple[str, str, str, bytes]] = [case[:4] for case in CASES]
"""(name, kind of data, file name, bytes): for every test that must see each of them refused."""


@pytest.mark.parametrize(
    ("kind", "filename", "content", "line", "field", "words"), [case[1:] for case in CASES], ids=[c[0] for c in CASES]
)
def test_broken_input_is_refused_with_its_place(tmp_path, kind, filename, content, line, field, words):
    path = write(tmp_path, filename, content)
    with pytest.raises(DataError) as caught:
        READERS[kind](path)
    error, message = caught.value, str(caught.value)
    assert (error.file, error.line, error.field) == (str(path), line, field)
    assert error.remedy
    assert message.startswith(str(path))
    assert f"Remedy: {error.remedy}." in message
    assert words in message
    assert "\n" not in message
    if line is not None:
        assert f", {'row' if filename.endswith('.parquet') else 'line'} {line}" in message
    if field is not None:
        assert f"field '{field}'" in message


def test_the_table_holds_enough_kinds_under_names_of_their_own():
    assert len({name for name, *_ in BROKEN}) == len(BROKEN) >= 25


def test_missing_file_and_folder(tmp_path):
    missing = tmp_path / "preferences.jsonl"
    with pytest.raises(DataError, match=r"preferences\.jsonl: no such file.*Remedy: check the path"):
        read_preferences(missing)
    with pytest.raises(DataError, match=r"is a folder, not a file\. Remedy: name the file in it"):
        read_preferences(str(tmp_path))


def test_a_missing_path_with_one_slash_is_not_taken_for_a_hub_data_set():
    with pytest.raises(DataError, match="no such file"):
        read_preferences("data/missing.jsonl")


def test_parquet_with_bytes_that_are_not_utf8(tmp_path):
    import pyarrow

    answers = pyarrow.array([b"2", b"caf\xe9"]).cast(pyarrow.string(), safe=False)
    path = write(tmp_path, "p.parquet", parquet(prompt=["1+1", "2+2"], answer=answers))
    with pytest.raises(DataError, match="row 2, field 'answer': is not UTF-8"):
        read_problems(path)


def test_error_is_one_line_and_survives_pickling():
    error = DataError("data/pairs.jsonl", "is\n empty", "write the worse answer, or delete the row.", 17, "rejected")
    place, remedy = "data/pairs.jsonl, line 17, field 'rejected'", "write the worse answer, or delete the row."
    assert str(error) == str(pickle.loads(pickle.dumps(error))) == f"{place}: is empty. Remedy: {remedy}"
    assert error.finding == f"{place}: is empty"


# --- What is accepted -------------------------------------------------------------------------------------------------

QUESTION, ANSWER = "How long do eggs boil?", "Seven minutes."
SHORT = (Message(role="user", content=QUESTION), Message(role="assistant", content=ANSWER))
LONG = (
    Message(role="system", content="Be brief."),
    *SHORT,
    Message(role="user", content="And soft?"),
    Message(role="assistant", content="Four."),
)


def dicts(messages: tuple[Message, ...]) -> list[dict[str, str]]:
    return [m.model_dump() for m in messages]


SHAREGPT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": QUESTION},
    {"from": "gpt", "value": ANSWER},
    {"from": "user", "value": "And soft?"},
    {"from": "assistant", "value": "Four."},
]

CONVERSATION_ROWS = [
    ("messages", {"messages": dicts(LONG)}, LONG),
    ("messages as json text", {"messages": json.dumps(dicts(LONG))}, LONG),
    ("prompt and completion", {"prompt": QUESTION, "completion": ANSWER}, SHORT),
    ("prompt and completion as messages", {"prompt": dicts(LONG[:4]), "completion": dicts(LONG[4:])}, LONG),
    ("prompt as messages, completion as text", {"prompt": dicts(LONG[:4]), "completion": "Four."}, LONG),
    ("prompt as a transcript", {"prompt": f"\n\nHuman: {QUESTION}\n\nAssistant:", "completion": f" {ANSWER}"}, SHORT),
    ("alpaca", {"instruction": QUESTION, "output": ANSWER}, SHORT),
    ("alpaca with an empty input", {"instruction": QUESTION, "input": "", "output": ANSWER}, SHORT),
    ("sharegpt", {"conversations": SHAREGPT}, LONG),
    ("metadata beside", {"messages": dicts(SHORT), "score": 1, "source": "x", "flaw": None, "license": "MIT"}, SHORT),
]

TURNS = (QUESTION, ANSWER, "And soft?")
PAIR = {"prompt": "And soft?", "chosen": "Four.", "rejected": "Forty."}

PREFERENCE_ROWS = [
    ("text", PAIR, 0),
    ("messages", {"prompt": [user("And soft?")], "chosen": [assistant("Four.")], "rejected": [assistant("Forty.")]}, 0),
    ("messages as json text", {**PAIR, "chosen": json.dumps([assistant("Four.")])}, 0),
    ("prompt of several turns, answers as text", {**PAIR, "prompt": dicts(LONG[:4])}, 3),
    ("history column", {**PAIR, "history": dicts(LONG[:3])}, 3),
    ("history of a system turn", {**PAIR, "history": dicts(LONG[:1])}, 1),
    ("whole conversations", {"chosen": dicts(LONG), "rejected": [*dicts(LONG[:4]), assistant("Forty.")]}, 3),
    ("whole conversations beside their first prompt, as UltraFeedback", {
        "prompt": QUESTION, "prompt_id": "f0e3", "messages": dicts(LONG), "score_chosen": 8.5, "score_rejected": 3.0,
        "chosen": dicts(LONG), "rejected": [*dicts(LONG[:4]), assistant("Forty.")],
    }, 3),
    ("hh-rlhf", {"chosen": transcript(*TURNS, "Four."), "rejected": transcript(*TURNS, "Forty.")}, 2),
    ("hh-rlhf of one turn", {
        "chosen": transcript("And soft?", "Four."), "rejected": transcript("And soft?", "Forty."),
    }, 0),
    ("prompt as a transcript", {**PAIR, "prompt": transcript(*TURNS) + "\n\nAssistant:"}, 2),
]  # fmt: skip


@pytest.mark.parametrize(("row", "messages"), [r[1:] for r in CONVERSATION_ROWS], ids=[r[0] for r in CONVERSATION_ROWS])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".csv"])
def test_conversation_formats(tmp_path, row, messages, suffix):
    path = write(tmp_path, f"talks{suffix}", encode([row], suffix))
    line = 2 if suffix == ".csv" else 1
    assert read_conversations(path) == [Conversation(id=f"talks-{line}", messages=messages)]


@pytest.mark.parametrize(("row", "turns"), [r[1:] for r in PREFERENCE_ROWS], ids=[r[0] for r in PREFERENCE_ROWS])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".csv"])
def test_preference_formats(tmp_path, row, turns, suffix):
    path = write(tmp_path, f"pairs{suffix}", encode([{"id": "a", "domain": "cooking", **row}], suffix))
    (record,) = read_preferences(path)
    assert (record.prompt, record.chosen, record.rejected) == ("And soft?", "Four.", "Forty.")
    assert record.history == {0: (), 1: LONG[:1], 2: LONG[1:3], 3: LONG[:3]}[turns]
    assert (record.id, record.domain, record.source) == ("a", "cooking", "human")


PROMPT_ROWS = [
    ("prompt", {"prompt": QUESTION, "tags": ["medical", "benign"]}),
    ("tags with commas", {"prompt": QUESTION, "tags": "medical, benign,"}),
    ("instruction", {"instruction": QUESTION, "tags": ["medical", "benign"]}),
    ("question", {"question": QUESTION, "tags": ["medical", "benign"], "difficulty": 3}),
]


@pytest.mark.parametrize("row", [r[1] for r in PROMPT_ROWS], ids=[r[0] for r in PROMPT_ROWS])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_prompt_formats(tmp_path, row, suffix):
    path = write(tmp_path, f"prompts{suffix}", encode([{"id": 4, **row}], suffix))
    assert read_prompts(path) == [Prompt(id="4", prompt=QUESTION, tags=("medical", "benign"))]


def test_a_prompt_needs_no_tags(tmp_path):
    path = write(tmp_path, "p.csv", b"prompt,tags\nHello,\n")
    assert read_prompts(path) == [Prompt(id="p-2", prompt="Hello")]


@pytest.mark.parametrize("column", ["prompt", "question"])
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_problem_formats(tmp_path, column, suffix):
    path = write(tmp_path, f"p{suffix}", encode([{column: "6 x 7?", "answer": "42", "kind": "arithmetic"}], suffix))
    (record,) = read_problems(path)
    assert (record.prompt, record.answer, record.kind) == ("6 x 7?", "42", "arithmetic")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_critique_formats(tmp_path, suffix):
    nothing = {**CRITIQUE, "critique": f"{NO_VIOLATIONS}: it is kind.", "revision": None}
    found, clean = read_critiques(write(tmp_path, f"c{suffix}", encode([CRITIQUE, nothing], suffix)))
    assert found.revision == CRITIQUE["revision"]
    assert clean.revision is None


def test_alpaca_input_follows_the_instruction(tmp_path):
    path = write(tmp_path, "a.jsonl", jsonl({"instruction": "Translate.", "input": "Ei", "output": "egg"}))
    assert read_conversations(path)[0].prompt == "Translate.\n\nEi"
    assert read_prompts(path)[0].prompt == "Translate.\n\nEi"


def test_formats_may_differ_from_line_to_line(tmp_path):
    path = write(tmp_path, "mixed.jsonl", jsonl(*(row for _, row, _ in CONVERSATION_ROWS)))
    assert [r.messages for r in read_conversations(path)] == [messages for _, _, messages in CONVERSATION_ROWS]


ANSWERS_LIKE_MESSAGES = [
    '[{"value": 3, "unit": "kg"}]',
    '[{"role": "admin", "content": "all"}]',
    '[{"content": "a", "type": "text"}]',
    '[{"from": "Berlin", "value": 1}]',
    '[{"role": "user"}]',
    '[{"role": ["user"], "content": "a"}]',
    '[{"role": "user", "content": "Hi"}, 3]',
    '[{"role": "user", "content": "Hi',
    "[{'role': 'x'}] is how a message begins",
]


@pytest.mark.parametrize("answer", ANSWERS_LIKE_MESSAGES)
def test_text_that_only_begins_like_messages_is_text(tmp_path, answer):
    path = write(tmp_path, "p.jsonl", jsonl({"prompt": answer, "chosen": f" {answer}\n", "rejected": "No."}))
    (record,) = read_preferences(path)
    assert (record.prompt, record.chosen, record.history) == (answer, answer, ())
    (talked,) = read_conversations(write(tmp_path, "c.jsonl", jsonl({"prompt": answer, "completion": answer})))
    assert [m.content for m in talked.messages] == [answer, answer]


def turned(message: dict[str, str]) -> dict[str, str]:
    return dict(reversed(message.items()))


@pytest.mark.parametrize(
    "turns",
    [
        [user("a"), assistant("b")],
        [turned(user("a's")), turned(assistant("b"))],
        [{"value": "a", "from": "human"}, {"value": "b", "from": "gpt"}],
        [{"id": 1, "role": "User", "content": "a"}, {"id": 2, "role": "Assistant", "content": "b"}],
    ],
    ids=["role first", "content first", "ShareGPT", "more keys, capitals"],
)
@pytest.mark.parametrize("between", [", ", "\n "], ids=["a list", "an array"])
def test_messages_as_pandas_writes_them_to_csv_are_not_taken_for_text(tmp_path, turns, between):
    printed = f"[{between.join(map(str, turns))}]"  # str() of a Python list, or of a numpy array
    content = csv_bytes(["prompt", "chosen", "rejected"], ["a", printed, "no"])
    with pytest.raises(DataError, match=r"field 'chosen': is messages as Python prints them.*json.dumps"):
        read_preferences(write(tmp_path, "p.csv", content))


def test_what_is_messages_is_still_checked_as_messages(tmp_path):
    row = pair(chosen=json.dumps([user("a"), assistant("b"), user("c")]))
    with pytest.raises(DataError, match="field 'chosen': ends with a user turn"):
        read_preferences(write(tmp_path, "p.jsonl", jsonl(row)))


@pytest.mark.parametrize("role", ["tool", "Tool", "robot"])
@pytest.mark.parametrize("keys", [("role", "content"), ("from", "value")], ids=str)
def test_an_unknown_role_in_the_json_text_of_messages_is_an_error(tmp_path, keys, role):
    turns = [dict(zip(keys, said, strict=True)) for said in [("user", "a"), (role, "b"), ("assistant", "c")]]
    with pytest.raises(DataError, match=rf"field 'chosen\[1\].{keys[0]}': is '{role}', which is not a role"):
        read_preferences(write(tmp_path, "p.jsonl", jsonl(pair(chosen=json.dumps(turns)))))


@pytest.mark.parametrize("told", [list, json.dumps], ids=["a list", "its json text"])
def test_roles_may_have_capitals(tmp_path, told):
    row = pair(chosen=told([{"role": "Assistant", "content": "Yes."}]), rejected=told([{"from": "GPT", "value": "No."}]))
    (record,) = read_preferences(write(tmp_path, "p.jsonl", jsonl(row)))
    assert (record.chosen, record.rejected) == ("Yes.", "No.")


def test_two_assistant_turns_in_a_row_of_a_transcript_are_one(tmp_path):
    row = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"}
    (record,) = read_preferences(write(tmp_path, "p.jsonl", jsonl(row)))
    assert (record.prompt, record.chosen, record.rejected) == ("a", "b\n\nc", "d")


def test_bom_crlf_blank_lines_and_line_separators_in_text(tmp_path):
    rows = [{"prompt": "one\u2028two"}, {"prompt": "three\x85four"}]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    content = ("\ufeff" + lines[0] + "\r\n\r\n" + lines[1]).encode()
    records = read_prompts(write(tmp_path, "p.jsonl", content))
    assert [(r.id, r.prompt) for r in records] == [("p-1", "one\u2028two"), ("p-3", "three\x85four")]
    table = b'\xef\xbb\xbfprompt,answer\r\n"one\r\ntwo",2\r\n\r\nthree,3\r\n'
    assert [(r.id, r.answer) for r in read_problems(write(tmp_path, "p.csv", table))] == [("p-2", "2"), ("p-5", "3")]


def test_csv_cells_may_be_long(tmp_path):
    path = write(tmp_path, "p.csv", csv_bytes(["prompt", "answer"], ["a" * 200_000, "1"]))
    assert len(read_problems(path)[0].prompt) == 200_000


def test_limit_looks_at_nothing_beyond_it(tmp_path):
    path = write(tmp_path, "t.jsonl", jsonl(TALK, TALK, b"not json"))
    assert [r.id for r in read_conversations(path, limit=2)] == ["t-1", "t-2"]
    with pytest.raises(DataError, match="line 3"):
        read_conversations(path, limit=3)
    with pytest.raises(ValueError, match="at least 1"):
        read_conversations(path, limit=0)


def test_skipped_collects_the_errors_of_rows(tmp_path):
    skipped: list[DataError] = []
    path = write(tmp_path, "p.jsonl", jsonl(b"not json", GOOD, pair(chosen=""), pair()))
    assert [r.id for r in read_preferences(path, skipped=skipped)] == ["p-2", "p-4"]
    assert [(e.line, e.field) for e in skipped] == [(1, None), (3, "chosen")]
    with pytest.raises(DataError, match="line 1"):
        read_preferences(write(tmp_path, "q.jsonl", jsonl(b"not json")), skipped=[])
    with pytest.raises(DataError, match="gzip"):
        read_preferences(write(tmp_path, "q.jsonl.gz", jsonl(GOOD)), skipped=[])


@pytest.mark.parametrize("column", ["chosen_score", "rejected_model", "difficulty", "idx", "", "unnamed: 0"])
def test_other_columns_stay_out(tmp_path, column):
    assert read_preferences(write(tmp_path, "p.jsonl", jsonl({**GOOD, column: "a"})))


def test_a_column_named_after_another_is_no_misspelling(tmp_path):
    assert read_prompts(write(tmp_path, "p.jsonl", jsonl({"prompt": "a", "tags_2": "b"})))[0].tags == ()


def test_hh_rlhf_harmless_base():
    if not HH_RLHF.exists():
        pytest.skip(f"no {HH_RLHF.name} beside the repository")
    skipped: list[DataError] = []
    pairs = read_preferences(HH_RLHF, skipped=skipped)
    assert len(pairs) + len(skipped) == 1800
    # two answers are empty in the published data
    assert [(e.line, e.field) for e in skipped] == [(391, "chosen"), (851, "chosen")]
    assert all(len(p.history) % 2 == 0 and "\n\nAssistant:" not in p.chosen for p in pairs)
    assert (pairs[0].prompt, len(pairs[0].history)) == ("okay some of these do not have anything to do with pens", 4)
    assert pairs[0].chosen.startswith("No, sorry!")
    with pytest.raises(DataError, match="line 391, field 'chosen': is empty"):
        read_preferences(HH_RLHF)


# --- The Hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch):
    """A Hub that holds `someone/pairs` with the splits train and test; the calls it got."""
    import datasets
    from huggingface_hub import constants

    calls: list[tuple[str, str, bool]] = []

    def load_dataset(name: str, split: str, streaming: bool):
        calls.append((name, split, streaming))
        if name != "someone/pairs":
            raise datasets.exceptions.DatasetNotFoundError(f"Dataset '{name}' doesn't exist\non the Hub")
        rows = [pair(rejected=f"{split} {i}", messages=TALK["messages"]) for i in range(3)]
        data = datasets.Dataset.from_list(rows)
        return data.to_iterable_dataset() if streaming else data

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # no question whether the Hub answers
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls


def test_hub_data_sets(hub):
    pairs = read_preferences("someone/pairs")
    assert [(p.id, p.rejected) for p in pairs] == [(f"pairs-{i + 1}", f"train {i}") for i in range(3)]
    assert read_preferences("someone/pairs:test")[2].id == "pairs-test-3"
    assert len(read_conversations("someone/pairs", limit=2)) == 2
    assert {name for name, _, _ in hub} == {"someone/pairs"}
    assert [call[1:] for call in hub] == [("train", False), ("test", False), ("train", True)]


def test_hub_data_set_that_is_not_there(hub):
    with pytest.raises(DataError, match=r"someone/nothing.*load_dataset\('someone/nothing', split='train'\)") as caught:
        read_preferences("someone/nothing")
    assert "DatasetNotFoundError" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_hub_that_does_not_answer(monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(DataError, match=r"someone/pairs: there is no such file, and .*load_dataset.* failed"):
        read_preferences("someone/pairs")
    assert time.monotonic() - start < 15


def test_hub_is_not_asked_when_offline(tmp_path):
    """With the real libraries: HF_HUB_OFFLINE is read when they are imported, hence the process of its own."""
    code = "from alignment.readers import read_preferences; read_preferences('someone/pairs:test')"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert "DataError: someone/pairs:test: there is no such file, and datasets.load_dataset('someone/pairs'" in last


# --- The pipeline's own files -----------------------------------------------------------------------------------------

MODELS_ANSWERS = [
    *ANSWERS_LIKE_MESSAGES,
    '[{"role": "assistant", "content": "b"}]',
    "Human: a\n\nAssistant: b",
    "one\u2028two\x85three\u200b",
    "\u200b",
    "a\0b",
]


def test_records_come_back_exactly_as_they_were_written(tmp_path):
    pairs = [PreferencePair(id="twice", prompt=f"{a} ", chosen=a, rejected="No.") for a in MODELS_ANSWERS]
    talks = [Conversation(id=f"{i}", messages=LONG, category="a") for i in range(2)]
    for kind, records in ((PreferencePair, pairs), (Conversation, talks), (Prompt, [])):
        write_jsonl(tmp_path / "own.jsonl", records)
        assert read_records(tmp_path / "own.jsonl", kind) == records


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"id": "a", "prompt": "p"}\n{"id": "b", "pro', "line 2: is no Prompt: Invalid JSON"),
        (b'{"id": "a"}\n', "line 1, field 'prompt': is no Prompt: Field required"),
        (b'{"id": "a", "prompt": "caf\xe9"}\n', "line 1: is no Prompt: Invalid JSON"),
        (b'{"id": "a", "prompt": "p", "answer": "1"}\n', "line 1, field 'answer': is no Prompt: Extra inputs"),
    ],
)
def test_a_broken_file_of_the_pipelines_own_is_named(tmp_path, content, says):
    path = write(tmp_path, "own.jsonl", content)
    with pytest.raises(DataError) as caught:
        read_records(path, Prompt)
    assert str(caught.value).startswith(f"{path}, {says}")
    assert "Remedy: materialize the asset" in str(caught.value)


def test_a_missing_file_of_the_pipelines_own_is_named(tmp_path):
    with pytest.raises(DataError, match=r"own\.jsonl: no such file\. Remedy: .* materialize the asset"):
        read_records(tmp_path / "own.jsonl", Prompt)
    with pytest.raises(DataError, match="cannot be read"):
        read_records(tmp_path, Prompt)


# --- Deduplication and properties -------------------------------------------------------------------------------------


def test_deduplicate_keeps_the_first_of_what_differs_in_case_and_white_space_only():
    texts = ["What's up?", "Eggs", " what's  UP?\n", "eggs\u00a0", "Eggs!", "ham"]
    kept, removed = deduplicate([Prompt(id=str(i), prompt=t) for i, t in enumerate(texts)], lambda p: [p.prompt])
    assert ([p.id for p in kept], removed) == (["0", "1", "4", "5"], 2)
    assert deduplicate(kept, lambda p: [p.prompt]) == (kept, 0)
    assert deduplicate([], lambda p: [p.prompt]) == ([], 0)


def test_deduplicate_compares_punctuation_and_each_text_for_itself():
    signs = [["👍"], ["?"], ["👎"], [" ? "], ["2 + 3?"], ["2 - 3?"], ["a b", "c"], ["a", "b c"]]
    kept, removed = deduplicate(signs, list)
    assert (kept, removed) == ([s for s in signs if s != [" ? "]], 1)


SIGNS = "aZ 7é-ßЖ漢字👍🏽\n\t\r\"',;:{}[]\\|\u2028\u00a0<|im_end|>$#"


def any_text(rng: random.Random) -> str:
    return ("x" + "".join(rng.choices(SIGNS, k=rng.randrange(30)))).strip()


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".parquet", ".csv"])
@pytest.mark.parametrize("kind", READERS)
def test_records_written_in_any_format_are_read_back(tmp_path, kind, suffix):
    rng = random.Random(kind + suffix)
    records = [any_record(kind, f"r{i}", rng) for i in range(60)]
    path = write(tmp_path, f"x{suffix}", encode([r.model_dump() for r in records], suffix))
    assert READERS[kind](path) == records


def test_no_damaged_file_gives_anything_but_records_or_a_data_error(tmp_path):
    rng = random.Random(0)
    rows = [any_record("preferences", f"r{i}", rng).model_dump() for i in range(5)]
    for suffix in (".jsonl", ".jsonl.gz", ".parquet", ".csv"):
        whole = encode(rows, suffix)
        for _ in range(100):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path = write(tmp_path, f"x{suffix}", bytes(damaged[: rng.randint(1, len(damaged))]))
            with contextlib.suppress(DataError):
                assert all(isinstance(record, PreferencePair) for record in read_preferences(path))


def test_import_is_light():
    code = "import sys, alignment.readers; print({'torch', 'datasets', 'pandas', 'pyarrow'} & set(sys.modules))"
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=200)
    assert result.stdout.strip() == "set()", result.stderr


def any_record(kind: str, identity: str, rng: random.Random):
    def text() -> str:
        return any_text(rng)

    def messages(turns: int) -> tuple[Message, ...]:
        system = [Message(role="system", content=text())] if rng.random() < 0.3 else []
        roles = ["user", "assistant"] * turns
        return (*system, *(Message(role=role, content=text()) for role in roles))

    match kind:
        case "conversations":
            return Conversation(id=identity, messages=messages(rng.randint(1, 4)), category=rng.choice(["", text()]))
        case "preferences":
            history = messages(rng.randint(0, 2))
            answers = {"chosen": text(), "rejected": "y" + text()}
            return PreferencePair(id=identity, prompt=text(), history=history, domain=rng.choice(["", "a"]), **answers)
        case "critiques":
            found = rng.random() < 0.6
            critique, revision = (text(), text()) if found else (f"{NO_VIOLATIONS}. {text()}", None)
            told = {name: text() for name in ("constitution", "principle", "prompt", "response")}
            # constitution is no `Text`: it is not stripped by the record, and any_text is stripped already
            return CritiqueDemonstration(id=identity, critique=critique, revision=revision, **told)
        case "prompts":
            return Prompt(id=identity, prompt=text(), tags=tuple(text() for _ in range(rng.randint(0, 3))))
        case _:
            return Problem(id=identity, prompt=text(), answer=text(), kind=rng.choice(["", "sum"]))


def encode(rows: list[dict], suffix: str) -> bytes:
    """Rows in a file format; in CSV, lists as their JSON and null as an empty cell."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    if suffix == ".parquet":
        return parquet(**{name: [row.get(name) for row in rows] for name in columns})
    if suffix == ".csv":
        return csv_bytes(columns, *([cell(row.get(name)) for name in columns] for row in rows))
    return gzip.compress(jsonl(*rows)) if suffix == ".jsonl.gz" else jsonl(*rows)


def cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)
