"""Answers from any OpenAI-compatible chat-completions server: OpenAI, vLLM, `transformers serve`, Ollama.

No answer is paid for twice: each is a file in a cache that all runs share, found by everything it depends on (model,
messages, sampling, seed), and whoever asks holds a lock on it. What fails is repeated here and nowhere else (the client's own
retries are off), so that every wait is in the log. The key is read from the environment when it is needed, travels in the
request's header, and is cut out of whatever a server may echo.
"""

from __future__ import annotations

import email.utils
import json
import math
import os
import random
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from filelock import FileLock

from alignment.critic import AnswererSettings, Conversation, Keep, answer_key
from alignment.errors import UserError
from alignment.finished import read_whole_lines
from alignment.generation import Completion, SamplingSettings
from alignment.progress import SILENT, Log, Progress

if TYPE_CHECKING:
    from openai import OpenAI

TOP_LOGPROBS = 20
FEW = 8  # conversations that may all be refused for their text, by a server that has answered others, without ending the run
BACKOFF = 1.0  # seconds before the first repetition; doubled for each further one


class EndpointError(UserError):
    """The endpoint gave no answer, or may not be asked for more; says what was kept and what to do."""


class EndpointAnswerer:
    """An `alignment.critic.Answerer` behind a server.

    Args:
        cache: folder of answers, shared by all runs; safe for several processes.
        ledger: file of what was paid for, read at the start, so that a budget holds across kills and repeated attempts.
    """

    def __init__(self, settings: AnswererSettings, cache: Path, *, ledger: Path | None = None) -> None:
        self.identity = f"endpoint:{settings.model}"
        self._settings, self._cache = settings, _Cache(cache)
        self._budget = _Budget(settings, ledger)
        self._tells_log_probs: bool | None = None  # None: not known yet
        self._has_answered = self._budget.has_paid

    @property
    def chooses(self) -> bool:
        """See `Answerer.chooses`: not once the server is known to tell no log-probabilities."""
        return self._tells_log_probs is not False

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
        """See `Answerer.answer`; a server bars no tokens and keeps what it likes: `not_first` and `continued` change nothing.

        Raises:
            EndpointError: no answer after all repetitions, a refused request, all requests refused for their own text, or a
                budget that is used up. Answers that were there, or under way, are in the cache by then.
        """
        payloads = [self._payload(c, settings, seed) for c, seed in zip(conversations, seeds, strict=True)]
        out: dict[int, Completion] = {}

        def tell(i: int, completion: Completion) -> None:
            out[i] = completion
            if keep is not None:
                keep(i, completion)

        def done(i: int, answer: Mapping[str, Any]) -> None:
            self._has_answered = True
            ended = answer["finish_reason"] not in ("length", "content_filter")
            tell(i, Completion(answer["text"], answer["completion_tokens"] or 0, ended))

        refused = _Exchange(self._settings, self._cache, self._budget).run(payloads, done, log, what)
        different = len({answer_key(conversations[i]) for i in refused})  # one may be asked with several seeds
        if refused and len(refused) == len(payloads) and not (self._has_answered and different < FEW):
            raise EndpointError(
                f"{what}: {self._settings.model} at {self._settings.base_url} refuses all {len(refused)} requests for their "
                f"own text, the last: {list(refused.values())[-1]}. Remedy: shorten the prompts, lower max_new_tokens, or use "
                "another model."
            )
        for i in refused:  # only now: what is kept would not be asked for again
            tell(i, Completion("", 0, ended=False))
        return [out[i] for i in range(len(payloads))]

    def choose(
        self, conversations: Sequence[Conversation], options: Sequence[str], *, log: Log = SILENT
    ) -> list[list[float] | None]:
        """See `Answerer.choose`: from the most likely first tokens, where the server tells them.

        An option's probability is that of the first tokens it alone begins with. A conversation that the server refuses for its
        own text (too long, a content filter) is one of which it cannot be told. A server that refuses the log-probabilities, or
        leaves them out of its first answer with a text, is asked no more; so is one that refuses with 400 or 422 and no word:
        they are all that is unusual in the request.

        Raises:
            EndpointError: as `answer`; a request refused for any other reason is such an error, with the server's words.
        """
        out: list[list[float] | None] = [None] * len(conversations)
        if not self.chooses:
            return out
        payloads = [
            {
                "model": self._settings.model,
                "messages": [dict(message) for message in conversation],
                "temperature": 1.0,
                "max_tokens": 1,
                "seed": 0,
                "logprobs": True,
                "top_logprobs": TOP_LOGPROBS,
            }
            for conversation in conversations
        ]

        def done(i: int, answer: Mapping[str, Any]) -> None:
            out[i] = option_probabilities(answer["logprobs"], options) if answer["logprobs"] else None

        try:
            _Exchange(self._settings, self._cache, self._budget, self._learn).run(payloads, done, log, "choices")
        except _NoLogProbs as error:
            self._tells_log_probs = False
            log.say(f"choices: {self._settings.model} tells no log-probabilities, and is asked for no more choices: {error}")
        return out

    def probability(self, conversations: Sequence[Conversation], answer: str) -> list[float] | None:
        """See `Answerer.probability`: a server does not tell."""
        return None

    def _learn(self, choice: Mapping[str, Any]) -> None:
        # An empty text has no first token to tell of.
        if choice["logprobs"]:
            self._tells_log_probs = True
        elif choice["text"] and self._tells_log_probs is None:
            raise _NoLogProbs("its answer is without them")

    def _payload(self, conversation: Conversation, settings: SamplingSettings, seed: int) -> dict[str, Any]:
        payload = {
            "model": self._settings.model,
            "messages": [dict(message) for message in conversation],
            "temperature": settings.temperature,
            "max_tokens": settings.max_new_tokens,
            "seed": seed,
        }
        if self._settings.extended_sampling:
            payload |= {"top_k": settings.top_k or -1, "repetition_penalty": settings.repetition_penalty}
        return payload


