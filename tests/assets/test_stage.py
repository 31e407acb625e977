"""What `materialize` does around a computation: `force` once per run, a GPU of its own for the step, and where the asset comes
from: the commit, and the version of the data."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import pytest
from dagster._core.definitions.job_base import InMemoryJob
from dagster._core.execution.api import execute_run
from dagster._core.storage.tags import ASSET_RESUME_RETRY_TAG, RESUME_RETRY_TAG

from alignment.handles import Checkpoint, DataSource, PromptSet, SftReport
from alignment.models import Config, LoadSettings
from assets.settings import GPU_POOL
from assets.stage import Outcome, Stage, Tools, data_version, git_commit, materialize, peak_gpu_memory_gb
from resources.artifacts import ArtifactStore, Work
from resources.dvc_data import DvcData
from resources.gpus import VISIBLE
from resources.tracking import MlflowTracking

ONE, TWO = "1" * 32, "2" * 32


class NoSettings(Config):
    """Nothing to set."""


@pytest.fixture
def resources(resources: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """With a `data.dvc` of our own."""
    pin(tmp_path, ONE)
    return {**resources, "dvc": DvcData(root=str(tmp_path))}


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


def test_a_forced_run_that_is_re_executed_from_failure_goes_on_where_it_stopped(resources):
    attempts = []

    def compute(work: Work, log: Any) -> Outcome:
        attempts.append(work.resumed)
        if len(attempts) in (2, 3):
            raise RuntimeError("an accident")
        return Outcome()

    @dg.asset
    def trained(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
        force = "forced" in context.run.tags
        return materialize(context, lambda: stage(compute), Tools(store, tracking, dvc), force=force)

    jobs = [dg.define_asset_job("job", executor_def=dg.in_process_executor)]
    job = dg.Definitions([trained], jobs=jobs, resources=resources).resolve_job_def("job")
    instance, forced = dg.DagsterInstance.ephemeral(), {"forced": "yes"}
    assert job.execute_in_process(instance=instance).success
    failed = job.execute_in_process(instance=instance, tags=forced, raise_on_error=False).run_id

    def again(**tags: str) -> bool:
        repeated = instance.create_run_for_job(job, parent_run_id=failed, root_run_id=failed, tags=forced | tags)
        return execute_run(InMemoryJob(job), repeated, instance, raise_on_error=False).success

    assert not again(**{RESUME_RETRY_TAG: "true"})
    assert again(**{ASSET_RESUME_RETRY_TAG: "true"})
    assert attempts == [False, False, True, True]
    assert again()  # all of it, which is a re-execution, too
    assert attempts == [False, False, True, True, False]


def test_a_step_of_the_pool_has_a_gpu_of_its_own_if_it_computes_something(resources, tmp_path, monkeypatch):
    monkeypatch.setenv("ALIGNMENT_STORAGE", str(tmp_path))
    monkeypatch.setattr("resources.gpus._held", [])
    seen = []

    def asset(name: str, pool: str | None) -> dg.AssetsDefinition:
        @dg.asset(name=name, pool=pool)
        def _asset(context: dg.AssetExecutionContext, store: ArtifactStore, tracking: MlflowTracking, dvc: DvcData):
            def compute(work: Work, log: Any) -> Outcome:
                seen.append(os.environ[VISIBLE])
                return Outcome()

            return materialize(context, lambda: stage(compute), Tools(store, tracking, dvc))

        return _asset

    for name, pool, left in (("read", None, "0,1"), ("trained", GPU_POOL, "0"), ("trained", GPU_POOL, "0,1")):
        monkeypatch.setenv(VISIBLE, "0,1")
        assert run([asset(name, pool)], resources).success
        assert os.environ[VISIBLE] == left
    assert seen == ["0,1", "0"]  # the last is reused


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


def test_the_commit_of_the_checkout_is_known_and_whether_it_was_changed(tmp_path, monkeypatch):
    folder = tmp_path / "checkout"
    folder.mkdir()
    monkeypatch.setattr("assets.stage.__file__", str(folder / "stage.py"))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    assert git_commit.__wrapped__() is None

    def git(*command: str) -> str:
        settings = ("-c", "user.name=n", "-c", "user.email=e", "-c", "commit.gpgsign=false", "-c", "tag.gpgsign=false")
        return subprocess.run(["git", *settings, *command], cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    git("init")
    (folder / "stage.py").write_text("one")
    git("add", "stage.py")
    git("commit", "-m", "first")
    git("tag", "--annotate", "v1", "-m", "a tag may be moved")
    head = git("rev-parse", "HEAD")
    assert len(head) == 40
    (folder / "notes.txt").write_text("of no commit")
    assert git_commit.__wrapped__() == head
    (folder / "stage.py").write_text("two")
    assert git_commit.__wrapped__() == f"{head}-dirty"


def test_gpu_memory_is_reported_where_a_gpu_is_used_and_nowhere_else(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace()))
    for used, told in ((True, {"peak_gpu_memory_gb": 1.5}), (False, {})):
        sys.modules["torch"].cuda = SimpleNamespace(is_initialized=lambda used=used: used, max_memory_allocated=lambda: 1.5e9)
        assert peak_gpu_memory_gb() == told
    monkeypatch.delitem(sys.modules, "torch")
    assert peak_gpu_memory_gb() == {}
