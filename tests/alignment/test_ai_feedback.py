"""RLAIF: what a judge is asked, in which orders, what becomes of its choices, and what survives a kill."""

import json
import math
import re
from collections import Counter

import pytest
from alarm_runs import SHOWN, shows
from pydantic import ValidationError

from alignment.ai_feedback import (
    OPTIONS,
    AiComparison,
    AiFeedbackConfig,
    Case,
    Judgement,
    collect_feedback,
    comparison_request,
    drop_reason,
    feedback_metrics,
    judge_in_both_orders,
    keep_preferred,
    measure_judge,
    prefers_in_both_orders,
    verdict_request,
)
from alignment.alarms import watches
from alignment.constitutions import Constitution, Principle
from alignment.critic import LocalAnswerer
from alignment.critique import draw_principles
from alignment.datasets import write_jsonl
from alignment.generation import Completion, SamplingSettings
from alignment.models import ModelFiles, load_causal_lm
from alignment.readers import read_records
from alignment.records import Message, PreferencePair, Prompt

CONSTITUTION = Constitution(
    name="general",
    description="d",
    prompt_tags=("general",),
    principles=tuple(Principle(id=f"p{i}", text=f"Choose the response that is number {i}.") for i in range(5)),
    text="t",
)
PROMPTS = [Prompt(id=f"prompt-{i}", prompt=f"Question number {i}" + "?" * (i % 3)) for i in range(6)]
CONFIG = AiFeedbackConfig(
    answer=SamplingSettings(temperature=1.0, max_new_tokens=12), keep_truncated=True, chunk=2, max_heldout=100
)
CASE = Case("one", [{"role": "user", "content": "Why?"}], "please wait", "never", "Choose the kind one.")


def shown(conversation):
    """The two options in a request."""
    return re.search(r"Options:\n\(A\) (.*?)\n\n\(B\) (.*?)\n\n", conversation[0]["content"], flags=re.DOTALL).groups()


def told(keep, answers):
    """The answers, each told of as `Answerer.answer` promises."""
    for i, answer in enumerate(answers):
        if keep is not None:
            keep(i, answer)
    return answers


class Judge:
    """A judge with a rule: `p(first, second)` is the probability of option (A), or None. It remembers what it was asked."""

    identity = "rule"

    def __init__(self, p, reasoning="Because."):
        self.p, self.reasoning, self.asked, self.seeds, self.chooses = p, reasoning, [], [], True

    def answer(self, conversations, settings, *, seeds, not_first=None, keep=None, continued=False, log=None, what=""):
        self.seeds += seeds
        return told(keep, [Completion(self.reasoning, 2, True) for _ in conversations])

    def choose(self, conversations, options, *, log=None):
        assert tuple(options) == OPTIONS
        self.asked += conversations
        chosen = [self.p(*shown(c)) for c in conversations]
        return [None if p is None else [p, 1 - p] for p in chosen]

    def probability(self, conversations, answer):
        return None


class Writer:
    """A policy that gives every prompt the same two answers."""

    identity = "writer"
    chooses = False

    def __init__(self, a="please wait a moment", b="never do that", ended=True):
        self.answers, self.asked = [Completion(a, 4, ended), Completion(b, 3, ended)], []

    def answer(self, conversations, settings, *, seeds, not_first=None, keep=None, continued=False, log=None, what=""):
        self.asked += conversations
        return told(keep, [self.answers[i % 2] for i in range(len(conversations))])

    def choose(self, conversations, options, *, log=None):
        raise AssertionError("the policy judges nothing")

    probability = choose


def polite(first, second):
    """Prefers "please", whatever the order."""
    return 0.9 if "please" in first else 0.2


def only_position(first, second):
    return 0.8


@pytest.fixture
def collect(tmp_path):
    """Runs the collection in a work folder of that name."""

    def run(policy, judge, name="work", prompts=PROMPTS, constitution=CONSTITUTION, **changes):
        work = tmp_path / name
        work.mkdir(exist_ok=True)
        config = AiFeedbackConfig.model_validate(CONFIG.model_dump() | changes)
        return collect_feedback(policy, judge, prompts, constitution, config, work=work)

    return run


@pytest.fixture
def local(model, tokenizer):
    """The tiny model as policy and judge."""
    return LocalAnswerer(model, tokenizer, batch_size=4)


