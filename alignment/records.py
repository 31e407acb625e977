"""The records every stage speaks: conversations, preference pairs, critiques, prompts and verifiable problems.

A record is a frozen pydantic model. Readers (`alignment.readers`) turn users' files into records, `alignment.splits`
sends each to train or held-out by its prompt, and trainers take records only.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Role = Literal["system", "user", "assistant"]


class Record(BaseModel):
    """Base of all records: immutable, and unknown columns are refused by the readers, not silently kept."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Message(Record):
    """One turn of a conversation."""

    role: Role
    content: Text


class Conversation(Record):
    """A conversation for supervised fine-tuning: an optional system turn, then user and assistant in turn.

    It ends with an assistant turn; every assistant turn is trained on (loss on assistant tokens only).
    """

    id: str
    messages: tuple[Message, ...]
    category: str = ""

    @model_validator(mode="after")
    def _turns_alternate(self) -> "Conversation":
        roles = [m.role for m in self.messages]
        turns = roles[1:] if roles[:1] == ["system"] else roles
        expected = ["user", "assistant"] * (len(turns) // 2)
        if not turns or turns != expected:
            raise ValueError(
                f"messages: roles are {roles}; expected an optional system turn, then user and assistant alternating, "
                "ending with assistant"
            )
        return self

    @property
    def prompt(self) -> str:
        """The first user turn."""
        return self.user_turns[0]

    @property
    def user_turns(self) -> list[str]:
        """What the user says, turn by turn: what the train / held-out split is made by."""
        return [m.content for m in self.messages if m.role == "user"]


PIPELINE_SOURCES = frozenset({"critique", "constitutional", "ai_feedback"})
"""`PreferencePair.source` of pairs that the pipeline itself makes; every other pair is a person's, whose source is "human"."""


class PreferencePair(Record):
    """A human or constitutional comparison: `chosen` is the better answer to `prompt`, `rejected` the worse.

    `history` holds the turns before the last user turn, oldest first (empty for single-turn prompts).
    """

    id: str
    prompt: Text
    chosen: Text
    rejected: Text
    history: tuple[Message, ...] = ()
    domain: str = ""
    source: str = "human"

    @model_validator(mode="after")
    def _answers_differ(self) -> "PreferencePair":
        if self.chosen == self.rejected:
            raise ValueError("rejected: is identical to chosen; a pair must say which of two answers is better")
        return self

    @property
    def user_turns(self) -> list[str]:
        """What the user says, turn by turn: what the train / held-out split is made by."""
        return [*(m.content for m in self.history if m.role == "user"), self.prompt]

    @property
    def prompt_messages(self) -> list[dict[str, str]]:
        """The conversation up to and including the last user turn, as chat-template messages."""
        return [m.model_dump() for m in self.history] + [{"role": "user", "content": self.prompt}]


class WeightedPair(PreferencePair):
    """A pair as a loss counts it: `label` is the probability that `chosen` is better, `weight` multiplies the pair's loss."""

    label: float = Field(1.0, ge=0, le=1)
    weight: float = Field(1.0, gt=0)


class ReviewedPair(Record):
    """A generated pair with a person's verdict on it; `check` tells whether its texts are still those that were generated.

    `line` is where it stands in the table, for messages.
    """

    pair: PreferencePair
    verdict: Literal["", "approve", "edit", "swap", "reject"]
    check: str
    line: int


class CritiqueDemonstration(Record):
    """One worked critique: what a critic should say of `response` under `principle`, and the revision it leads to.

    `revision` is None exactly when the critique finds nothing (`NO_VIOLATIONS`).
    """

    id: str
    constitution: str
    principle: Text
    prompt: Text
    response: Text
    critique: Text
    revision: Text | None = None


class Prompt(Record):
    """A single user turn with tags: its domain and its intent (harmful-intent, borderline-but-fine, benign)."""

    id: str
    prompt: Text
    tags: tuple[str, ...] = ()


class Problem(Record):
    """A short problem whose `answer` can be checked by a program."""

    id: str
    prompt: Text
    answer: Text
    kind: str = ""
