"""Readers: users' files into records, or one clear `DataError` that names the file, the line and the field.

A source is a path to a `.jsonl`, `.jsonl.gz`, `.parquet` or `.csv` file, or a Hub data set `owner/name` or
`owner/name:split` (split `train` unless named) when no file of that name exists.

The format of a row is recognised by its columns, the first of the reader's list that is complete:

    conversations  messages | conversations (ShareGPT) | prompt, completion | instruction, output (Alpaca)
    preferences    prompt, chosen, rejected | chosen, rejected
    critiques      constitution, principle, prompt, response, critique
    prompts        prompt | instruction | question
    problems       prompt, answer | question, answer
    reviews        verdict, check, prompt, chosen, rejected

- `prompt` (not of critiques, prompts and problems), `completion`, `chosen` and `rejected` are text, a list of messages,
  or an hh-rlhf transcript ("\\n\\nHuman: ...\\n\\nAssistant: ...").
- Without a prompt column, `chosen` and `rejected` are whole conversations: their last turn is the answer, what stands
  before it must be the same in both and becomes history and prompt.
- In a transcript, two Assistant turns in a row, of which hh-rlhf has a few, are one turn.
- A message is {"role": system | user | assistant, "content": text}
  or {"from": system | human | user | gpt | assistant, "value": text}; its role may have capitals.
- A list may stand as its JSON text, as it must in CSV. Where text may stand, too, it is taken for messages only if every item
  has the form of one, and one item at least a role that chats have: `[{"value": 3}]` is an answer like any other. An answer that
  is itself such a list stands as the content of a message.
- An empty CSV cell is a missing value.
- Optional columns: `id` (text or a whole number; else `<file stem>-<line>`), `category` (conversations), `input`
  (beside instruction), `history` (messages before prompt), `domain` and `source` (preferences), `revision` (critiques;
  null when nothing was found), `tags` (prompts; a list, or text with commas), `kind` (problems).
- Every other column stays out of the record. One that looks like a misspelling of a column that is not there is an
  error ("did you mean 'rejected'?"), unless it is in `IGNORABLE` or holds a column's name as a word (`prompt_id`).
- Blank lines, a byte order mark and CRLF are fine. Lines count from 1 in the file, blank lines and the CSV header
  included; a Parquet or Hub table has rows instead, also from 1.
"""

import csv
import difflib
import functools
import gzip
import io
import json
import math
import os
import re
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from pydantic import ValidationError

from alignment.errors import UserError
from alignment.records import (
    Conversation,
    CritiqueDemonstration,
    Message,
    PreferencePair,
    Problem,
    Prompt,
    Record,
    ReviewedPair,
)
from alignment.splits import folded

Source = str | os.PathLike[str]
R = TypeVar("R")
Kind = TypeVar("Kind", bound=Record)

NO_VIOLATIONS = "No violations found"
"""How a critique begins that found nothing; exactly these have no revision."""

# fmt: off
IGNORABLE = frozenset(
    {
        "id", "idx", "index", "uid", "uuid", "prompt_id", "category", "domain", "source", "tags", "kind",
        "flaw", "score", "scores", "score_chosen", "score_rejected", "margin", "model", "split", "language",
        "license", "licence", "metadata", "constitution", "principle", "history", "note", "notes", "comment",
        "author", "date", "timestamp",
    }
)
# fmt: on
"""Columns that are left out without a question where the record has no place for them."""


class DataError(UserError):
    """What is wrong with a user's data, where, and what to do about it. `str()` is one line.

    `line` counts from 1 and is None when the whole file is meant; `field` is a column or a path in it such as
    `messages[2].role` (messages count from 0), None when the whole line is meant; `unit` is "row" for tables.
    """

    def __init__(
        self,
        file: str,
        problem: str,
        remedy: str,
        line: int | None = None,
        field: str | None = None,
        unit: str = "line",
    ) -> None:
        super().__init__(file, problem, remedy, line, field, unit)  # all arguments, so that the error can be pickled
        self.file, self.line, self.field, self.unit = file, line, field, unit
        self.problem = " ".join(problem.split()).rstrip(".")
        self.remedy = " ".join(remedy.split()).rstrip(".")

    def __str__(self) -> str:
        return f"{self.finding}. Remedy: {self.remedy}."

    @property
    def finding(self) -> str:
        """What is wrong and where, without the remedy."""
        line = "" if self.line is None else f", {self.unit} {self.line}"
        field = "" if self.field is None else f", field {self.field!r}"
        return f"{self.file}{line}{field}: {self.problem}"


