"""Retraining on new data: a sensor watches the md5 that `data.dvc` pins."""

import dagster as dg

from assets.data import DATA
from assets.settings import PARTITIONS
from dagster_project.jobs import alignment_job
from resources.dvc_data import DataVersionError, DvcData, pinned_md5
from resources.paths import data_root


@dg.sensor(
    job=alignment_job,
    minimum_interval_seconds=15,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Starts a run per constitution when `data.dvc` pins another version (after `dvc add data`). The first "
    "look only remembers the version.",
)
def new_data(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
    """Compare the pinned md5 with the one seen last; on a change, request runs and record it on the asset `data`.

    The cursor is `<md5>/<number of changes seen>`, or the md5 alone before the first. Dagster drops a request whose run key
    it has seen, so the key counts changes: a version that comes back is new. It hangs on nothing but cursor and pointer, so
    that a look repeated before its cursor was saved asks for the same runs.
    """
    pointer = data_root() / "data.dvc"
    try:
        md5 = pinned_md5(pointer)
    except DataVersionError as error:
        return dg.SkipReason(str(error))
    before, _, changes = (context.cursor or "").partition("/")
    if before == md5:
        return dg.SkipReason(f"data.dvc still pins {md5}")
    seen = dg.AssetMaterialization(asset_key=DATA, metadata={"md5": md5, "before": before}, tags={"dagster/data_version": md5})
    if not before:
        return dg.SensorResult(cursor=md5, asset_events=[seen])
    # After `git pull` the pointer is new and the files are not: runs would fail, and nobody would start them again.
    try:
        DvcData(root=str(data_root())).check()
    except DataVersionError as error:
        return dg.SkipReason(str(error))
    cursor = f"{md5}/{int(changes or 0) + 1}"
    requests = [
        dg.RunRequest(run_key=f"{cursor}/{c}", partition_key=c, tags={"trigger": "data", "dvc.md5": md5})
        for c in PARTITIONS.get_partition_keys()
    ]
    return dg.SensorResult(run_requests=requests, cursor=cursor, asset_events=[seen])
