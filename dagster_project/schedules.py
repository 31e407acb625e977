"""Scheduled retraining: once a week, one run per constitution."""

from collections.abc import Iterator

import dagster as dg

from assets.settings import PARTITIONS
from dagster_project.jobs import alignment_job


@dg.schedule(
    job=alignment_job,
    cron_schedule="0 3 * * 1",
    execution_timezone="UTC",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Mondays 03:00 UTC: one run per constitution. Runs reuse whatever has not changed.",
)
def weekly_retraining(context: dg.ScheduleEvaluationContext) -> Iterator[dg.RunRequest]:
    """One run request per constitution."""
    week = context.scheduled_execution_time.strftime("%G-W%V")
    for constitution in PARTITIONS.get_partition_keys():
        yield dg.RunRequest(run_key=f"{week}/{constitution}", partition_key=constitution, tags={"trigger": "weekly"})
