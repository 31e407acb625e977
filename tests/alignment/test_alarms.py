"""Every alarm is silent on healthy numbers, fires on those of its failure, says what to do, and is in the docs.

That real runs give such numbers is in tests/alignment/test_alarm_runs.py; that Dagster shows them, in
tests/assets/test_checks.py.
"""

import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from alignment.alarms import ALARMS, AlarmConfig, sound, watches

DOCS = (Path(__file__).parents[2] / "docs" / "alarms.md").read_text(encoding="utf-8")
REPORT = {
    "reward_model/gain": 0.6,
    "evaluator/gain": 0.4,
    "evaluator/gain_low": 0.2,
    "evaluator/gain_high": 0.6,
    "eos_rate/policy": 0.9,
    "eos_rate/sft": 0.95,
    "perplexity/policy": 20.0,
    "perplexity/sft": 20.0,
    "length/policy": 50.0,
    "length/sft": 45.0,
    "policy/train/chosen_reward_last": -0.4,
}
# How much of the data fitted.
ROWS = {"train/rows": 500.0, "train/rows_dropped_too_long": 20.0}
PAIRS = {"train/pairs": 300.0, "train/pairs_dropped_too_long": 30.0}
PROMPTS = {"train/prompts": 380.0, "train/prompts_dropped_too_long": 2.0}
TASKS = {"train/tasks": 380.0, "train/tasks_dropped_too_long": 2.0}
SCORER = {
    **PAIRS,
    "reload/score_gap": 0.0,
    "heldout/accuracy": 0.7,
    "heldout/gain_over_length": 0.15,
    "heldout/gain_over_length_low": 0.05,
    "heldout/gain_over_length_high": 0.25,
}
GROUPS = {
    **TASKS,
    "train/zero_variance_groups_last": 0.4,
    "train/entropy_last": 1.1,
    "train/kl_last": 0.05,
    "train/clipped_completions_last": 0.2,
    "train/mean_length_last": 80.0,
    "train/max_new_tokens": 128.0,
}
# A healthy artifact of each asset.
HEALTHY = {
    "sft_checkpoint": {
        **ROWS,
        "train/loss": 2.0,
        "heldout/loss_before": 3.0,
        "heldout/loss": 2.4,
        "heldout/eos_probability": 0.4,
    },
    "human_reward_model": SCORER,
    "reward_model": SCORER,
    "evaluator": SCORER,
    "constitutional_preference_pairs": {
        "share_kept": 0.4,
        "filters.min_share_kept": 0.25,  # a setting of the stage
        "pairs": 40.0,
        "share_no_violations": 0.1,
    },
    "ai_feedback": {
        "share_compared": 0.9,
        "prompts": 60.0,
        "position/order_flips": 0.1,
        "position/bias": 0.15,
        "position/first_chosen": 0.55,
        "heldout/accuracy": 0.7,
        "heldout/gain_over_length": 0.15,
        "heldout/gain_over_length_low": 0.05,
        "heldout/gain_over_length_high": 0.25,
    },
    "prompts": {"leakage/heldout": 400.0, "leakage/leaked": 0.0},
    "aligned_policy/sl_cai": {**ROWS, "train/loss": 1.5, "heldout/eos_probability": 0.5},
    "aligned_policy/dpo": {**PAIRS, "train/rewards_margin_last": 1.2, "train/chosen_reward_last": 0.1},
    "aligned_policy/kto": PAIRS,
    "aligned_policy/orpo": PAIRS,
    "aligned_policy/ppo": {
        **PROMPTS,
        "train/ratio_first": 1.0003,
        "train/scores_first": 0.1,
        "train/scores_last": 0.8,
        "train/kl_last": 6.0,
        "train/eos_rate_last": 0.9,
        "train/entropy_last": 1.5,
    },
    "aligned_policy/grpo": GROUPS,
    "aligned_policy/rloo": GROUPS,
    "policy_report/dpo": REPORT,
    "policy_report/ppo": REPORT,
}
# What each failure looks like: the asset, and the numbers in which it differs from a healthy one.
BROKEN = [
    ("trainable_tokens", "sft_checkpoint", {"train/loss": 0.0}),
    ("trainable_tokens", "sft_checkpoint", {"train/loss": math.nan}),
    ("trainable_tokens", "sft_checkpoint", {"train/rows": 0.0, "train/rows_dropped_too_long": 0.0}),
    ("trainable_tokens", "aligned_policy/sl_cai", {"train/loss": 0.0}),
    ("heldout_loss_falls", "sft_checkpoint", {"heldout/loss": 3.0}),
    ("rows_dropped", "sft_checkpoint", {"train/rows_dropped_too_long": 501.0}),
    ("rows_dropped", "aligned_policy/sl_cai", {"train/rows_dropped_too_long": 501.0}),
    ("eos_is_learnt", "sft_checkpoint", {"heldout/eos_probability": 0.001}),
    ("eos_is_learnt", "aligned_policy/sl_cai", {"heldout/eos_probability": 0.001}),
    ("pairs_dropped", "human_reward_model", {"train/pairs_dropped_too_long": 301.0}),
    ("pairs_dropped", "aligned_policy/dpo", {"train/pairs_dropped_too_long": 301.0}),
    ("pairs_dropped", "aligned_policy/kto", {"train/pairs_dropped_too_long": 301.0}),
    ("pairs_dropped", "aligned_policy/orpo", {"train/pairs_dropped_too_long": 301.0}),
    ("prompts_dropped", "aligned_policy/ppo", {"train/prompts_dropped_too_long": 381.0}),
    ("tasks_dropped", "aligned_policy/grpo", {"train/tasks_dropped_too_long": 381.0}),
    ("scores_survive_reload", "reward_model", {"reload/score_gap": 0.3}),
    ("better_than_length", "evaluator", {"heldout/gain_over_length_low": -0.01}),
    ("better_than_length", "reward_model", {"heldout/gain_over_length_low": 0.0}),
    ("share_kept", "constitutional_preference_pairs", {"share_kept": 0.2}),
    ("critic_finds_something", "constitutional_preference_pairs", {"share_no_violations": 0.95}),
    ("share_compared", "ai_feedback", {"share_compared": 0.4}),
    ("judge_reads_the_answers", "ai_feedback", {"position/order_flips": 0.6}),
    ("judge_beats_length", "ai_feedback", {"heldout/gain_over_length_low": -0.1}),
    ("nothing_leaks", "prompts", {"leakage/leaked": 1.0}),
    ("chosen_stays_likely", "aligned_policy/dpo", {"train/chosen_reward_last": -1.5}),
    ("first_pass_ratio", "aligned_policy/ppo", {"train/ratio_first": 1.02}),
    ("first_pass_ratio", "aligned_policy/ppo", {"train/ratio_first": 0.97}),
    ("reward_rises", "aligned_policy/ppo", {"train/scores_last": 0.1}),
    ("reward_rises", "aligned_policy/ppo", {"train/scores_last": -0.2}),
    ("kl_per_answer", "aligned_policy/ppo", {"train/kl_last": 80.0}),
    ("rollouts_end", "aligned_policy/ppo", {"train/eos_rate_last": 0.0}),
    ("policy_has_entropy", "aligned_policy/ppo", {"train/entropy_last": 0.005}),
    ("policy_has_entropy", "aligned_policy/grpo", {"train/entropy_last": 0.005}),
    ("groups_differ", "aligned_policy/grpo", {"train/zero_variance_groups_last": 0.8}),
    ("groups_differ", "aligned_policy/rloo", {"train/zero_variance_groups_last": 1.0}),
    ("kl_per_token", "aligned_policy/grpo", {"train/kl_last": 2.1}),
    ("completions_end", "aligned_policy/grpo", {"train/clipped_completions_last": 0.81}),
    ("length_below_cap", "aligned_policy/grpo", {"train/mean_length_last": 126.0}),
    ("evaluator_agrees", "policy_report/ppo", {"evaluator/gain": 0.1, "evaluator/gain_low": -0.1}),
    ("evaluator_agrees", "policy_report/dpo", {"evaluator/gain": -0.4, "evaluator/gain_low": -0.6, "evaluator/gain_high": -0.2}),
    ("answers_end", "policy_report/ppo", {"eos_rate/policy": 0.1}),
    ("answers_end", "policy_report/dpo", {"eos_rate/sft": 0.2}),
    ("gain_is_not_length", "policy_report/ppo", {"length/policy": 90.0}),
    ("likelihood_not_displaced", "policy_report/dpo", {"perplexity/policy": 30.0}),
]
BLOCKING = {"trainable_tokens", "scores_survive_reload", "share_kept", "nothing_leaks"}
BOUNDS = AlarmConfig()


