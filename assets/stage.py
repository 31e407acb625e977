"""What every asset does around its own computation: fingerprint, reuse, resume, MLflow, publish.

An asset body builds a `Stage` and calls `materialize`; this module holds the only copy of that choreography:

    fingerprint -> already published? reuse : build under a lock -> log to MLflow -> publish atomically -> handle -> alarms
"""

import base64
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import dagster as dg
from pydantic import ValidationError

from alignment.constitutions import Constitution
from alignment.errors import UserError
from alignment.fingerprint import fingerprint
from alignment.handles import AnyHandle, Checkpoint, DataSource, GeneratedData, Handle, PolicyReport, SftReport
from alignment.models import Config, resolve_dtype
from alignment.plots import Curves, curve_png
from alignment.progress import Log
from alignment.recipes import RecipeError, describe
from assets.checks import check_result, sound_alarms
from assets.settings import GPU_POOL
from resources.artifacts import ArtifactRecord, ArtifactStore, Work, file_hashes
from resources.dvc_data import DvcData, folder_md5
from resources.gpus import take_one_gpu
from resources.tracking import Attempt, DataInput, MlflowTracking, StepInfo

LESS_MEMORY = (
    "lower this stage's optim.micro_batch_size (without dropout the result stays the same) or its batch sizes of sampling and "
    "scoring, set optim.gradient_checkpointing: true, or load the model in 4 bit (load: {quantization: nf4})"
)
LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "bitsandbytes", "dagster", "mlflow", "dvc")


@dataclass
class Outcome:
    """What an asset's computation hands back; files it wrote to `Work.out` are published as they are."""

    metrics: Mapping[str, float] = field(default_factory=dict)
    curves: Curves = field(default_factory=dict)
    curve_names: Sequence[str] = ("loss",)
    tables: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    handle: Mapping[str, Any] = field(default_factory=dict)
    summary: str = ""


@dataclass(frozen=True)
class Stage:
    """One asset at one configuration: everything that decides its content, and how to compute it."""

    kind: type[Handle]
    config: Config
    code_version: str
    inputs: Mapping[str, Handle]
    compute: Callable[[Work, Log], Outcome]
    versions: Mapping[str, str] = field(default_factory=dict)
    constitution: Constitution | None = None
    data: Sequence[DataSource] = ()
    model_artifact: bool = False
    versioned: Sequence[str] = ()  # files of generated data that DVC is to version; the rows of the first are counted


@dataclass(frozen=True)
class Tools:
    """The resources an asset needs."""

    store: ArtifactStore
    tracking: MlflowTracking
    dvc: DvcData


