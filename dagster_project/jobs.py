"""The jobs: the whole pipeline for one constitution."""

import dagster as dg

from dagster_project.executor import executor

# Everything, from data to champion. Unpartitioned assets are part of each run and reused, not retrained.
alignment_job = dg.define_asset_job(
    "alignment",
    selection=dg.AssetSelection.all() - dg.AssetSelection.assets("data"),
    executor_def=executor,
    description="The whole pipeline for one constitution: data, SFT, constitutional pairs, reward models, policies, "
    "reports, champion. What has not changed is reused.",
    tags={"dagster/max_runtime": 24 * 3600},
)