def read_conversations(source: Source, limit: int | None = None, *, skipped: list[DataError] | None = None) -> list[Conversation]:
    """The conversations of a source, in its order; with `limit` at most so many, and what follows is not looked at.

    Raises `DataError` at the first thing that is wrong. Data that one cannot mend oneself (a Hub data set) may be read
    with a list as `skipped`: bad rows are left out and their errors appended to it, for the caller to count and bound;
    a file that cannot be read at all, or has no good row, still raises.
    """
    return _read(source, _CONVERSATIONS, limit, skipped)


def read_preferences(source: Source, *, skipped: list[DataError] | None = None) -> list[PreferencePair]:
    """The preference pairs of a source, in its order. Errors and `skipped` as in `read_conversations`."""
    return _read(source, _PREFERENCES, None, skipped)


def read_critiques(source: Source, *, skipped: list[DataError] | None = None) -> list[CritiqueDemonstration]:
    """The critique demonstrations of a source, in its order. Errors and `skipped` as in `read_conversations`."""
    return _read(source, _CRITIQUES, None, skipped)


def read_prompts(source: Source, *, skipped: list[DataError] | None = None) -> list[Prompt]:
    """The prompts of a source, in its order. Errors and `skipped` as in `read_conversations`."""
    return _read(source, _PROMPTS, None, skipped)


def read_problems(source: Source, *, skipped: list[DataError] | None = None) -> list[Problem]:
    """The problems of a source, in its order. Errors and `skipped` as in `read_conversations`."""
    return _read(source, _PROBLEMS, None, skipped)


def read_reviews(source: Source) -> list[ReviewedPair]:
    """The reviewed pairs of a table that `alignment.review` wrote, in its order. Errors as in `read_conversations`."""
    return _read(source, _REVIEWS, None, None)


def read_records(path: Path, kind: type[Kind]) -> list[Kind]:
    """The records in a file that the pipeline itself wrote (`alignment.datasets.write_jsonl`), exactly as it wrote them.

    No format is guessed here: a model's answer may well look like messages or a transcript. A part without rows is no error.

    Raises:
        DataError: there is no such file, or a line is no such record.
    """
    remedy = "materialize the asset that wrote it with force: true; such a file is not to be edited"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise DataError(str(path), "no such file", "check the path, or materialize the asset that writes it") from error
    except OSError as error:
        raise DataError(str(path), f"cannot be read ({error})", "check the file and its permissions") from error
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            if line:
                records.append(kind.model_validate_json(line))
        except ValidationError as error:
            detail = error.errors()[0]
            field = ".".join(map(str, detail["loc"])) or None
            raise DataError(str(path), f"is no {kind.__name__}: {detail['msg']}", remedy, number, field) from error
    return records


def deduplicate(records: Iterable[R], texts: Callable[[R], Iterable[str]]) -> tuple[list[R], int]:
    """The first of the records whose `texts(record)` are the same but for case and white space, in order, and how many later
    ones were removed.

    Punctuation counts, as it does not for the split: "2 + 3?" is another question than "2 - 3?".
    """
    first: dict[tuple[str, ...], R] = {}
    total = 0
    for record in records:
        total += 1
        first.setdefault(tuple(map(folded, texts(record))), record)
    return list(first.values()), total - len(first)


# --- From rows to records ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Row:
    """One row of a file: its values by column, and where it stands. `header` is the line that holds the columns."""

    file: str
    stem: str
    line: int
    unit: str
    header: int | None
    values: Mapping[str, Any]

    def fail(self, field: str | None, problem: str, remedy: str) -> NoReturn:
        raise DataError(self.file, problem, remedy, self.line, field, self.unit)

    def text(self, field: str) -> str:
        return self.checked(field, self.values.get(field))

    def label(self, field: str, default: str = "") -> str:
        """An optional short text: `default` when absent or blank."""
        value = self.values.get(field)
        if value is None or (isinstance(value, str) and not value.strip()):
            return default
        return self.checked(field, value)

    def checked(self, field: str, value: Any) -> str:
        """`value` stripped, if it is text that a tokenizer can take and a reader can see."""
        if value is None:
            self.fail(field, "has no value", "write the text, or delete the row")
        if isinstance(value, float) and math.isnan(value):
            self.fail(field, "is NaN, which stands for a missing value", "write the text, or delete the row")
        if not isinstance(value, str):
            self.fail(field, f"is {_kind(value)}, not text", "write it as text, in quotes")
        if "\0" in value:
            self.fail(field, "holds a NUL character", "remove it; the file may be damaged or not be text")
        if surrogate := re.search("[\ud800-\udfff]", value):
            code = f"U+{ord(surrogate[0]):04X}"
            self.fail(field, f"holds a lone surrogate ({code}), half of a character", "write the whole character")
        if all(unicodedata.category(char) in _INVISIBLE for char in value):
            self.fail(field, "is empty", _IF_EMPTY.get(field, "write the text, or delete the row"))
        return value.strip()