# --- What is asked ----------------------------------------------------------------------------------------------------


def test_both_orders_are_asked_of_the_same_question():
    judge = Judge(polite)
    judge_in_both_orders(judge, [CASE])
    first, second = judge.asked
    assert (shown(first), shown(second)) == ((CASE.a, CASE.b), (CASE.b, CASE.a))
    for (turn,) in (first, second):
        assert turn["role"] == "user"
        assert "Human: Why?" in turn["content"]
        assert CASE.principle in turn["content"]
        assert turn["content"].endswith("Answer with A or B only.")


def test_the_turns_before_are_shown_in_their_order():
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    asked = comparison_request(turns, "x", "y", "p")
    assert "System: Be brief.\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\np\n\nOptions:\n(A) x\n\n(B) y\n" in asked


def test_text_with_template_syntax_is_text():
    turns = [{"role": "user", "content": "{{ 7 * 7 }}"}]
    asked = comparison_request(turns, "{% raw %}", "{{ principle }}", "<b>&{# no #}")
    assert all(text in asked for text in ("{{ 7 * 7 }}", "{% raw %}", "{{ principle }}", "<b>&{# no #}"))
    assert "49" not in asked


def test_with_chain_of_thought_the_choice_is_read_after_the_reasoning():
    judge = Judge(polite, reasoning="")
    (said,) = judge_in_both_orders(judge, [CASE], reasoning=SamplingSettings())
    for turns in judge.asked:
        assert [t["role"] for t in turns] == ["user", "assistant", "user"]
        assert "step by step" in turns[0]["content"]
        assert turns[1]["content"] == "-"  # a chat template may refuse an empty turn
        assert turns[2]["content"] == verdict_request()
    assert said.reasoning == ("", "")
    assert len(set(judge.seeds)) == 2  # each order reasons for itself


# --- What becomes of the choices --------------------------------------------------------------------------------------


def test_the_orders_are_averaged_by_hand():
    # Shown first, `a` is option (A) and gets 0.9; shown second it is (B) and gets 1 - 0.2.
    (said,) = judge_in_both_orders(Judge(polite), [CASE])
    assert (said.a_first, said.a_second) == (0.9, 0.8)
    assert said.probability == pytest.approx(0.85)
    assert not said.flipped


def test_a_preference_for_a_position_averages_out_and_is_measured(collect):
    compared = collect(Writer(), Judge(only_position))
    assert [c.comparison.probability for c in compared] == pytest.approx([0.5] * 6)
    metrics = feedback_metrics(compared)
    assert metrics["position/bias"] == pytest.approx(0.6)  # |0.8 - 0.2|
    assert metrics["position/order_flips"] == 1
    assert metrics["position/first_chosen"] == 1
    assert metrics["confidence"] == pytest.approx(0.5)


def test_a_judge_that_reads_the_answers_is_not_said_to_be_biased(collect):
    metrics = feedback_metrics(collect(Writer(), Judge(polite)))
    assert metrics["position/bias"] == pytest.approx(0.1)
    assert metrics["position/order_flips"] == 0
    assert metrics["position/first_chosen"] == 0.5
    assert metrics["confidence"] == pytest.approx(0.85)
    assert (metrics["prompts"], metrics["pairs"], metrics["share_compared"]) == (6, 6, 1)


@pytest.mark.parametrize(("a", "b"), [("please wait", "never do that"), ("never do that", "please wait")])
def test_a_pair_to_train_on_has_the_likelier_answer_chosen(collect, a, b):
    compared = collect(Writer(a, b), Judge(polite), prompts=PROMPTS[:1])
    pair = compared[0].comparison.pair("general")
    assert (pair.chosen, pair.rejected) == ("please wait", "never do that")
    assert pair.label == pytest.approx(0.85)
    assert (pair.id, pair.prompt, pair.domain, pair.source) == ("prompt-0", PROMPTS[0].prompt, "general", "ai_feedback")


def test_no_label_is_certain(collect):
    compared = collect(Writer(), Judge(lambda first, second: float("please" in first)))
    assert all(0.999 < c.comparison.probability < 1 for c in compared)


