"""The endpoint answerer: what it asks, what it survives, what it pays for, and what it never tells."""

import json
import logging
import os
import socket
import subprocess
import sys
import time
import traceback
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
from chat_server import ChatServer, completion, echo, forward
from pydantic import ValidationError

import resources.endpoint
from alignment.ai_feedback import Case, judge_in_both_orders
from alignment.constitutions import load_constitution
from alignment.critic import AnswererSettings, KeptAnswers, LocalAnswerer
from alignment.critique import CritiqueConfig, critique_and_revise, preference_pairs
from alignment.errors import UserError
from alignment.fingerprint import identity
from alignment.generation import Completion, SamplingSettings
from alignment.models import LoadSettings, ModelFiles, load_causal_lm, load_tokenizer
from alignment.pair_filters import FilterSettings
from alignment.progress import Log
from alignment.recipes import Recipe, RecipeError
from alignment.records import Prompt
from alignment.tiny_model import build_tiny_model
from resources.endpoint import FEW, EndpointAnswerer, EndpointError, option_probabilities

KEY = "sk-recognisable-4711-0815-secret"
SAMPLING = SamplingSettings(temperature=0.7, max_new_tokens=64)
CONVERSATIONS = [[{"role": "user", "content": f"Question {i}: größer?"}] for i in range(16)]
SEEDS = list(range(16))
FAULTS = ["429", "500", "time-out", "cut body", "cut json", "slow body", "endless body", "hang-up"]


@pytest.fixture(autouse=True)
def quick_and_keyed(monkeypatch):
    monkeypatch.setattr(resources.endpoint, "BACKOFF", 0.05)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


@pytest.fixture
def answerer(tmp_path):
    """Makes an answerer of a server; `cache` and `ledger` name files in the test's folder."""

    def make(server, cache="cache", ledger=None, **settings):
        given = {"kind": "endpoint", "model": "m", "base_url": server.url, "timeout": 60.0, "retries": 3, **settings}
        return EndpointAnswerer(AnswererSettings(**given), tmp_path / cache, ledger=tmp_path / ledger if ledger else None)

    return make


def ask(answerer, conversations=CONVERSATIONS, settings=SAMPLING, said=None, **kwargs):
    log = Log(say=said.append) if said is not None else Log()
    return answerer.answer(conversations, settings, seeds=SEEDS[: len(conversations)], log=log, what="critiques", **kwargs)


def expected(conversations=CONVERSATIONS, settings=SAMPLING):
    payloads = [
        {"messages": c, "seed": i, "temperature": settings.temperature, "max_tokens": settings.max_new_tokens}
        for i, c in enumerate(conversations)
    ]
    return [echo(p)["choices"][0]["message"]["content"] for p in payloads]


# --- Asking -----------------------------------------------------------------------------------------------------------


def test_answers_come_in_the_order_of_the_conversations(answerer):
    with ChatServer() as server:
        kept = {}
        answers = ask(answerer(server), keep=lambda i, answer: kept.update({i: answer}))
        assert [a.text for a in answers] == expected()
        assert answers[0] == Completion(expected()[0], 12, True)
        assert [kept[i] for i in range(16)] == answers
        (payload,) = [p for p in server.payloads if p["messages"] == CONVERSATIONS[3]]
        assert payload == {"model": "m", "messages": CONVERSATIONS[3], "temperature": 0.7, "max_tokens": 64, "seed": 3}
        assert server.keys == {f"Bearer {KEY}"}


def test_an_answer_cut_at_the_limit_has_not_ended(answerer):
    with ChatServer() as server:
        (answer,) = ask(answerer(server), CONVERSATIONS[:1], SAMPLING.model_copy(update={"max_new_tokens": 5}))
        assert (answer.tokens, answer.ended) == (5, False)


def test_an_answer_holds_no_nul_characters(answerer):
    with ChatServer(lambda payload: completion("\0 a\0b \0")) as server:
        assert [a.text for a in ask(answerer(server), CONVERSATIONS[:1])] == ["ab"]


