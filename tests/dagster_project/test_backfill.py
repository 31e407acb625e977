"""A backfill of the job over all constitutions, asked for as the UI and the command line do: a run of the whole job for each."""

import logging
import shutil
from pathlib import Path

import dagster as dg
import pytest

from assets.settings import PARTITIONS

pytestmark = pytest.mark.slow  # several whole runs
PROJECT = Path(__file__).parents[2]
WORKSPACE = PROJECT / "workspace.yaml"
CONSTITUTIONS = sorted(PARTITIONS.get_partition_keys())


@pytest.fixture
def instance(tmp_path, monkeypatch):
    """A new instance with the project's own dagster.yaml, whose runs wait in the queue."""
    shutil.copy(PROJECT / "dagster_home" / "dagster.yaml", tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        yield instance


def assert_whole_runs_for_all(instance):
    runs = instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.QUEUED]))
    assert sorted(run.tags["dagster/partition"] for run in runs) == CONSTITUTIONS
    assert {run.job_name for run in runs} == {"alignment"}
    assert {run.asset_selection for run in runs} == {None}
    assert len({run.tags["dagster/backfill"] for run in runs}) == 1


def test_from_the_command_line(instance):
    from click.testing import CliRunner
    from dagster._cli.job import job_backfill_command

    command = ["-w", str(WORKSPACE), "-j", "alignment", "--partitions", ",".join(CONSTITUTIONS), "--noprompt"]
    done = CliRunner().invoke(job_backfill_command, command)
    assert done.exit_code == 0, done.output
    assert "Launched backfill job" in done.output
    assert_whole_runs_for_all(instance)


def test_from_the_ui_by_way_of_the_daemon(instance):
    from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill
    from dagster._core.test_utils import create_test_daemon_workspace_context
    from dagster._core.workspace.load_target import WorkspaceFileTarget
    from dagster._daemon.backfill import execute_backfill_iteration

    with create_test_daemon_workspace_context(WorkspaceFileTarget([str(WORKSPACE)]), instance) as workspace:
        location = workspace.create_request_context().code_locations[0]
        repository = next(iter(location.get_repositories().values()))
        asked = PartitionBackfill(
            backfill_id="all_constitutions",
            partition_set_origin=repository.get_partition_set("alignment_partition_set").get_remote_origin(),
            status=BulkActionStatus.REQUESTED,
            partition_names=CONSTITUTIONS,
            from_failure=False,
            reexecution_steps=None,
            tags={},
            backfill_timestamp=0.0,
        )
        instance.add_backfill(asked)
        list(execute_backfill_iteration(workspace, logging.getLogger("daemon")))
    assert_whole_runs_for_all(instance)
