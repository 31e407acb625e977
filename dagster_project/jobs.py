"""The jobs: the whole pipeline for one constitution, and a demonstration of critique and revise."""

import dagster as dg

from assets.settings import keys_without, methods
from dagster_project.executor import executor

# Everything, from data to champion. Unpartitioned assets are part of each run and reused, not retrained.
alignment_job = dg.define_asset_job(
    "alignment",
    selection=dg.AssetSelection.all()
    - dg.AssetSelection.assets("data", "revised_examples", *(key.split("/") for key in keys_without(methods()))),
    executor_def=executor,
    description="The whole pipeline for one constitution: data, SFT, constitutional pairs, reward models, policies, "
    "reports, champion. What has not changed is reused.",
    tags={"dagster/max_runtime": 24 * 3600},
)

cai_demo_job = dg.define_asset_job(
    "cai_demo",
    selection=dg.AssetSelection.assets("revised_examples").upstream() - dg.AssetSelection.assets("data"),
    executor_def=executor,
    description="Your prompts through critique and revise, initial against revised side by side: in the asset's summary, in the "
    "table revisions.json in MLflow, and in the terminal with `make cai-demo`. The prompts are config of revised_examples.",
    tags={"dagster/max_runtime": 24 * 3600},
)


def alignment() -> dg.JobDefinition:
    """The job `alignment`, resolved; a function of a module, so that worker processes can build it again."""
    return _resolved(alignment_job.name)


def cai_demo() -> dg.JobDefinition:
    """The job `cai_demo`, likewise."""
    return _resolved(cai_demo_job.name)


def _resolved(name: str) -> dg.JobDefinition:
    from dagster_project.definitions import defs

    return defs.resolve_job_def(name)