def test_what_the_server_understands_is_a_setting(answerer):
    with ChatServer() as server:
        ask(answerer(server, limit_key="max_completion_tokens", extended_sampling=True), CONVERSATIONS[:1])
        (payload,) = server.payloads
        assert payload.keys() & {"max_tokens", "max_completion_tokens"} == {"max_completion_tokens"}
        assert (payload["top_k"], payload["repetition_penalty"]) == (50, 1.0)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_are_under_way_than_allowed(answerer, concurrency):
    def slow(payload):
        time.sleep(0.05)
        return echo(payload)

    with ChatServer(slow) as server:
        ask(answerer(server, concurrency=concurrency))
        assert server.busiest == concurrency


def test_address_and_layout_decide_nothing_and_the_model_does():
    def decides(**settings):
        return identity(AnswererSettings(kind="endpoint", **{"model": "m", **settings}))

    assert decides(base_url="http://other/v1", concurrency=1, timeout=5, max_cost=1, price_prompt=1) == decides()
    assert decides(model="n") != decides()
    assert not any("http" in str(value) for value in decides().values())


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"model": ""}, "model: name the model"),
        ({"model": "", "base_url": "http://me:secret@host/v1"}, "model: name the model"),
        ({"base_url": "http://me:secret@host/v1"}, "base_url: must hold no password"),
        ({"base_url": "https://host/v1?key=secret"}, "base_url: must hold no password"),
        ({"base_url": ["https://host/v1?key=secret"]}, "base_url"),
        ({"base_url": "host:8000"}, "base_url: must begin with http"),
        ({"api_key_env": "sk-abc-secret"}, "api_key_env"),
        ({"api_key_env": ["sk-abc-secret"]}, "api_key_env"),
        ({"api_key": "sk-abc-secret"}, "api_key"),
        ({"max_cost": 1.0}, "max_cost: needs price_prompt"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, names):
    given = {"kind": "endpoint", "model": "m", **settings}
    recipe = Recipe(Path("r.yaml"), {"stage": {"critic": given}})
    for make in (lambda: AnswererSettings(**given), lambda: recipe.config("stage", CritiqueConfig)):
        with pytest.raises((ValidationError, RecipeError)) as error:
            make()
        for told in (str(error.value), "".join(traceback.format_exception(error.value))):
            assert "secret" not in told
            assert names in told


# --- Faults -----------------------------------------------------------------------------------------------------------


def test_a_slow_body_is_waited_for_and_nothing_else_is_asked_for_twice_without_need(answerer):
    with ChatServer(faults=["slow body", "500"]) as server:
        assert [a.text for a in ask(answerer(server))] == expected()
        assert sorted(server.asked.values()) == [1] * 8 + [2] * 8


def test_faults_change_no_answer(answerer):
    with ChatServer(faults=FAULTS) as server:
        said = []
        assert [a.text for a in ask(answerer(server, timeout=3.0, retries=6), said=said)] == expected()
        assert server.failed == dict.fromkeys(FAULTS, 2)
    told = "\n".join(said)
    for reason in ("HTTP 429", "HTTP 500", "no answer within 3 s", "no whole answer within 3 s", "cut off", "connection failed"):
        assert reason in told
    assert "repeating it in" in told
    assert KEY not in told


def test_after_a_429_everybody_waits_as_long_as_the_server_asks(answerer):
    answered = []

    def slow_at_first(payload):
        answered.append(payload)
        if len(answered) == 1:
            time.sleep(0.15)  # under way when the other is refused, and over before the wait is
        return echo(payload)

    with ChatServer(slow_at_first, faults=["429", *[None] * 99]) as server:
        assert [a.text for a in ask(answerer(server, concurrency=2), CONVERSATIONS[:6])] == expected()[:6]
    refused, _, *later = server.times
    assert len(later) == 5  # four others, and the one that was refused
    assert all(t - refused >= 0.3 for t in later)


def refusing(status, code=None, headers=None):
    return lambda payload: (status, {"error": {"message": f"no: {KEY}", "code": code}})


def test_a_server_that_stays_down_is_one_clear_error_and_keeps_what_was_done(answerer):
    with ChatServer(faults=[None] * 6 + ["down"] * 10) as server:
        said = []
        with pytest.raises(EndpointError) as error:
            ask(answerer(server, concurrency=1), said=said)
        message = str(error.value)
        assert message.startswith(f"critiques: m at {server.url}: no answer after 4 attempts, the last: HTTP 503")
        assert "6 of 16 answers are kept. Remedy: see to the server" in message
        assert len(said) >= 3
        assert isinstance(error.value, UserError)
        assert sorted(server.asked.values()) == [1] * 6 + [4]
        server.faults = [None]
        before = server.asked.total()
        assert [a.text for a in ask(answerer(server))] == expected()
        assert server.asked.total() - before == 10


