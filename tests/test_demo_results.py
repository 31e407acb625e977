"""What `make demo` left behind, held to what it promises. Slow: it needs the real model's run; `.ci/run` makes it first."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.methods import METHODS

PROJECT = Path(__file__).resolve().parents[1]
STORAGE = PROJECT / "storage"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (STORAGE / "mlflow.db").exists(), reason="run `make demo` first: it writes storage/"),
]
# `make demo METHODS=...` leaves methods out.
BUILT = [name for name in METHODS if (STORAGE / "handles" / "policy_report" / name / "general.json").exists()]
SHARED = [
    "base_model",
    "sft_dataset",
    "human_preferences",
    "prompts",
    "human_reward_model",
    "sft_checkpoint",
    "constitutional_preference_pairs",
    "ai_feedback",
    "reward_model",
    "evaluator",
    "sft_report",
    "champion",
]


def assets(methods) -> list[str]:
    """The assets of a run with these methods."""
    return [*SHARED, *(f"{stage}/{name}" for name in methods for stage in ("aligned_policy", "policy_report"))]


def handle(asset: str) -> dict:
    """The handle that the last `make demo` (constitution general) left."""
    plain, partitioned = STORAGE / "handles" / f"{asset}.json", STORAGE / "handles" / asset / "general.json"
    return json.loads((partitioned if partitioned.exists() else plain).read_text())


def record(asset: str) -> dict:
    """The artifact record behind a handle."""
    return json.loads((STORAGE / "artifacts" / asset / handle(asset)["fingerprint"] / "artifact.json").read_text())


@pytest.fixture(scope="module")
def client():
    import mlflow

    return mlflow.MlflowClient(tracking_uri=f"sqlite:///{STORAGE / 'mlflow.db'}")


@pytest.mark.parametrize("asset", assets(BUILT))
def test_every_asset_is_published_with_its_record_and_within_memory(asset):
    assert record(asset)["peak_memory_gb"] < 6.0
    assert record(asset)["handle"]["fingerprint"] == handle(asset)["fingerprint"]


def test_reward_model_beats_the_length_baseline_on_heldout_pairs():
    metrics = handle("reward_model")["metrics"]
    assert metrics["heldout/gain_over_length_low"] > 0, metrics


@pytest.mark.parametrize("name", [name for name in ("dpo", "ppo") if name in BUILT])
def test_the_policy_beats_the_sft_checkpoint_by_the_evaluator(name):
    metrics = handle(f"policy_report/{name}")["metrics"]
    assert metrics["evaluator/gain_low"] > 0, metrics


@pytest.mark.parametrize("name", BUILT)
def test_every_method_is_measured_on_equal_footing(name):
    metrics, sft = handle(f"policy_report/{name}")["metrics"], handle("sft_report")["metrics"]
    for key in ("evaluator/score_sft", "length/sft", "eos_rate/sft", "perplexity/sft", "problems/solved_sft", "prompts"):
        assert metrics[key] == sft[key]
    for key in ("win_rate_low", "reward_model/gain", "kl/from_sft", "over_refusal_rate/policy", "training/seconds"):
        assert key in metrics


def test_the_demo_built_a_policy():
    assert BUILT


@pytest.mark.skipif("ppo" not in BUILT, reason="`make demo METHODS=...` left PPO out")
def test_ppo_starts_at_the_reference():
    metrics = handle("aligned_policy/ppo")["metrics"]
    assert abs(metrics["train/ratio_first"] - 1) < 1e-3
    assert metrics["train/kl_last"] > 0


def test_promotion_follows_the_evidence_and_the_registry_follows_the_promotion(client):
    from alignment.promotion import GateConfig, judge

    champion = handle("champion")
    report = handle(f"policy_report/{champion['method']}")
    gate = GateConfig.model_validate(record("champion")["config"])
    assert champion["promoted"] == all(rule.passed for rule in judge(report["metrics"], gate))
    aliases = client.get_registered_model("aligned-policy-general").aliases
    challenger = client.get_model_version("aligned-policy-general", aliases["challenger"])
    assert challenger.tags["alignment.fingerprint"] == champion["policy"]["fingerprint"]
    assert (aliases.get("champion") == aliases["challenger"]) == champion["promoted"]


def test_last_run_reused_everything_and_has_one_parent_and_one_child_per_asset(client):
    experiment = client.get_experiment_by_name("alignment")
    demos = "tags.`alignment.level` = 'run' and attributes.run_name = 'alignment[general]'"
    parents = client.search_runs([experiment.experiment_id], demos, order_by=["attributes.start_time DESC"])
    assert parents[0].info.status == "FINISHED"
    built = set()
    for parent in (run for run in parents if run.info.status == "FINISHED"):  # others were killed, or failed
        children = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
        made = sorted(c.data.tags["dagster.asset_key"] for c in children)
        methods = [name for name in BUILT if f"aligned_policy/{name}" in made]
        assert made == sorted(assets(methods))
        assert methods
        assert {c.info.status for c in children} == {"FINISHED"} == {parent.info.status}
        built.update(methods)
    assert built == set(BUILT)
    latest = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parents[0].info.run_id}'")
    assert {c.data.tags["alignment.reused"] for c in latest} == {"true"} or len(parents) == 1


GENERATE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
base, adapter = sys.argv[1:3]
tokenizer = AutoTokenizer.from_pretrained(adapter)
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
for prompt in ["How do I get into my ex's phone?", "Give me one tip for storing fresh basil."]:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt",
                                        return_dict=True)
    out = model.generate(**ids, max_new_tokens=24, do_sample=False)
    print(tokenizer.decode(out[0, ids["input_ids"].shape[1]:]))
"""


@pytest.mark.parametrize("asset", ["sft_checkpoint", *(f"aligned_policy/{name}" for name in BUILT if name in ("dpo", "ppo"))])
def test_mlflow_model_loads_with_plain_libraries_and_generates_the_same(asset, client, tmp_path):
    base = STORAGE / "artifacts" / "base_model" / handle("base_model")["fingerprint"] / "model"
    ours = STORAGE / "artifacts" / asset / handle(asset)["fingerprint"] / "model"
    theirs = client.download_artifacts(handle(asset)["mlflow_run_id"], "model", str(tmp_path))
    answers = [
        subprocess.run(
            [sys.executable, "-c", GENERATE, str(base), str(folder)], capture_output=True, text=True, check=True
        ).stdout
        for folder in (ours, theirs)
    ]
    assert answers[0] == answers[1]
    assert answers[0].strip()
