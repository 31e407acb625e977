"""What `materialize` does around a computation: `force` once per run, and the version of the data that an asset is made of."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from alignment.handles import Checkpoint, PromptSet
from alignment.models import Config
from assets.stage import Outcome, Stage, Tools, materialize
from resources.artifacts import ArtifactStore, Work
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.tracking import DataInput, MlflowTracking

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
        data = [DataInput("prompts", "data/prompts.jsonl", "a" * 32, 1)]
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
