"""The three scorers. `human_reward_model` judges revisions, `reward_model[c]` trains policies, `evaluator[c]` judges policies:
it has another seed and human pairs of its own, and takes part in no training.
"""

from collections.abc import Callable, Sequence

import dagster as dg

from alignment.ai_feedback import AiComparison
from alignment.constitutions import Constitution, no_human_pairs, pairs_under
from alignment.handles import Checkpoint, PreferenceDataset, RewardModel
from alignment.readers import read_records
from alignment.records import PreferencePair
from alignment.reward import (
    CODE_VERSION,
    EvaluatorConfig,
    RewardConfig,
    RewardMixConfig,
    reward_training_pairs,
    train_reward_model,
)
from assets.checks import alarm_specs
from assets.launch_config import launch_config
from assets.settings import PARTITIONS, constitution, dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

RewardLaunchConfig = launch_config("reward_model", recipe_config("reward_model", RewardMixConfig))
HumanLaunchConfig = launch_config("human_reward_model", recipe_config("human_reward_model", RewardConfig))
EvaluatorLaunchConfig = launch_config("evaluator", recipe_config("evaluator", EvaluatorConfig))


@dg.asset(check_specs=alarm_specs("human_reward_model"), **dressed("reward", {"trl", "peft"}, gpu=True))
def human_reward_model(
    context: dg.AssetExecutionContext,
    config: HumanLaunchConfig,  # type: ignore[valid-type]
    base_model: Checkpoint,
    human_preferences: PreferenceDataset,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
):
    """A scorer trained on the human pairs alone: picks the best of several revisions and drops those that are no better
    than the initial answer. Shared by all constitutions."""

    def pairs(settings: RewardConfig, rules: Constitution | None) -> Sequence[PreferencePair]:
        return read_records(store.path(human_preferences) / "reward_train.jsonl", PreferencePair)

    inputs = {"base_model": base_model, "human_preferences": human_preferences}
    return _train(context, config, inputs, pairs, Tools(store, tracking, dvc))


@dg.asset(partitions_def=PARTITIONS, check_specs=alarm_specs("reward_model"), **dressed("reward", {"trl", "peft"}, gpu=True))
def reward_model(
    context: dg.AssetExecutionContext,
    config: RewardLaunchConfig,  # type: ignore[valid-type]
    base_model: Checkpoint,
    human_preferences: PreferenceDataset,
    constitutional_preference_pairs: PreferenceDataset,
    ai_feedback: PreferenceDataset,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
):
    """A scalar scorer of (prompt, answer), trained on human and constitutional pairs and, if the recipe gives it a weight, on
    AI feedback with soft labels."""

    def pairs(settings: RewardMixConfig, rules: Constitution) -> Sequence[PreferencePair]:
        human = pairs_of(rules, read_records(store.path(human_preferences) / "reward_train.jsonl", PreferencePair))
        constitutional = read_records(store.path(constitutional_preference_pairs) / "pairs.jsonl", PreferencePair)
        feedback = []
        if settings.ai_feedback_weight:
            compared = read_records(store.path(ai_feedback) / "comparisons.jsonl", AiComparison)
            feedback = [comparison.pair(rules.name) for comparison in compared]
        mixed = reward_training_pairs(human, constitutional, settings, feedback)
        if not mixed and not human:
            raise no_human_pairs(rules)
        return mixed

    inputs = {
        "base_model": base_model,
        "human_preferences": human_preferences,
        "constitutional_preference_pairs": constitutional_preference_pairs,
    }
    if config.ai_feedback_weight:  # what takes no part decides nothing, and is no reason to train anew
        inputs["ai_feedback"] = ai_feedback
    return _train(context, config, inputs, pairs, Tools(store, tracking, dvc), RewardMixConfig)


@dg.asset(partitions_def=PARTITIONS, check_specs=alarm_specs("evaluator"), **dressed("reward", {"trl", "peft"}, gpu=True))
def evaluator(
    context: dg.AssetExecutionContext,
    config: EvaluatorLaunchConfig,  # type: ignore[valid-type]
    base_model: Checkpoint,
    human_preferences: PreferenceDataset,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
):
    """A second scorer that no policy is trained with: other seed, human pairs that the reward model never saw. Constitutions that
    learn from the same domains of human pairs share one."""

    def pairs(settings: RewardConfig, rules: Constitution) -> Sequence[PreferencePair]:
        ours = pairs_of(rules, read_records(store.path(human_preferences) / "evaluator_train.jsonl", PreferencePair))
        if not ours:
            raise no_human_pairs(rules)
        return ours

    inputs = {"base_model": base_model, "human_preferences": human_preferences}
    return _train(context, config, inputs, pairs, Tools(store, tracking, dvc), EvaluatorConfig, pairs_decide=True)


def pairs_of(rules: Constitution | None, pairs: Sequence[PreferencePair]) -> list[PreferencePair]:
    """The human pairs of a constitution's domains; all of them without a constitution."""
    return pairs_under(pairs, rules.preference_domains if rules else ())


def domains_of(rules: Constitution) -> dict[str, str]:
    """The domains of human pairs as part of a fingerprint; nothing where all count."""
    return {"preference_domains": ",".join(sorted(rules.preference_domains))} if rules.preference_domains else {}


def _train(
    context: dg.AssetExecutionContext,
    config: dg.Config,
    inputs: dict[str, Checkpoint | PreferenceDataset],
    pairs: Callable[[RewardConfig, Constitution | None], Sequence[PreferencePair]],
    tools: Tools,
    kind: type[RewardConfig] = RewardConfig,
    *,
    pairs_decide: bool = False,
) -> dg.MaterializeResult[RewardModel]:
    def stage() -> Stage:
        settings = checked_config(kind, config.model_dump())
        rules = constitution(context) if context.has_partition_key and context.assets_def.partitions_def else None

        def compute(work, log) -> Outcome:
            heldout = read_records(tools.store.path(inputs["human_preferences"]) / "heldout.jsonl", PreferencePair)
            trained, metrics, table = train_reward_model(
                settings,
                tools.store.model_files(inputs["base_model"]),
                pairs(settings, rules),
                pairs_of(rules, heldout),
                work=work.folder,
                out=work.out,
                log=log,
            )
            adapter_of = inputs["base_model"] if settings.finetuning == "lora" else None
            return Outcome(
                metrics=metrics,
                curves=trained.curves,
                curve_names=("loss", "accuracy"),
                tables={"heldout_pairs": table},
                handle={"adapter_of": adapter_of},
            )

        return Stage(
            kind=RewardModel,
            config=settings,
            code_version=CODE_VERSION,
            inputs=inputs,
            # Where a constitution only says which human pairs count, another with the same ones has the same model.
            constitution=None if pairs_decide else rules,
            versions=domains_of(rules) if pairs_decide else {},
            compute=compute,
            model_artifact=True,
        )

    return materialize(context, stage, tools, force=config.force)
