"""MLflow: one parent run per Dagster run, one child run per attempt at an asset.

The parent is looked up by the tag `dagster.root_run_id` (so that a re-execution joins the run it repeats) under a file
lock, and created if absent; on a server, whose clients no lock of ours keeps apart, whoever created one looks again after two
seconds, and the oldest stays. A new child per attempt, since MLflow's parameters are immutable; when a child ends, the
parent's status follows from the latest attempt at each asset. An attempt holds a lock of its own for as long as its
process lives; the next attempt at the same asset, in whatever run, finds the locks of the dead free and closes their runs.
Everything goes through MlflowClient, never through the global active run: several steps may share a process, and
third-party callbacks must not find a run to write into.
"""

import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock, Timeout
from pydantic import PrivateAttr

from resources.paths import is_database

EXPERIMENT = "alignment"
ROOT_RUN = "dagster.root_run_id"
LEVEL = "alignment.level"
ALIVE = "alignment.lock"
DECISION = "alignment.decision"
_OTHER_HOSTS = 2.0  # seconds in which a step on another host may create the same run's parent


@dataclass(frozen=True)
class StepInfo:
    """Which step of which Dagster run an attempt belongs to."""

    run_id: str
    root_run_id: str
    job: str
    asset: str
    partition: str | None
    retry_number: int
    run_url: str


@dataclass(frozen=True)
class DataInput:
    """A data set a run reads: its name, the file, and the md5 DVC knows it by."""

    name: str
    source: str
    md5: str
    rows: int
    context: str = "training"


class Attempt:
    """One child run. All methods may be called until the run ends; none of them is kept in memory."""

    def __init__(self, client: Any, run_id: str) -> None:
        self._client, self.run_id = client, run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """The resolved configuration, nested keys joined with dots."""
        from mlflow.entities import Param

        flat = [Param(k, str(v)[:6000]) for k, v in flatten(values).items()]
        for start in range(0, len(flat), 100):
            self._client.log_batch(self.run_id, params=flat[start : start + 100])

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Metrics of one optimiser step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self.run_id, metrics=[Metric(k, v, now, step) for k, v in values.items()])

    def final(self, values: Mapping[str, float]) -> None:
        """The metrics that runs are compared by, under `final/`."""
        self.metrics(0, {f"final/{k}": v for k, v in values.items()})

    def tags(self, values: Mapping[str, str]) -> None:
        """Further tags."""
        from mlflow.entities import RunTag

        self._client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in values.items()])

    def inputs(self, data: Sequence[DataInput]) -> None:
        """Data sets read, with digest `dvc-<md5>`."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entities = [
            DatasetInput(
                Dataset(
                    name=d.name,
                    digest=f"dvc-{d.md5}",
                    source_type="dvc",
                    source=json.dumps({"path": d.source}),
                    profile=json.dumps({"num_rows": d.rows}),
                ),
                [InputTag("mlflow.data.context", d.context)],
            )
            for d in data
        ]
        if entities:
            self._client.log_inputs(self.run_id, datasets=entities)

    def table(self, rows: Sequence[Mapping[str, Any]], name: str) -> None:
        """A table that MLflow's evaluation view shows run beside run."""
        if rows:
            columns = {key: [row.get(key) for row in rows] for key in rows[0]}
            self._client.log_table(self.run_id, data=columns, artifact_file=f"{name}.json")

    def file(self, path: Path, folder: str | None = None) -> None:
        """One artifact file."""
        self._client.log_artifact(self.run_id, str(path), folder)

    def folder(self, path: Path, name: str) -> None:
        """A folder of artifacts."""
        self._client.log_artifacts(self.run_id, str(path), name)