def of(asset):
    return [w for w in ALARMS.values() if {asset, asset.split("/")[0]} & set(w.stages)]


def fired(asset, metrics, bounds=BOUNDS):
    return [w.name for w in of(asset) if sound(w, metrics, bounds).fired]


def test_every_alarm_has_a_healthy_and_a_broken_case():
    assert {name for name, _, _ in BROKEN} == set(ALARMS)
    for watch in ALARMS.values():
        assert [asset for asset in HEALTHY if watch in of(asset)]


@pytest.mark.parametrize("asset", HEALTHY)
def test_healthy_numbers_are_silent_and_shown(asset):
    for watch in of(asset):
        alarm = sound(watch, HEALTHY[asset], BOUNDS)
        assert not alarm.fired
        assert re.search(r"\d", alarm.reason)
        assert "Remedy" not in alarm.reason


@pytest.mark.parametrize(("name", "asset", "numbers"), BROKEN, ids=[f"{n}-{i}" for i, (n, _, _) in enumerate(BROKEN)])
def test_a_failure_fires_its_alarm_and_no_other(name, asset, numbers):
    metrics = HEALTHY[asset] | numbers
    assert fired(asset, metrics) == [name]
    alarm = sound(ALARMS[name], metrics, BOUNDS)
    assert alarm.severity == ("error" if name in BLOCKING else "warn")
    assert re.fullmatch(r".+\. Remedy: .+\.", alarm.reason)