def option_probabilities(first_tokens: Sequence[tuple[str, float]], options: Sequence[str]) -> list[float] | None:
    """Normalised probabilities of options from (token, log-probability) pairs of an answer's first token; None if none fits.

    >>> option_probabilities([("A", -0.7), (" B", -0.7), ("The", -3.0)], ["A", "B"])
    [0.5, 0.5]
    >>> option_probabilities([("(", -0.1)], ["(A)", "(B)"]) is None
    True
    """
    weights = [0.0] * len(options)
    for token, log_prob in first_tokens:
        said = token.strip()
        fits = [i for i, option in enumerate(options) if said and option.strip().startswith(said)]
        if len(fits) == 1:
            weights[fits[0]] += math.exp(log_prob)
    total = sum(weights)
    return [w / total for w in weights] if total > 0 else None


class _Stopped(Exception):
    """One request ended the run: its reason, and what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.reason, self.remedy = reason, remedy


class _NoLogProbs(Exception):
    """The server tells no log-probabilities; holds its words."""


@dataclass(frozen=True)
class _Failure:
    """A request without an answer. `wait`: seconds the server asked for; `refused`: what of the request it does not take."""

    reason: str
    again: bool
    wait: float | None = None
    status: int | None = None
    refused: Literal["text", "logprobs"] | None = None


@dataclass(frozen=True)
class _Refused:
    """A request that is refused for its own text. Not kept: a server with another context length, or filter, may answer it."""

    reason: str


class _Exchange:
    """Sends some requests, several at once, until all are answered or one ends the run.

    Args:
        check: told of every answer of the server before the next is asked for; what it raises ends the run.
    """

    def __init__(
        self,
        settings: AnswererSettings,
        cache: _Cache,
        budget: _Budget,
        check: Callable[[Mapping[str, Any]], None] = lambda answer: None,
    ) -> None:
        self._settings, self._cache, self._budget, self._check = settings, cache, budget, check
        self._key = os.environ.get(settings.api_key_env, "").strip()
        self._address = settings.base_url
        self._over = threading.Event()
        self._quiet_until = 0.0  # a server that asks to wait asks all of us
        self._news: SimpleQueue[str] = SimpleQueue()

    def run(
        self, payloads: Sequence[dict[str, Any]], done: Callable[[int, Mapping[str, Any]], None], log: Log, what: str
    ) -> dict[int, str]:
        """`done(i, answer)` for every request, from this thread, as the answers come in.

        Returns:
            The reasons of the requests that were refused for their own text, by their numbers.
        """
        keys = [answer_key(payload) for payload in payloads]
        known = {i: answer for i, key in enumerate(keys) if (answer := self._kept(key, payloads[i])) is not None}
        for i, answer in known.items():
            done(i, answer)
        todo = [i for i in range(len(payloads)) if i not in known]
        if known:
            log.say(f"{what}: {len(known)} of {len(payloads)} answers of {self._settings.model} were already there")
        refused: dict[int, str] = {}
        if not todo:
            return refused
        paid_before = self._budget.tokens
        progress = Progress(log, what, len(todo))
        answered, stopped = len(known), None
        with self._client() as client, ThreadPoolExecutor(self._settings.concurrency) as pool:
            try:
                pending = {pool.submit(self._ask, client, keys[i], payloads[i]): i for i in todo}
                while pending:
                    finished, _ = wait(pending, timeout=1.0, return_when=FIRST_COMPLETED)
                    self._say_news(log, what)
                    for future in finished:
                        i, error = pending.pop(future), future.exception()
                        if error is not None:  # those under way are waited for: they are paid for
                            stopped = stopped or error
                        elif isinstance(answer := future.result(), _Refused):
                            refused[i] = answer.reason
                            text = _beginning(payloads[i])
                            log.say(f"{what}: warning: {self._settings.model} refuses {text!r}...: {answer.reason}")
                            progress.advance(1)
                        elif answer is not None:
                            answered += 1
                            done(i, answer)
                            progress.advance(1)
            finally:
                self._over.set()
        self._say_news(log, what)
        if isinstance(stopped, _Stopped):
            raise EndpointError(
                f"{what}: {self._settings.model} at {self._address}: {stopped.reason}; {answered} of {len(payloads)} answers are "
                f"kept. Remedy: {stopped.remedy}, and run again: what is kept is not asked for again."
            )
        if stopped is not None:
            raise stopped
        cost = f", {self._budget.cost:.4g} spent so far" if self._budget.cost else ""
        others = f", {len(refused)} refused" if refused else ""
        tokens = self._budget.tokens - paid_before
        log.say(f"{what}: {len(todo) - len(refused)} answers of {self._settings.model} for {tokens} tokens{cost}{others}")
        return refused

    def _say_news(self, log: Log, what: str) -> None:
        while not self._news.empty():
            log.say(f"{what}: {self._news.get()}")

    def _ask(self, client: OpenAI, key: str, payload: dict[str, Any]) -> dict[str, Any] | _Refused | None:
        # In a thread of the pool. None when another request ended the run.
        if self._over.is_set():
            return None
        try:
            with self._cache.lock(key):
                answer = self._kept(key, payload)  # another process may have asked meanwhile
                if answer is None:
                    self._budget.check()
                    answer = self._answer(client, payload)
                    if answer is None:
                        return None
                    if not isinstance(answer, _Refused):
                        if _is_whole(answer, payload):
                            self._cache.put(key, answer)
                        self._budget.add(answer["prompt_tokens"], answer["completion_tokens"])
                        self._check(answer)
        except BaseException:
            self._over.set()  # here, before this thread takes up the next request
            raise
        self._cache.unlock(key)
        return answer

    def _kept(self, key: str, payload: dict[str, Any]) -> dict[str, Any] | None:
        answer = self._cache.get(key)
        return answer if answer is not None and _is_whole(answer, payload) else None

    def _answer(self, client: OpenAI, payload: dict[str, Any]) -> dict[str, Any] | _Refused | None:
        attempts = self._settings.retries + 1
        for attempt in range(1, attempts + 1):
            self._over.wait(max(0.0, self._quiet_until - time.monotonic()))
            if self._over.is_set():
                return None
            answer = self._attempt(client, payload)
            if not isinstance(answer, _Failure):
                return answer
            if answer.refused == "text":
                return _Refused(answer.reason)
            if answer.refused == "logprobs" and "logprobs" in payload:
                raise _NoLogProbs(answer.reason)
            if not answer.again:
                raise _Stopped(answer.reason, _REMEDIES.get(answer.status or 0, "correct the settings of this answerer"))
            if attempt == attempts:
                break
            pause = min(BACKOFF * 2 ** (attempt - 1), self._settings.max_retry_wait) * random.uniform(0.5, 1.0)
            if answer.wait is not None:
                if answer.wait > self._settings.max_retry_wait:
                    raise _Stopped(
                        f"{answer.reason}, and asks to wait for {answer.wait:.0f} s", "wait that long, or raise max_retry_wait"
                    )
                pause = max(answer.wait, pause if answer.wait == 0 else 0.0)
                self._quiet_until = max(self._quiet_until, time.monotonic() + pause)
            self._news.put(f"{answer.reason}; repeating it in {pause:.1f} s ({attempt} of {attempts - 1})")
            self._over.wait(pause)
        raise _Stopped(
            f"no answer after {attempts} attempts, the last: {answer.reason}", "see to the server, or raise retries and timeout"
        )

    def _attempt(self, client: OpenAI, payload: dict[str, Any]) -> dict[str, Any] | _Failure:
        import openai

        sent = {key: value for key, value in payload.items() if key in _KNOWN_TO_CLIENT}
        sent[self._settings.limit_key] = payload["max_tokens"]
        extra = {key: value for key, value in payload.items() if key not in _KNOWN_TO_CLIENT and key != "max_tokens"}
        create = client.chat.completions.with_streaming_response.create
        deadline = time.monotonic() + self._settings.timeout
        try:
            with create(**sent, extra_body=extra or None) as response:
                body = b""
                for piece in response.iter_bytes():  # the client's timeout is per piece: a slow body would never end
                    body += piece
                    if time.monotonic() > deadline:
                        return _Failure(f"no whole answer within {self._settings.timeout:g} s", again=True)
            return self._read(json.loads(body))
        except openai.APIStatusError as error:
            return self._status_failure(error.status_code, error.response.headers, error.body)
        except openai.APITimeoutError:
            return _Failure(f"no answer within {self._settings.timeout:g} s", again=True)
        except ValueError:
            return _Failure("an answer that was cut off, or is no JSON", again=True)
        except Exception as error:  # whatever the connection died of; bounded by `retries`, then told by this name
            cause = error.__cause__ or error
            return _Failure(self._scrubbed(f"the connection failed ({type(cause).__name__}: {cause})"), again=True)

    def _read(self, answer: Any) -> dict[str, Any] | _Failure:
        try:
            choice = answer["choices"][0]
            text = choice["message"].get("content") or ""
            usage = answer.get("usage") or {}
            told = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
            log_probs = [(str(t["token"]), float(t["logprob"])) for t in told]
        except (AttributeError, IndexError, KeyError, TypeError):
            return _Failure("an answer that is no chat completion", again=True)
        return {
            "text": self._scrubbed(text, least=16).replace("\0", "").strip(),  # no reader of text takes NUL back
            "finish_reason": choice.get("finish_reason"),
            "prompt_tokens": usage.get("prompt_tokens"),
            "completion_tokens": usage.get("completion_tokens"),
            "logprobs": log_probs,
        }

    def _status_failure(self, status: int, headers: Mapping[str, str], body: Any) -> _Failure:
        detail = body.get("message") or body.get("detail") or body if isinstance(body, dict) else body
        reason = self._scrubbed(f"HTTP {status}" + (f" ({str(detail)[:300]})" if detail else ""))
        spent = isinstance(body, dict) and body.get("code") == "insufficient_quota"  # told as 429, but waiting does not help
        return _Failure(
            reason,
            again=not spent and (status in (408, 409, 429) or status >= 500),
            wait=_retry_after(headers),
            status=status,
            refused=_what_is_refused(body) if status in (400, 422) else None,
        )

    def _scrubbed(self, text: str, least: int = 1) -> str:
        # `least`: a local server's key may be a word ("none") that occurs in answers for other reasons.
        return text.replace(self._key, "[key]") if len(self._key) >= least else text

    def _client(self) -> OpenAI:
        import openai

        variable = self._settings.api_key_env
        if not self._key and urlsplit(self._address).hostname == "api.openai.com":
            raise EndpointError(f"{self._address}: needs a key. Remedy: put it into the environment variable {variable}.")
        if not (self._key.isascii() and self._key.isprintable()):
            raise EndpointError(f"the environment variable {variable} holds what cannot be a key. Remedy: set it anew.")
        return openai.OpenAI(
            api_key=self._key or "none",  # local servers want none, the client wants some
            base_url=self._address,
            timeout=self._settings.timeout,
            max_retries=0,
        )


_KNOWN_TO_CLIENT = ("model", "messages", "temperature", "seed", "logprobs", "top_logprobs")
_REMEDIES = {
    401: "set the environment variable that api_key_env names to a valid key",
    403: "use a key that may use this model",
    404: "correct base_url (with its version path, such as /v1) or model",
    429: "raise the account's limits, or lower concurrency",
}


# How servers say that a request's own text is why it is refused, in small letters.
_TOO_LONG = ("context length", "context_length", "context size", "context window", "model length", "prompt is too long")
_FILTERED = ("content_filter", "content filter", "content_policy", "content policy", "content management policy", "usage polic")


def _what_is_refused(body: Any) -> Literal["text", "logprobs"] | None:
    said = _complaint(body).lower()
    if any(sign in said for sign in _TOO_LONG + _FILTERED):
        return "text"
    return "logprobs" if "logprob" in said or not said else None


def _complaint(body: Any) -> str:
    # Without what it repeats of the request, such as FastAPI's `input`: that names `logprobs` whatever is wrong.
    if not isinstance(body, dict):
        return str(body or "")
    detail = body.get("detail") or []
    said = [body.get(name) for name in ("message", "param", "code")] + (detail if isinstance(detail, list) else [detail])
    said = [{k: v for k, v in part.items() if k != "input"} if isinstance(part, dict) else part for part in said]
    return " ".join(str(part) for part in said if part and not isinstance(part, int))


def _is_whole(answer: Mapping[str, Any], payload: Mapping[str, Any]) -> bool:
    # Not where log-probabilities were asked for and left out: the key has no address, and another server may tell them.
    return "logprobs" not in payload or bool(answer["logprobs"])


def _beginning(payload: Mapping[str, Any], most: int = 60) -> str:
    # Of the prompt, which the requests for a critique and a comparison show after "Human: ", and later ones do not repeat.
    said = [" ".join(message["content"].split()) for message in payload["messages"] if message["role"] == "user"]
    shown = [text for text in said if "Human: " in text] or said
    return shown[-1].split("Human: ", 1)[-1][:most]


class _Cache:
    """Answers as files, by key: `<2 characters>/<key>.json`, whole or not there."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def get(self, key: str) -> dict[str, Any] | None:
        try:
            return json.loads(self._path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    def put(self, key: str, answer: Mapping[str, Any]) -> None:
        path = self._path(key)
        part = path.with_name(f".{uuid.uuid4().hex}.part")
        part.write_text(json.dumps(answer), encoding="utf-8")
        part.replace(path)

    def lock(self, key: str) -> FileLock:
        path = self._path(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path.with_suffix(".lock"))

    def unlock(self, key: str) -> None:
        # Whoever still waits on the removed file, or makes a new one, finds the answer there.
        self._path(key).with_suffix(".lock").unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.json"


class _Budget:
    """What was paid for, and whether more may be."""

    def __init__(self, settings: AnswererSettings, ledger: Path | None) -> None:
        self._settings, self._ledger, self._lock = settings, ledger, threading.Lock()
        paid = read_whole_lines(ledger, lambda line: (int(line["prompt"]), int(line["completion"]))) if ledger else []
        self._prompt, self._completion = sum(p for p, _ in paid), sum(c for _, c in paid)
        self._untold = False
        self.has_paid = bool(paid)  # in an earlier attempt

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens paid for so far."""
        return self._prompt + self._completion

    @property
    def cost(self) -> float:
        """What they cost, in the currency of the prices."""
        return (self._prompt * self._settings.price_prompt + self._completion * self._settings.price_completion) / 1e6

    def check(self) -> None:
        """Raises: _Stopped, when nothing more may be asked for. What is under way may still exceed the budget."""
        limit, most = self._settings.max_tokens_budget, self._settings.max_cost
        if self._untold and (limit or most):
            raise _Stopped("the server does not say how many tokens it used", "set max_tokens_budget and max_cost to 0")
        if limit and self.tokens >= limit:
            raise _Stopped(f"the budget of {limit} tokens is used up ({self.tokens})", "raise max_tokens_budget")
        if most and self.cost >= most:
            raise _Stopped(f"the budget of {most:g} is used up ({self.cost:.4g})", "raise max_cost")

    def add(self, prompt: int | None, completion: int | None) -> None:
        """One more answer was paid for; None where the server does not say how many tokens."""
        with self._lock:
            self._untold |= prompt is None or completion is None
            self._prompt += prompt or 0
            self._completion += completion or 0
            if self._ledger is not None:
                with self._ledger.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"prompt": prompt or 0, "completion": completion or 0}) + "\n")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    # Seconds, or a date.
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except ValueError:
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None