def test_a_server_that_is_not_there_is_one_clear_error(answerer):
    with ChatServer() as server:
        gone = answerer(server, retries=1)
    with pytest.raises(EndpointError, match=r"no answer after 2 attempts.*connection failed.*0 of 16.*Remedy"):
        ask(gone)


@pytest.mark.parametrize(
    ("status", "code", "names"),
    [
        (401, None, r"HTTP 401.*api_key_env"),
        (404, None, r"HTTP 404.*correct base_url .* or model"),
        (400, None, r"HTTP 400.*correct the settings"),
        (429, "insufficient_quota", r"HTTP 429.*raise the account's limits"),
    ],
)
def test_what_waiting_does_not_help_is_not_repeated(answerer, status, code, names):
    with ChatServer(refusing(status, code)) as server:
        with pytest.raises(EndpointError, match=names) as error:
            ask(answerer(server, concurrency=1))
        assert server.asked.total() == 1
        assert KEY not in str(error.value)


def test_a_longer_wait_than_allowed_ends_the_run(answerer):
    with ChatServer(faults=["429"]) as server, pytest.raises(EndpointError, match=r"asks to wait for 0 s; .*max_retry_wait"):
        ask(answerer(server, max_retry_wait=0.1))


@pytest.mark.parametrize(
    ("value", "least", "most"),
    [
        ("2", 2, 2),
        ("0.5", 0.5, 0.5),
        ("-3", 0, 0),
        ("Fri, 01 Jan 2100 00:00:00 GMT", 1e8, 1e10),
        ("soon", None, None),
        ("nan", None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value, least, most):
    wait = resources.endpoint._retry_after({"retry-after": value})
    assert wait is None if least is None else least <= wait <= most


# --- Paying once ------------------------------------------------------------------------------------------------------


def test_a_second_run_asks_for_nothing(answerer):
    with ChatServer() as server:
        first = ask(answerer(server))
        assert server.asked.total() == 16
        said = []
        assert ask(answerer(server), said=said) == first
        assert server.asked.total() == 16
        assert said == ["critiques: 16 of 16 answers of m were already there"]


def test_whatever_an_answer_depends_on_makes_another_question(answerer):
    with ChatServer() as server:
        one = CONVERSATIONS[:1]
        for settings, sampling in [
            ({}, SAMPLING),
            ({"model": "other"}, SAMPLING),
            ({}, SAMPLING.model_copy(update={"temperature": 0.0})),
            ({}, SAMPLING.model_copy(update={"max_new_tokens": 7})),
            ({"extended_sampling": True}, SAMPLING),
        ]:
            ask(answerer(server, **settings), one, sampling)
        answerer(server).answer(one, SAMPLING, seeds=[99])
        assert server.asked.total() == 6
        ask(answerer(server, timeout=2.0, concurrency=2, limit_key="max_completion_tokens"), one)
        ask(answerer(server), one, SAMPLING.model_copy(update={"batch_size": 1}))
        assert server.asked.total() == 6


ASKING = """
import sys
from pathlib import Path
from alignment.critic import AnswererSettings
from alignment.generation import SamplingSettings
from resources.endpoint import EndpointAnswerer
url, cache = sys.argv[1:]
settings = AnswererSettings(kind="endpoint", model="m", base_url=url, concurrency=4)
told = [[{"role": "user", "content": f"Question {i}"}] for i in range(24)]
for answer in EndpointAnswerer(settings, Path(cache)).answer(told, SamplingSettings(), seeds=range(24)):
    print(answer.text)
"""


def test_several_processes_ask_for_each_answer_once(tmp_path):
    def slow(payload):
        time.sleep(0.1)
        return echo(payload)

    with ChatServer(slow) as server:
        command = [sys.executable, "-c", ASKING, server.url, str(tmp_path / "cache")]
        root = Path(__file__).parents[2]
        asking = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) for _ in range(3)]
        outputs = [process.communicate(timeout=120)[0] for process in asking]
        assert set(server.asked.values()) == {1}
        assert len(server.asked) == 24
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].count("\n") == 24
    assert not list((tmp_path / "cache").rglob("*.lock")) + list((tmp_path / "cache").rglob("*.part"))