class MlflowTracking(dg.ConfigurableResource):
    """The MLflow server or database that runs are logged to."""

    tracking_uri: str
    artifact_root: str
    lock_folder: str
    experiment: str = EXPERIMENT
    ui_url: str = "http://127.0.0.1:5000"
    _client: Any = PrivateAttr(default=None)
    _experiment_id: str = PrivateAttr(default="")

    @contextmanager
    def attempt(self, info: StepInfo, tags: Mapping[str, str]) -> Iterator[Attempt]:
        """A child run for one attempt at an asset; FAILED if the block raises, FINISHED otherwise."""
        client, name = self.client(), f"{uuid.uuid4().hex}.lock"
        # Held before the run exists: whoever finds it free while the run is RUNNING knows that this process is dead.
        with FileLock(self._locks() / name):
            with self._lock():
                parent = self._parent(info)
                self._close_dead_attempts(info)
                child = client.create_run(
                    self._experiment_id,
                    run_name=f"{info.asset}[{info.partition}]" if info.partition else info.asset,
                    tags={
                        "mlflow.parentRunId": parent,
                        "mlflow.source.name": info.job,
                        "mlflow.source.type": "JOB",
                        LEVEL: "attempt",
                        ALIVE: name,
                        "dagster.run_id": info.run_id,
                        ROOT_RUN: info.root_run_id,
                        "dagster.asset_key": info.asset,
                        "dagster.partition": info.partition or "",
                        "dagster.retry_number": str(info.retry_number),
                        "dagster.run_url": info.run_url,
                        **tags,
                    },
                ).info.run_id
                client.update_run(parent, status="RUNNING")
            try:
                yield Attempt(client, child)
            except BaseException:
                self._end(child, parent, "FAILED", name)
                raise
            self._end(child, parent, "FINISHED", name)

    def run_url(self, run_id: str) -> str:
        """Address of a run in MLflow's UI."""
        self.client()
        return f"{self.ui_url}/#/experiments/{self._experiment_id}/runs/{run_id}"

    def register(
        self,
        constitution: str,
        run_id: str,
        fingerprint: str,
        *,
        decision: str,
        promoted: bool,
        description: str,
        model: Path,
        attempt: str,
        again: bool = False,
    ) -> tuple[str, list[str]]:
        """Make a run's `model/` a version of `aligned-policy-<constitution>` and set its aliases, once per decision.

        The same policy is registered once. A decision that was the last one carried out is not carried out again when it is
        reused: the aliases may have been moved by hand since, to go back to an older version. After another decision it is, as
        when data or settings are put back. What a kill left undone is done.

        Args:
            run_id: the run that computed the policy; it may be unknown here, where the policy was reused from the artifact
                store and the tracking server is another than then.
            fingerprint: the policy's.
            decision: fingerprint of the decision.
            promoted: whether the alias `champion` goes to it as well as `challenger`.
            model: the policy's folder in the artifact store.
            attempt: the run that `model` is logged to where `run_id` is unknown.
            again: carry the decision out although it was the last one.

        Returns:
            The version, and the aliases it has now.
        """
        from mlflow.exceptions import MlflowException

        client, name = self.client(), f"aligned-policy-{constitution}"
        with self._lock():
            try:
                client.create_registered_model(name, description=f"Policies aligned with conf/constitutions/{constitution}.yaml")
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            for known in client.search_model_versions(f"name = '{name}'"):
                if known.tags.get("alignment.fingerprint") == fingerprint:
                    found = known
                    break
            else:
                if not self._knows(run_id):
                    client.log_artifacts(attempt, str(model), "model")
                    run_id = attempt
                found = client.create_model_version(
                    name,
                    source=f"runs:/{run_id}/model",
                    run_id=run_id,
                    tags={"alignment.fingerprint": fingerprint},
                    description=description,
                )
            if again or client.get_registered_model(name).tags.get(DECISION) != decision:
                client.set_registered_model_alias(name, "challenger", found.version)
                if promoted:
                    client.set_registered_model_alias(name, "champion", found.version)
                verdict = "promoted" if promoted else "refused"
                client.set_model_version_tag(name, found.version, f"{DECISION}.{decision[:12]}", verdict)
                client.set_registered_model_tag(name, DECISION, decision)
            aliases = sorted(client.get_model_version(name, found.version).aliases)
        return str(found.version), aliases

    def client(self) -> Any:
        """The MlflowClient, its experiment made sure of."""
        if self._client is None:
            import mlflow

            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            # The first connection to a fresh database creates its tables, which is not safe for several processes.
            with self._lock():
                client = mlflow.MlflowClient(tracking_uri=self.tracking_uri, registry_uri=self.tracking_uri)
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    # A server decides itself where artifacts go; beside a database nobody does.
                    location = _uri(self.artifact_root) if is_database(self.tracking_uri) else None
                    self._experiment_id = client.create_experiment(self.experiment, artifact_location=location)
                else:
                    self._experiment_id = found.experiment_id
                self._client = client
        return self._client

    def _knows(self, run_id: str) -> bool:
        from mlflow.exceptions import MlflowException

        try:
            self.client().get_run(run_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return False
            raise
        return True

    @property
    def experiment_id(self) -> str:
        """Id of the experiment `alignment`."""
        self.client()
        return self._experiment_id

    def _lock(self) -> FileLock:
        folder = Path(self.lock_folder)
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / "mlflow.lock", is_singleton=True)

    def _locks(self) -> Path:
        folder = Path(self.lock_folder) / "attempts"
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _parent(self, info: StepInfo) -> str:
        if oldest := self._oldest_parent(info):
            return oldest
        name = f"{info.job}[{info.partition}]" if info.partition else info.job
        tags = {
            LEVEL: "run",
            ROOT_RUN: info.root_run_id,
            "dagster.run_id": info.run_id,
            "dagster.partition": info.partition or "",
            "dagster.run_url": info.run_url,
        }
        created = self._client.create_run(self._experiment_id, run_name=name, tags=tags).info.run_id
        if not self._on_one_host():
            time.sleep(_OTHER_HOSTS)
            oldest = self._oldest_parent(info) or created
            if oldest != created:
                self._client.delete_run(created)
                return oldest
        return created

    def _on_one_host(self) -> bool:
        # A file's lock is then a lock for all.
        return self.tracking_uri.startswith("sqlite")

    def _oldest_parent(self, info: StepInfo) -> str | None:
        filters = f"tags.`{ROOT_RUN}` = '{info.root_run_id}' and tags.`{LEVEL}` = 'run'"
        found = [run.info for run in self._client.search_runs([self._experiment_id], filters)]
        return min(found, key=lambda run: (run.start_time, run.run_id)).run_id if found else None

    def _children(self, parent: str) -> list[Any]:
        filters = f"tags.`mlflow.parentRunId` = '{parent}'"
        return list(self._client.search_runs([self._experiment_id], filters, max_results=1000))

    def _close_dead_attempts(self, info: StepInfo) -> None:
        # What was killed could not end its run. Called, like _end, under the lock that guards all runs.
        filters = f"attributes.status = 'RUNNING' and tags.`{LEVEL}` = 'attempt' and tags.`dagster.asset_key` = '{info.asset}'"
        for run in self._client.search_runs([self._experiment_id], filters, max_results=1000):
            tags = run.data.tags
            # Dagster retries a step only after its process ended, even where a child of that still holds the lock.
            retried = tags["dagster.run_id"] == info.run_id and int(tags["dagster.retry_number"]) < info.retry_number
            lock = self._locks() / tags.get(ALIVE, "none")
            if retried or _is_free(lock):
                self._client.set_terminated(run.info.run_id, "KILLED")
                lock.unlink(missing_ok=True)
                self._settle(tags["mlflow.parentRunId"])

    def _end(self, child: str, parent: str, status: str, lock: str) -> None:
        with self._lock():
            self._client.set_terminated(child, status)
            (self._locks() / lock).unlink(missing_ok=True)
            self._settle(parent)

    def _settle(self, parent: str) -> None:
        latest: dict[str, Any] = {}
        for run in sorted(self._children(parent), key=lambda r: r.info.start_time):
            latest[run.data.tags["dagster.asset_key"]] = run.info.status
        states = set(latest.values())
        if "RUNNING" in states:
            self._client.update_run(parent, status="RUNNING")
        else:
            self._client.set_terminated(parent, "FAILED" if states - {"FINISHED"} else "FINISHED")


def _uri(root: str) -> str:
    return root if "://" in root else Path(root).resolve().as_uri()


def _is_free(lock: Path) -> bool:
    # A lock that is not here may be held on another machine: then nothing is known of its holder.
    if not lock.is_file():
        return False
    try:
        with FileLock(lock, blocking=False):
            return True
    except Timeout:
        return False


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, keys joined with dots.

    >>> flatten({"optim": {"epochs": 1}, "seed": 0})
    {'optim.epochs': 1, 'seed': 0}
    """
    out: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            out |= flatten(value, f"{name}.")
        else:
            out[name] = value
    return out
