"""Records: immutable, closed to unknown fields, and valid or not there at all."""

import pytest
from pydantic import ValidationError

from alignment.records import Conversation, CritiqueDemonstration, Message, PreferencePair, Problem, Prompt

SYSTEM = Message(role="system", content="Be brief.")
USER = Message(role="user", content="Hello")
ASSISTANT = Message(role="assistant", content="Good morning.")

RECORDS = [
    USER,
    Conversation(id="a", messages=(SYSTEM, USER, ASSISTANT), category="greeting"),
    PreferencePair(id="a", prompt="And now?", chosen="b", rejected="c", history=(USER, ASSISTANT), domain="cooking"),
    CritiqueDemonstration(id="a", constitution="general", principle="p", prompt="q", response="r", critique="c"),
    Prompt(id="a", prompt="Hello", tags=("general", "benign")),
    Problem(id="a", prompt="1 + 1?", answer="2"),
]
each_record = pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)


@each_record
def test_records_are_immutable(record):
    with pytest.raises(ValidationError, match="frozen"):
        setattr(record, next(iter(type(record).model_fields)), "other")
    assert hash(record) == hash(record.model_copy())


@each_record
def test_records_refuse_unknown_fields(record):
    with pytest.raises(ValidationError, match="Extra inputs"):
        type(record).model_validate({**record.model_dump(), "anser": "b"})


@each_record
def test_records_survive_json(record):
    assert type(record).model_validate_json(record.model_dump_json()) == record


@pytest.mark.parametrize("blank", ["", "  \n"])
def test_text_is_stripped_and_never_blank(blank):
    assert Message(role="user", content=" Hello\n") == USER
    for make in (
        lambda: Message(role="user", content=blank),
        lambda: Prompt(id="a", prompt=blank),
        lambda: Problem(id="a", prompt="1 + 1?", answer=blank),
        lambda: PreferencePair(id="a", prompt="p", chosen=blank, rejected="c"),
    ):
        with pytest.raises(ValidationError, match="at least 1 character"):
            make()


@pytest.mark.parametrize("turns", [(USER, ASSISTANT), (SYSTEM, USER, ASSISTANT), (USER, ASSISTANT, USER, ASSISTANT)])
def test_conversations_alternate_and_know_their_prompt(turns):
    assert Conversation(id="a", messages=turns).prompt == "Hello"


@pytest.mark.parametrize(
    "turns",
    [
        (),
        (SYSTEM,),
        (USER,),
        (ASSISTANT,),
        (ASSISTANT, USER),
        (USER, USER, ASSISTANT),
        (USER, ASSISTANT, ASSISTANT),
        (USER, SYSTEM, ASSISTANT),
        (SYSTEM, SYSTEM, USER, ASSISTANT),
        (USER, ASSISTANT, USER),
    ],
    ids=lambda turns: "-".join(turn.role for turn in turns) or "none",
)
def test_conversations_refuse_other_orders(turns):
    with pytest.raises(ValidationError, match="expected an optional system turn"):
        Conversation(id="a", messages=turns)


def test_unknown_roles_are_refused():
    with pytest.raises(ValidationError, match="role"):
        Message(role="tool", content="a")


def test_a_pair_needs_two_answers():
    with pytest.raises(ValidationError, match="identical to chosen"):
        PreferencePair(id="a", prompt="p", chosen="So.", rejected=" So.\n")


def test_prompt_messages_end_with_the_question():
    pair = PreferencePair(id="a", prompt="And now?", chosen="b", rejected="c", history=(USER, ASSISTANT))
    assert pair.prompt_messages == [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Good morning."},
        {"role": "user", "content": "And now?"},
    ]