def test_half_an_answer_in_the_cache_is_asked_for_again(answerer, tmp_path):
    with ChatServer() as server:
        first = ask(answerer(server), CONVERSATIONS[:2])
        for path in (tmp_path / "cache").rglob("*.json"):
            path.write_text(path.read_text()[:-5])
        assert ask(answerer(server), CONVERSATIONS[:2]) == first
        assert server.asked.total() == 4


@pytest.mark.parametrize(
    ("budget", "names", "raised"),
    [
        ({"max_tokens_budget": 100}, r"budget of 100 tokens is used up \(110\).*5 of 16.*raise max_tokens_budget", {}),
        (
            {"max_cost": 0.0005, "price_prompt": 1.0, "price_completion": 8.0},  # 106 millionths an answer
            r"budget of 0\.0005 is used up \(0\.00053\).*5 of 16.*raise max_cost",
            {"max_cost": 1.0, "price_prompt": 1.0},
        ),
    ],
)
def test_a_budget_ends_the_run_and_what_was_paid_for_is_kept(answerer, budget, names, raised):
    with ChatServer() as server:
        for attempt in range(3):  # a repeated attempt may not spend it anew
            with pytest.raises(EndpointError, match=names):
                ask(answerer(server, ledger="paid.jsonl", concurrency=1, **budget))
            assert server.asked.total() == 5, attempt
        assert [a.text for a in ask(answerer(server, ledger="paid.jsonl", **raised))] == expected()
        assert server.asked.total() == 16


def test_a_budget_needs_a_server_that_counts(answerer):
    with ChatServer(lambda payload: {**echo(payload), "usage": None}) as server:
        assert len(ask(answerer(server), CONVERSATIONS[:4])) == 4
        with pytest.raises(EndpointError, match=r"does not say how many tokens.*Remedy: set max_tokens_budget and max_cost to 0"):
            ask(answerer(server, cache="other", max_tokens_budget=100, concurrency=1))


# --- Refused for its own text -----------------------------------------------------------------------------------------

TOO_LONG = (400, {"error": {"message": "This model's maximum context length is 4096 tokens.", "code": 400}})
FILTERED = (400, {"error": {"message": "The response was filtered.", "code": "content_filter", "param": "prompt"}})
REFUSALS = [
    TOO_LONG,
    FILTERED,
    (400, {"error": {"message": "Too much.", "code": "context_length_exceeded", "param": "messages"}}),
    (400, {"error": {"message": "No.", "code": "content_policy_violation"}}),
    (422, {"detail": "the request exceeds the available context size"}),
]


def refusing_those_with(text, refusal=FILTERED):
    return lambda payload: refusal if any(text in m["content"] for m in payload["messages"]) else echo(payload)


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_a_prompt_that_is_refused_for_its_own_text_has_an_empty_answer_that_did_not_end(answerer, refusal):
    asked = [*CONVERSATIONS[:2], [{"role": "user", "content": "How do I\n" + "make one, " * 20}], CONVERSATIONS[3]]
    with ChatServer(refusing_those_with("make one", refusal)) as server:
        said, kept = [], {}
        answers = ask(answerer(server), asked, said=said, keep=lambda i, answer: kept.update({i: answer}))
        assert answers[2] == Completion("", 0, ended=False)
        assert [a.text for a in answers] == [*expected()[:2], "", expected()[3]]
        assert kept == dict(enumerate(answers))
    (warning,) = [line for line in said if "warning" in line]
    beginning = ("How do I " + "make one, " * 20)[:60]
    assert warning.startswith(f"critiques: warning: m refuses {beginning!r}...: HTTP {refusal[0]} (")


def test_a_refusal_is_asked_for_again_by_another_stage_only(answerer, tmp_path):
    with ChatServer(refusing_those_with("Question 1:", TOO_LONG)) as server:
        for _ in range(2):
            ask(KeptAnswers(answerer(server), tmp_path / "kept.jsonl"), CONVERSATIONS[:4])
        assert server.asked.total() == 4
        server.upstream = echo  # it was started with a longer context
        assert [a.text for a in ask(answerer(server), CONVERSATIONS[:4])] == expected()[:4]
        assert server.asked.total() == 5


