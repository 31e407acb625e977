"""Schedule and sensor: evaluated on their own, and ticked by Dagster's daemon in a real instance."""

import datetime
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from assets.settings import PARTITIONS
from dagster_project.definitions import defs
from dagster_project.schedules import weekly_retraining
from dagster_project.sensors import new_data
from resources.dvc_data import DvcData

PROJECT = Path(__file__).parents[2]
CONSTITUTIONS = sorted(p.stem for p in (PROJECT / "conf" / "constitutions").glob("*.yaml"))
FIRST, SECOND = "1" * 32, "2" * 32
DATA = dg.AssetKey("data")


@pytest.fixture
def pointer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `data.dvc` of our own, which the sensor watches."""
    monkeypatch.setenv("ALIGNMENT_DATA_ROOT", str(tmp_path))
    path = tmp_path / "data.dvc"
    pin(path, FIRST)
    return path


def pin(pointer: Path, md5: str, files: Mapping[str, str] | None = None) -> None:
    """What `dvc add data` leaves for a folder of these files, apart from the files."""
    manifest = pointer.parent / ".dvc" / "cache" / "files" / "md5" / md5[:2] / f"{md5[2:]}.dir"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"md5": hashlib.md5(text.encode()).hexdigest(), "relpath": name} for name, text in (files or {}).items()]
    manifest.write_text(json.dumps(rows), encoding="utf-8")
    pointer.write_text(f"outs:\n- md5: {md5}.dir\n  path: data\n", encoding="utf-8")


@pytest.fixture(scope="module")
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


def requests_at(instance: dg.DagsterInstance, when: datetime.datetime) -> list[dg.RunRequest]:
    repository = defs.get_repository_def()
    with dg.build_schedule_context(instance, scheduled_execution_time=when, repository_def=repository) as context:
        return weekly_retraining.evaluate_tick(context).run_requests


def look(instance: dg.DagsterInstance, cursor: str | None) -> Any:
    context = dg.build_sensor_context(instance, cursor=cursor, definitions=defs)
    return new_data.evaluate_tick(context)


# --- evaluated on their own -------------------------------------------------------------------------------------------


def test_partitions_are_the_files_of_constitutions():
    assert PARTITIONS.get_partition_keys() == CONSTITUTIONS
    assert "general" in CONSTITUTIONS
    assert len(CONSTITUTIONS) >= 2


def test_the_schedule_asks_for_one_run_per_constitution(instance):
    monday = datetime.datetime(2026, 11, 23, 3, tzinfo=datetime.UTC)
    requests = requests_at(instance, monday)
    assert [request.partition_key for request in requests] == CONSTITUTIONS
    assert [request.run_key for request in requests] == [f"2026-W48/{name}" for name in CONSTITUTIONS]
    assert all(request.tags["trigger"] == "weekly" for request in requests)


def test_run_keys_differ_from_week_to_week_also_over_new_year(instance):
    keys = set()
    for week in range(60):
        when = datetime.datetime(2026, 11, 23, 3, tzinfo=datetime.UTC) + datetime.timedelta(weeks=week)
        keys |= {request.run_key for request in requests_at(instance, when)}
    assert len(keys) == 60 * len(CONSTITUTIONS)


def test_schedule_and_sensor_are_off_until_somebody_switches_them_on():
    assert weekly_retraining.default_status == dg.DefaultScheduleStatus.STOPPED
    assert new_data.default_status == dg.DefaultSensorStatus.STOPPED
    assert weekly_retraining.job_name == new_data.job_name == "alignment"


def test_the_first_look_only_remembers(instance, pointer):
    tick = look(instance, None)
    assert tick.run_requests == []
    assert tick.cursor == FIRST
    (event,) = tick.asset_events
    assert event.asset_key == DATA


def test_the_same_version_is_skipped(instance, pointer):
    tick = look(instance, FIRST)
    assert tick.run_requests == []
    assert tick.asset_events == []
    assert tick.skip_message == f"data.dvc still pins {FIRST}"
    assert tick.cursor == FIRST


def test_a_new_version_asks_for_one_run_per_constitution_and_records_the_data(instance, pointer):
    pin(pointer, SECOND)
    tick = look(instance, FIRST)
    assert look(instance, tick.cursor).skip_message == f"data.dvc still pins {SECOND}"
    assert [request.partition_key for request in tick.run_requests] == CONSTITUTIONS
    assert len({request.run_key for request in tick.run_requests}) == len(CONSTITUTIONS)
    assert all(SECOND in request.run_key for request in tick.run_requests)
    assert all(request.tags["dvc.md5"] == SECOND for request in tick.run_requests)
    (event,) = tick.asset_events
    assert event.asset_key == DATA
    assert event.tags["dagster/data_version"] == SECOND
    assert event.metadata["md5"].value == SECOND
    assert event.metadata["before"].value == FIRST


def test_a_pointer_that_came_without_its_files_is_a_reason_to_wait_for_them(instance, pointer):
    (pointer.parent / "data").mkdir()
    (pointer.parent / "data" / "prompts.jsonl").write_text("old")
    pin(pointer, SECOND, {"prompts.jsonl": "new", "talks.jsonl": "added"})  # `git pull` brings the pointer
    tick = look(instance, FIRST)
    assert tick.run_requests == []
    assert "data/talks.jsonl: is not there yet" in tick.skip_message
    assert "dvc pull data.dvc" in tick.skip_message
    assert tick.cursor in (None, FIRST)  # None leaves the cursor as it is
    (pointer.parent / "data" / "talks.jsonl").write_text("added")
    tick = look(instance, FIRST)
    assert "data/prompts.jsonl: differs from the version that data.dvc pins" in tick.skip_message
    assert "dvc pull data.dvc" in tick.skip_message
    (pointer.parent / "data" / "prompts.jsonl").write_text("new")  # and `dvc pull` the files
    assert len(look(instance, FIRST).run_requests) == len(CONSTITUTIONS)


@pytest.mark.parametrize("content", [None, b"", b"outs: [", b"outs:\n- path: data\n"], ids=["missing", "empty", "yaml", "md5"])
def test_a_broken_pointer_is_a_reason_to_skip_and_forgets_nothing(instance, pointer, content):
    if content is None:
        pointer.unlink()
    else:
        pointer.write_bytes(content)
    tick = look(instance, FIRST)
    assert tick.run_requests == []
    assert tick.skip_message.startswith(f"{pointer}: is ")
    assert "Remedy" in tick.skip_message
    assert tick.cursor in (None, FIRST)  # None leaves the cursor as it is


def test_a_version_that_comes_back_gets_new_run_keys(instance, pointer):
    pin(pointer, SECOND)
    first = look(instance, FIRST)
    pin(pointer, FIRST)
    back = look(instance, first.cursor)
    pin(pointer, SECOND)
    again = look(instance, back.cursor)
    assert {r.run_key for r in first.run_requests}.isdisjoint({r.run_key for r in again.run_requests})


def test_a_look_that_is_repeated_before_its_cursor_was_saved_asks_for_the_same_runs(instance, pointer):
    pin(pointer, SECOND)
    cursor = look(instance, FIRST).cursor
    pin(pointer, FIRST)
    once, twice = look(instance, cursor), look(instance, cursor)
    assert [r.run_key for r in once.run_requests] == [r.run_key for r in twice.run_requests] != []
    assert once.cursor == twice.cursor
    assert once.asset_events[0].metadata["before"].value == SECOND


DATA_SETS = [dg.AssetKey(name) for name in ("sft_dataset", "human_preferences", "prompts")]


def test_runs_for_a_changed_file_build_what_reads_it_and_reuse_the_rest(pulled, resources, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.setenv("ALIGNMENT_DATA_ROOT", str(pulled))
    resources["dvc"] = DvcData(root=str(pulled))
    ours = dg.Definitions(assets=defs.assets, asset_checks=defs.asset_checks, jobs=defs.jobs, resources=resources)
    instance, job = dg.DagsterInstance.ephemeral(), ours.resolve_job_def(new_data.job_name)

    def built(constitution: str, tags: Mapping[str, str] | None = None) -> set[str]:
        done = job.execute_in_process(instance=instance, partition_key=constitution, tags=tags, asset_selection=DATA_SETS)
        found = {e.asset_key.to_user_string(): e.materialization for e in done.get_asset_materialization_events()}
        assert len(found) == len(DATA_SETS)
        return {name for name, materialization in found.items() if not materialization.metadata["reused"].value}

    assert built("general") == {"sft_dataset", "human_preferences", "prompts"}
    seen = look(instance, None).cursor
    file = pulled / "data" / "reasoning.jsonl"
    rows = file.read_text(encoding="utf-8").splitlines()
    rows[-1] = json.dumps({"id": "new", "prompt": "Add 17 to 26.", "answer": "43", "kind": "sum"})
    file.unlink()  # DVC may have linked it to its cache
    file.write_text("\n".join([*rows, ""]), encoding="utf-8")
    assert look(instance, seen).skip_message == f"data.dvc still pins {seen}"
    with Repo(str(pulled)) as repo:
        repo.add(str(pulled / "data"))
    tick = look(instance, seen)
    assert [request.partition_key for request in tick.run_requests] == CONSTITUTIONS
    first, second, *_ = tick.run_requests
    assert built(first.partition_key, first.tags) == {"prompts"}
    assert built(second.partition_key, second.tags) == set()


# --- ticked by the daemon ---------------------------------------------------------------------------------------------


class Daemon:
    """The project's workspace in a code server of its own, and the daemon's iterations, at times of our choosing."""

    def __init__(self, workspace: Any, instance: dg.DagsterInstance) -> None:
        self.workspace, self.instance = workspace, instance
        location = workspace.create_request_context().code_locations[0]
        self.repository = next(iter(location.get_repositories().values()))
        self._now = datetime.datetime.now(datetime.UTC)
        self._log = logging.getLogger("daemon")

    def look(self) -> Any:
        """One round of the sensor daemon, a minute later than the last; the sensor's tick."""
        from dagster._core.test_utils import freeze_time
        from dagster._daemon.sensor import execute_sensor_iteration

        self._now += datetime.timedelta(minutes=1)
        with freeze_time(self._now):
            list(execute_sensor_iteration(self.workspace, self._log, None, None))
        return self._latest(self.repository.get_sensor("new_data"))

    def a_week_later(self) -> Any:
        """One round of the scheduler; the schedule's tick."""
        from dagster._scheduler.scheduler import launch_scheduled_runs

        list(launch_scheduled_runs(self.workspace, self._log, self._now + datetime.timedelta(days=7), {}))
        return self._latest(self.repository.get_schedule("weekly_retraining"))

    def _latest(self, instigator: Any) -> Any:
        return self.instance.get_ticks(instigator.get_remote_origin_id(), instigator.selector_id, limit=1)[0]

    def queued(self) -> list[str]:
        """The constitutions of the runs that wait in the queue."""
        runs = self.instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
        return sorted(run.tags["dagster/partition"] for run in runs)