_INVISIBLE = frozenset({"Cc", "Cf", "Zs", "Zl", "Zp"})

_IF_EMPTY = {
    "chosen": "write the better answer, or delete the row",
    "rejected": "write the worse answer, or delete the row",
    "revision": "write the revision, or null when the critique found nothing",
    "id": "write an id, or leave the column out",
}


@dataclass(frozen=True)
class _Format:
    """One way to write a record: the columns that show it, those that may be there, and how it becomes a record."""

    needed: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[_Row, str], Record]


def _read(source: Source, formats: tuple[_Format, ...], limit: int | None, skipped: list[DataError] | None) -> list[Any]:
    records: list[Record] = []
    ids: dict[str, int] = {}
    first_error: DataError | None = None
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1")
    for row in _rows(source, streaming=limit is not None):
        try:
            if isinstance(row, DataError):
                raise row
            records.append(_record(row, formats, ids))
        except DataError as error:
            if skipped is None:
                raise
            skipped.append(error)
            first_error = first_error or error
        if len(records) == limit:
            break
    if not records:
        raise first_error or DataError(os.fspath(source), "is empty: it holds no rows", "add rows, or check the path")
    return records


def _record(row: _Row, formats: tuple[_Format, ...], ids: dict[str, int]) -> Record:
    """The record of a row, its id entered in `ids` (id -> line)."""
    outcome = _recognise(tuple(row.values), formats)
    if not isinstance(outcome, _Format):
        raise DataError(row.file, outcome.problem, outcome.remedy, row.header, outcome.field, row.unit)
    identity = _identity(row)
    if identity in ids:
        row.fail("id", f"is {identity!r} again, as in {row.unit} {ids[identity]}", "give every row an id of its own")
    try:
        record = outcome.build(row, identity)
    except ValidationError as error:  # a rule of the record that no check here foresees
        detail = error.errors()[0]
        field = ".".join(map(str, detail["loc"])) or None
        row.fail(field, detail["msg"], f"see {type(error).__name__} of alignment.records.{error.title}")
    ids[identity] = row.line
    return record


def _identity(row: _Row) -> str:
    value = row.values.get("id")
    if value is None:
        return f"{row.stem}-{row.line}"
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return row.checked("id", value)


@dataclass(frozen=True)
class _Complaint:
    """What is wrong with a set of columns, before it is known of which row."""

    field: str | None
    problem: str
    remedy: str


@functools.lru_cache(maxsize=1024)  # a file has few sets of columns and many rows
def _recognise(columns: tuple[str, ...], formats: tuple[_Format, ...]) -> _Format | _Complaint:
    complete = next((f for f in formats if set(f.needed) <= set(columns)), None)
    known = [name for f in ([complete] if complete else formats) for name in f.needed + f.optional]
    for column in columns:
        if meant := _misspelt(column, columns, known):
            return _Complaint(column, f"is not a column; did you mean {meant!r}?", f"rename it to {meant!r}")
    if complete:
        return complete
    found = ", ".join(columns) or "none"
    expected = " | ".join(", ".join(f.needed) for f in formats)
    nearest = max(formats, key=lambda f: len(set(f.needed) & set(columns)) / len(f.needed))
    missing = [name for name in nearest.needed if name not in columns]
    if len(missing) == len(nearest.needed):
        return _Complaint(None, f"wrong columns: found {found}; expected {expected}", "rename the columns")
    return _Complaint(missing[0], f"is missing: found {found}; expected {expected}", f"add {missing[0]!r}, or delete the row")


def _misspelt(column: str, columns: tuple[str, ...], known: list[str]) -> str | None:
    """The known column that this one is meant to be, if it is neither known nor plainly something else."""
    if column in known or column in IGNORABLE:
        return None
    name = column.strip().casefold()
    # prompt_id or chosen_score speak of a column, they are not a misspelling of it
    words = [word for word in re.split(r"[\W_]+", name) if word]
    if len(words) > 1 and set(words) & set(known):
        return None
    absent = [other for other in known if other not in columns]
    return next(iter(difflib.get_close_matches(name, absent, n=1, cutoff=0.8)), None)