def test_where_every_prompt_is_refused_there_is_one_clear_error_and_nothing_is_kept(answerer, tmp_path):
    with ChatServer(refusing_those_with("Question", TOO_LONG)) as server:
        for attempt in (1, 2):
            who = KeptAnswers(answerer(server, ledger="paid.jsonl"), tmp_path / "kept.jsonl")
            with pytest.raises(EndpointError, match=r"m at .* refuses all 16 .*maximum context length is 4096 tokens.*Remedy"):
                ask(who)
            assert server.asked.total() == 16 * attempt


def test_a_last_prompt_that_is_refused_does_not_end_a_stage_that_had_answers(answerer):
    with ChatServer(refusing_those_with("Question 1:")) as server:
        with pytest.raises(EndpointError, match="refuses all 1 "):
            ask(answerer(server, ledger="paid.jsonl"), CONVERSATIONS[1:2])
        who = answerer(server, ledger="paid.jsonl")
        ask(who, CONVERSATIONS[:1])
        later = answerer(server, ledger="paid.jsonl")  # in another process
        for one in (who, later):
            assert ask(one, CONVERSATIONS[1:2]) == [Completion("", 0, ended=False)]
        server.upstream = refusing_those_with("Question")
        with pytest.raises(EndpointError, match="refuses all 15 "):
            ask(later, CONVERSATIONS[1:])


def test_a_prompt_that_is_asked_with_many_seeds_and_refused_each_time_is_one(answerer):
    with ChatServer(refusing_those_with("Question 1:")) as server:
        who = answerer(server)
        ask(who, CONVERSATIONS[:1])
        assert ask(who, CONVERSATIONS[1:2] * 16) == [Completion("", 0, ended=False)] * 16


RULES = load_constitution(Path(__file__).parents[2] / "conf" / "constitutions" / "general.yaml")
PROMPTS = [Prompt(id=f"p{i}", prompt=c[0]["content"]) for i, c in enumerate(CONVERSATIONS[:3])]


def test_a_prompt_that_is_refused_makes_no_pair_and_is_counted(answerer, tmp_path):
    with ChatServer(refusing_those_with("Question 1:")) as server:
        said, who = [], answerer(server)
        config = CritiqueConfig(rounds=1)
        revised = critique_and_revise(who, who, PROMPTS, RULES, config, work=tmp_path, log=Log(say=said.append))
    assert (revised[1].initial, revised[1].final, revised[1].truncated) == ("", "", True)
    pairs, reasons = preference_pairs(revised, RULES, FilterSettings(min_same_script=0.0))
    assert [p.id for p in pairs] == ["p0", "p2"]
    assert reasons == {"empty": 1}
    warnings = [line for line in said if "warning" in line]
    assert len(warnings) == 2  # of the answer and the critique
    assert all("refuses 'Question 1: größer?" in line for line in warnings)


def test_where_only_the_critique_is_refused_no_revision_is_asked_for(answerer, tmp_path):
    def upstream(payload):
        asked = payload["messages"][-1]["content"]
        if "Critique:" not in asked:
            return echo(payload)
        return FILTERED if "Question 1:" in asked else completion("No violations found.")

    with ChatServer(upstream) as server:
        who = answerer(server)
        config = CritiqueConfig(rounds=2, candidates=FEW)
        revised = critique_and_revise(who, who, PROMPTS, RULES, config, work=tmp_path)
        assert not [p for p in server.payloads if "Revision:" in p["messages"][-1]["content"]]
    assert [r.truncated for r in revised] == [False, True, False]
    assert revised[1].initial == revised[1].final != ""
    assert [(r.critique, r.revised) for r in revised[1].revisions] == [("", False)] * 2


def test_a_refused_judgement_is_named_by_the_prompt_that_was_answered(answerer):
    with ChatServer(lambda payload: TOO_LONG) as server:
        said, case = [], Case("one", CONVERSATIONS[7], "yes", "no", "Choose the kind one.")
        assert judge_in_both_orders(answerer(server), [case], log=Log(say=said.append)) == [None]
    assert sum("refuses 'Question 7: größer?" in line for line in said) == 2


