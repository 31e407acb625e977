"""The IO manager: an asset's value is its handle, a small JSON file per asset and partition.

    <root>/<asset>[/<partition>].json              the last one materialized, for runs that do not make it themselves
    <root>/.runs/<run>/<asset>[/<partition>].json  the one that a run made, for the run's own later steps

Two runs at once, of two recipes or before and after a change of the data, would otherwise read each other's handles.
"""

import os
import shutil
import time
from pathlib import Path

import dagster as dg

from alignment.handles import AnyHandle, Handle, parse_handle

KEPT_DAYS = 30  # a run's own handles, for those who execute it again from where it failed


class HandleIOManager(dg.ConfigurableIOManager):
    """Writes handles atomically and reads them back as their own class; a re-executed run goes on with those of the first."""

    root: str

    def handle_output(self, context: dg.OutputContext, obj: Handle) -> None:
        if not isinstance(obj, Handle):
            raise TypeError(f"{context.asset_key.to_user_string()} must return a handle, got {type(obj).__name__}")
        partition = context.asset_partition_key if context.has_asset_partitions else None
        run = self._run_folder(context)
        if not run.exists():
            self._forget_old_runs()
        for folder in (run, Path(self.root)):
            path = _path(folder, context.asset_key, partition)
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(f".{os.getpid()}.tmp")
            draft.write_text(obj.model_dump_json(indent=2), encoding="utf-8")
            os.replace(draft, path)

    def load_input(self, context: dg.InputContext) -> AnyHandle:
        partition = context.asset_partition_key if context.has_asset_partitions else None
        path = _path(Path(self.root), context.asset_key, partition)
        own = _path(self._run_folder(context), context.asset_key, partition)
        if own.exists():
            path = own
        if not path.exists():
            where = f" for partition {partition!r}" if partition else ""
            raise dg.Failure(
                f"{context.asset_key.to_user_string()} has not been materialized{where} ({path} is missing). "
                "Remedy: materialize it first, or run the whole job.",
                allow_retries=False,
            )
        return parse_handle(path.read_text(encoding="utf-8"))

    def _run_folder(self, context: dg.InputContext | dg.OutputContext) -> Path:
        run = context.step_context.dagster_run
        return Path(self.root) / ".runs" / (run.root_run_id or run.run_id)

    def _forget_old_runs(self) -> None:
        oldest = time.time() - KEPT_DAYS * 24 * 3600
        for folder in (Path(self.root) / ".runs").glob("*"):
            try:
                if max(path.stat().st_mtime for path in [folder, *folder.rglob("*")]) < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # another run has forgotten it just now
                continue


def _path(folder: Path, key: dg.AssetKey, partition: str | None) -> Path:
    folder = folder.joinpath(*key.path)
    return folder / f"{partition}.json" if partition else folder.with_suffix(".json")
