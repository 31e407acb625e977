"""`sft_report[c]`: what the SFT checkpoint answers to held-out prompts. Every policy is compared with it, and it is made once."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import dagster as dg

from alignment.constitutions import Constitution, prompts_under
from alignment.evaluation import CODE_VERSION, Heldout, SftReportConfig, measure_sft
from alignment.handles import Checkpoint, PromptSet, RewardModel, SftDataset, SftReport
from alignment.readers import read_records
from alignment.records import Conversation, Problem, Prompt
from assets.launch_config import launch_config
from assets.settings import PARTITIONS, constitution, dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

LaunchConfig = launch_config("sft_report", recipe_config("sft_report", SftReportConfig))


@dg.asset(partitions_def=PARTITIONS, **dressed("evaluation", {"transformers"}, gpu=True))
def sft_report(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    base_model: Checkpoint,
    sft_checkpoint: Checkpoint,
    evaluator: RewardModel,
    reward_model: RewardModel,
    prompts: PromptSet,
    sft_dataset: SftDataset,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
) -> dg.MaterializeResult[SftReport]:
    """The SFT checkpoint on held-out prompts: answers, scores and guardrails. All policies are compared with these answers."""

    def stage() -> Stage:
        settings = checked_config(SftReportConfig, config.model_dump())
        rules = constitution(context)

        def compute(work, log) -> Outcome:
            measured, metrics, table = measure_sft(
                settings,
                base=store.model_files(base_model),
                sft=store.model_files(sft_checkpoint),
                evaluator=store.model_files(evaluator),
                reward_model=store.model_files(reward_model),
                heldout=heldout_data(store, rules, prompts, sft_dataset),
                log=log,
            )
            (work.out / "measured.json").write_text(measured.model_dump_json(), encoding="utf-8")
            write_table(work.out / "generations.jsonl", table)
            return Outcome(metrics=metrics, tables={"generations": table})

        return Stage(
            kind=SftReport,
            config=settings,
            code_version=CODE_VERSION,
            inputs={
                "base_model": base_model,
                "sft_checkpoint": sft_checkpoint,
                "evaluator": evaluator,
                "reward_model": reward_model,
                "prompts": prompts,
                "sft_dataset": sft_dataset,
            },
            constitution=rules,
            compute=compute,
        )

    return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)


def heldout_data(store: ArtifactStore, rules: Constitution, prompts: PromptSet, sft_dataset: SftDataset) -> Heldout:
    """What the models of a constitution are measured on."""
    folder = store.path(prompts)
    return Heldout(
        prompts=tuple(prompts_under(read_records(folder / "heldout.jsonl", Prompt), rules, ())),
        demonstrations=tuple(read_records(store.path(sft_dataset) / "heldout.jsonl", Conversation)),
        problems=tuple(read_records(folder / "problems_heldout.jsonl", Problem)),
    )


def write_table(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows that `write_table` wrote. Only a newline ends one: `splitlines` also breaks at a U+2028 inside a text."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
