"""Handles between steps: each kind comes back as its own class, per asset and partition."""

import json
import os
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run

from alignment.handles import Champion, Checkpoint, Handle, PolicyReport, RewardModel
from resources.handle_io import HandleIOManager

COMMON = {"asset": "made", "fingerprint": "f" * 64, "mlflow_run_id": "r", "metrics": {"final": 0.5}, "facts": {"n": [1]}}
BASE = Checkpoint(**{**COMMON, "asset": "base_model"})
POLICY = Checkpoint(**{**COMMON, "asset": "aligned_policy/dpo", "partition": "general"}, adapter_of=BASE)
OF_A_KIND = {  # what only handles of this kind have
    RewardModel: {"adapter_of": BASE},
    PolicyReport: {"method": "dpo", "policy": POLICY},
    Champion: {"method": "dpo", "promoted": True, "policy": POLICY},
}
EVERY_KIND = [kind(**COMMON, **OF_A_KIND.get(kind, {})) for kind in Handle.__subclasses__()]
HANDLES = [*EVERY_KIND, POLICY, Champion(**COMMON, promoted=False)]
PARTITIONS = dg.StaticPartitionsDefinition(["coding", "general"])


def run(assets: list, folder: Path, **kwargs) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        assets,
        resources={"io_manager": HandleIOManager(root=str(folder))},
        instance=dg.DagsterInstance.ephemeral(),
        raise_on_error=False,
        **kwargs,
    )


def files(folder: Path) -> list[str]:
    """All files but those that runs keep to themselves."""
    found = [p.relative_to(folder) for p in folder.rglob("*") if p.is_file()]
    return sorted(p.as_posix() for p in found if p.parts[0] != ".runs")


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
    assert files(tmp_path) == ["group/made.json"]
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
    assert files(tmp_path) == ["each/coding.json", "each/general.json", "shared.json"]
    assert json.loads((tmp_path / "each" / "coding.json").read_text())["partition"] == "coding"


def test_a_run_goes_on_with_its_own_handles_whatever_others_materialize_meanwhile(tmp_path):
    read = []

    @dg.asset
    def made(context: dg.AssetExecutionContext):
        return BASE.model_copy(update={"mlflow_run_id": context.run_id})

    @dg.asset(deps=[made])
    def meanwhile(context: dg.AssetExecutionContext) -> None:
        if "other" not in context.run.tags:
            assert run([made], tmp_path, tags={"other": "yes"}).success

    @dg.asset(deps=[meanwhile])
    def used(context: dg.AssetExecutionContext, made) -> None:
        read.append((context.run_id, made.mlflow_run_id))

    first = run([made, meanwhile, used], tmp_path)
    assert first.success
    assert read == [(first.run_id, first.run_id)]
    # A later run that does not make it reads what was materialized last: by the other run.
    assert run([made, meanwhile, used], tmp_path, selection=[used]).success
    assert read[1][1] not in {first.run_id, read[1][0]}


class Repeated:
    """A job whose run fails, to be executed again in part, on an instance of its own."""

    def __init__(self, folder: Path, *assets: dg.AssetsDefinition) -> None:
        resources = {"io_manager": HandleIOManager(root=str(folder))}
        jobs = [dg.define_asset_job("job", executor_def=dg.in_process_executor)]
        self.job = dg.Definitions(assets, jobs=jobs, resources=resources).resolve_job_def("job")
        self.instance = dg.DagsterInstance.ephemeral()

    def materialize(self, *keys: str) -> dg.ExecuteInProcessResult:
        selection = [dg.AssetKey(key) for key in keys] or None
        return self.job.execute_in_process(instance=self.instance, raise_on_error=False, asset_selection=selection)

    def again(self, first: dg.ExecuteInProcessResult, *keys: str) -> list[str]:
        """Executes these assets of a run again; what the log says of handles."""
        job = self.job.get_subset(asset_selection={dg.AssetKey(key) for key in keys})
        repeated = self.instance.create_run_for_job(job, parent_run_id=first.run_id, root_run_id=first.run_id)
        assert execute_run(InMemoryJob(job), repeated, self.instance).success
        return [e.user_message for e in self.instance.all_logs(repeated.run_id) if e.user_message.startswith("made: as run ")]


