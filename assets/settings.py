"""What all asset files share: the recipe in force, the partitions, and how an asset is dressed for the UI."""

import os
from collections.abc import Iterable
from typing import Any

import dagster as dg

from alignment.constitutions import Constitution, constitution_names, load_constitution
from alignment.datasets import HumanPreferencesConfig, PromptsConfig, SftDatasetConfig
from alignment.errors import UserError
from alignment.methods import METHODS
from alignment.models import Config
from alignment.recipes import Recipe, RecipeError, load_recipe
from alignment.reward import EvaluatorConfig, RewardMixConfig
from resources.paths import RECIPES, constitutions, recipe_path

OWNERS = ["team:alignment"]
GPU_POOL = "gpu"
# What Kubernetes and Ray executors are told about a step that trains or samples.
GPU_TAGS = {
    "dagster-k8s/config": {"container_config": {"resources": {"limits": {"nvidia.com/gpu": "1"}}}},
    "dagster-ray/config": {"num_gpus": 1},
}
RETRIES = dg.RetryPolicy(max_retries=2, delay=3)

RECIPE: Recipe = load_recipe(recipe_path(), shipped=RECIPES)
PARTITIONS = dg.StaticPartitionsDefinition(constitution_names(constitutions()))


_stages: set[str] = set()


def recipe_config(stage: str, kind: type[Config]) -> Config:
    """The recipe's configuration of a stage."""
    _stages.add(stage)
    return RECIPE.config(stage, kind)


def check_recipe() -> None:
    """Called when all assets are defined.

    Raises:
        RecipeError: the recipe names a stage that no asset reads, holds out different shares in the data stages, or gives the
            evaluator the reward model's seed.
    """
    unknown = sorted(set(RECIPE.stages) - _stages)
    if unknown:
        raise RecipeError(f"{RECIPE.path}: key {unknown[0]!r}: no such stage. Remedy: one of {', '.join(sorted(_stages))}.")
    shares = {
        stage: RECIPE.config(stage, kind).heldout_fraction
        for stage, kind in (
            ("sft_dataset", SftDatasetConfig),
            ("human_preferences", HumanPreferencesConfig),
            ("prompts", PromptsConfig),
        )
    }
    if len(set(shares.values())) > 1:
        raise RecipeError(
            f"{RECIPE.path}: heldout_fraction differs between {shares}; prompts held out of one data set would be trained on "
            "in another. Remedy: give all three the same value."
        )
    scorers = (("reward_model", RewardMixConfig), ("evaluator", EvaluatorConfig))
    seeds = {stage: RECIPE.config(stage, kind).optim.seed for stage, kind in scorers}
    if len(set(seeds.values())) < 2:
        raise RecipeError(
            f"{RECIPE.path}: reward_model and evaluator have the same optim.seed, {seeds['evaluator']}: they would start as the "
            "same model, and what fools one fools the other. Remedy: give evaluator another seed."
        )


def methods() -> tuple[str, ...]:
    """The methods that the job `alignment`, its schedule and its sensor run: all, or those that ALIGNMENT_METHODS names."""
    return chosen_methods(os.environ.get("ALIGNMENT_METHODS") or ",".join(METHODS))


def chosen_methods(names: str) -> tuple[str, ...]:
    """Methods named with commas between.

    Raises:
        UserError: a name that is no method, or none at all.
    """
    chosen = tuple(name.strip() for name in names.split(",") if name.strip())
    unknown = [name for name in chosen if name not in METHODS]
    if unknown or not chosen:
        raise UserError(f"methods: {', '.join(unknown) or 'nothing'}: choose from {', '.join(METHODS)}")
    return chosen


def keys_without(chosen: Iterable[str]) -> list[str]:
    """Keys of the assets that only methods other than the chosen ones need."""
    return [f"{stage}/{name}" for name in METHODS if name not in chosen for stage in ("aligned_policy", "policy_report")]


def constitution(context: dg.AssetExecutionContext) -> Constitution:
    """The constitution of the partition being materialized."""
    return load_constitution(constitutions() / f"{context.partition_key}.yaml")


def dressed(group: str, kinds: set[str], *, gpu: bool = False, **kwargs: Any) -> dict[str, Any]:
    """Arguments common to all assets: group, kinds, owners, retries; pool and GPU tags for those that need a GPU."""
    out: dict[str, Any] = {"group_name": group, "kinds": kinds, "owners": OWNERS, "retry_policy": RETRIES, **kwargs}
    if gpu:
        out |= {"pool": GPU_POOL, "op_tags": GPU_TAGS}
    return out
