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
    """Writes handles atomically and reads them back as their own class.

    A re-executed run goes on with those of the run it repeats, unless another run, begun after that one had ended, has
    materialized the asset since: whoever mends something upstream and then executes the failed run again means the new one.
    """

    root: str

    def handle_output(self, context: dg.OutputContext, obj: Handle) -> None:
        if not isinstance(obj, Handle):
            raise TypeError(f"{context.asset_key.to_user_string()} must return a handle, got {type(obj).__name__}")
        partition = context.asset_partition_key if context.has_asset_partitions else None
        run = self._run_folder(context.step_context.dagster_run)
        if not run.exists():
            self._forget_old_runs()
        for folder in (run, Path(self.root)):
            _write(_path(folder, context.asset_key, partition), obj.model_dump_json(indent=2))

    def load_input(self, context: dg.InputContext) -> AnyHandle:
        partition = context.asset_partition_key if context.has_asset_partitions else None
        path = _path(Path(self.root), context.asset_key, partition)
        run = _run_of(context)
        own = _path(self._run_folder(run), context.asset_key, partition) if run else None
        if own and own.exists():
            if run.parent_run_id:
                self._renew(own, path, context, run, partition)
            path = own
        if not path.exists():
            where = f" for partition {partition!r}" if partition else ""
            raise dg.Failure(
                f"{context.asset_key.to_user_string()} has not been materialized{where} ({path} is missing). "
                "Remedy: materialize it first, or run the whole job.",
                allow_retries=False,
            )
        return parse_handle(path.read_text(encoding="utf-8"))

    def _renew(self, own: Path, last: Path, context: dg.InputContext, run: dg.DagsterRun, partition: str | None) -> None:
        # Copied, so that all steps of the run read the same, whatever others materialize meanwhile.
        asset, maker = context.asset_key.to_user_string(), _made_since(context, run, partition)
        if maker and last.exists():
            _write(own, last.read_text(encoding="utf-8"))
            context.log.info(f"{asset}: as run {maker} has made it since run {run.parent_run_id} ended")
        else:
            context.log.info(f"{asset}: as run {run.root_run_id}, or what has gone on with it, made or read it")

    def _run_folder(self, run: dg.DagsterRun) -> Path:
        return Path(self.root) / ".runs" / (run.root_run_id or run.run_id)

    def _forget_old_runs(self) -> None:
        oldest = time.time() - KEPT_DAYS * 24 * 3600
        for folder in (Path(self.root) / ".runs").glob("*"):
            try:
                if max(path.stat().st_mtime for path in [folder, *folder.rglob("*")]) < oldest:
                    shutil.rmtree(folder, ignore_errors=True)
            except FileNotFoundError:  # another run has forgotten it just now
                continue


def _run_of(context: dg.InputContext) -> dg.DagsterRun | None:
    """The run that an input is loaded for; None outside of runs, as with `defs.load_asset_value` in a notebook."""
    try:
        return context.step_context.dagster_run
    except dg.DagsterInvariantViolationError:
        return None


def _made_since(context: dg.InputContext, run: dg.DagsterRun, partition: str | None) -> str | None:
    """The run that materialized an asset last, if it began after the run that `run` repeats had ended, and did so before `run`
    began: a run at once with either of them may be one of other settings."""
    instance = context.instance
    asset = dg.AssetRecordsFilter(asset_key=context.asset_key, asset_partitions=[partition] if partition else None)
    for last in instance.fetch_materializations(asset, limit=1).records:
        repeated, this, maker = map(instance.get_run_record_by_id, (run.parent_run_id, run.run_id, last.run_id))
        times = [repeated and repeated.end_time, maker and maker.start_time, last.timestamp, this and this.start_time]
        if None not in times and times == sorted(times):
            return last.run_id
    return None


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def _path(folder: Path, key: dg.AssetKey, partition: str | None) -> Path:
    folder = folder.joinpath(*key.path)
    return folder / f"{partition}.json" if partition else folder.with_suffix(".json")