def test_a_re_executed_run_goes_on_with_the_handles_of_the_run_it_repeats(tmp_path):
    read, fails = [], [True]

    @dg.asset
    def made(context: dg.AssetExecutionContext):
        return BASE.model_copy(update={"mlflow_run_id": context.run_id})

    @dg.asset
    def used(made) -> None:
        if fails:
            assert pipeline.materialize("made").success  # somebody else's, at once with this run
            raise RuntimeError("an accident")
        read.append(made.mlflow_run_id)

    pipeline = Repeated(tmp_path, made, used)
    first = pipeline.materialize()
    assert not first.success
    fails.clear()
    (said,) = pipeline.again(first, "used")
    assert read == [first.run_id]
    assert first.run_id in said


def test_a_re_executed_run_reads_what_was_made_since_the_run_it_repeats_had_ended(tmp_path):
    read, fails = [], [True]

    @dg.asset
    def made(context: dg.AssetExecutionContext):
        return BASE.model_copy(update={"mlflow_run_id": context.run_id})

    @dg.asset
    def used(made) -> None:
        if fails:
            raise RuntimeError("settings to be mended upstream")
        read.append(made.mlflow_run_id)
        assert pipeline.materialize("made").success  # somebody else's, at once with this run

    @dg.asset(deps=[used])
    def used_later(made) -> None:
        read.append(made.mlflow_run_id)

    pipeline = Repeated(tmp_path, made, used, used_later)
    first = pipeline.materialize()
    assert not first.success
    mended = pipeline.materialize("made")
    fails.clear()
    said = pipeline.again(first, "used", "used_later")
    assert read == [mended.run_id] * 2
    assert said[0] == f"made: as run {mended.run_id} has made it since run {first.run_id} ended"


def test_what_a_run_makes_that_was_under_way_when_the_repeated_one_failed_is_not_read(tmp_path):
    read, first = [], []

    @dg.asset
    def meanwhile() -> None:
        first.append(pipeline.materialize("made", "used"))

    @dg.asset(deps=[meanwhile])
    def made(context: dg.AssetExecutionContext):
        return BASE.model_copy(update={"mlflow_run_id": context.run_id})

    @dg.asset
    def used(made) -> None:
        if not first:
            raise RuntimeError("an accident")
        read.append(made.mlflow_run_id)

    pipeline = Repeated(tmp_path, meanwhile, made, used)
    assert pipeline.materialize("meanwhile", "made").success  # of other settings, perhaps
    pipeline.again(first[0], "used")
    assert read == [first[0].run_id]


def test_a_value_is_loaded_without_a_run_as_in_a_notebook(tmp_path):
    @dg.asset
    def made():
        return BASE

    @dg.asset(partitions_def=PARTITIONS)
    def each(context: dg.AssetExecutionContext):
        return POLICY.model_copy(update={"partition": context.partition_key})

    assert run([made, each], tmp_path, partition_key="general").success
    defs = dg.Definitions([made, each], resources={"io_manager": HandleIOManager(root=str(tmp_path))})
    assert defs.load_asset_value("made") == BASE
    assert defs.load_asset_value("each", partition_key="general").partition == "general"
    with pytest.raises(dg.Failure, match="each has not been materialized for partition 'coding'"):
        defs.load_asset_value("each", partition_key="coding")


def test_handles_of_runs_long_past_are_forgotten(tmp_path):
    @dg.asset
    def made():
        return BASE

    first = run([made], tmp_path)
    for path in (tmp_path / ".runs").rglob("*"):
        os.utime(path, (time.time() - 31 * 24 * 3600,) * 2)
    second = run([made], tmp_path)
    assert {p.name for p in (tmp_path / ".runs").iterdir()} == {second.run_id}
    assert first.run_id != second.run_id
    assert files(tmp_path) == ["made.json"]


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