def _kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    if isinstance(value, bool):
        return "true or false"
    names = {int: "a number", float: "a number", list: "a list", dict: "an object", str: "text", type(None): "null"}
    return names.get(type(value), f"of type {type(value).__name__}")


# --- Conversations, pairs and the rest --------------------------------------------------------------------------------


def _from_messages(column: str) -> Callable[[_Row, str], Conversation]:
    def build(row: _Row, identity: str) -> Conversation:
        messages = _turns(row, column, None)
        if _next_role(row, column, messages) != "user":
            row.fail(column, "ends with a user turn", "end with the assistant's answer, or delete the last turn")
        return Conversation(id=identity, messages=tuple(messages), category=row.label("category"))

    return build


def _from_completion(row: _Row, identity: str) -> Conversation:
    prompt = _prompt_turns(row)
    completion = _turns(row, "completion", "assistant")
    if _next_role(row, "completion", completion, "assistant") != "user":
        row.fail("completion", "ends with a user turn", "end with the assistant's answer, or delete the last turn")
    return Conversation(id=identity, messages=(*prompt, *completion), category=row.label("category"))


def _from_alpaca(row: _Row, identity: str) -> Conversation:
    turns = (Message(role="user", content=_instruction(row)), Message(role="assistant", content=row.text("output")))
    return Conversation(id=identity, messages=turns, category=row.label("category"))


def _instruction(row: _Row) -> str:
    """An Alpaca instruction, its input after an empty line."""
    parts = [row.text("instruction"), row.label("input")]
    return "\n\n".join(part for part in parts if part)


def _preference(row: _Row, identity: str) -> PreferencePair:
    prompt = _prompt_turns(row) if "prompt" in row.values else []
    chosen = _answered(row, "chosen", prompt)
    rejected = _answered(row, "rejected", prompt)
    if chosen[:-1] != rejected[:-1]:
        turn = next(i for i, (c, r) in enumerate(zip(chosen, rejected, strict=False)) if c != r) + 1
        problem = f"answers another prompt than chosen: the conversations part at turn {turn}, before the answer"
        row.fail("rejected", problem, "pair two answers to the same conversation, or delete the row")
    return _pair(row, identity, chosen, rejected)


def _pair(row: _Row, identity: str, chosen: list[Message], rejected: list[Message]) -> PreferencePair:
    """The pair of two conversations that part at their last turn, the answer."""
    if chosen[-1] == rejected[-1]:
        row.fail("rejected", "is identical to chosen", "write a worse answer, or delete the row")
    return PreferencePair(
        id=identity,
        prompt=chosen[-2].content,
        chosen=chosen[-1].content,
        rejected=rejected[-1].content,
        history=tuple(chosen[:-2]),
        domain=row.label("domain"),
        source=row.label("source", "human"),
    )


def _review(row: _Row, identity: str) -> ReviewedPair:
    verdict = row.label("verdict").strip().casefold()
    if verdict not in _VERDICTS:
        row.fail("verdict", f"is {verdict!r}", f"write {', '.join(_VERDICTS[1:])}, or leave it empty")
    # The texts stand as a model wrote them, and may look like messages or a transcript.
    asked = [*_history(row), Message(role="user", content=row.text("prompt"))]
    chosen, rejected = ([*asked, Message(role="assistant", content=row.text(side))] for side in ("chosen", "rejected"))
    pair = _pair(row, identity, chosen, rejected)
    return ReviewedPair(pair=pair, verdict=verdict, check=row.text("check"), line=row.line)


def _answered(row: _Row, field: str, prompt: list[Message]) -> list[Message]:
    """The conversation that ends with the answer in `field`, which holds all of it or a bare answer to `prompt`."""
    turns = _turns(row, field, "assistant")
    if len(turns) == 1 and turns[0].role == "assistant":
        if not prompt:
            found = ", ".join(row.values)
            problem = f"is missing, and {field} is a bare answer, not a conversation (the columns are {found})"
            row.fail("prompt", problem, "add the column prompt, or give chosen and rejected as messages or transcripts")
        return prompt + turns
    if _next_role(row, field, turns) != "user":
        row.fail(field, "ends with a user turn, not with an answer", "add the assistant's answer, or delete the row")
    if prompt and prompt[-1] not in turns[:-1]:
        row.fail("prompt", f"is not among the user turns of {field}", "leave it out, or make it the question answered")
    return turns


