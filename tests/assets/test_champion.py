"""Which reports compete for `champion`: those that Dagster recorded last, measured against the same SFT checkpoint. And what it
does with the best of them."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from alignment.handles import Champion, Checkpoint, Handle, PolicyReport, SftReport
from assets.champion import champion, recorded_reports
from resources.artifacts import ArtifactRecord, ArtifactStore, file_hashes

OLD, NEW = "0" * 64, "1" * 64
BASE = Checkpoint(asset="base_model", fingerprint="2" * 64, mlflow_run_id="r")
PASSING = {
    "evaluator/gain": 0.4,
    "evaluator/gain_low": 0.2,
    "evaluator/gain_high": 0.6,
    "prompts": 40.0,
    **{f"{name}/{side}": 0.5 for name in ("length", "eos_rate", "perplexity", "over_refusal_rate") for side in ("policy", "sft")},
}


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    """The one of `resources`."""
    return ArtifactStore(root=str(tmp_path / "artifacts")).process_config_and_initialize()


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as found:
        yield found


@pytest.fixture
def recorded(store, instance) -> Callable[..., None]:
    """Publishes an artifact and has Dagster record its materialization."""

    def record(handle: Handle, inputs: dict[str, str]) -> None:
        with store.building(handle.asset, handle.fingerprint) as work:
            (work.out / "model").mkdir()
            (work.out / "model" / "weights").write_text(handle.asset)
            work.publish(
                ArtifactRecord(
                    handle=handle.model_dump(mode="json"),
                    config={},
                    code_version="1",
                    inputs=inputs,
                    files=file_hashes(work.out),
                    versions={},
                    git_commit=None,
                    dvc_md5=None,
                    mlflow_run_id="r",
                    dagster_run_id="d",
                    seconds=0.0,
                    peak_memory_gb=0.0,
                )
            )
        instance.report_runless_asset_event(
            dg.AssetMaterialization(
                asset_key=handle.asset.split("/"), partition=handle.partition, metadata={"fingerprint": handle.fingerprint}
            )
        )

    return record


def baseline(digest: str, partition: str = "general") -> SftReport:
    return SftReport(asset="sft_report", fingerprint=digest, partition=partition, mlflow_run_id="r")


def report(method: str, digest: str, partition: str = "general", **metrics: float) -> PolicyReport:
    common = {"fingerprint": digest, "partition": partition, "mlflow_run_id": "r"}
    policy = Checkpoint(asset=f"aligned_policy/{method}", adapter_of=BASE, **common)
    return PolicyReport(asset=f"policy_report/{method}", method=method, policy=policy, metrics=metrics, **common)


def competing(instance, store) -> dict[str, str]:
    context = dg.build_asset_context(instance=instance, partition_key="general")
    return {name: found.fingerprint for name, found in recorded_reports(context, store).items()}


def test_reports_of_earlier_runs_compete_as_long_as_they_compare_with_the_same_answers(recorded, instance, store):
    recorded(baseline(NEW), {})
    recorded(report("ppo", "a" * 64), {"sft_report": NEW})
    recorded(report("dpo", "b" * 64), {"sft_report": NEW})
    assert competing(instance, store) == {"ppo": "a" * 64, "dpo": "b" * 64}


def test_a_report_against_another_sft_checkpoint_does_not_compete(recorded, instance, store):
    recorded(baseline(OLD), {})
    recorded(report("ppo", "a" * 64), {"sft_report": OLD})
    recorded(baseline(NEW), {})  # another recipe, base model or version of the data
    recorded(report("dpo", "b" * 64), {"sft_report": NEW})
    assert competing(instance, store) == {"dpo": "b" * 64}


def test_the_last_report_of_a_method_counts_and_other_partitions_do_not(recorded, instance, store):
    recorded(baseline(NEW), {})
    recorded(report("dpo", "a" * 64), {"sft_report": NEW})
    recorded(report("dpo", "b" * 64), {"sft_report": NEW})
    recorded(baseline(OLD, "tutor"), {})
    recorded(report("kto", "c" * 64, "tutor"), {"sft_report": OLD})
    assert competing(instance, store) == {"dpo": "b" * 64}


def test_without_reports_nobody_competes(instance, store):
    assert competing(instance, store) == {}


def test_a_report_whose_artifact_is_gone_does_not_compete(recorded, instance, store):
    recorded(baseline(NEW), {})
    recorded(report("dpo", "a" * 64), {"sft_report": NEW})
    store.discard("policy_report/dpo", "a" * 64, asked_by="run")
    assert competing(instance, store) == {}


def test_an_older_report_that_compares_competes_beside_a_later_one_that_does_not(recorded, instance, store):
    recorded(baseline(NEW), {})
    recorded(report("dpo", "a" * 64), {"sft_report": NEW})
    recorded(baseline(OLD), {})
    recorded(report("dpo", "b" * 64), {"sft_report": OLD})
    recorded(report("ppo", "c" * 64), {"sft_report": OLD})
    instance.report_runless_asset_event(
        dg.AssetMaterialization(asset_key="sft_report", partition="general", metadata={"fingerprint": NEW})
    )  # the settings were put back, and the SFT report reused
    assert competing(instance, store) == {"dpo": "a" * 64}


def decided(instance, resources) -> tuple[Champion, dict[str, Any]]:
    """Materializes the decision; returns it with what Dagster shows of it."""
    done = dg.materialize([champion], partition_key="general", instance=instance, resources=resources)
    (event,) = done.get_asset_materialization_events()
    return done.output_for_node("champion"), {name: value.value for name, value in event.materialization.metadata.items()}


def test_a_candidate_that_passes_is_registered_and_becomes_champion(recorded, instance, store, resources):
    recorded(baseline(NEW), {})
    recorded(report("dpo", "a" * 64, **PASSING), {"sft_report": NEW})
    recorded(report("ppo", "b" * 64, **PASSING | {"evaluator/gain_low": -0.1, "evaluator/gain": 0.5}), {"sft_report": NEW})
    policy = report("dpo", "a" * 64).policy
    recorded(policy, {})
    decision, shown = decided(instance, resources)
    assert (decision.method, decision.promoted, decision.policy) == ("dpo", True, policy)
    assert shown["decision"] == "dpo: promoted"
    assert shown["registered"] == "aligned-policy-general version 1 (challenger, champion)"
    files = store.model_files(policy)
    assert (shown["policy"], shown["base"]) == (str(files.adapter), str(files.base))
    client = resources["tracking"].client()
    assert set(client.get_registered_model("aligned-policy-general").aliases) == {"challenger", "champion"}
    version = client.get_model_version_by_alias("aligned-policy-general", "champion")
    assert version.tags["alignment.fingerprint"] == policy.fingerprint
    # The policy's own run is not known to this database, so that the decision's run has its files.
    assert version.run_id == shown["mlflow_run_id"]
    logged = Path(resources["tracking"].artifact_root) / version.run_id / "artifacts" / "model" / "weights"
    assert logged.read_text() == "aligned_policy/dpo"


def test_without_a_report_nobody_is_promoted_and_nothing_registered(instance, resources):
    decision, shown = decided(instance, resources)
    assert (decision.method, decision.promoted, decision.policy) == (None, False, None)
    assert shown["decision"] == "no candidate: not promoted"
    assert not {"registered", "policy", "base"} & set(shown)
    assert not list(resources["tracking"].client().search_registered_models())