# --- Choices ----------------------------------------------------------------------------------------------------------


def telling(top):
    logprobs = {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}]}
    return lambda payload: completion("A", "length", 1, logprobs=logprobs)


def test_choices_are_read_from_the_first_tokens(answerer):
    with ChatServer(telling([("A", -0.5), (" A", -1.5), ("B", -1.0), ("The", -2.0)])) as server:
        (one, two) = answerer(server).choose(CONVERSATIONS[:2], ["A", "B"])
        a, b = 2.718281828**-0.5 + 2.718281828**-1.5, 2.718281828**-1.0
        assert one == two == pytest.approx([a / (a + b), b / (a + b)])
        payload = server.payloads[0]
        assert (payload["max_tokens"], payload["logprobs"], payload["top_logprobs"]) == (1, True, 20)
        answerer(server).choose(CONVERSATIONS[:2], ["A", "B"])
        assert server.asked.total() == 2


def test_a_server_that_leaves_log_probabilities_out_is_asked_for_no_more_choices(answerer):
    with ChatServer() as server:
        said, judge = [], answerer(server, concurrency=1)
        assert judge.chooses
        for asked in (CONVERSATIONS[:3], CONVERSATIONS[3:5]):
            assert judge.choose(asked, ["A", "B"], log=Log(say=said.append)) == [None] * len(asked)
        assert not judge.chooses
        assert judge.probability(CONVERSATIONS, "A") is None
        assert server.asked.total() == 1
    (line,) = [line for line in said if "tells no log-probabilities" in line]
    assert line.endswith("m tells no log-probabilities, and is asked for no more choices: its answer is without them")


def test_an_answer_without_log_probabilities_is_paid_for_and_not_read_back_from_the_cache(answerer, tmp_path):
    with ChatServer() as without:
        answerer(without, concurrency=1, ledger="paid.jsonl").choose(CONVERSATIONS[:1], ["A", "B"])
        (paid,) = (tmp_path / "paid.jsonl").read_text().splitlines()
        assert json.loads(paid) == {"prompt": 10, "completion": 1}
    assert not list((tmp_path / "cache").rglob("*.json"))
    with ChatServer(telling([("A", -0.5), ("B", -0.5)])) as server:
        moved = answerer(server)
        assert moved.choose(CONVERSATIONS[:1], ["A", "B"]) == [[0.5, 0.5]]
        (kept,) = (tmp_path / "cache").rglob("*.json")
        kept.write_text(json.dumps({**json.loads(kept.read_text()), "logprobs": []}))  # as older versions kept it
        assert moved.choose(CONVERSATIONS[:1], ["A", "B"]) == [[0.5, 0.5]]
        assert server.asked.total() == 2


def test_one_answer_without_log_probabilities_is_a_missing_value_where_others_have_them(answerer):
    telling_now = telling([("A", -0.5), ("B", -0.5)])

    def mixed(payload):
        return completion("A", "length", 1) if payload["messages"] == CONVERSATIONS[1] else telling_now(payload)

    with ChatServer(mixed) as server:
        judge = answerer(server, concurrency=1)
        assert judge.choose(CONVERSATIONS[:3], ["A", "B"]) == [[0.5, 0.5], None, [0.5, 0.5]]
        assert judge.chooses
    with ChatServer(lambda payload: completion("", "stop", 1)) as silent:
        judge = answerer(silent, cache="other")
        assert judge.choose(CONVERSATIONS[:1], ["A", "B"]) == [None]
        assert judge.chooses