def _prompt_turns(row: _Row) -> list[Message]:
    """The turns up to the question to answer: those of the column history, if there is one, and of prompt."""
    history = _history(row)
    turns = _turns(row, "prompt", "user")
    if _next_role(row, "prompt", turns, "user", opening=not history) != "assistant":
        row.fail("prompt", "ends with an assistant turn", "end with the user's question")
    return history + turns


def _history(row: _Row) -> list[Message]:
    if row.values.get("history") in (None, "", [], "[]"):
        return []
    history = _turns(row, "history", None)
    if _next_role(row, "history", history, bare_system=True) != "user":
        row.fail("history", "ends with a user turn", "put the last user turn into prompt")
    return history


def _critique(row: _Row, identity: str) -> CritiqueDemonstration:
    critique = row.text("critique")
    revision = None if row.values.get("revision") is None else row.text("revision")
    if revision is None and not critique.startswith(NO_VIOLATIONS):
        remedy = f"write the revision, or begin the critique with {NO_VIOLATIONS!r}"
        row.fail("revision", "has no value, though the critique found something", remedy)
    # in any case of letters: "no violations found" beside a revision is the same contradiction
    if revision is not None and critique.casefold().startswith(NO_VIOLATIONS.casefold()):
        row.fail("revision", "is there, though the critique found nothing", "make it null, or write what is wrong")
    return CritiqueDemonstration(
        id=identity,
        constitution=row.text("constitution"),
        principle=row.text("principle"),
        prompt=row.text("prompt"),
        response=row.text("response"),
        critique=critique,
        revision=revision,
    )


def _prompt(text: Callable[[_Row], str]) -> Callable[[_Row, str], Prompt]:
    def build(row: _Row, identity: str) -> Prompt:
        return Prompt(id=identity, prompt=text(row), tags=_tags(row))

    return build


def _tags(row: _Row) -> tuple[str, ...]:
    value = row.values.get("tags")
    if value is None:
        return ()
    if isinstance(value, str):
        if not value.strip().startswith("["):
            return tuple(row.checked("tags", tag) for tag in value.split(",") if tag.strip())
        value = _json_list(row, "tags", value)
    if not isinstance(value, list | tuple):
        row.fail("tags", f"is {_kind(value)}, not a list", 'write ["medical", "benign"] or "medical, benign"')
    return tuple(row.checked(f"tags[{i}]", tag) for i, tag in enumerate(value))


def _problem(column: str) -> Callable[[_Row, str], Problem]:
    def build(row: _Row, identity: str) -> Problem:
        return Problem(id=identity, prompt=row.text(column), answer=row.text("answer"), kind=row.label("kind"))

    return build


_VERDICTS = ("", "approve", "edit", "swap", "reject")
_PAIR_OPTIONS = ("history", "id", "domain", "source")

_CONVERSATIONS = (
    _Format(("messages",), ("id", "category"), _from_messages("messages")),
    _Format(("conversations",), ("id", "category"), _from_messages("conversations")),
    _Format(("prompt", "completion"), ("history", "id", "category"), _from_completion),
    _Format(("instruction", "output"), ("input", "id", "category"), _from_alpaca),
)
_PREFERENCES = (
    _Format(("prompt", "chosen", "rejected"), _PAIR_OPTIONS, _preference),
    _Format(("chosen", "rejected"), ("prompt", *_PAIR_OPTIONS), _preference),
)
_REVIEWS = (_Format(("verdict", "check", "prompt", "chosen", "rejected"), _PAIR_OPTIONS, _review),)
_CRITIQUES = (_Format(("constitution", "principle", "prompt", "response", "critique"), ("revision", "id"), _critique),)
_PROMPTS = (
    _Format(("prompt",), ("tags", "id"), _prompt(lambda row: row.text("prompt"))),
    _Format(("instruction",), ("input", "tags", "id"), _prompt(_instruction)),
    _Format(("question",), ("tags", "id"), _prompt(lambda row: row.text("question"))),
)
_PROBLEMS = (
    _Format(("prompt", "answer"), ("kind", "id"), _problem("prompt")),
    _Format(("question", "answer"), ("kind", "id"), _problem("question")),
)


# --- Turns ------------------------------------------------------------------------------------------------------------

