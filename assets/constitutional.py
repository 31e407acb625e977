"""`constitutional_preference_pairs[c]`: the SFT checkpoint, or whoever the recipe names, criticises and revises its answers."""

import dagster as dg

from alignment.ai_feedback import keep_preferred
from alignment.constitutions import no_prompts, prompts_to_criticise
from alignment.critique import CODE_VERSION, CritiqueConfig, critique_and_revise, preference_pairs
from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, PreferenceDataset, PromptSet, RewardModel
from alignment.readers import read_records
from alignment.records import Prompt
from assets.answerers import who_revises
from assets.checks import alarm_specs
from assets.launch_config import launch_config
from assets.settings import PARTITIONS, constitution, dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

LaunchConfig = launch_config("constitutional_preference_pairs", recipe_config("constitutional_preference_pairs", CritiqueConfig))


@dg.asset(
    partitions_def=PARTITIONS,
    check_specs=alarm_specs("constitutional_preference_pairs"),
    **dressed("constitutional", {"transformers"}, gpu=True),
)
def constitutional_preference_pairs(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    sft_checkpoint: Checkpoint,
    human_reward_model: RewardModel,
    prompts: PromptSet,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
):
    """Critique and revise under the constitution: rejected = initial answer, chosen = last revision, bad revisions
    filtered and counted by reason."""

    def stage() -> Stage:
        settings = checked_config(CritiqueConfig, config.model_dump())
        rules = constitution(context)

        def compute(work, log) -> Outcome:
            known = read_records(store.path(prompts) / "train.jsonl", Prompt)
            ours = prompts_to_criticise(known, rules, settings.prompt_tags)
            asked = ours[: settings.max_prompts or None]
            if not asked:
                if rules.critique_tags is None:
                    raise no_prompts(rules, settings.prompt_tags, "constitutional_preference_pairs.prompt_tags")
                raise no_prompts(rules, rules.critique_tags, "its critique_tags")
            sampler, critic, judge = who_revises(settings, sft_checkpoint, human_reward_model, store, work.folder)
            revised = critique_and_revise(sampler, critic, asked, rules, settings, judge=judge, work=work.folder, log=log)
            pairs, reasons = preference_pairs(revised, rules, settings.filters)
            if settings.filters.judge_pairs:
                texts = {p.id: p.text for p in rules.principles}
                principles = {(r.id, r.prompt): texts[r.revisions[-1].principle] for r in revised}
                pairs, judged = keep_preferred(critic, pairs, principles, log=log)
                reasons += judged
            write_jsonl(work.out / "rounds.jsonl", revised)
            write_jsonl(work.out / "pairs.jsonl", pairs)
            kept = {(p.id, p.prompt) for p in pairs}
            metrics = {
                "prompts": len(revised),
                "pairs": len(pairs),
                "share_kept": len(pairs) / len(revised),
                "share_no_violations": sum(not r.revised for x in revised for r in x.revisions)
                / sum(len(x.revisions) for x in revised),
                "reward/initial": sum(r.reward_initial for r in revised) / len(revised),
                "reward/final": sum(r.reward_final for r in revised) / len(revised),
                **{f"filtered/{reason}": float(count) for reason, count in sorted(reasons.items())},
            }
            table = [
                {
                    "prompt": r.prompt,
                    "initial": r.initial,
                    "principle": r.revisions[-1].principle,
                    "critique": r.revisions[-1].critique,
                    "final": r.final,
                    "kept": (r.id, r.prompt) in kept,
                }
                for r in revised
            ]
            return Outcome(metrics=metrics, tables={"revisions": table}, summary=_examples(table))

        return Stage(
            kind=PreferenceDataset,
            config=settings,
            code_version=CODE_VERSION,
            inputs={"sft_checkpoint": sft_checkpoint, "human_reward_model": human_reward_model, "prompts": prompts},
            constitution=rules,
            compute=compute,
            versioned=("pairs.jsonl", "rounds.jsonl"),
        )

    return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)


def _examples(table: list[dict], count: int = 3) -> str:
    rows = [row for row in table if row["kept"]][:count]
    return "\n\n".join(f"**{r['prompt']}**\n\n- initial: {r['initial']}\n- revised: {r['final']}" for r in rows)