@pytest.mark.parametrize(
    "upstream",
    [
        lambda payload: (400, {"error": {"message": "LogProbs are not supported", "code": None}}),
        lambda payload: (400, {"error": {"message": "unsupported", "param": "logprobs", "code": 400}}),
        lambda payload: (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", "logprobs"], "msg": "Extra"}]}),
        lambda payload: (422, {}),
    ],
    ids=["message", "param", "detail", "without a word"],
)
def test_a_server_that_refuses_log_probabilities_is_asked_for_no_more_choices(answerer, upstream):
    with ChatServer(upstream) as server:
        said, judge = [], answerer(server, concurrency=1)
        log = Log(say=said.append)
        assert judge.choose(CONVERSATIONS[:3], ["A", "B"], log=log) == [None] * 3
        assert judge.choose(CONVERSATIONS[3:5], ["A", "B"], log=log) == [None] * 2
        assert server.asked.total() == 1
        (line,) = said
        assert line.startswith("choices: m tells no log-probabilities, and is asked for no more choices: HTTP 4")


@pytest.mark.parametrize("refusal", REFUSALS, ids=str)
def test_a_question_that_is_refused_for_its_own_text_is_the_only_choice_that_is_missing(answerer, refusal):
    def picky(payload):
        return refusal if payload["messages"] == CONVERSATIONS[1] else telling([("A", -0.5), ("B", -0.5)])(payload)

    with ChatServer(picky, faults=["429", None]) as server:
        said = []
        choices = answerer(server, concurrency=1).choose(CONVERSATIONS[:3], ["A", "B"], log=Log(say=said.append))
        assert choices == [[0.5, 0.5], None, [0.5, 0.5]]
        assert server.asked.total() == 5
    (warning,) = [line for line in said if "warning" in line]
    assert warning.startswith(f"choices: warning: m refuses 'Question 1: größer?'...: HTTP {refusal[0]}")
    assert any("HTTP 429" in line and "repeating it in" in line for line in said)
    assert said[-1] == "choices: 2 answers of m for 22 tokens, 1 refused"


@pytest.mark.parametrize(
    "refusal",
    [
        (400, {"error": {"message": "Unsupported parameter: use max_completion_tokens.", "param": "max_tokens"}}),
        (422, {"detail": [{"loc": ["body", "user"], "msg": "use max_completion_tokens", "input": {"logprobs": True}}]}),
    ],
    ids=["openai", "fastapi"],
)
def test_a_choice_refused_for_another_reason_is_an_error_with_the_servers_words(answerer, refusal):
    with ChatServer(lambda payload: refusal) as server:
        with pytest.raises(EndpointError, match=r"choices: m at .*HTTP 4.*use max_completion_tokens.*Remedy: correct"):
            answerer(server, concurrency=1).choose(CONVERSATIONS[:3], ["A", "B"])
        assert server.asked.total() == 1


@pytest.mark.parametrize(
    ("tokens", "options", "shares"),
    [
        ([("A", 0.0)], ["A", "B"], [1.0, 0.0]),
        ([("(", -0.1), ("A", -3.0)], ["(A)", "(B)"], None),  # begins both
        ([("The", -0.1)], ["A", "B"], None),
        ([(" ", -0.1)], ["A", "B"], None),
        ([("Y", -1.0), ("Yes", -1.0), ("No", -1.0)], ["Yes", "No"], [2 / 3, 1 / 3]),
    ],
)
def test_an_options_probability_is_that_of_tokens_that_only_it_begins_with(tokens, options, shares):
    assert option_probabilities(tokens, options) == (shares and pytest.approx(shares))


# --- The key ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("upstream", "faults"),
    [
        (lambda payload: completion(f"Your key is {KEY}, is it not?"), FAULTS),
        (refusing(401), [None]),
        (refusing(500), [None]),
        (refusing(400), [None]),
    ],
    ids=["answered", "401", "500", "400"],
)
def test_the_key_is_nowhere_but_in_the_header(answerer, tmp_path, caplog, capfd, upstream, faults):
    caplog.set_level(logging.DEBUG)
    said, text = [], ""
    with ChatServer(upstream, faults=faults) as server:
        try:
            text = str(ask(answerer(server, ledger="paid.jsonl", timeout=3.0, retries=4), said=said))
        except EndpointError as error:
            text = "".join(traceback.format_exception(error)) + repr(error.__context__) + repr(error.__cause__)
        assert server.keys == {f"Bearer {KEY}"}
    out, err = capfd.readouterr()
    files = [path.read_text(encoding="utf-8") for path in tmp_path.rglob("*") if path.is_file()]
    for place in (text, *said, out, err, caplog.text, *files):
        assert KEY not in place
    assert text


