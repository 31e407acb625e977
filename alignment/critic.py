"""Whoever is asked: the sampler, the critic and the judge of Constitutional AI are each an `Answerer`.

`LocalAnswerer` is a model in this process; `resources.endpoint` has one behind an OpenAI-compatible server. What an answer
depends on is the conversation, the settings and the row's seed - not the batch or the order it was asked in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

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
        """See `Answerer.choose`: from the log-probabilities of whole options, which may be several tokens long."""
        asked = [c for c in conversations for _ in options]
        said = list(options) * len(conversations)
        log_probs = answer_log_probs(self._model, self._tokenizer, asked, said, self._batch_size)
        out: list[list[float] | None] = []
        for start in range(0, len(log_probs), len(options)):
            row = log_probs[start : start + len(options)]
            top = max(row)
            weights = [math.exp(lp - top) for lp in row]
            out.append([w / sum(weights) for w in weights])
        return out

    def probability(self, conversations, answer) -> list[float] | None:
        """See `Answerer.probability`."""
        said = [answer] * len(conversations)
        return [math.exp(lp) for lp in answer_log_probs(self._model, self._tokenizer, conversations, said, self._batch_size)]