_ROLES = {"system": "system", "user": "user", "assistant": "assistant"}
_SHAREGPT_ROLES = {**_ROLES, "human": "user", "gpt": "assistant"}
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_SPEAKERS = frozenset({*_SHAREGPT_ROLES, "tool", "function", "developer"})
"""Roles that show a list to be messages, those included that no message may have here."""
_PYTHON_MESSAGES = re.compile(
    rf"\s*\[\s*\{{(?=.*'(content|value)':)(?=.*'(role|from)':\s*'({'|'.join(sorted(_SPEAKERS))})')\s*'.*\}}\s*\]\s*\Z",
    re.DOTALL | re.IGNORECASE,
)
"""A list of messages as Python prints it, in whatever order it has their keys."""
_TRANSCRIPT_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):")


def _turns(row: _Row, field: str, bare: str | None) -> list[Message]:
    """The turns in a column, at least one, their order not yet checked. Plain text is one turn of the role `bare`."""
    value = row.values.get(field)
    if isinstance(value, str):
        if bare is None:
            value = _json_list(row, field, row.checked(field, value))
        elif messages := _messages_in(value):
            value = messages
        elif _PYTHON_MESSAGES.match(value):
            problem = "is messages as Python prints them, as pandas writes them to CSV"
            row.fail(field, problem, "write them as JSON (json.dumps), or save the data as .jsonl or .parquet")
        elif _is_transcript(value, prompt_only=bare == "user"):
            return _transcript(row, field, row.checked(field, value), prompt_only=bare == "user")
    if not isinstance(value, list | tuple):
        if bare is not None:
            return [Message(role=bare, content=row.checked(field, value))]
        problem = "has no value" if value is None else f"is {_kind(value)}, not a list of messages"
        row.fail(field, problem, 'write [{"role": "user", "content": "..."}, ...]')
    if not value:
        row.fail(field, "is empty: a list without messages", "write the conversation, or delete the row")
    return [_message(row, f"{field}[{i}]", item) for i, item in enumerate(value)]


def _message(row: _Row, field: str, item: Any) -> Message:
    if not isinstance(item, dict):
        row.fail(field, f"is {_kind(item)}, not a message", 'write {"role": "user", "content": "..."}')
    role_key, content_key, roles = _message_keys(item)
    for key in (role_key, content_key):
        if item.get(key) is None:
            has = ", ".join(map(str, item)) or "nothing"
            row.fail(f"{field}.{key}", f"is missing; the message has {has}", f"write its {key}")
    role = row.checked(f"{field}.{role_key}", item[role_key])
    known = roles.get(role.casefold())
    if known is None:
        row.fail(f"{field}.{role_key}", f"is {role!r}, which is not a role", f"write one of {', '.join(roles)}")
    return Message(role=known, content=row.checked(f"{field}.{content_key}", item[content_key]))


def _message_keys(item: Mapping[str, Any]) -> tuple[str, str, Mapping[str, str]]:
    """Under which keys a message has its role and its content, and the roles by their name there."""
    sharegpt = "role" not in item and ("from" in item or "value" in item)
    return ("from", "value", _SHAREGPT_ROLES) if sharegpt else ("role", "content", _ROLES)


def _messages_in(text: str) -> list[Any] | None:
    """The messages that a text is the JSON of, each with a role and a content, one at least in a role of `_SPEAKERS`.

    None for all other text.
    """
    if not text.lstrip().startswith("["):
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    roles = [_role_in(item) for item in value] if isinstance(value, list) else []
    return value if None not in roles and _SPEAKERS & set(roles) else None


def _role_in(item: Any) -> str | None:
    """The role of what has the form of a message, in small letters. None where it has not."""
    if not isinstance(item, dict):
        return None
    role_key, content_key, _ = _message_keys(item)
    role, content = item.get(role_key), item.get(content_key)
    return role.strip().casefold() if isinstance(role, str) and isinstance(content, str) else None


def _next_role(
    row: _Row, field: str, turns: list[Message], expected: str = "user", opening: bool = True, bare_system: bool = False
) -> str:
    """The role whose turn it is after `turns`, which must alternate from `expected` on.

    `opening` turns (those of a question, not of an answer) may begin with one system turn, and with `bare_system` hold
    nothing else.
    """
    for i, turn in enumerate(turns):
        if turn.role == "system" and i == 0 and opening and expected == "user":
            continue
        if turn.role != expected:
            place = f"{field}[{i}].role" if isinstance(row.values.get(field), list | tuple) else field
            problem = f"is {turn.role!r} out of order: turn {i + 1} must be the {expected}'s"
            row.fail(place, problem, "let user and assistant take turns, after at most one system turn")
        expected = "assistant" if expected == "user" else "user"
    if turns[-1].role == "system" and not bare_system:
        row.fail(field, "has no user turn", "add the user's question and the assistant's answer")
    return expected


