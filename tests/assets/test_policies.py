"""A policy learns from the human pairs of its constitution's domains, and its fingerprint says which; a report measures it."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from alignment.evaluation import Measured, SftReportConfig
from alignment.methods import METHODS
from alignment.progress import SILENT
from assets import policies
from assets.sft_report import write_table


@pytest.fixture
def trained(tmp_path, stage_of, cook):
    """The domains that a method's training is given under a constitution, what of them names its policy, and its inputs."""

    def run(name, partition, **settings):
        seen = []

        def train(config, training):
            seen.append(training)
            return SimpleNamespace(curves={}), {}

        stage = stage_of(policies.policy_asset(name, replace(METHODS[name], train=train)), partition, **settings)
        stage.compute(SimpleNamespace(folder=tmp_path, out=tmp_path), SILENT)
        return seen[0].preference_domains, stage.versions, set(stage.inputs)

    return run


def test_a_method_that_learns_from_human_pairs_is_told_their_domains_and_named_by_them(trained):
    domains = ("everyday", "cooking")
    assert trained("dpo", "cook", human_pairs=-1)[:2] == (domains, {"preference_domains": "cooking,everyday"})
    assert trained("dpo", "general", human_pairs=-1)[:2] == ((), {})


def test_where_no_human_pair_takes_part_their_domains_decide_nothing(trained):
    assert trained("ppo", "cook")[1] == {}
    assert trained("dpo", "cook", human_pairs=0)[1] == {}


def test_a_data_set_of_which_no_pair_is_wanted_is_no_input(trained):
    every = {"sft_checkpoint", "constitutional_preference_pairs", "human_preferences"}
    assert trained("dpo", "general", human_pairs=8)[2] == every
    assert trained("dpo", "general", human_pairs=8, constitutional_pairs=0)[2] == every - {"constitutional_preference_pairs"}
    assert trained("kto", "general", human_pairs=0)[2] == every - {"human_preferences"}


def test_a_report_compares_the_policy_with_the_sft_report_and_both_are_scored_by_the_evaluator(
    stage_of, heldout, tmp_path, monkeypatch
):
    theirs = Measured(settings=SftReportConfig(), answers=(), scores=(), rewards=(), nll=1.0, correct=())
    rows = [{"prompt": "Boil it.", "base": "", "sft": "No.", "score_sft": 0.5}]
    (tmp_path / "sft_report").mkdir()
    (tmp_path / "sft_report" / "measured.json").write_text(theirs.model_dump_json(), encoding="utf-8")
    write_table(tmp_path / "sft_report" / "generations.jsonl", rows)
    sides = [f"{name}/{side}" for name in ("length", "eos_rate", "perplexity") for side in ("policy", "sft")]
    scores = [f"evaluator/{name}" for name in ("score_policy", "score_sft", "gain", "gain_low", "gain_high")]
    metrics, asked = dict.fromkeys([*sides, *scores, "win_rate", "prompts"], 1.0), {}

    def evaluate(settings, **given):
        asked.update(given)
        return metrics, rows

    monkeypatch.setattr(policies, "evaluate_policy", evaluate)
    stage = stage_of(policies.report_asset("dpo", METHODS["dpo"]))
    outcome = stage.compute(SimpleNamespace(out=tmp_path), SILENT)
    assert asked == {
        "theirs": theirs,
        "base_rows": rows,
        "sft": tmp_path / "sft_checkpoint" / "model",
        "policy": tmp_path / "aligned_policy" / "dpo" / "model",
        "evaluator": tmp_path / "evaluator" / "model",
        "reward_model": tmp_path / "reward_model" / "model",
        "heldout": heldout,
        "log": SILENT,
    }
    told = {**metrics, "training/seconds": 3.0, "training/peak_memory_gb": 0.5}
    policy = stage.inputs["policy"]
    assert (outcome.metrics, outcome.handle) == (told, {"method": "dpo", "policy": policy})
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert report == {"method": "dpo", "policy": policy.fingerprint, "metrics": told}
