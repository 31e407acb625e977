"""Runs whose process was killed, or whose machine was restarted: they are marked as failed, and free what they hold.

Dagster's daemon cannot tell that the worker of a run on this machine has died, and a step that is killed keeps its slot in the
pool `gpu`: every later run would wait for it. Called when `make demo` and `make ui` start.
"""

import os
import socket

import dagster as dg
import psutil

PROCESS = "alignment/process"  # tag of the runs that a process of its own executes, not a worker of Dagster's
CLOCKS_DIFFER = 60  # seconds between a process's start and the event of it, at most
CLOCKS_STEP = 5  # seconds that the start of one process may seem to move by when the clock is set


def this_process() -> str:
    """Names this process: host, process id and start time. A process id alone may have been given to another since."""
    return f"{socket.gethostname()}/{os.getpid()}/{psutil.Process().create_time():.2f}"


def end_dead_runs(instance: dg.DagsterInstance) -> None:
    """Mark runs as failed whose process is gone, and free the pool slots that they and other finished runs hold."""
    under_way = [dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING]
    for run in instance.get_runs(filters=dg.RunsFilter(statuses=under_way)):
        if _is_dead(instance, run):
            print(f"run {run.run_id} was killed before it ended; freeing what it holds", flush=True)
            instance.report_run_failed(run, "Its process was killed.")
    slots = instance.event_log_storage
    if slots.supports_global_concurrency_limits:
        for run_id in slots.get_concurrency_run_ids():
            run = instance.get_run_by_id(run_id)
            if run is None or run.is_finished:
                slots.free_concurrency_slots_for_run(run_id)


def _is_dead(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    # A run that Dagster launches has an origin, and where it repeats one of ours, also the tag of a process that is not its own.
    if run.remote_job_origin is None and (owner := run.tags.get(PROCESS)):
        host, pid, begun = owner.split("/")
        return host == socket.gethostname() and not _lives(int(pid), float(begun), within=CLOCKS_STEP)
    # A run that was launched from the UI or by the daemon: its worker noted its process id, but neither host nor start.
    if not isinstance(instance.run_launcher, dg.DefaultRunLauncher) or not _is_here(instance):
        return False
    for entry in instance.all_logs(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
        noted = getattr(entry.dagster_event.event_specific_data, "metadata", {}).get("pid")
        if noted is not None and "process for run" in entry.dagster_event.message:
            return not _lives(int(noted.value), entry.timestamp, within=CLOCKS_DIFFER)
    return False


def _is_here(instance: dg.DagsterInstance) -> bool:
    # Only this machine writes to a database in a file; a server's may know runs of other machines.
    from dagster._core.storage.runs import SqliteRunStorage

    return isinstance(instance.run_storage, SqliteRunStorage)


def _lives(pid: int, begun: float, within: float) -> bool:
    try:
        return abs(psutil.Process(pid).create_time() - begun) <= within
    except psutil.NoSuchProcess:
        return False