def test_labels_are_clamped_with_chain_of_thought_only(collect):
    def labels(name, **changes):
        return [c.comparison.probability for c in collect(Writer(), Judge(polite), name, **changes)]

    assert labels("plain") == pytest.approx([0.85] * 6)
    assert labels("thought", chain_of_thought=True) == [0.6] * 6
    assert labels("wider", chain_of_thought=True, clamp=[0.2, 0.7]) == [0.7] * 6
    flipped = collect(Writer("never", "please"), Judge(polite), "low", chain_of_thought=True)
    assert [c.comparison.probability for c in flipped] == [0.4] * 6
    # What the judge said is kept as it was.
    said = flipped[0].comparison.judgement
    assert (said.a_first, said.a_second) == pytest.approx((0.2, 0.1))
    assert said.reasoning == ("Because.",) * 2


# --- Missing values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("unreadable", [lambda first, second: None, lambda f, s: None if "please" in f else 0.3])
def test_a_judgement_that_cannot_be_read_is_dropped_and_counted(collect, unreadable):
    compared = collect(Writer(), Judge(unreadable))
    assert [(c.comparison, c.dropped) for c in compared] == [(None, "unreadable")] * 6
    metrics = feedback_metrics(compared)
    assert metrics == {"prompts": 6, "pairs": 0, "share_compared": 0, "dropped/unreadable": 6}


def test_no_reasoning_is_asked_of_a_judge_that_is_known_to_tell_no_choice(collect):
    def unable(first, second):
        judge.chooses = False

    judge = Judge(unable)
    compared = collect(Writer(), judge, chain_of_thought=True, chunk=2)
    assert [c.dropped for c in compared] == ["unreadable"] * 6
    assert len(judge.seeds) == len(judge.asked) == 4  # of the first two prompts, in both orders; the other four cost nothing


@pytest.mark.parametrize(
    ("a", "b", "ended", "reason"),
    [
        ("one thing", "another", True, None),
        ("", "another", True, "empty"),
        ("one thing", "...", True, "empty"),
        ("One thing!", "one  thing", True, "identical"),
        ("one thing", "another", False, "truncated"),
    ],
)
def test_answers_that_are_not_worth_comparing(collect, a, b, ended, reason):
    assert drop_reason(Completion(a, 1, ended), Completion(b, 1, True)) == reason
    judge = Judge(polite)
    compared = collect(Writer(a, b, ended), judge, keep_truncated=False)
    assert [c.dropped for c in compared] == [reason] * 6
    assert len(judge.asked) == (12 if reason is None else 0)
    assert feedback_metrics(compared).get(f"dropped/{reason}", 0) == (0 if reason is None else 6)


def test_truncated_answers_may_be_kept():
    assert drop_reason(Completion("one", 1, False), Completion("two", 1, True), keep_truncated=True) is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"answer": {"temperature": 0}}, "both answers to a prompt are the same"),
        ({"clamp": [0.6, 0.4]}, "a lowest and a highest label"),
        ({"clamp": [0.0, 0.5]}, "a lowest and a highest label"),
        ({"clamp": [0.4]}, "clamp"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes, says):
    with pytest.raises(ValidationError, match=says):
        AiFeedbackConfig(**changes)


# --- Seeds, batches, kills: with a real model -------------------------------------------------------------------------


def same(got, expected):
    """Equal but for the rounding of probabilities, which depends on the batch."""

    def rounded(compared):
        values = compared.model_dump()
        if values["comparison"]:
            numbers = values["comparison"]
            numbers["probability"] = pytest.approx(numbers["probability"], abs=1e-4)
            for name in ("a_first", "a_second"):
                numbers["judgement"][name] = pytest.approx(numbers["judgement"][name], abs=1e-4)
        return values

    assert [c.model_dump() for c in got] == [rounded(c) for c in expected]


def test_every_prompt_is_answered_twice_and_judged_under_its_own_principle(collect, local):
    compared = collect(local, local)
    assert [(c.id, c.prompt) for c in compared] == [(p.id, p.prompt) for p in PROMPTS]
    found = [c.comparison for c in compared]
    assert len({x for c in found for x in (c.a, c.b)}) == 2 * len(PROMPTS)
    assert [c.principle for c in found] == [draw_principles(CONSTITUTION, 1, p.id, 0)[0].id for p in PROMPTS]
    assert len({c.principle for c in found}) > 1
    assert all(0 < c.probability < 1 for c in found)


