"""`ai_feedback` and who learns from it, materialized on the tiny recipe in this process.

The base model stands in for the SFT checkpoint and, with a head that nobody trained, for the human reward model.
"""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest

from alignment.ai_feedback import AiComparison
from alignment.constitutions import load_constitution
from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, RewardModel
from alignment.readers import read_records
from alignment.records import PreferencePair, Prompt
from assets.ai_feedback import ai_feedback
from assets.base_model import base_model
from assets.constitutional import constitutional_preference_pairs
from assets.data import human_preferences, prompts
from assets.reward_models import reward_model
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.paths import PROJECT
from resources.tracking import MlflowTracking


@dg.asset(name="sft_checkpoint")
def sft_stand_in(base_model: Checkpoint) -> Checkpoint:
    return base_model


@dg.asset(name="human_reward_model")
def scorer_stand_in(base_model: Checkpoint) -> RewardModel:
    return RewardModel(asset=base_model.asset, fingerprint=base_model.fingerprint, mlflow_run_id=base_model.mlflow_run_id)


ASSETS = [
    base_model,
    human_preferences,
    prompts,
    sft_stand_in,
    scorer_stand_in,
    constitutional_preference_pairs,
    ai_feedback,
    reward_model,
]
SEED = {"ai_feedback": {"seed": 1}}
WEIGHT = {"reward_model": {"ai_feedback_weight": 0.5, "ai_feedback_share": 0.5}}
JUDGED = {"constitutional_preference_pairs": {"filters": {"judge_pairs": True}}}
FIRST, OTHER_SEED, WEIGHTED, JUDGED_PAIRS = range(4)


class Materialized:
    """One run: what Dagster says of each asset, and its artifact."""

    def __init__(self, done: dg.ExecuteInProcessResult) -> None:
        assert done.success
        self.metadata = {
            event.asset_key.to_user_string(): {k: v.value for k, v in event.materialization.metadata.items()}
            for event in done.get_asset_materialization_events()
            if "fingerprint" in event.materialization.metadata  # a stand-in has none
        }

    def folder(self, asset: str) -> Path:
        return Path(self.metadata[asset]["artifact"])

    def record(self, asset: str) -> dict[str, Any]:
        return json.loads((self.folder(asset) / "artifact.json").read_text(encoding="utf-8"))

    def built(self) -> set[str]:
        return {asset for asset, metadata in self.metadata.items() if not metadata["reused"]}


@pytest.fixture(scope="module")
def storage(tmp_path_factory, empty_database) -> Path:
    folder = tmp_path_factory.mktemp("ai_feedback")
    shutil.copy(empty_database, folder / "mlflow.db")
    return folder


@pytest.fixture(scope="module")
def runs(storage, fresh_data) -> list[Materialized]:
    """The recipe as it is; another seed of AI feedback; then with a weight, too; and with the revisions judged."""
    resources = {
        "store": ArtifactStore(root=str(storage / "artifacts")),
        "io_manager": HandleIOManager(root=str(storage / "handles")),
        "dvc": DvcData(root=str(fresh_data)),
        "tracking": MlflowTracking(
            tracking_uri=f"sqlite:///{storage / 'mlflow.db'}",
            artifact_root=str(storage / "mlartifacts"),
            lock_folder=str(storage / "locks"),
        ),
    }
    instance = dg.DagsterInstance.ephemeral()
    out = []
    for configs, assets in (({}, ASSETS), (SEED, ASSETS), (SEED | WEIGHT, ASSETS), (JUDGED, ASSETS[:-2])):
        config = {"ops": {name: {"config": values} for name, values in configs.items()}}
        out.append(
            Materialized(
                dg.materialize(assets, instance=instance, resources=resources, run_config=config, partition_key="general")
            )
        )
    return out