def _is_transcript(value: str, prompt_only: bool) -> bool:
    """Whether text is an hh-rlhf transcript, or with `prompt_only` one that breaks off where the answer belongs."""
    text = value.strip()
    return text.startswith("Human:") and (text.endswith("\n\nAssistant:") if prompt_only else "\n\nAssistant:" in text)


def _transcript(row: _Row, field: str, text: str, prompt_only: bool) -> list[Message]:
    _, *parts = _TRANSCRIPT_TURN.split(text)
    said = list(zip(parts[::2], parts[1::2], strict=True))
    if prompt_only:
        said.pop()
    turns: list[Message] = []
    for i, (speaker, words) in enumerate(said, start=1):
        if not words.strip():
            row.fail(field, f"is empty at turn {i} ({speaker})", "write what was said, or delete the row")
        content, role = row.checked(field, words), _TRANSCRIPT_ROLES[speaker]
        if turns and turns[-1].role == role == "assistant":
            turns[-1] = Message(role=role, content=f"{turns[-1].content}\n\n{content}")
        else:
            turns.append(Message(role=role, content=content))
    return turns


def _json_list(row: _Row, field: str, text: str) -> list[Any]:
    """A list from its JSON text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        # str() of a Python list is what pandas writes into CSV by itself
        row.fail(field, "is text, but not the JSON of a list", "write the list with json.dumps")
    if not isinstance(value, list):
        row.fail(field, f"is the JSON of {_kind(value)}, not of a list", "write the list with json.dumps")
    return value


# --- From sources to rows ---------------------------------------------------------------------------------------------

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?P<split>:[\w.\[\]:%+-]+)?")
_FILE_NAME = re.compile(r"\.(jsonl?|parquet|csv|tsv|txt|md|xlsx?|arrow|ya?ml|pkl|gz|zip|bz2|xz|zst)$", re.IGNORECASE)


def _rows(source: Source, streaming: bool) -> Iterator["_Row | DataError"]:
    """The rows of a source; an error in place of a row that cannot be read, after which reading goes on."""
    file = os.fspath(source)
    if os.path.isdir(file):
        raise DataError(file, "is a folder, not a file", "name the file in it")
    if not os.path.exists(file):
        if isinstance(source, str) and _HUB_ID.fullmatch(source) and not _FILE_NAME.search(source):
            return _hub_rows(source, streaming)
        remedy = f"check the path (looked for {os.path.abspath(file)}), or name a Hub data set as owner/name"
        raise DataError(file, "no such file", remedy)
    name = Path(file).name
    for suffix, rows in _SUFFIXES.items():
        if name.lower().endswith(suffix):
            return rows(file, name[: -len(suffix)])
    raise DataError(file, f"is of a kind that is not read ({Path(file).suffix or 'no suffix'})", f"save it as {_KINDS}")


def _jsonl_rows(file: str, stem: str) -> Iterator["_Row | DataError"]:
    compressed = file.lower().endswith(".gz")
    line = 0
    try:
        with gzip.open(file) if compressed else open(file, "rb") as stream:
            for line, raw in enumerate(stream, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw
                if raw.strip():
                    yield _json_row(file, stem, line, raw)
    except (OSError, EOFError, zlib.error) as error:
        if compressed and not isinstance(error, PermissionError):
            problem = f"is not a whole gzip file: it breaks off after line {line} ({error})"
            raise DataError(file, problem, "compress or copy it again; if it is plain text, name it .jsonl") from error
        raise DataError(file, f"cannot be read ({error})", "check the file and its permissions") from error


def _json_row(file: str, stem: str, line: int, raw: bytes) -> "_Row | DataError":
    try:
        values = json.loads(raw.decode(), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        problem = f"byte {error.start + 1} of the line (0x{raw[error.start]:02x}) is not UTF-8"
        return DataError(file, problem, "save the file as UTF-8", line)
    except _TwiceError as error:
        return DataError(file, "stands twice in one object", "keep one of the two", line, str(error))
    except (ValueError, RecursionError) as error:
        detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
        return DataError(file, f"is not valid JSON: {detail}", "write one JSON object on each line", line)
    if not isinstance(values, dict):
        return DataError(file, f"is {_kind(values)}, not an object", "write one JSON object on each line", line)
    return _Row(file, stem, line, "line", line, values)


class _TwiceError(Exception):
    """A key stands twice in a JSON object."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; `json` by itself would keep the last of two values for one key and say nothing."""
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise _TwiceError(next(key for key in keys if keys.count(key) > 1))
    return values