def test_the_probabilities_are_those_of_the_options(collect, local, model, tokenizer):
    from alignment.likelihood import answer_log_probs

    (compared,) = collect(local, local, prompts=PROMPTS[:1])
    c = compared.comparison
    principle = draw_principles(CONSTITUTION, 1, c.id, 0)[0].text
    asked = [[{"role": "user", "content": comparison_request([{"role": "user", "content": c.prompt}], c.a, c.b, principle)}]] * 2
    a, b = (math.exp(lp) for lp in answer_log_probs(model, tokenizer, asked, list(OPTIONS), 2))
    assert c.judgement.a_first == pytest.approx(a / (a + b), abs=1e-5)


@pytest.mark.parametrize("options", [("A", "B", "C"), ("(A)", "(B)"), ("A", "Both")], ids=str)
def test_a_local_model_is_asked_for_whole_options(local, model, tokenizer, options):
    from alignment.likelihood import answer_log_probs

    asked = [[{"role": "user", "content": "Which?" * n}] for n in (3, 1, 2)]
    for conversation, chosen in zip(asked, local.choose(asked, options), strict=True):
        log_probs = answer_log_probs(model, tokenizer, [conversation] * len(options), list(options), 2)
        total = sum(map(math.exp, log_probs))
        assert chosen == pytest.approx([math.exp(lp) / total for lp in log_probs], abs=1e-4)


@pytest.mark.parametrize("thought", [False, True])
def test_batch_sizes_chunks_and_order_change_nothing(collect, model, tokenizer, thought):
    changes = {"chain_of_thought": thought, "reasoning": {"temperature": 1.0, "max_new_tokens": 6}}
    one, many = (LocalAnswerer(model, tokenizer, batch_size=n) for n in (1, 16))
    usual = collect(many, many, "usual", **changes)
    same(collect(one, one, "one", chunk=1, answer=CONFIG.answer.model_copy(update={"batch_size": 1}), **changes), usual)
    same(collect(many, many, "all", chunk=100, **changes), usual)
    same(collect(many, many, "backwards", prompts=PROMPTS[::-1], **changes)[::-1], usual)
    same(collect(many, many, "some", prompts=PROMPTS[3:5], **changes), usual[3:5])


def test_the_seed_changes_answers_and_principles(collect, local):
    first, other = (collect(local, local, f"seed {seed}", seed=seed) for seed in (0, 1))
    assert all(x.comparison.a != y.comparison.a for x, y in zip(first, other, strict=True))
    assert [x.comparison.principle for x in first] != [y.comparison.principle for y in other]


@pytest.fixture
def count_forward_passes(model, interrupted):
    """Counts the model's forward passes; with `die_at`, that pass kills the run."""
    counter = {"n": 0, "die_at": None}

    def count(*_):
        counter["n"] += 1
        if counter["n"] == counter["die_at"]:
            raise interrupted

    handle = model.register_forward_pre_hook(count)
    yield counter
    handle.remove()


def test_a_killed_run_goes_on_and_ends_like_one_that_was_not(collect, local, count_forward_passes, interrupted, tmp_path):
    uninterrupted = collect(local, local, "uninterrupted")
    total, count_forward_passes["n"] = count_forward_passes["n"], 0
    count_forward_passes["die_at"] = total * 2 // 3 - 2  # in the second of three chunks
    with pytest.raises(interrupted):
        collect(local, local, "killed")
    path = tmp_path / "killed" / "compared.jsonl"
    assert path.read_bytes().count(b"\n") == 2
    path.write_bytes(path.read_bytes() + b'{"id": "prom')
    count_forward_passes.update(n=0, die_at=None)
    same(collect(local, local, "killed"), uninterrupted)
    assert count_forward_passes["n"] < total * 3 // 4  # the finished chunk was not done again
    assert sorted(json.loads(line)["id"] for line in path.read_bytes().splitlines()) == [p.id for p in PROMPTS]


def test_what_is_in_the_file_is_not_asked_again(collect):
    policy, judge = Writer(), Judge(polite)
    first = collect(policy, judge)
    asked = len(policy.asked), len(judge.asked)
    assert collect(policy, judge) == first
    assert (len(policy.asked), len(judge.asked)) == asked


def test_two_prompts_of_one_id_are_not_mixed_up(collect):
    twins = [Prompt(id="prompts-1", prompt="The one"), Prompt(id="prompts-1", prompt="The other")]
    assert [c.comparison.prompt for c in collect(Writer(), Judge(polite), prompts=twins)] == ["The one", "The other"]


