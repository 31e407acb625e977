"""`revised_examples[c]`: a handful of prompts through critique and revise, for people to compare initial and revised answers."""

import dagster as dg

from alignment.critique import CODE_VERSION, critique_and_revise
from alignment.critique_demo import CritiqueDemoConfig, comparison_rows
from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, Revisions, RewardModel
from assets.answerers import who_revises
from assets.launch_config import launch_config
from assets.settings import PARTITIONS, constitution, dressed, recipe_config
from assets.sft_report import write_table
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

# The recipe's settings of the real stage, so that the demo shows what the pairs are made of.
LaunchConfig = launch_config("revised_examples", recipe_config("constitutional_preference_pairs", CritiqueDemoConfig))


@dg.asset(partitions_def=PARTITIONS, **dressed("constitutional", {"transformers"}, gpu=True))
def revised_examples(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    sft_checkpoint: Checkpoint,
    human_reward_model: RewardModel,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
) -> dg.MaterializeResult[Revisions]:
    """Your prompts through critique and revise: initial against revised, side by side. Nothing is trained on it."""

    def stage() -> Stage:
        settings = checked_config(CritiqueDemoConfig, config.model_dump())
        rules = constitution(context)

        def compute(work, log) -> Outcome:
            sampler, critic, judge = who_revises(settings, sft_checkpoint, human_reward_model, store, work.folder)
            asked = settings.records()
            revised = critique_and_revise(sampler, critic, asked, rules, settings, judge=judge, work=work.folder, log=log)
            rows = comparison_rows(revised, settings.filters)
            write_jsonl(work.out / "rounds.jsonl", revised)
            write_table(work.out / "revisions.jsonl", rows)
            metrics = {
                "prompts": len(rows),
                "pairs": sum(row["pair"] == "kept" for row in rows),
                "reward/initial": sum(r.reward_initial for r in revised) / len(revised),
                "reward/final": sum(r.reward_final for r in revised) / len(revised),
            }
            return Outcome(metrics=metrics, tables={"revisions": rows}, summary=_markdown(rows))

        return Stage(
            kind=Revisions,
            config=settings,
            code_version=CODE_VERSION,
            inputs={"sft_checkpoint": sft_checkpoint, "human_reward_model": human_reward_model},
            constitution=rules,
            compute=compute,
        )

    result = materialize(context, stage, Tools(store, tracking, dvc), force=config.force)
    # Where the answers are reused, the table is in the run that made them.
    table = dg.MetadataValue.url(tracking.run_url(result.value.mlflow_run_id))
    return result._replace(metadata={**result.metadata, "table": table})


def _markdown(rows: list[dict]) -> str:
    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", "<br>")

    lines = ["| prompt | initial | principles | revised | pair |", "|---|---|---|---|---|"]
    columns = ("prompt", "initial", "principles", "revised", "pair")
    return "\n".join(lines + ["| " + " | ".join(cell(row[c]) for c in columns) + " |" for row in rows])
