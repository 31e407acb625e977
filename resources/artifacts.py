"""The artifact store: weights and tables, one folder per asset and fingerprint, published whole or not at all.

    <root>/<asset>/<fingerprint>/artifact.json   the record: config, inputs, file hashes, versions, commit, MLflow run
    <root>/<asset>/<fingerprint>/...             what the asset wrote
    <root>/.work/<asset>/<fingerprint>/          a step at work, or what a killed step left to resume from

A work folder becomes an artifact by one atomic rename; a file lock keeps two processes from building the same one.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from filelock import FileLock
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError

from alignment.errors import UserError
from alignment.handles import AnyHandle, Checkpoint, Handle, RewardModel, parse_handle
from alignment.models import ModelFiles


class ArtifactRecord(BaseModel):
    """What lies beside every artifact as `artifact.json`: enough to say where it came from and that it is whole."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")

    handle: dict[str, Any]
    config: dict[str, Any]
    code_version: str
    inputs: dict[str, str]
    files: dict[str, str]
    versions: dict[str, str]
    git_commit: str | None
    dvc_md5: str | None
    mlflow_run_id: str
    dagster_run_id: str
    seconds: float
    peak_memory_gb: float


class CorruptArtifact(UserError):
    """A published artifact does not match its record; the message names the file and the remedy."""


class Work:
    """A work folder: `folder` survives a kill (checkpoints, partial results), `out` becomes the artifact."""

    def __init__(self, folder: Path, target: Path) -> None:
        self.folder, self._target = folder, target
        self.out = folder / "out"
        self.resumed = folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        # Only what the current attempt writes may be published; what a killed attempt half wrote may not.
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir()

    def publish(self, record: ArtifactRecord) -> None:
        """Write the record and make `out` the artifact, atomically; the rest of the work folder is deleted."""
        path = self.out / "artifact.json"
        path.write_text(record.model_dump_json(indent=2), encoding="utf-8")
        with path.open("rb") as file:
            os.fsync(file.fileno())
        self._target.parent.mkdir(parents=True, exist_ok=True)
        os.rename(self.out, self._target)
        shutil.rmtree(self.folder, ignore_errors=True)


class ArtifactStore(dg.ConfigurableResource):
    """Where artifacts lie, by content address."""

    root: str
    _root: Path = PrivateAttr()

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        self._root = Path(self.root).resolve()
        self._root.mkdir(parents=True, exist_ok=True)

    def path(self, handle: Handle) -> Path:
        """The folder of a handle's artifact."""
        return self._folder(handle.asset, handle.fingerprint)

    def model_files(self, handle: Checkpoint | RewardModel) -> ModelFiles:
        """The folders of a model handle: the full model, and the adapter over it if it is one."""
        own = self.path(handle) / "model"
        return ModelFiles(self.path(handle.adapter_of) / "model", own) if handle.adapter_of else ModelFiles(own)

    def find(self, asset: str, fingerprint: str) -> AnyHandle | None:
        """The handle of a published artifact, or None.

        Raises:
            CorruptArtifact: the record is unreadable, or a file is missing or has another size than when published.
        """
        record = self.record(asset, fingerprint)
        if record is None:
            return None
        try:
            return parse_handle(json.dumps(record.handle))
        except ValidationError as error:
            raise self._corrupt(asset, fingerprint, f"the handle in it cannot be read ({error})") from error

    def record(self, asset: str, fingerprint: str) -> ArtifactRecord | None:
        """The record of a published artifact, or None. Raises like `find`."""
        folder = self._folder(asset, fingerprint)
        if not folder.exists():
            return None
        try:
            record = ArtifactRecord.model_validate_json((folder / "artifact.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self._corrupt(asset, fingerprint, f"unreadable ({error})") from error
        for name, digest in record.files.items():
            size = int(digest.split(":")[1])
            path = folder / name
            if not path.exists() or path.stat().st_size != size:
                raise self._corrupt(asset, fingerprint, f"missing, or not the {size} bytes that were published", name)
        return record

    @contextmanager
    def building(self, asset: str, fingerprint: str) -> Iterator[Work | None]:
        """A work folder for this artifact, or None if somebody else published it while we waited for the lock."""
        with self._lock(asset, fingerprint):
            target = self._folder(asset, fingerprint)
            if target.exists():
                yield None
            else:
                yield Work(self._root / ".work" / asset / fingerprint, target)

    def discard(self, asset: str, fingerprint: str, *, asked_by: str, say: Callable[[str], None] = lambda _: None) -> None:
        """Take an artifact out of the store so that it is computed anew (`force: true`); it is moved aside, not lost.

        Waits for whoever is building it. Asked again by the same run, as when Dagster retries its step, it does nothing: what
        that run has begun is resumed, and what it has published stays.

        Args:
            asked_by: the Dagster run; of a run that repeats another, the first.
        """
        folder = self._folder(asset, fingerprint)
        work = self._root / ".work" / asset / fingerprint
        mark = self._root / ".forced" / asset / fingerprint
        with self._lock(asset, fingerprint):
            if mark.exists() and mark.read_text(encoding="utf-8") == asked_by:
                return
            say(f"force: computing {asset} anew")
            if folder.exists():
                aside = self._root / ".replaced" / asset / fingerprint
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(parents=True, exist_ok=True)
                os.rename(folder, aside)
            shutil.rmtree(work, ignore_errors=True)
            mark.parent.mkdir(parents=True, exist_ok=True)
            mark.write_text(asked_by, encoding="utf-8")

    def _lock(self, asset: str, fingerprint: str) -> FileLock:
        path = self._root / ".locks" / f"{asset.replace('/', '_')}-{fingerprint[:16]}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        return FileLock(path)

    def _corrupt(self, asset: str, fingerprint: str, what: str, file: str = "artifact.json") -> CorruptArtifact:
        folder = self._folder(asset, fingerprint)
        return CorruptArtifact(f"{folder / file}: {what}. Remedy: delete {folder} and materialize {asset} again.")

    def _folder(self, asset: str, fingerprint: str) -> Path:
        return self._root / asset / fingerprint


def file_hashes(folder: Path) -> dict[str, str]:
    """`sha256:size` of every file below a folder, by relative path."""
    out = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        out[path.relative_to(folder).as_posix()] = f"{digest}:{path.stat().st_size}"
    return out
