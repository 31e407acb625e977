"""Whoever is asked: the sampler, the critic and the judge of Constitutional AI are each an `Answerer`.

`LocalAnswerer` is a model in this process; `resources.endpoint` has one behind an OpenAI-compatible server. What an answer
depends on is the conversation, the settings and the row's seed - not the batch or the order it was asked in. That is also
what `KeptAnswers` finds an answer by that an interrupted run already had.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from alignment.chat import prompt_ids
from alignment.context_length import position_limit
from alignment.fingerprint import identity, layout
from alignment.finished import read_whole_lines
from alignment.generation import Completion, SamplingSettings, generate
from alignment.likelihood import answer_log_probs, first_token_log_probs
from alignment.models import NEVER_SHOWN, Config
from alignment.prefixes import Prefixes
from alignment.progress import SILENT, Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = Sequence[dict[str, str]]  # chat messages, the last one the user's
Keep = Callable[[int, Completion], None]  # told the number of a conversation and its answer


class AnswererSettings(Config):
    """Who answers: a model in this process, or one behind an OpenAI-compatible server."""

    kind: Literal["local", "endpoint"] = Field(
        "local", description="local: a model in this process; endpoint: a server that speaks OpenAI's chat completions"
    )
    source: Literal["sft_checkpoint", "base_model"] = Field("sft_checkpoint", description="Which model, if local")
    model: str = Field(
        "", description="Name under which the endpoint knows the model; part of the fingerprint, the address is not"
    )
    extended_sampling: bool = Field(
        False, description="Send top_k and repetition_penalty too; vLLM knows them, OpenAI's own servers refuse them"
    )
    base_url: str = Field("https://api.openai.com/v1", **layout("The endpoint's address, with its version path"))
    api_key_env: str = Field("OPENAI_API_KEY", **layout("Environment variable that holds the key; never the key itself"))
    limit_key: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens", **layout("What the endpoint calls the limit of new tokens; OpenAI's reasoning models want the longer one")
    )
    concurrency: int = Field(8, ge=1, **layout("Requests under way at once"))
    timeout: float = Field(120.0, gt=0, **layout("Seconds after which a request counts as failed, its answer's body included"))
    retries: int = Field(6, ge=0, **layout("Times a failed request is repeated, with growing waits, before the run ends"))
    max_retry_wait: float = Field(
        60.0, gt=0, **layout("Longest wait before a repetition, in seconds; a longer Retry-After ends the run")
    )
    max_tokens_budget: int = Field(0, ge=0, **layout("The run ends when it has paid for this many tokens; 0: no limit"))
    max_cost: float = Field(0.0, ge=0, **layout("The run ends when its answers have cost this much; 0: no limit"))
    price_prompt: float = Field(0.0, ge=0, **layout("Price of a million prompt tokens, in the currency of max_cost"))
    price_completion: float = Field(0.0, ge=0, **layout("Price of a million completion tokens"))

    @field_validator("api_key_env", mode="before")
    @classmethod
    def _no_key(cls, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_]\w*", value):
            raise PydanticCustomError(NEVER_SHOWN, "must be the name of an environment variable, never the key itself")
        return value

    @model_validator(mode="after")
    def _complete(self) -> AnswererSettings:
        if self.kind == "endpoint" and not self.model:
            raise ValueError("model: name the model that the endpoint is to answer with")
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError("base_url: must begin with http:// or https://")
        if "@" in self.base_url or "?" in self.base_url:
            raise ValueError("base_url: must hold no password and no query; a key belongs into the environment, see api_key_env")
        if self.max_cost and not (self.price_prompt or self.price_completion):
            raise ValueError("max_cost: needs price_prompt or price_completion, or nothing ever costs anything")
        return self


class Answerer(Protocol):
    """Answers conversations, and says how likely it finds given answers.

    `identity` says which model it is, for fingerprints and tables; it holds no key and no address.
    """

    identity: str

    @property
    def chooses(self) -> bool:
        """False once it is known that `choose` can tell nothing, whatever it is asked."""
        ...

    def answer(
        self,
        conversations: Sequence[Conversation],
        settings: SamplingSettings,
        *,
        seeds: Sequence[int],
        not_first: str | None = None,
        keep: Keep | None = None,
        continued: bool = False,
        log: Log = SILENT,
        what: str = "sampling",
    ) -> list[Completion]:
        """One answer per conversation, in their order. One refused for what it says has an empty answer that did not end.

        Args:
            seeds: one per conversation.
            not_first: no answer starts with the first token of this text; whoever cannot bar a token ignores it.
            keep: told of every answer as soon as it has ended, while others go on; never of two at once.
            continued: the next call is about conversations that go on from these; whoever can need not read them again.
        """
        ...

    def choose(
        self, conversations: Sequence[Conversation], options: Sequence[str], *, log: Log = SILENT
    ) -> list[list[float] | None]:
        """For every conversation, the probability of each option as the answer's beginning, normalised over the options.

        None where it cannot be told: a missing value, never a guess.
        """
        ...

    def probability(self, conversations: Sequence[Conversation], answer: str) -> list[float] | None:
        """The probability that each conversation is answered by a text that begins with `answer`; None if it cannot be told."""
        ...


class LocalAnswerer:
    """A model in this process."""

    chooses = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, identity: str = "local", batch_size: int = 32
    ) -> None:
        self.identity = identity
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self._read: Prefixes | None = None

    def answer(
        self, conversations, settings, *, seeds, not_first=None, keep=None, continued=False, log=SILENT, what="sampling"
    ) -> list[Completion]:
        """See `Answerer.answer`."""
        read, self._read = self._read, Prefixes(self._model) if continued else None
        given = {"seeds": seeds, "not_first": not_first, "keep": keep, "read": read, "remember": self._read}
        given |= {"log": log, "what": what}
        return generate(self._model, self._tokenizer, conversations, settings, **given)

    def choose(self, conversations, options, *, log=SILENT) -> list[list[float] | None]:
        """See `Answerer.choose`: from the log-probabilities of whole options, which may be several tokens long.

        A conversation that is longer than the model can read is one of which it cannot be told.
        """
        tokens = [self._tokenizer(o, add_special_tokens=False)["input_ids"] for o in options]
        limit = position_limit(self._model)
        if limit < math.inf:
            limit -= max(map(len, tokens), default=0)
        readable = [limit == math.inf or len(prompt_ids(self._tokenizer, c)) <= limit for c in conversations]
        asked = [c for c, fits in zip(conversations, readable, strict=True) if fits]
        if all(len(ids) == 1 for ids in tokens):  # one pass tells all of them
            firsts = [ids[0] for ids in tokens]
            rows = iter(first_token_log_probs(self._model, self._tokenizer, asked, firsts, self._batch_size))
        else:
            repeated, said = [c for c in asked for _ in options], list(options) * len(asked)
            log_probs = iter(answer_log_probs(self._model, self._tokenizer, repeated, said, self._batch_size))
            rows = ([next(log_probs) for _ in options] for _ in asked)
        return [_normalised(next(rows)) if fits else None for fits in readable]

    def probability(self, conversations, answer) -> list[float] | None:
        """See `Answerer.probability`."""
        said = [answer] * len(conversations)
        return [math.exp(lp) for lp in answer_log_probs(self._model, self._tokenizer, conversations, said, self._batch_size)]


class KeptAnswers:
    """An answerer whose every answer is on disk as soon as it has ended, and is not asked for again.

    Args:
        path: a file of JSON lines, appended to; the line that a kill cut short is dropped, and its answer asked for again.
    """

    def __init__(self, answerer: Answerer, path: Path) -> None:
        self.identity = answerer.identity
        self.choose, self.probability = answerer.choose, answerer.probability
        self._answerer, self._path = answerer, path
        self._known = dict(read_whole_lines(path, _kept))

    @property
    def chooses(self) -> bool:
        """See `Answerer.chooses`."""
        return self._answerer.chooses

    def answer(
        self, conversations, settings, *, seeds, not_first=None, keep=None, continued=False, log=SILENT, what="sampling"
    ) -> list[Completion]:
        """See `Answerer.answer`."""
        keys = [
            answer_key(self.identity, conversation, identity(settings), seed, not_first)
            for conversation, seed in zip(conversations, seeds, strict=True)
        ]
        missing = [i for i, key in enumerate(keys) if key not in self._known]
        if len(missing) < len(keys):
            log.say(f"{what}: {len(keys) - len(missing)} of {len(keys)} were already there")
        with self._path.open("a", encoding="utf-8") as file:

            def write(j: int, answer: Completion) -> None:
                key = keys[missing[j]]
                self._known[key] = answer
                line = {"key": key, "text": answer.text, "tokens": answer.tokens, "ended": answer.ended, "ids": answer.ids}
                file.write(json.dumps(line) + "\n")
                file.flush()  # what the operating system has outlives this process
                if keep is not None:
                    keep(missing[j], answer)

            asked, their_seeds = [conversations[i] for i in missing], [seeds[i] for i in missing]
            if asked:
                given = {"not_first": not_first, "keep": write, "continued": continued, "log": log, "what": what}
                self._answerer.answer(asked, settings, seeds=their_seeds, **given)
        return [self._known[key] for key in keys]


def answer_key(*parts: Any) -> str:
    """sha256 (hex) of everything an answer depends on."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _kept(line: dict[str, Any]) -> tuple[str, Completion]:
    return line["key"], Completion(line["text"], line["tokens"], line["ended"], tuple(line["ids"]))


def _normalised(log_probs: Sequence[float]) -> list[float]:
    top = max(log_probs)
    weights = [math.exp(lp - top) for lp in log_probs]
    return [w / sum(weights) for w in weights]
