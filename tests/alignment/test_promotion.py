"""The gate: each rule alone decides, what was not measured is not evidence, and the best that passes is chosen."""

import math

import pytest

from alignment.promotion import GateConfig, choose, judge
from alignment.statistics import paired_bootstrap

GATE = GateConfig()
GOOD = {
    "evaluator/gain": 0.5,
    "evaluator/gain_low": 0.2,
    "evaluator/gain_high": 0.8,
    "prompts": 40.0,
    "length/policy": 100.0,
    "length/sft": 90.0,
    "eos_rate/policy": 0.95,
    "eos_rate/sft": 0.97,
    "perplexity/policy": 11.0,
    "perplexity/sft": 10.0,
    "over_refusal_rate/policy": 0.10,
    "over_refusal_rate/sft": 0.05,
}
RULES = {
    "better than SFT": ("evaluator/gain", "evaluator/gain_low", "evaluator/gain_high"),
    "held-out prompts": ("prompts",),
    "length": ("length/policy", "length/sft"),
    "EOS rate": ("eos_rate/policy", "eos_rate/sft"),
    "perplexity": ("perplexity/policy", "perplexity/sft"),
    "over-refusal": ("over_refusal_rate/policy", "over_refusal_rate/sft"),
    "blocking alarms": (),
}


def failing(metrics, gate=GATE):
    return [r.name for r in judge(metrics, gate) if not r.passed]


def test_a_good_candidate_passes_every_rule():
    assert [r.name for r in judge(GOOD, GATE)] == list(RULES)
    assert failing(GOOD) == []


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"evaluator/gain_low": -0.01}, "better than SFT"),
        ({"evaluator/gain_low": 0.0}, "better than SFT"),
        ({"prompts": 9.0}, "held-out prompts"),
        ({"length/policy": 136.0}, "length"),
        ({"length/policy": 59.0}, "length"),
        ({"length/policy": 0.0, "length/sft": 0.0}, "length"),
        ({"eos_rate/policy": 0.91}, "EOS rate"),
        ({"perplexity/policy": 11.51}, "perplexity"),
        ({"over_refusal_rate/policy": 0.16}, "over-refusal"),
    ],
)
def test_each_rule_fails_alone(change, rule):
    assert failing(GOOD | change) == [rule]


@pytest.mark.parametrize(
    "change",
    [
        {"evaluator/gain_low": 0.001},
        {"prompts": 10.0},
        {"length/policy": 134.0},
        {"length/policy": 61.0},
        {"eos_rate/policy": 0.93},
        {"eos_rate/policy": 1.0, "eos_rate/sft": 0.2},
        {"perplexity/policy": 11.49},
        {"perplexity/policy": 1.1},
        {"over_refusal_rate/policy": 0.14},
        {"over_refusal_rate/policy": 0.0, "over_refusal_rate/sft": 0.9},
    ],
)
def test_what_stays_within_the_margin_passes(change):
    assert failing(GOOD | change) == []


@pytest.mark.parametrize(
    ("gate", "rule"),
    [
        (GateConfig(min_gain=0.2), "better than SFT"),
        (GateConfig(min_prompts=41), "held-out prompts"),
        (GateConfig(max_length_ratio=1.1), "length"),
        (GateConfig(max_eos_drop=0.01), "EOS rate"),
        (GateConfig(max_perplexity_ratio=1.05), "perplexity"),
        (GateConfig(max_over_refusal_rise=0.01), "over-refusal"),
    ],
)
def test_every_margin_of_the_gate_counts(gate, rule):
    assert failing(GOOD, gate) == [rule]


@pytest.mark.parametrize(("rule", "metric"), [(rule, metric) for rule, needed in RULES.items() for metric in needed])
def test_what_was_not_measured_fails_its_rule(rule, metric):
    rules = {r.name: r for r in judge({k: v for k, v in GOOD.items() if k != metric}, GATE)}
    assert not rules.pop(rule).passed
    assert all(r.passed for r in rules.values())
    assert failing(GOOD | {metric: math.nan}) == ([rule] if metric not in ("evaluator/gain", "evaluator/gain_high") else [])