def test_comparisons_come_back_from_their_file(collect, tmp_path):
    compared = collect(Writer(a="please wait"), Judge(polite))
    found = [c.comparison for c in compared]
    write_jsonl(tmp_path / "comparisons.jsonl", found)
    assert read_records(tmp_path / "comparisons.jsonl", AiComparison) == found


def test_a_question_that_the_model_cannot_read_is_a_missing_value(tiny_model, tmp_path, tokenizer, float32):
    from alignment.tiny_model import build_tiny_model

    gpt2 = load_causal_lm(ModelFiles(build_tiny_model(tmp_path / "gpt2", architecture="gpt2")), float32)
    long = CASE._replace(a="please " * 700)  # a byte is a token, and there are 4,096 positions
    said = judge_in_both_orders(LocalAnswerer(gpt2, tokenizer), [CASE, long, CASE])
    assert said[1] is None
    assert said[0] == said[2]
    assert said[0] is not None


# --- The judge against people -----------------------------------------------------------------------------------------

HELDOUT = [
    PreferencePair(
        id=f"h{i}",
        prompt=f"question {i}",
        history=(Message(role="user", content="before"), Message(role="assistant", content="indeed")) if i % 2 else (),
        chosen="please wait",
        rejected="never, and this is the longer of the two answers" if i < 8 else "no",
    )
    for i in range(10)
]


def measure(judge, tmp_path, pairs=HELDOUT, **changes):
    return measure_judge(judge, pairs, CONSTITUTION, CONFIG.model_copy(update=changes), work=tmp_path)


def test_a_judge_that_agrees_with_people_beats_the_length_baseline(tmp_path):
    judge = Judge(polite)
    metrics, measured = measure(judge, tmp_path)
    assert metrics["heldout/accuracy"] == 1
    assert metrics["heldout/accuracy_shorter_wins"] == 0.8
    assert metrics["heldout/gain_over_length"] == pytest.approx(0.2)
    assert metrics["heldout/accuracy_low"] < 1
    assert (metrics["heldout/pairs"], metrics["heldout/unreadable"], metrics["heldout/order_flips"]) == (10, 0, 0)
    assert sorted(m.id for m in measured) == sorted(p.id for p in HELDOUT)
    assert all(m.principle == draw_principles(CONSTITUTION, 1, m.id, 0)[0].id for m in measured)
    assert sum("Human: before\n\nAssistant: indeed\n\n" in turn["content"] for (turn,) in judge.asked) == 10  # of 20


def test_a_judge_that_sees_only_the_position_is_right_half_the_time(tmp_path):
    metrics, _ = measure(Judge(lambda first, second: 0.75), tmp_path)
    assert metrics["heldout/accuracy"] == 0.5
    assert metrics["heldout/order_flips"] == 1


def test_a_judge_of_the_opposite_opinion_is_always_wrong(tmp_path):
    metrics, _ = measure(Judge(lambda first, second: 1 - polite(first, second)), tmp_path)
    assert metrics["heldout/accuracy"] == 0


def test_what_the_judge_cannot_tell_is_neither_right_nor_wrong(tmp_path):
    metrics, measured = measure(Judge(lambda f, s: None if "longer" in f + s else polite(f, s)), tmp_path)
    assert (metrics["heldout/pairs"], metrics["heldout/unreadable"]) == (2, 8)
    assert metrics["heldout/accuracy"] == 1
    assert sum(m.judgement is None for m in measured) == 8


