"""Runs whose process is gone are ended and free their pool slots; those that live are left alone."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.events import EngineEventData
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteJobOrigin, RemoteRepositoryOrigin

from dagster_project.dead_runs import PROCESS, end_dead_runs, this_process

PROJECT = Path(__file__).resolve().parents[2]
STARTED = dg.DagsterRunStatus.STARTED
LAUNCHED = RemoteJobOrigin(RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("here"), "__repository__"), "idle")


@pytest.fixture
def instance(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", tmp_path)
    with dg.DagsterInstance.from_config(str(tmp_path)) as found:
        yield found


@pytest.fixture
def dead() -> int:
    """The process id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@dg.op
def nothing() -> None: ...


@dg.job
def idle() -> None:
    nothing()


def started(instance: dg.DagsterInstance, *, worker: int | None = None, **tags: str) -> dg.DagsterRun:
    """A run under way that holds the pool's only slot; with a worker, one that was launched from the UI."""
    origin = None if worker is None else LAUNCHED
    run = instance.create_run_for_job(idle, status=STARTED, tags=tags, remote_job_origin=origin)
    if worker is not None:
        instance.report_engine_event(f"Started process for run (pid: {worker}).", run, EngineEventData.in_process(worker))
    instance.event_log_storage.set_concurrency_slots("gpu", 1)
    assert instance.event_log_storage.claim_concurrency_slot("gpu", run.run_id, "train").is_claimed
    return run


def held(instance: dg.DagsterInstance) -> set[str]:
    return instance.event_log_storage.get_concurrency_run_ids()


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    return instance.get_run_by_id(run.run_id).status


def test_a_run_launched_from_the_ui_whose_worker_is_gone_is_ended(instance, dead, capsys):
    run = started(instance, worker=dead)
    end_dead_runs(instance)
    assert status(instance, run) == dg.DagsterRunStatus.FAILURE
    assert held(instance) == set()
    assert capsys.readouterr().out == f"run {run.run_id} was killed before it ended; freeing what it holds\n"


def test_a_process_of_the_same_number_that_started_at_another_time_is_not_the_worker(instance, monkeypatch):
    run = started(instance, worker=1)  # the first process of the machine started long before the run
    end_dead_runs(instance)
    assert status(instance, run) == dg.DagsterRunStatus.FAILURE


@pytest.mark.parametrize("repeats_a_command", [False, True])
def test_a_run_whose_worker_lives_goes_on(instance, dead, repeats_a_command):
    # Executed again in the UI, a command's run hands its tags on, with a process that has ended.
    tags = {PROCESS: f"{this_process().split('/')[0]}/{dead}/1.00"} if repeats_a_command else {}
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    try:
        run = started(instance, worker=worker.pid, **tags)
        end_dead_runs(instance)
        assert status(instance, run) == STARTED
        assert held(instance) == {run.run_id}
    finally:
        worker.kill()
        worker.wait()


def test_nothing_is_known_of_a_run_that_noted_no_worker(instance):
    run = started(instance)
    end_dead_runs(instance)
    assert status(instance, run) == STARTED


def test_the_run_of_a_killed_command_is_ended_and_that_of_a_living_one_is_not(instance, dead):
    mine = this_process()
    host, pid, begun = mine.split("/")
    run = started(instance, **{PROCESS: f"{host}/{dead}/{begun}"})
    end_dead_runs(instance)
    assert status(instance, run) == dg.DagsterRunStatus.FAILURE
    after_the_clock_was_set = f"{host}/{pid}/{float(begun) + 2:.2f}"
    for owner in (mine, after_the_clock_was_set, f"another-host/{os.getpid()}/1.00"):
        run = started(instance, **{PROCESS: owner})
        end_dead_runs(instance)
        assert status(instance, run) == STARTED
        instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def test_a_slot_that_a_finished_run_still_holds_is_freed(instance, dead):
    run = started(instance, worker=dead)
    instance.report_run_failed(run, "The code server found its worker dead, and freed nothing.")
    assert held(instance) == {run.run_id}
    end_dead_runs(instance)
    assert held(instance) == set()


def test_the_daemon_frees_the_slots_of_finished_runs_by_itself(instance):
    assert instance.run_monitoring_settings["free_slots_after_run_end_seconds"] == 30