@pytest.mark.parametrize(("asset", "metric"), [(a, m) for a, metrics in HEALTHY.items() for m in metrics])
def test_what_was_not_measured_is_no_evidence(asset, metric):
    metrics = {name: value for name, value in HEALTHY[asset].items() if name != metric}
    expected = [w.name for w in of(asset) if metric in (*w.needs, *w.settings) and not w.optional]
    assert fired(asset, metrics) == expected
    for name in expected:
        assert f"not measured: {metric}" in sound(ALARMS[name], metrics, BOUNDS).reason


def test_only_what_a_recipe_may_leave_out_is_no_alarm_when_it_is_missing_and_the_docs_name_it():
    optional = {w.name for w in ALARMS.values() if w.optional}
    unmeasured = {name: value for name, value in HEALTHY["ai_feedback"].items() if not name.startswith("heldout/")}
    assert fired("ai_feedback", unmeasured) == []
    introduction, _, _ = DOCS.partition("| # |")
    assert optional == {"judge_beats_length"} == set(re.findall(r"`(\w+)` passes where", introduction))


def test_a_healthy_dpo_run_may_lower_both_likelihoods_a_little_and_one_without_a_margin_is_another_matter():
    assert fired("aligned_policy/dpo", {**PAIRS, "train/rewards_margin_last": 2.0, "train/chosen_reward_last": -0.9}) == []
    assert fired("aligned_policy/dpo", {**PAIRS, "train/rewards_margin_last": -0.1, "train/chosen_reward_last": -3.0}) == []


def test_a_worse_perplexity_alone_is_the_gates_business():
    better = {"policy/train/chosen_reward_last": 0.2, "perplexity/policy": 30.0}
    assert fired("policy_report/dpo", REPORT | better) == []


def test_shorter_answers_and_losses_are_no_length_gain():
    assert fired("policy_report/ppo", REPORT | {"length/policy": 20.0}) == []
    lost = {"evaluator/gain": -0.3, "evaluator/gain_low": -0.5, "reward_model/gain": -0.2, "length/policy": 100.0}
    assert fired("policy_report/ppo", REPORT | lost) == []


OTHER_VALUES = [1e-9, 0.001, 0.3, 0.6, 1.0, 1.00001, 3.0, 1e6]


@pytest.mark.parametrize("field", AlarmConfig.model_fields)
def test_every_bound_decides_something(field):
    def decisions(bounds):
        cases = [*HEALTHY.items(), *((asset, HEALTHY[asset] | numbers) for _, asset, numbers in BROKEN)]
        return [fired(asset, metrics, bounds) for asset, metrics in cases]

    changed = []
    for value in OTHER_VALUES:
        try:
            changed.append(decisions(AlarmConfig(**{field: value})))
        except ValidationError:
            continue
    assert any(d != decisions(BOUNDS) for d in changed)


def test_alarms_are_attached_where_they_belong():
    assert [w.name for w in watches("policy_report/dpo")] == [
        "answers_end",
        "likelihood_not_displaced",
        "evaluator_agrees",
        "gain_is_not_length",
    ]
    assert "likelihood_not_displaced" not in [w.name for w in watches("policy_report/ppo")]
    assert [w.name for w in watches("aligned_policy/rloo")] == [w.name for w in watches("aligned_policy/grpo")]
    assert [w.name for w in watches("aligned_policy/sl_cai")] == ["trainable_tokens", "rows_dropped", "eos_is_learnt"]
    for asset in ("aligned_policy/kto", "aligned_policy/orpo"):
        assert [w.name for w in watches(asset)] == ["pairs_dropped"]
    for asset in ("base_model", "sft_dataset", "prompts", "champion"):
        assert watches(asset) == []


# --- The docs ---------------------------------------------------------------------------------------------------------


def rows():
    found = re.findall(r"^\| (\d+) \| (.+) \| (.+) \| (.+) \|$", DOCS, flags=re.MULTILINE)
    return {int(number): cells for number, *cells in found}


def test_the_docs_have_all_fifteen_failures():
    assert sorted(rows()) == list(range(1, 16))
    for _, where, remedy in rows().values():
        assert where
        assert remedy


@pytest.mark.parametrize("name", ALARMS)
def test_an_alarm_is_in_its_row_of_the_docs(name):
    _, where, _ = rows()[ALARMS[name].failure]
    assert f"`{name}`" in where


def test_the_docs_name_no_check_that_does_not_exist():
    for number, (_, where, _) in rows().items():
        checks = re.findall(r"(?:check|warning|warnings) ((?:`[\w]+`(?:, | and )?)+)", where)
        for name in re.findall(r"`(\w+)`", " ".join(checks)):
            assert number in (ALARMS[name].failure, 6, 7), name


def test_the_bounds_that_the_docs_show_exist():
    import yaml

    example = re.search(r"```yaml\n(.+?)```", DOCS, flags=re.DOTALL).group(1)
    assert AlarmConfig(**yaml.safe_load(example)["alarms"])