def test_at_most_so_many_pairs_are_measured_and_the_seed_decides_which(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    metrics, four = measure(Judge(polite), tmp_path / "a", max_heldout=4)
    _, others = measure(Judge(polite), tmp_path / "b", max_heldout=4, seed=1)
    assert metrics["heldout/pairs"] == len({m.id for m in four}) == 4
    assert {m.id for m in others} != {m.id for m in four}
    assert measure(Judge(polite), tmp_path, max_heldout=0) == ({}, [])
    assert measure(Judge(polite), tmp_path, pairs=[]) == ({}, [])


def test_a_killed_measurement_goes_on(tmp_path, interrupted):
    expected = measure(Judge(polite), tmp_path)
    work = tmp_path / "killed"
    work.mkdir()
    judge = Judge(polite)

    def dying(first, second):
        if len(judge.asked) >= 16:
            raise interrupted
        return polite(first, second)

    judge.p = dying
    with pytest.raises(interrupted):
        measure(judge, work)
    again = Judge(polite)
    assert measure(again, work) == expected
    assert 0 < len(again.asked) < 20


# --- Alarms -----------------------------------------------------------------------------------------------------------

MIXED = [p.model_copy(update={"id": f"{p.id}-{i}", "rejected": "no" * (1 + 20 * (i % 2))}) for i in range(4) for p in HELDOUT]


@pytest.fixture
def collected(collect, tmp_path):
    """The metrics of a run with this policy and judge."""

    def run(policy, judge, **changes):
        compared = collect(policy, judge, **changes)
        accuracy, _ = measure(judge, tmp_path / "work", MIXED)
        return feedback_metrics(compared) | accuracy

    return run


@shows(of="ai_feedback")
def test_a_healthy_run_is_silent(collected):
    return collected(Writer(), Judge(polite))


@shows("share_compared", "judge_reads_the_answers", of="ai_feedback")
def test_answers_that_cannot_be_compared_are_noticed(collected):
    return collected(Writer(ended=False), Judge(polite), keep_truncated=False)


@shows("share_compared", "judge_reads_the_answers", of="ai_feedback")
def test_a_judge_whose_choices_cannot_be_read_is_noticed(collected):
    return collected(Writer(), Judge(lambda first, second: None if "moment" in first + second else polite(first, second)))


@shows("judge_reads_the_answers", of="ai_feedback")
def test_a_judge_that_looks_at_the_position_is_noticed(collected):
    def order(first, second):  # of answers to prompts; it agrees with people all the same
        return 0.8 if "moment" in first + second else polite(first, second)

    return collected(Writer(), Judge(order))


@shows("judge_beats_length", of="ai_feedback")
def test_a_judge_that_knows_no_more_than_the_length_is_noticed(collected):
    return collected(Writer(), Judge(lambda first, second: 0.8 if len(first) < len(second) else 0.2))


def test_every_alarm_of_ai_feedback_fires_in_a_run_here():
    assert {("ai_feedback", w.name) for w in watches("ai_feedback")} <= SHOWN


# --- The judge of revisions -------------------------------------------------------------------------------------------


def test_only_what_is_preferred_in_both_orders_is_preferred():
    cases = [CASE, CASE._replace(a=CASE.b, b=CASE.a)]
    assert prefers_in_both_orders(Judge(polite), cases) == [True, False]
    assert prefers_in_both_orders(Judge(only_position), cases) == [False, False]
    assert prefers_in_both_orders(Judge(lambda first, second: 0.5), cases) == [False, False]
    assert prefers_in_both_orders(Judge(lambda f, s: None if "please" in f else 0.1), cases) == [None, None]
    assert prefers_in_both_orders(Judge(polite), []) == []


def test_pairs_whose_revision_is_not_preferred_are_left_out_and_counted():
    def pair(i, chosen, rejected):
        return PreferencePair(id=f"r{i}", prompt="q", chosen=chosen, rejected=rejected)

    def judging(first, second):
        return None if "unclear" in first + second else polite(first, second)

    pairs = [pair(0, "please", "never"), pair(1, "never", "please"), pair(2, "unclear", "never"), pair(3, "please", "no")]
    judge = Judge(judging)
    kept, reasons = keep_preferred(judge, pairs, {(p.id, p.prompt): f"Principle of {p.id}." for p in pairs})
    assert [p.id for p in kept] == ["r0", "r3"]
    assert reasons == Counter(judged_worse=1, judge_unreadable=1)
    assert sum("Principle of r2." in turn["content"] for (turn,) in judge.asked) == 2


def test_a_comparison_needs_two_texts_and_a_probability_between_0_and_1():
    judgement = Judgement(a_first=0.5, a_second=0.5)
    good = {"id": "1", "prompt": "q", "a": "x", "b": "y", "principle": "p", "probability": 0.5, "judgement": judgement}
    assert AiComparison(**good).label == 0.5
    for wrong in ({"a": " "}, {"probability": 0.0}, {"probability": 1.0}, {"probability": math.nan}):
        with pytest.raises(ValidationError):
            AiComparison(**good | wrong)