def _csv_rows(file: str, stem: str) -> Iterator["_Row | DataError"]:
    try:
        raw = Path(file).read_bytes()
    except OSError as error:
        raise DataError(file, f"cannot be read ({error})", "check the file and its permissions") from error
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(file, f"byte 0x{raw[error.start]:02x} is not UTF-8", "save the file as UTF-8", line) from error
    csv.field_size_limit(2**31 - 1)  # the default, 128 KiB, is short for a conversation in one cell
    cells = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    header_line = line = 0
    try:
        while True:
            line = cells.line_num + 1  # a row with line breaks in quotes is named by its first line
            row = next(cells, None)
            if row is None:
                return
            if not row:
                continue
            if not header:
                header, header_line = row, line
                if twice := next((name for name in header if name.strip() and header.count(name) > 1), None):
                    raise DataError(file, "stands twice in the header", "keep one of the two", line, twice)
            elif len(row) != len(header):
                problem = f"has {len(row)} cells where the header has {len(header)}"
                yield DataError(file, problem, "put text with commas or line breaks in double quotes", line)
            else:
                values = {name: cell or None for name, cell in zip(header, row, strict=True) if name.strip()}
                yield _Row(file, stem, line, "line", header_line, values)
    except csv.Error as error:
        raise DataError(file, f"is not valid CSV: {error}", "double every quote inside a quoted cell", line) from error


def _parquet_rows(file: str, stem: str) -> Iterator["_Row | DataError"]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            names = table.schema_arrow.names
            if twice := next((name for name in names if names.count(name) > 1), None):
                raise DataError(file, "stands twice among the columns", "keep one of the two", None, twice)
            line = 0
            for batch in table.iter_batches(batch_size=1024):
                for i in range(batch.num_rows):
                    line += 1
                    yield _parquet_row(file, stem, line, {name: batch.column(name)[i] for name in names})
    except (pyarrow.ArrowException, OSError, UnicodeError) as error:  # a damaged footer may be no UTF-8
        raise DataError(file, f"is not a whole Parquet file ({error})", "write or copy it again") from error


def _parquet_row(file: str, stem: str, line: int, cells: dict[str, Any]) -> "_Row | DataError":
    values: dict[str, Any] = {}
    for name, cell in cells.items():
        try:
            values[name] = cell.as_py()
        except UnicodeDecodeError:
            return DataError(file, "is not UTF-8", "write the column as UTF-8 text", line, name, "row")
    return _Row(file, stem, line, "row", None, values)


def _hub_rows(source: str, streaming: bool) -> Iterator["_Row | DataError"]:
    """The rows of a Hub data set. The Hub is asked first if it answers: `load_dataset` retries for half a minute."""
    name, _, split = source.partition(":")
    split = split or "train"
    streaming = streaming and "[" not in split  # the Hub cannot stream a slice
    tried = f"datasets.load_dataset({name!r}, split={split!r})"
    remedy = "check name and connection; HF_HUB_OFFLINE=1 reads the cache; or save the data as .jsonl"
    stem = name.split("/")[1] + ("" if split == "train" else f"-{split}")
    try:
        import datasets
        from huggingface_hub import constants, get_session

        if not constants.HF_HUB_OFFLINE:
            get_session().head(constants.ENDPOINT, timeout=5)
        for line, values in enumerate(datasets.load_dataset(name, split=split, streaming=streaming), start=1):
            yield _Row(source, stem, line, "row", None, values)
    except Exception as error:  # of many libraries, without a common base; all mean that the data cannot be had
        problem = f"there is no such file, and {tried} failed with {type(error).__name__}: {error}"
        raise DataError(source, problem, remedy) from error


_SUFFIXES: dict[str, Callable[[str, str], Iterator["_Row | DataError"]]] = {
    ".jsonl": _jsonl_rows,
    ".jsonl.gz": _jsonl_rows,
    ".parquet": _parquet_rows,
    ".csv": _csv_rows,
}
_KINDS = ", ".join(_SUFFIXES)
