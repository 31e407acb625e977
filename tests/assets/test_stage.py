"""What `materialize` does around a computation: `force` once per run, and the version of the data that an asset is made of."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from alignment.handles import Checkpoint, DataSource, PromptSet, SftReport
from alignment.models import Config, LoadSettings
from assets.stage import Outcome, Stage, Tools, data_version, materialize
from resources.artifacts import ArtifactStore, Work
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.tracking import MlflowTracking

ONE, TWO = "1" * 32, "2" * 32


class NoSettings(Config):
    """Nothing to set."""


@pytest.fixture
def resources(tmp_path: Path, empty_database: Path) -> dict[str, Any]:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    pin(tmp_path, ONE)
    return {
        "store": ArtifactStore(root=str(tmp_path / "artifacts")),
        "io_manager": HandleIOManager(root=str(tmp_path / "handles")),
        "dvc": DvcData(root=str(tmp_path)),
        "tracking": MlflowTracking(
            tracking_uri=f"sqlite:///{tmp_path / 'mlflow.db'}",
            artifact_root=str(tmp_path / "mlartifacts"),
            lock_folder=str(tmp_path / "locks"),
        ),
    }


def pin(folder: Path, md5: str) -> None:
    """What `dvc add data` leaves."""
    (folder / "data.dvc").write_text(f"outs:\n- md5: {md5}.dir\n  size: 1\n  nfiles: 1\n  hash: md5\n  path: data\n")


def run(assets: list, resources: dict[str, Any], **kwargs: Any) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        assets,
        resources=resources,
        instance=kwargs.pop("instance", dg.DagsterInstance.ephemeral()),
        raise_on_error=False,
        **kwargs,
    )


def stage(compute: Callable[[Work, Any], Outcome] = lambda work, log: Outcome(), **more: Any) -> Stage:
    return Stage(**{"kind": Checkpoint, "config": NoSettings(), "code_version": "1", "inputs": {}, "compute": compute, **more})


def test_a_forced_step_that_is_retried_goes_on_where_it_stopped(resources):
    attempts = []

    def compute(work: Work, log: Any) -> Outcome:
        attempts.append(work.resumed)
        if len(attempts) == 2:
            raise RuntimeError("an accident")
        return Outcome()

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=1))
    def trained(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        force = "forced" in context.run.tags
        return materialize(context, lambda: stage(compute), Tools(store, tracking, dvc), force=force)

    assert run([trained], resources).success
    assert attempts == [False]
    assert run([trained], resources, tags={"forced": "yes"}).success
    assert attempts == [False, False, True]  # computed anew, which failed, and resumed
    assert run([trained], resources).success
    assert len(attempts) == 3


def test_an_asset_says_the_version_of_the_data_that_it_is_made_of_not_of_the_data_there_is(resources, tmp_path):
    seen = {}

    @dg.asset
    def rows(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        data = [DataSource(name="prompts", source="data/prompts.jsonl", md5="a" * 32, rows=1)]
        return materialize(context, lambda: stage(kind=PromptSet, data=data), Tools(store, tracking, dvc))

    @dg.asset(deps=[rows])
    def meanwhile() -> None:
        if "change" not in seen:
            seen["change"] = True
            pin(tmp_path, TWO)  # somebody runs `dvc add data`

    @dg.asset(deps=[meanwhile])
    def trained(context: dg.AssetExecutionContext, rows: PromptSet, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        return materialize(context, lambda: stage(inputs={"rows": rows}), Tools(store, tracking, dvc))

    def version(done: dg.ExecuteInProcessResult) -> tuple[str, str, str]:
        handle = done.output_for_node("trained")
        store = resources["store"].process_config_and_initialize()
        tracking = resources["tracking"].process_config_and_initialize()
        (materialized,) = done.asset_materializations_for_node("trained")
        attempt = tracking.client().get_run(materialized.metadata["mlflow_run_id"].value)
        return handle.dvc_md5, attempt.data.tags["dvc.md5"], store.record("trained", handle.fingerprint).dvc_md5

    assert version(run([rows, meanwhile, trained], resources)) == (ONE, ONE, ONE)
    # Nothing that it is made of has changed: it is reused, and part of the new version as of the old.
    assert version(run([rows, meanwhile, trained], resources)) == (TWO, TWO, ONE)


def test_out_of_memory_on_the_gpu_is_said_once_with_what_to_lower(resources):
    attempts = []

    def compute(work: Work, log: Any) -> Outcome:
        import torch

        attempts.append(work)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 5.00 GiB.\nMore lines")

    @dg.asset(retry_policy=dg.RetryPolicy(max_retries=2))
    def trained(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        return materialize(context, lambda: stage(compute), Tools(store, tracking, dvc))

    done = run([trained], resources)
    assert not done.success
    assert len(attempts) == 1
    (failure,) = done.get_step_failure_events()
    description = failure.step_failure_data.user_failure_data.description
    assert description.startswith("out of GPU memory: CUDA out of memory. Tried to allocate 5.00 GiB. Remedy: lower this stage's")


class Loads(Config):
    """Settings of a stage that loads a model."""

    load: LoadSettings = LoadSettings(dtype="float32")


def test_a_runs_data_parents_precision_and_record_are_in_mlflow_also_where_it_is_reused(resources):
    file = DataSource(name="prompts", source="data/prompts.jsonl", md5="a" * 32, rows=7)

    @dg.asset
    def rows(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        return materialize(context, lambda: stage(kind=PromptSet, data=[file]), Tools(store, tracking, dvc))

    @dg.asset
    def trained(context: dg.AssetExecutionContext, rows: PromptSet, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        compute = lambda work, log: Outcome(facts={"source": "hub:somebody/model@1234", "files": ["a"]})  # noqa: E731
        return materialize(context, lambda: stage(compute, config=Loads(), inputs={"rows": rows}), Tools(store, tracking, dvc))

    @dg.asset
    def report(context: dg.AssetExecutionContext, rows: PromptSet, trained: Checkpoint, store: ArtifactStore,
               tracking: MlflowTracking, dvc: DvcData):  # fmt: skip
        inputs = {"rows": rows, "trained": trained}
        return materialize(context, lambda: stage(kind=SftReport, inputs=inputs), Tools(store, tracking, dvc))

    tracking = resources["tracking"].process_config_and_initialize()
    for reused in (False, True):
        done = run([rows, trained, report], resources)
        found = {}
        for asset in ("rows", "trained", "report"):
            (event,) = done.asset_materializations_for_node(asset)
            assert event.metadata["reused"].value is reused
            found[asset] = tracking.client().get_run(event.metadata["mlflow_run_id"].value)
            data = [
                (i.dataset.name, i.dataset.digest, i.tags[0].value, json.loads(i.dataset.source)["path"])
                for i in found[asset].inputs.dataset_inputs
            ]
            purpose = "evaluation" if asset == "report" else "training"
            assert data == [("prompts", f"dvc-{'a' * 32}", purpose, "data/prompts.jsonl")]
            artifact = mlflow_text(tracking, found[asset].info.run_id, "artifact.json")
            assert json.loads(artifact)["handle"]["fingerprint"] == found[asset].data.tags["alignment.fingerprint"]
        digest = {asset: attempt.data.tags["alignment.fingerprint"] for asset, attempt in found.items()}
        tags = found["report"].data.tags
        assert (tags["alignment.input.rows"], tags["alignment.input.trained"]) == (digest["rows"], digest["trained"])
        tags = found["trained"].data.tags
        assert (tags["alignment.source"], tags["alignment.dtype"]) == ("hub:somebody/model@1234", "float32")
        assert tags["alignment.device"]
        (event,) = done.asset_materializations_for_node("trained")
        assert event.metadata["source"].value == "hub:somebody/model@1234"


def mlflow_text(tracking: MlflowTracking, run_id: str, name: str) -> str:
    import mlflow

    path = mlflow.artifacts.download_artifacts(run_id=run_id, artifact_path=name, tracking_uri=tracking.tracking_uri)
    return Path(path).read_text()


def test_an_accident_is_told_to_mlflow_too(resources):
    def compute(work: Work, log: Any) -> Outcome:
        raise RuntimeError("the disk is full")

    @dg.asset
    def trained(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        return materialize(context, lambda: stage(compute), Tools(store, tracking, dvc))

    assert not run([trained], resources).success
    tracking = resources["tracking"].process_config_and_initialize()
    (attempt,) = tracking.client().search_runs([tracking.experiment_id], "tags.`alignment.level` = 'attempt'")
    assert attempt.data.tags["alignment.error"] == "RuntimeError: the disk is full"


def test_data_made_of_several_versions_names_each_once_and_files_elsewhere_have_none(tmp_path):
    pin(tmp_path, ONE)
    both, first = (PromptSet(asset="a", fingerprint="0", mlflow_run_id="r", dvc_md5=v) for v in (f"{ONE}, {TWO}", ONE))
    dvc = DvcData(root=str(tmp_path))
    assert data_version(stage(inputs={"both": both, "first": first}), dvc) == f"{ONE}, {TWO}"
    elsewhere = DataSource(name="mine", source="/home/me/mine.jsonl", md5="a" * 32, rows=1)
    assert data_version(stage(data=[elsewhere]), dvc) is None