def test_openai_without_a_key_is_refused_before_anything_is_sent(monkeypatch, tmp_path):
    monkeypatch.delenv("OPENAI_API_KEY")
    settings = AnswererSettings(kind="endpoint", model="m")
    with pytest.raises(EndpointError, match=r"needs a key\. Remedy: put it into the environment variable OPENAI_API_KEY"):
        ask(EndpointAnswerer(settings, tmp_path))


def test_another_server_needs_no_key(answerer, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    with ChatServer() as server:
        assert [a.text for a in ask(answerer(server))] == expected()


def test_a_key_with_a_line_break_is_refused_without_being_told(answerer, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f"{KEY}\nX-Header: 1")
    with ChatServer() as server, pytest.raises(EndpointError, match="OPENAI_API_KEY holds what cannot be a key") as error:
        ask(answerer(server))
    assert KEY not in str(error.value)


# --- A real server ----------------------------------------------------------------------------------------------------


@contextmanager
def serving(folder, log):
    """`transformers serve` with the model in a folder; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [Path(sys.executable).parent / "transformers", "serve", folder, "--host", "127.0.0.1", "--port", str(port)]
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--dtype", "float32", "--device", "cpu"], stdout=file, stderr=file, env=env)
    try:
        deadline = time.monotonic() + 600
        while True:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).read()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.kill()  # it has nothing to lose, and is slow to end by itself
        process.wait()


def with_and_without_faults(answerer, folder, tmp_path, tokens, timeout):
    """Critique and revise with a real server as sampler and critic, and the same behind a proxy that makes faults."""
    greedy = SamplingSettings(temperature=0.0, max_new_tokens=tokens)
    config = CritiqueConfig(rounds=1, answer=greedy, critique=greedy, revision=greedy)
    rules = load_constitution(Path(__file__).parents[2] / "conf" / "constitutions" / "general.yaml")
    prompts = [Prompt(id=f"p{i}", prompt=c[0]["content"]) for i, c in enumerate(CONVERSATIONS[:6])]
    with serving(folder, tmp_path / "serve.log") as url:
        results = []
        for name, faults in (("calm", [None]), ("stormy", FAULTS)):
            with ChatServer(forward(url), faults=faults) as server:
                server.patience = 1.5 * timeout
                who = answerer(server, cache=f"{name} cache", model=str(folder), timeout=timeout, retries=8)
                (tmp_path / name).mkdir()
                results.append(critique_and_revise(who, who, prompts, rules, config, work=tmp_path / name))
        assert server.failed.keys() == set(FAULTS)
        again = answerer(server, cache="stormy cache", model=str(folder))
        (tmp_path / "again").mkdir()
        results.append(critique_and_revise(again, again, prompts, rules, config, work=tmp_path / "again"))  # asks nobody
    calm, stormy, again = results
    assert stormy == calm == again
    return calm


def test_a_real_server_behind_faults_gives_the_pairs_that_it_gives_without_them(answerer, tmp_path):
    folder = build_tiny_model(tmp_path / "llama")
    calm = with_and_without_faults(answerer, folder, tmp_path, tokens=8, timeout=10.0)
    model = load_causal_lm(ModelFiles(folder), LoadSettings(dtype="float32"))
    greedy = SamplingSettings(temperature=0.0, max_new_tokens=8)
    local = LocalAnswerer(model, load_tokenizer(folder)).answer(CONVERSATIONS[:6], greedy, seeds=SEEDS[:6])
    assert [r.initial for r in calm] == [a.text for a in local]  # the model in this process says the same


@pytest.mark.slow
def test_the_embedded_model_behind_a_real_server_and_faults(answerer, tmp_path):
    found = sorted((Path(__file__).parents[2] / "storage" / "artifacts" / "base_model").glob("*/model"))
    if not found:
        pytest.skip("storage/ holds no base_model: run `make demo` first")
    calm = with_and_without_faults(answerer, found[0], tmp_path, tokens=24, timeout=60.0)
    assert all(r.initial for r in calm)


def test_cached_answers_hold_no_prompt(answerer, tmp_path):
    with ChatServer() as server:
        ask(answerer(server))
    for path in (tmp_path / "cache").rglob("*.json"):
        assert "Question" not in path.read_text(encoding="utf-8")
        assert set(json.loads(path.read_text(encoding="utf-8"))) == {
            "text",
            "finish_reason",
            "prompt_tokens",
            "completion_tokens",
            "logprobs",
        }