def materialize(
    context: dg.AssetExecutionContext, stage: Callable[[], Stage], tools: Tools, *, force: bool = False
) -> dg.MaterializeResult:
    """Materialize an asset: reuse the published artifact of its fingerprint, or compute and publish it.

    Args:
        stage: builds the stage; errors in configuration and data that it raises end the step with one clear sentence.
        force: compute anew although an artifact exists.
    """
    begun = time.monotonic()
    asset = context.asset_key.to_user_string()
    step = _step_info(context, asset)
    tags = {"alignment.stage": asset.split("/")[0], "git.commit": git_commit() or "", "dvc.md5": ""}
    try:
        with user_errors():
            built = stage()
            made_of_data = data_version(built, tools.dvc)
            tags["dvc.md5"] = made_of_data or tools.dvc.md5()
    except dg.Failure as failure:
        with tools.tracking.attempt(step, tags) as attempt:
            attempt.tags({"alignment.error": str(failure.description)[:4000]})
            raise
    inputs = {name: handle.fingerprint for name, handle in built.inputs.items()} | dict(built.versions)
    digest = fingerprint(
        asset=asset,
        code_version=built.code_version,
        config=built.config,
        inputs=inputs,
        constitution=built.constitution.text if built.constitution else None,
    )
    tags["alignment.fingerprint"] = digest
    # A run has a partition even where its asset has none.
    partition = step.partition if context.assets_def.partitions_def else None
    with tools.tracking.attempt(step, tags) as attempt, user_errors(attempt):
        attempt.params(built.config.model_dump(mode="json"))
        attempt.inputs(_data_read(built))
        attempt.tags({f"alignment.input.{name}": handle.fingerprint for name, handle in built.inputs.items()})
        if force:
            tools.store.discard(asset, digest, asked_by=_asked_by(context), say=context.log.info)
        with tools.store.building(asset, digest) as work:
            reused = work is None
            if work is None:
                outcome = Outcome()
                context.log.info(f"reusing {asset} {digest[:12]}: nothing that decides it has changed")
            else:
                if work.resumed:
                    context.log.info(f"resuming {asset} {digest[:12]} from what an interrupted step left")
                if context.op_def.pool == GPU_POOL and (gpu := take_one_gpu()):
                    context.log.info(f"working on GPU {gpu}")
                log = Log(metrics=attempt.metrics, say=context.log.info)
                made_of = {data.md5: data for given in built.inputs.values() for data in given.generated}
                if built.model_artifact:
                    attempt.inputs([_input(data, "training") for data in made_of.values()])
                outcome = built.compute(work, log)
                if built.versioned:
                    data = generated_data(asset, partition, work.out, built.versioned)
                    made_of[data.md5] = data
                handle = built.kind(
                    asset=asset,
                    fingerprint=digest,
                    partition=partition,
                    mlflow_run_id=attempt.run_id,
                    metrics={k: float(v) for k, v in outcome.metrics.items()},
                    facts={**outcome.facts, **_computed_on(built.config)},
                    sources=tuple(built.data),
                    generated=tuple(made_of.values()),
                    dvc_md5=made_of_data,
                    **outcome.handle,
                )
                _log_outcome(attempt, built, outcome, work.out, asset)
                work.publish(
                    ArtifactRecord(
                        handle=handle.model_dump(mode="json"),
                        config=built.config.model_dump(mode="json"),
                        code_version=built.code_version,
                        inputs=inputs,
                        files=file_hashes(work.out),
                        versions=library_versions(),
                        git_commit=git_commit(),
                        dvc_md5=tags["dvc.md5"],
                        mlflow_run_id=attempt.run_id,
                        dagster_run_id=context.run_id,
                        seconds=round(time.monotonic() - begun, 2),
                        peak_memory_gb=peak_memory_gb(),
                    )
                )
        handle = tools.store.find(asset, digest)
        if handle is None:
            raise dg.Failure(f"{asset} {digest[:12]} vanished from the artifact store while it was materialized")
        handle = handle.model_copy(update={"dvc_md5": made_of_data, "sources": tuple(built.data)})
        if built.versioned:
            handle = _version(tools, built, handle, attempt, context.log.info)
        elif reused and built.model_artifact:
            attempt.inputs([_input(data, "training") for data in handle.generated])
        attempt.tags({"alignment.reused": str(reused).lower(), "alignment.computed_by": handle.mlflow_run_id})
        attempt.tags({f"alignment.{name}": value for name, value in _texts(handle.facts).items()})
        attempt.final(handle.metrics)
        attempt.file(tools.store.path(handle) / "artifact.json")
        alarms = sound_alarms(handle, built.config.model_dump(mode="json"))
        attempt.tags({"alignment.alarms": ", ".join(alarm.name for alarm in alarms if alarm.fired)})
        for alarm in alarms:
            if alarm.fired:
                context.log.warning(f"alarm: {asset}: {alarm.name}: {alarm.reason}")
        metadata = _metadata(tools, handle, attempt, reused, time.monotonic() - begun, outcome)
        curve = tools.store.path(handle) / "curve.png"
        if curve.exists():
            picture = base64.b64encode(curve.read_bytes()).decode()
            metadata = {"curve": dg.MetadataValue.md(f"![curve](data:image/png;base64,{picture})"), **metadata}
    return dg.MaterializeResult(
        value=handle,
        metadata=metadata,
        data_version=dg.DataVersion(digest),
        check_results=[check_result(alarm) for alarm in alarms],
    )


def generated_data(asset: str, partition: str | None, folder: Path, names: Sequence[str]) -> GeneratedData:
    """The named files of a folder as one data set at its DVC version."""
    md5 = folder_md5(folder, names)
    with (folder / names[0]).open("rb") as file:
        rows = sum(1 for line in file if line.strip())
    place = f"{asset}/{partition}" if partition else asset
    return GeneratedData(name=asset, pointer=f"generated/{place}/{md5[:12]}.dvc", md5=md5, rows=rows)


def data_version(stage: Stage, dvc: DvcData) -> str | None:
    """md5 of the `data/` that an asset is made of: what its inputs were made of, which `data.dvc` may have left behind since.

    Several, with commas between, where inputs were made of several versions; None for what is made of no data.
    """
    versions = {version for given in stage.inputs.values() if given.dvc_md5 for version in given.dvc_md5.split(", ")}
    if any(source.source.startswith("data/") for source in stage.data):
        versions.add(dvc.md5())
    return ", ".join(sorted(versions)) or None


def checked_config(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The pure configuration behind a launchpad's values, bounds checked.

    Raises:
        RecipeError: one sentence per faulty key.
    """
    try:
        return kind.model_validate({k: v for k, v in values.items() if k != "force"})
    except ValidationError as error:
        raise RecipeError(f"run config: {describe(error)}") from error


class user_errors:
    """Turns errors that a retry cannot mend into one clear failure of the step; every error is told to the MLflow run."""

    def __init__(self, attempt: Attempt | None = None) -> None:
        self._attempt = attempt

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        problem = None
        if isinstance(error, UserError):
            problem = str(error)
        elif type(error).__name__ == "OutOfMemoryError":  # torch's; torch itself is not imported for it
            problem = f"out of GPU memory: {str(error).splitlines()[0]} Remedy: {LESS_MEMORY}."
        if self._attempt and isinstance(error, Exception):
            self._attempt.tags({"alignment.error": (problem or f"{type(error).__name__}: {error}")[:4000]})
        if problem:
            raise dg.Failure(problem, allow_retries=False) from error


@cache
def git_commit() -> str | None:
    """The commit of this checkout, with `-dirty` when tracked files were changed; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() or None


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide results."""
    out = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            out[name] = version(name)
        except PackageNotFoundError:
            continue
    return out


def peak_memory_gb() -> float:
    """The largest resident size of this process so far, in GB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 3)