@pytest.fixture
def daemon(tmp_path: Path, pointer: Path) -> Iterator[Daemon]:
    """On an instance with the project's own dagster.yaml."""
    from dagster._core.test_utils import create_test_daemon_workspace_context
    from dagster._core.workspace.load_target import WorkspaceFileTarget

    home = tmp_path / "dagster_home"
    home.mkdir()
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", home)
    target = WorkspaceFileTarget([str(PROJECT / "workspace.yaml")])
    with (
        dg.DagsterInstance.from_config(str(home)) as instance,
        create_test_daemon_workspace_context(target, instance) as workspace,
    ):
        yield Daemon(workspace, instance)


def test_the_daemon_starts_runs_for_new_data_and_for_a_new_week(daemon, pointer):
    instance = daemon.instance
    instance.start_sensor(daemon.repository.get_sensor("new_data"))
    instance.start_schedule(daemon.repository.get_schedule("weekly_retraining"))

    daemon.look()
    assert daemon.queued() == []
    assert daemon.look().skip_reason == f"data.dvc still pins {FIRST}"

    pin(pointer, SECOND)
    assert daemon.look().status.value == "SUCCESS"
    assert daemon.queued() == CONSTITUTIONS
    assert daemon.look().skip_reason == f"data.dvc still pins {SECOND}"
    assert daemon.queued() == CONSTITUTIONS

    recorded = [r.asset_materialization for r in instance.fetch_materializations(DATA, limit=10).records]
    assert [m.metadata["md5"].value for m in recorded] == [SECOND, FIRST]
    assert instance.get_latest_data_version_record(DATA).asset_materialization.tags["dagster/data_version"] == SECOND

    pointer.write_text("<<<<<<< HEAD\n", encoding="utf-8")
    broken = daemon.look()
    assert broken.status.value == "SKIPPED"
    assert "Remedy" in broken.skip_reason
    pin(pointer, SECOND)
    assert daemon.look().skip_reason == f"data.dvc still pins {SECOND}"

    weekly = daemon.a_week_later()
    assert weekly.status.value == "SUCCESS"
    assert daemon.queued() == sorted([*CONSTITUTIONS, *CONSTITUTIONS])