def test_the_artifact_holds_the_comparisons_and_the_judged_human_pairs(runs):
    first = runs[FIRST]
    folder, metrics = first.folder("ai_feedback"), first.record("ai_feedback")["handle"]["metrics"]
    compared = read_records(folder / "comparisons.jsonl", AiComparison)
    assert len(compared) == metrics["pairs"] > 0
    assert metrics["prompts"] == 8
    assert metrics["pairs"] + sum(v for k, v in metrics.items() if k.startswith("dropped/")) == 8
    train = {p.prompt for p in read_records(first.folder("prompts") / "train.jsonl", Prompt) if "general" in p.tags}
    assert {c.prompt for c in compared} <= train
    principles = {p.id for p in load_constitution(PROJECT / "conf" / "constitutions" / "general.yaml").principles}
    assert {c.principle for c in compared} <= principles
    heldout = {p.chosen for p in read_records(first.folder("human_preferences") / "heldout.jsonl", PreferencePair)}
    measured = [json.loads(line) for line in (folder / "heldout.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(measured) == metrics["heldout/pairs"] == 8
    assert {m["chosen"] for m in measured} <= heldout
    assert metrics["heldout/accuracy_low"] <= metrics["heldout/accuracy"] <= metrics["heldout/accuracy_high"]
    assert {"heldout/accuracy_longer_wins", "heldout/gain_over_length_low", "position/bias", "confidence"} <= set(metrics)


def test_the_comparisons_are_a_table_in_mlflow(runs, storage):
    run_id = runs[FIRST].metadata["ai_feedback"]["mlflow_run_id"]
    table = json.loads((storage / "mlartifacts" / run_id / "artifacts" / "comparisons.json").read_text(encoding="utf-8"))
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 8
    assert {"prompt", "principle", "a", "b", "a_better", "a_better_shown_first", "a_better_shown_second", "dropped"} <= set(
        rows[0]
    )


def test_without_a_weight_other_feedback_is_no_reason_to_train_the_reward_model_anew(runs):
    assert "ai_feedback" in runs[FIRST].metadata
    assert runs[OTHER_SEED].built() == {"ai_feedback"}
    assert "ai_feedback" not in runs[FIRST].record("reward_model")["inputs"]
    assert runs[FIRST].record("reward_model")["handle"]["metrics"]["train/pairs_soft"] == 0


def test_with_a_weight_the_reward_model_learns_from_the_soft_labels_and_says_so(runs):
    weighted = runs[WEIGHTED]
    assert weighted.built() == {"reward_model"}
    record = weighted.record("reward_model")
    assert record["inputs"]["ai_feedback"] == weighted.metadata["ai_feedback"]["fingerprint"]
    pairs = weighted.record("ai_feedback")["handle"]["metrics"]["pairs"]
    assert record["handle"]["metrics"]["train/pairs_soft"] == round(pairs / 2) > 0  # half of them is the configured share


def test_a_judge_may_have_its_say_about_the_revisions(runs):
    before, after = (runs[i].record("constitutional_preference_pairs")["handle"]["metrics"] for i in (FIRST, JUDGED_PAIRS))
    said = {k: v for k, v in after.items() if k in ("filtered/judged_worse", "filtered/judge_unreadable")}
    assert after["pairs"] + sum(said.values()) == before["pairs"]
    assert sum(said.values()) > 0  # random weights prefer a position
    kept = read_records(runs[JUDGED_PAIRS].folder("constitutional_preference_pairs") / "pairs.jsonl", PreferencePair)
    assert len(kept) == after["pairs"]


def test_the_judge_is_measured_on_held_out_pairs_of_the_constitutions_domains(stage_of, cook, tmp_path, monkeypatch):
    heldout = [PreferencePair(id=d, prompt="p", chosen="c", rejected="r", domain=d) for d in ("cooking", "law", "everyday")]
    files = {"prompts/train": [Prompt(id="1", prompt="Hello", tags=("general",))], "human_preferences/heldout": heldout}
    for name, rows in files.items():
        (tmp_path / name).parent.mkdir()
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    nobody, measured = SimpleNamespace(identity="nobody"), []

    def measure(judge, pairs, *settings, **places):
        measured.extend(pairs)
        return {}, []

    for name, stand_in in {
        "answerers": lambda *settings: {"policy": nobody, "judge": nobody},
        "collect_feedback": lambda *settings, **places: [],
        "feedback_metrics": lambda compared: {},
        "measure_judge": measure,
    }.items():
        monkeypatch.setattr(f"assets.ai_feedback.{name}", stand_in)
    stage_of(ai_feedback, cook).compute(SimpleNamespace(folder=tmp_path, out=tmp_path), None)
    assert [pair.domain for pair in measured] == ["cooking", "everyday"]
