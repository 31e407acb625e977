"""Alarms as Dagster shows them: attached to their assets, decided at every materialization, blocking where they should."""

import hashlib
import importlib.util
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from alignment.alarms import ALARMS, watches
from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, Handle, PolicyReport, PreferenceDataset, RewardModel
from alignment.models import Config
from alignment.pair_filters import FilterSettings
from alignment.readers import read_records
from alignment.records import Conversation, Prompt
from assets.checks import alarm_specs, blocking_alarms, nothing_leaks
from assets.data import human_preferences, prompts, sft_dataset
from assets.stage import Outcome, Stage, Tools, materialize
from dagster_project.definitions import defs
from resources.artifacts import ArtifactRecord, ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.tracking import MlflowTracking


def _numbers() -> Any:
    path = Path(__file__).parents[1] / "alignment" / "test_alarms.py"
    spec = importlib.util.spec_from_file_location("alarm_numbers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


NUMBERS = _numbers()
BROKEN = [(name, asset, NUMBERS.HEALTHY[asset] | numbers) for name, asset, numbers in NUMBERS.BROKEN if name != "nothing_leaks"]
# One broken case of each severity, of each kind of handle.
SHOWN = [
    next(case for case in BROKEN if case[:2] == wanted)
    for wanted in (
        ("trainable_tokens", "sft_checkpoint"),
        ("eos_is_learnt", "sft_checkpoint"),
        ("better_than_length", "reward_model"),
        ("scores_survive_reload", "reward_model"),
        ("share_kept", "constitutional_preference_pairs"),
        ("share_compared", "ai_feedback"),
        ("judge_reads_the_answers", "ai_feedback"),
        ("chosen_stays_likely", "aligned_policy/dpo"),
        ("kl_per_answer", "aligned_policy/ppo"),
        ("groups_differ", "aligned_policy/grpo"),
        ("evaluator_agrees", "policy_report/ppo"),
        ("likelihood_not_displaced", "policy_report/dpo"),
    )
]


class NoSettings(Config):
    """Nothing to set."""


class Filtered(Config):
    """Settings that an alarm compares a metric with."""

    filters: FilterSettings


@pytest.fixture
def resources(tmp_path: Path, empty_database: Path, fresh_data: Path) -> dict[str, Any]:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return {
        "store": ArtifactStore(root=str(tmp_path / "artifacts")),
        "io_manager": HandleIOManager(root=str(tmp_path / "handles")),
        "dvc": DvcData(root=str(fresh_data)),
        "tracking": MlflowTracking(
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
            artifact_root=str(tmp_path / "mlartifacts"),
            lock_folder=str(tmp_path / "locks"),
        ),
    }


def pretended(asset: str, metrics: Mapping[str, float]) -> list[dg.AssetsDefinition]:
    """An asset with the checks of a real one, whose computation ends with given metrics; and one downstream of it."""
    own = {k: v for k, v in metrics.items() if not k.startswith(("policy/", "filters."))}
    kept = metrics.get("filters.min_share_kept")
    policys = {k.removeprefix("policy/"): v for k, v in metrics.items() if k.startswith("policy/")}
    policy = Checkpoint(asset="aligned_policy/dpo", fingerprint="0", mlflow_run_id="0", metrics=policys)
    handle = {"method": "dpo", "policy": policy} if asset.startswith("policy_report") else {}

    @dg.asset(key=asset.split("/"), check_specs=alarm_specs(asset))
    def watched(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        def stage() -> Stage:
            return Stage(
                kind=PolicyReport if handle else Checkpoint,
                config=NoSettings() if kept is None else Filtered(filters=FilterSettings(min_share_kept=kept)),
                code_version="1",
                inputs={},
                compute=lambda work, log: Outcome(metrics=own, handle=handle),
            )

        return materialize(context, stage, Tools(store, tracking, dvc))

    @dg.asset(deps=[watched])
    def downstream() -> None: ...

    return [watched, downstream]


def evaluations(done: dg.ExecuteInProcessResult) -> dict[str, Any]:
    return {e.check_name: e for e in done.get_asset_check_evaluations()}


def ran(done: dg.ExecuteInProcessResult) -> list[str]:
    return [e.asset_key.to_user_string() for e in done.get_asset_materialization_events()]


Run = Callable[..., dg.ExecuteInProcessResult]


@pytest.fixture
def run(resources: dict[str, Any]) -> Run:
    def execute(assets: list, config: Mapping[str, Any] | None = None, instance: Any = None) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            assets,
            instance=instance or dg.DagsterInstance.ephemeral(),
            resources=resources,
            run_config=config,
            raise_on_error=False,
        )

    return execute


@pytest.mark.parametrize("asset", sorted({asset for _, asset, _ in SHOWN}))
def test_a_healthy_asset_passes_all_of_its_checks(run, asset):
    done = run(pretended(asset, NUMBERS.HEALTHY[asset]))
    assert done.success
    found = evaluations(done)
    assert list(found) == [w.name for w in watches(asset)]
    assert all(e.passed for e in found.values())
    assert ran(done) == [asset, "downstream"]


@pytest.mark.parametrize(("name", "asset", "metrics"), SHOWN, ids=[name for name, _, _ in SHOWN])
def test_a_failure_shows_on_its_asset_and_again_when_it_is_reused(run, resources, name, asset, metrics):
    blocking = ALARMS[name].severity == "error"
    for reused in (False, True):
        done = run(pretended(asset, metrics))
        (event,) = (e for e in done.get_asset_materialization_events() if e.asset_key.to_user_string() == asset)
        assert event.materialization.metadata["reused"].value is reused
        found = evaluations(done)
        assert [n for n, e in found.items() if not e.passed] == [name]
        assert found[name].asset_key.to_user_string() == asset
        assert found[name].severity == (dg.AssetCheckSeverity.ERROR if blocking else dg.AssetCheckSeverity.WARN)
        assert "Remedy: " in found[name].description
        assert found[name].metadata["failure"].value == ALARMS[name].failure
        assert done.success is not blocking
        assert ran(done) == ([asset] if blocking else [asset, "downstream"])
        assert not [e for e in done.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]
    tracking = resources["tracking"]
    attempts = [r for r in tracking.client().search_runs([tracking.experiment_id]) if r.data.tags["alignment.level"] == "attempt"]
    assert [r.data.tags["alignment.alarms"] for r in attempts] == [name, name]


# --- leakage, on the real data ----------------------------------------------------------------------------------------

SPLIT = [sft_dataset, human_preferences, prompts, nothing_leaks]


def test_the_shipped_data_does_not_leak(run):
    done = run(SPLIT)
    assert done.success
    (evaluation,) = done.get_asset_check_evaluations()
    assert evaluation.passed
    assert "0 of " in evaluation.description


def test_the_same_prompts_in_two_data_sets_leak_only_if_one_is_split_otherwise(run, tmp_path):
    rows = []
    run([sft_dataset])
    for path in (tmp_path / "artifacts").glob("sft_dataset/*/*.jsonl"):
        rows += [row for row in read_records(path, Conversation) if row.category != "critique"]
    file = tmp_path / "prompts.jsonl"
    write_jsonl(file, [Prompt(id=row.id, prompt=row.prompt.upper(), tags=("general",)) for row in rows])

    @dg.asset(deps=[prompts])
    def training() -> None: ...

    for fraction, leaks in ((0.25, False), (0.6, True)):
        config = {"prompts": [str(file)], "problems": [], "heldout_fraction": fraction}
        done = run([*SPLIT, training], {"ops": {"prompts": {"config": config}}})
        assert done.success is not leaks
        (evaluation,) = done.get_asset_check_evaluations()
        assert (evaluation.passed, evaluation.severity) == (not leaks, dg.AssetCheckSeverity.ERROR)
        assert ("same heldout_fraction" in evaluation.description) == leaks
        assert (len(evaluation.metadata["leaked"].value) > 3) == leaks
        assert ("training" in ran(done)) is not leaks


def test_prompts_alone_can_be_materialized_in_a_fresh_project(run):
    done = run([prompts, nothing_leaks])
    assert done.success
    (evaluation,) = done.get_asset_check_evaluations()
    assert evaluation.passed
    assert "nothing to compare with yet: sft_dataset, human_preferences" in evaluation.description


# --- the whole graph --------------------------------------------------------------------------------------------------


def test_every_alarm_of_an_asset_in_the_graph_is_one_of_its_checks_and_none_is_forgotten():
    graph = defs.resolve_asset_graph()
    expected = {(key, w.name) for key in graph.get_all_asset_keys() for w in watches(key.to_user_string())}
    expected.add((dg.AssetKey("prompts"), "nothing_leaks"))
    assert {(key.asset_key, key.name) for key in graph.asset_check_keys} == expected
    for key in graph.asset_check_keys:
        spec = graph.get_check_spec(key)
        assert spec.blocking == (ALARMS[key.name].severity == "error")
        assert spec.description == ALARMS[key.name].description


def test_the_job_runs_all_checks():
    layer = defs.resolve_job_def("alignment").asset_layer
    graph = defs.resolve_asset_graph()
    assert set(layer.executable_asset_keys) | {dg.AssetKey("data")} >= {key.asset_key for key in graph.asset_check_keys}
    assert set(layer.asset_graph.asset_check_keys) == set(graph.asset_check_keys)


def test_bounds_in_a_recipe_decide(python, tmp_path):
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("extends: tiny\nalarms: {min_entropy: 0.7}\n", encoding="utf-8")
    done = python("from assets.checks import BOUNDS; print(BOUNDS.min_entropy)", ALIGNMENT_RECIPE=str(recipe))
    assert done.stdout.strip() == "0.7", done.stderr
    recipe.write_text("extends: tiny\nalarms: {min_entropi: 0.7}\n", encoding="utf-8")
    done = python("from assets.checks import BOUNDS", ALIGNMENT_RECIPE=str(recipe))
    assert "key 'alarms.min_entropi': is not a known key" in done.stderr


# --- once more before promotion ---------------------------------------------------------------------------------------


@pytest.fixture
def store(resources: dict[str, Any]) -> ArtifactStore:
    return resources["store"].process_config_and_initialize()


def published(store: ArtifactStore, kind: type[Handle], asset: str, inputs: Mapping[str, Handle], metrics, **own) -> Handle:
    """An artifact with given metrics, made of given others and of a file."""
    digest = hashlib.sha256(f"{asset} {inputs} {metrics}".encode()).hexdigest()
    handle = kind(asset=asset, fingerprint=digest, mlflow_run_id="r", metrics=metrics, **own)
    record = ArtifactRecord(
        handle=handle.model_dump(mode="json"),
        config={},
        code_version="1",
        inputs={name: given.fingerprint for name, given in inputs.items()} | {"data/rows.jsonl": "0" * 32},
        files={},
        versions={},
        git_commit=None,
        dvc_md5=None,
        mlflow_run_id="r",
        dagster_run_id="d",
        seconds=0.0,
        peak_memory_gb=0.0,
    )
    with store.building(asset, digest) as work:
        work.publish(record)
    return handle


def reported(store: ArtifactStore, changes: Mapping[str, Mapping[str, float]]) -> PolicyReport:
    """A report on a policy, healthy but for the changes by asset, and but for pairs of which the filters kept none."""

    def numbers(asset: str) -> dict[str, float]:
        return NUMBERS.HEALTHY[asset] | changes.get(asset, {})

    sft = published(store, Checkpoint, "sft_checkpoint", {}, numbers("sft_checkpoint"))
    none_kept = {"share_kept": 0.0, "pairs": 0.0}
    pairs = published(store, PreferenceDataset, "constitutional_preference_pairs", {"sft_checkpoint": sft}, none_kept)
    scorer = published(store, RewardModel, "reward_model", {pairs.asset: pairs}, numbers("reward_model"))
    judge = published(store, RewardModel, "evaluator", {}, numbers("evaluator"))
    inputs = {"sft_checkpoint": sft, "reward_model": scorer}
    policy = published(store, Checkpoint, "aligned_policy/ppo", inputs, numbers("aligned_policy/ppo"))
    inputs = {"policy": policy, "evaluator": judge}
    measured = numbers("policy_report/ppo")
    return published(store, PolicyReport, "policy_report/ppo", inputs, measured, method="ppo", policy=policy)


def test_a_policy_of_healthy_artifacts_is_not_blocked_and_a_bound_that_a_run_sets_itself_does_not_count(store):
    assert blocking_alarms(store, reported(store, {})) == {}


@pytest.mark.parametrize(
    ("asset", "metrics", "alarm"),
    [
        ("sft_checkpoint", {"train/loss": 0.0}, "trainable_tokens"),  # what the policy's reward model was made of
        ("reward_model", {"reload/score_gap": 0.3}, "scores_survive_reload"),
        ("evaluator", {"reload/score_gap": 0.3}, "scores_survive_reload"),  # what measured the policy
    ],
)
def test_what_blocked_one_run_keeps_a_later_one_from_promoting(store, asset, metrics, alarm):
    fired = blocking_alarms(store, reported(store, {asset: metrics}))
    assert list(fired) == [f"{asset}: {alarm}"]
    assert "Remedy: " in fired[f"{asset}: {alarm}"]


def test_warnings_do_not_keep_a_policy_from_promotion(store):
    assert blocking_alarms(store, reported(store, {"aligned_policy/ppo": {"train/kl_last": 80.0}})) == {}


@pytest.mark.parametrize(("fraction", "leaks"), [(0.25, False), (0.6, True)])
def test_leaked_rows_in_what_a_policy_was_made_of_keep_it_from_promotion(run, store, tmp_path, fraction, leaks):
    done = run([sft_dataset, human_preferences])
    given = {name: done.output_for_node(name) for name in ("sft_dataset", "human_preferences")}
    rows = [
        r for side in ("train", "heldout") for r in read_records(store.path(given["sft_dataset"]) / f"{side}.jsonl", Conversation)
    ]
    file = tmp_path / "prompts.jsonl"
    asked = [Prompt(id=row.id, prompt=row.user_turns[0], tags=("general",)) for row in rows if row.category != "critique"]
    write_jsonl(file, asked)
    config = {"prompts": [str(file)], "problems": [], "heldout_fraction": fraction}
    given["prompts"] = run([prompts], {"ops": {"prompts": {"config": config}}}).output_for_node("prompts")
    policy = Checkpoint(asset="aligned_policy/ppo", fingerprint="gone", mlflow_run_id="r")
    measured = NUMBERS.HEALTHY["policy_report/ppo"]
    report = published(store, PolicyReport, "policy_report/ppo", given, measured, method="ppo", policy=policy)
    assert list(blocking_alarms(store, report)) == (["prompts: nothing_leaks"] if leaks else [])
