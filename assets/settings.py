"""What all asset files share: the recipe in force, the partitions, and how an asset is dressed for the UI."""

from typing import Any

import dagster as dg

from alignment.constitutions import Constitution, constitution_names, load_constitution
from alignment.models import Config
from alignment.recipes import Recipe, load_recipe
from resources.paths import CONSTITUTIONS, recipe_path

OWNERS = ["team:alignment"]
GPU_POOL = "gpu"
# What Kubernetes and Ray executors are told about a step that trains or samples.
GPU_TAGS = {
    "dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}},
    "dagster-ray/config": {"ray_remote_args": {"num_gpus": 1}},
}
RETRIES = dg.RetryPolicy(max_retries=2, delay=3)

RECIPE: Recipe = load_recipe(recipe_path())
PARTITIONS = dg.StaticPartitionsDefinition(constitution_names(CONSTITUTIONS))


def recipe_config(stage: str, kind: type[Config]) -> Config:
    """The recipe's configuration of a stage."""
    return RECIPE.config(stage, kind)


def constitution(context: dg.AssetExecutionContext) -> Constitution:
    """The constitution of the partition being materialized."""
    return load_constitution(CONSTITUTIONS / f"{context.partition_key}.yaml")


def dressed(group: str, kinds: set[str], *, gpu: bool = False, **kwargs: Any) -> dict[str, Any]:
    """Arguments common to all assets: group, kinds, owners, retries; pool and GPU tags for those that need a GPU."""
    out: dict[str, Any] = {"group_name": group, "kinds": kinds, "owners": OWNERS, "retry_policy": RETRIES, **kwargs}
    if gpu:
        out |= {"pool": GPU_POOL, "op_tags": GPU_TAGS}
    return out