def test_a_missing_metric_is_named():
    (missing,) = [r for r in judge({k: v for k, v in GOOD.items() if k != "eos_rate/sft"}, GATE) if not r.passed]
    assert missing.reason == "not measured: eos_rate/sft"
    assert failing({}) == [name for name, needed in RULES.items() if needed]


def test_without_over_refusal_the_remedy_is_named():
    measured = {k: v for k, v in GOOD.items() if not k.startswith("over_refusal_rate")}
    (missing,) = [r for r in judge(measured, GATE) if not r.passed]
    assert missing.reason == (
        "not measured: over_refusal_rate/policy, over_refusal_rate/sft. "
        "Remedy: add held-out prompts tagged benign or borderline-but-fine"
    )


def test_a_gain_on_one_prompt_promotes_nobody():
    """The bootstrap of one pair has no width: its interval lies above zero whenever the gain does."""
    gain = paired_bootstrap([0.3], [0.1])
    one = {"evaluator/gain": gain.value, "evaluator/gain_low": gain.low, "evaluator/gain_high": gain.high, "prompts": 1.0}
    assert failing(GOOD | one) == ["held-out prompts"]


def test_the_reason_says_the_numbers():
    reasons = {r.name: r.reason for r in judge(GOOD, GATE)}
    assert all(text in reasons["better than SFT"] for text in ("+0.500", "+0.200", "+0.800"))
    assert all(text in reasons["held-out prompts"] for text in ("40", "10"))
    assert all(text in reasons["length"] for text in ("100.0", "90.0", "1.5"))
    assert all(text in reasons["EOS rate"] for text in ("95%", "97%", "5%"))
    assert all(text in reasons["perplexity"] for text in ("11.00", "10.00", "1.15"))
    assert all(text in reasons["over-refusal"] for text in ("10%", "5%"))


def test_the_largest_lower_bound_of_those_that_pass_is_chosen():
    candidates = {
        "dpo": GOOD | {"evaluator/gain_low": 0.3},
        "ppo": GOOD | {"evaluator/gain_low": 0.4},
        "grpo": GOOD | {"evaluator/gain_low": 0.9, "perplexity/policy": 30.0},
    }
    name, verdicts = choose(candidates, GATE)
    assert name == "ppo"
    assert {n: all(r.passed for r in rules) for n, rules in verdicts.items()} == {"dpo": True, "ppo": True, "grpo": False}
    assert choose(dict(reversed(candidates.items())), GATE)[0] == "ppo"


def test_where_none_passes_the_best_is_named_and_does_not_pass():
    name, verdicts = choose({"a": GOOD | {"evaluator/gain_low": -0.2}, "b": GOOD | {"evaluator/gain_low": -0.1}}, GATE)
    assert name == "b"
    assert not all(r.passed for r in verdicts[name])


def test_a_candidate_without_measurements_is_the_last_to_be_chosen():
    assert choose({"a": {}, "b": GOOD | {"evaluator/gain_low": -5.0}}, GATE)[0] == "b"


def test_a_candidate_whose_gain_is_not_a_number_is_the_last_to_be_chosen():
    assert choose({"a": GOOD | {"evaluator/gain_low": math.nan}, "b": GOOD | {"evaluator/gain_low": -5.0}}, GATE)[0] == "b"


def test_nobody_is_chosen_among_none():
    assert choose({}, GATE) == (None, {})


def test_a_blocking_alarm_of_what_it_was_made_of_keeps_a_candidate_from_promotion_and_says_which():
    why = {"reward_model: scores_survive_reload": "scores moved by 0.3"}
    name, verdicts = choose({"ppo": GOOD, "dpo": GOOD | {"evaluator/gain_low": 0.1}}, GATE, {"ppo": why, "dpo": {}})
    assert name == "dpo"
    (rule,) = [r for r in verdicts["ppo"] if not r.passed]
    assert (rule.name, rule.reason) == ("blocking alarms", "reward_model: scores_survive_reload: scores moved by 0.3")
