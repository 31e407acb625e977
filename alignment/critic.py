"""Whoever is asked: the sampler, the critic and the judge of Constitutional AI are each an `Answerer`.

`LocalAnswerer` is a model in this process; `resources.endpoint` has one behind an OpenAI-compatible server. What an answer
depends on is the conversation, the settings and the row's seed - not the batch or the order it was asked in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from alignment.chat import prompt_ids
from alignment.context_length import position_limit
from alignment.generation import Completion, SamplingSettings, generate
from alignment.likelihood import answer_log_probs
from alignment.progress import SILENT, Log

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Conversation = Sequence[dict[str, str]]  # chat messages, the last one the user's


class Answerer(Protocol):
    """Answers conversations, and says how likely it finds given answers.

    `identity` says which model it is, for fingerprints and tables; it holds no key and no address.
    """

    identity: str

    def answer(
        self,
        conversations: Sequence[Conversation],
        settings: SamplingSettings,
        *,
        seeds: Sequence[int],
        not_first: str | None = None,
        log: Log = SILENT,
        what: str = "sampling",
    ) -> list[Completion]:
        """One answer per conversation, in their order.

        Args:
            seeds: one per conversation.
            not_first: no answer starts with the first token of this text; whoever cannot bar a token ignores it.
        """
        ...

    def choose(self, conversations: Sequence[Conversation], options: Sequence[str]) -> list[list[float] | None]:
        """For every conversation, the probability of each option as the answer's beginning, normalised over the options.

        None where it cannot be told: a missing value, never a guess.
        """
        ...

    def probability(self, conversations: Sequence[Conversation], answer: str) -> list[float] | None:
        """The probability that each conversation is answered by a text that begins with `answer`; None if it cannot be told."""
        ...


class LocalAnswerer:
    """A model in this process."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, identity: str = "local", batch_size: int = 32
    ) -> None:
        self.identity = identity
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size

    def answer(self, conversations, settings, *, seeds, not_first=None, log=SILENT, what="sampling") -> list[Completion]:
        """See `Answerer.answer`."""
        return generate(
            self._model, self._tokenizer, conversations, settings, seeds=seeds, not_first=not_first, log=log, what=what
        )

    def choose(self, conversations, options) -> list[list[float] | None]:
        """See `Answerer.choose`: from the log-probabilities of whole options, which may be several tokens long.

        A conversation that is longer than the model can read is one of which it cannot be told.
        """
        longest = max((len(self._tokenizer(o, add_special_tokens=False)["input_ids"]) for o in options), default=0)
        limit = position_limit(self._model) - longest
        readable = [limit == math.inf or len(prompt_ids(self._tokenizer, c)) <= limit for c in conversations]
        asked = [c for c, fits in zip(conversations, readable, strict=True) if fits for _ in options]
        said = list(options) * sum(readable)
        log_probs = iter(answer_log_probs(self._model, self._tokenizer, asked, said, self._batch_size))
        return [_normalised([next(log_probs) for _ in options]) if fits else None for fits in readable]

    def probability(self, conversations, answer) -> list[float] | None:
        """See `Answerer.probability`."""
        said = [answer] * len(conversations)
        return [math.exp(lp) for lp in answer_log_probs(self._model, self._tokenizer, conversations, said, self._batch_size)]


def _normalised(log_probs: list[float]) -> list[float]:
    top = max(log_probs)
    weights = [math.exp(lp - top) for lp in log_probs]
    return [w / sum(weights) for w in weights]