def peak_gpu_memory_gb() -> dict[str, float]:
    """The most GPU memory that tensors of this process took at once so far, in GB, by its name; nothing where it uses no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"peak_gpu_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3)}


def _step_info(context: dg.AssetExecutionContext, asset: str) -> StepInfo:
    run = context.run
    ui = os.environ.get("DAGSTER_UI_URL", "http://127.0.0.1:3000")
    return StepInfo(
        run_id=run.run_id,
        root_run_id=run.root_run_id or run.run_id,
        job=run.job_name,
        asset=asset,
        partition=context.partition_key if context.has_partition_key else None,
        retry_number=context.retry_number,
        run_url=f"{ui}/runs/{run.run_id}",
    )


def _asked_by(context: dg.AssetExecutionContext) -> str:
    # A run that goes on from where another failed asks for nothing new; one that repeats all of it does.
    run = context.run
    goes_on = "true" in (run.tags.get("dagster/is_resume_retry"), run.tags.get("dagster/is_asset_resume_retry"))
    return run.root_run_id if goes_on and run.root_run_id else run.run_id


def _version(tools: Tools, stage: Stage, handle: AnyHandle, attempt: Attempt, say: Callable[[str], None]) -> AnyHandle:
    """Have the artifact's generated data versioned by DVC, and the pointer in MLflow; also when the artifact is reused, since
    cache and pointer may have been deleted. Returns the handle with the version, which artifacts of older code lack."""
    data = generated_data(handle.asset, handle.partition, tools.store.path(handle), stage.versioned)
    pointer = tools.dvc.version(tools.store.path(handle), stage.versioned, data.pointer)
    say(f"versioned by DVC: {data.pointer} ({data.rows} rows)")
    attempt.file(pointer, "dvc")
    attempt.tags({"dvc.generated_md5": data.md5, "dvc.pointer": data.pointer})
    attempt.inputs([_input(data, "generated")])
    others = tuple(g for g in handle.generated if g.md5 != data.md5)
    return handle.model_copy(update={"generated": (*others, data)})


def _data_read(stage: Stage) -> list[DataInput]:
    """The files that a stage reads, itself or as one of its data sets; other models' data is named by the runs of these."""
    context = "evaluation" if issubclass(stage.kind, SftReport | PolicyReport) else "training"
    sources = [*stage.data, *(source for given in stage.inputs.values() for source in given.sources)]
    return [DataInput(s.name, s.source, s.md5, s.rows, context) for s in dict.fromkeys(sources)]


def _input(data: GeneratedData, context: str) -> DataInput:
    return DataInput(data.name, data.pointer, data.md5, data.rows, context)


def _computed_on(config: Config) -> dict[str, str]:
    """The device that models ran on and the precision they were loaded in; both are outside the fingerprint."""
    load = getattr(config, "load", None)
    if load is None:
        return {}
    import torch

    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    return {"device": name, "dtype": str(resolve_dtype(load.dtype)).removeprefix("torch.")}


def _texts(facts: Mapping[str, Any]) -> dict[str, str]:
    return {name: value for name, value in facts.items() if isinstance(value, str)}


def _log_outcome(attempt: Attempt, stage: Stage, outcome: Outcome, out: Path, asset: str) -> None:
    for name, rows in outcome.tables.items():
        attempt.table(rows, name)
    png = curve_png(outcome.curves, asset, outcome.curve_names)
    if png:
        (out / "curve.png").write_bytes(png)
        attempt.file(out / "curve.png", "plots")
    if stage.model_artifact:
        attempt.folder(out / "model", "model")


def _metadata(
    tools: Tools, handle: AnyHandle, attempt: Attempt, reused: bool, seconds: float, outcome: Outcome
) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "fingerprint": handle.fingerprint,
        "reused": reused,
        "seconds": round(seconds, 2),
        "peak_memory_gb": peak_memory_gb(),
        **peak_gpu_memory_gb(),
        "mlflow_run": dg.MetadataValue.url(tools.tracking.run_url(attempt.run_id)),
        "mlflow_run_id": attempt.run_id,
        "artifact": dg.MetadataValue.path(str(tools.store.path(handle))),
        **_texts(handle.facts),
        **{name: float(value) for name, value in handle.metrics.items()},
    }
    if isinstance(handle, Checkpoint) and handle.adapter_of:
        metadata["adapter_of"] = handle.adapter_of.fingerprint
    if own := next((data for data in handle.generated if data.name == handle.asset), None):
        metadata["dvc_pointer"] = own.pointer
    if outcome.summary:
        metadata["summary"] = dg.MetadataValue.md(outcome.summary)
    return metadata
