"""Handles between steps: each kind comes back as its own class, per asset and partition."""

import json
from pathlib import Path

import dagster as dg
import pytest

from alignment.handles import (
    Champion,
    Checkpoint,
    Handle,
    PolicyReport,
    PreferenceDataset,
    PromptSet,
    RewardModel,
    SftDataset,
)
from resources.handle_io import HandleIOManager

COMMON = {"asset": "made", "fingerprint": "f" * 64, "mlflow_run_id": "r", "metrics": {"final": 0.5}, "facts": {"n": [1]}}
BASE = Checkpoint(**{**COMMON, "asset": "base_model"})
POLICY = Checkpoint(**{**COMMON, "asset": "aligned_policy/dpo", "partition": "general"}, adapter_of=BASE)
HANDLES: list[Handle] = [
    SftDataset(**COMMON),
    PreferenceDataset(**COMMON),
    PromptSet(**COMMON),
    BASE,
    POLICY,
    RewardModel(**COMMON, adapter_of=BASE),
    PolicyReport(**COMMON, method="dpo", policy=POLICY),
    Champion(**COMMON, method="dpo", promoted=True, policy=POLICY),
    Champion(**COMMON, promoted=False),
]
PARTITIONS = dg.StaticPartitionsDefinition(["coding", "general"])


def run(assets: list, folder: Path, **kwargs) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        assets,
        resources={"io_manager": HandleIOManager(root=str(folder))},
        instance=dg.DagsterInstance.ephemeral(),
        raise_on_error=False,
        **kwargs,
    )


@pytest.mark.parametrize("handle", HANDLES, ids=lambda h: h.kind)
def test_every_kind_comes_back_as_itself(tmp_path, handle):
    read = []

    @dg.asset(key_prefix="group")
    def made():
        return handle

    @dg.asset(ins={"made": dg.AssetIn(key=["group", "made"])})
    def used(made) -> None:
        read.append(made)

    assert run([made, used], tmp_path, selection=[made]).success
    assert [p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()] == ["group/made.json"]
    assert run([made, used], tmp_path, selection=[used]).success  # loaded by another run, as in a new process
    assert read == [handle]
    assert type(read[0]) is type(handle)


def test_partitions_are_files_of_their_own_and_shared_assets_feed_all(tmp_path):
    read = {}

    @dg.asset
    def shared():
        return BASE

    @dg.asset(partitions_def=PARTITIONS)
    def each(context: dg.AssetExecutionContext, shared):
        assert shared == BASE
        return POLICY.model_copy(update={"partition": context.partition_key})

    @dg.asset(partitions_def=PARTITIONS)
    def used(context: dg.AssetExecutionContext, each) -> None:
        read[context.partition_key] = each.partition

    for partition in ("coding", "general"):
        assert run([shared, each, used], tmp_path, partition_key=partition).success
    assert read == {"coding": "coding", "general": "general"}
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.json")) == [
        "each/coding.json",
        "each/general.json",
        "shared.json",
    ]
    assert json.loads((tmp_path / "each" / "coding.json").read_text())["partition"] == "coding"


def test_an_input_that_was_never_materialized_is_one_clear_failure_without_retry(tmp_path):
    @dg.asset(partitions_def=PARTITIONS)
    def each(context: dg.AssetExecutionContext):
        return POLICY

    @dg.asset(partitions_def=PARTITIONS, retry_policy=dg.RetryPolicy(max_retries=2))
    def used(each) -> None: ...

    done = run([each, used], tmp_path, partition_key="general", selection=[used])
    assert not done.success
    (failure,) = done.get_step_failure_events()
    description = failure.step_failure_data.user_failure_data.description
    assert "each has not been materialized for partition 'general'" in description
    assert "Remedy: materialize it first" in description
    assert not [e for e in done.all_events if e.event_type_value == "STEP_UP_FOR_RETRY"]


def test_a_value_that_is_no_handle_is_refused(tmp_path):
    @dg.asset
    def made():
        return {"path": "/somewhere"}

    done = run([made], tmp_path)
    assert not done.success
    assert "made must return a handle, got dict" in str(done.get_step_failure_events()[0].step_failure_data.error)
    assert list(tmp_path.rglob("*.json")) == []
