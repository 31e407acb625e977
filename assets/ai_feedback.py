"""`ai_feedback[c]`: two answers of the SFT checkpoint to every prompt, compared by a judge under the constitution (RLAIF)."""

import dagster as dg

from alignment.ai_feedback import (
    CODE_VERSION,
    AiFeedbackConfig,
    Compared,
    Measured,
    collect_feedback,
    feedback_metrics,
    measure_judge,
)
from alignment.constitutions import no_prompts, prompts_under
from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, PreferenceDataset, PromptSet
from alignment.readers import read_records
from alignment.records import PreferencePair, Prompt
from assets.answerers import answerers
from assets.checks import alarm_specs
from assets.launch_config import launch_config
from assets.reward_models import pairs_of
from assets.settings import PARTITIONS, constitution, dressed, recipe_config
from assets.stage import Outcome, Stage, Tools, checked_config, materialize
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.tracking import MlflowTracking

LaunchConfig = launch_config("ai_feedback", recipe_config("ai_feedback", AiFeedbackConfig))


@dg.asset(
    partitions_def=PARTITIONS,
    check_specs=alarm_specs("ai_feedback"),
    **dressed("constitutional", {"transformers"}, gpu=True),
)
def ai_feedback(
    context: dg.AssetExecutionContext,
    config: LaunchConfig,  # type: ignore[valid-type]
    sft_checkpoint: Checkpoint,
    prompts: PromptSet,
    human_preferences: PreferenceDataset,
    store: ArtifactStore,
    tracking: MlflowTracking,
    dvc: DvcData,
):
    """AI feedback under the constitution: pairs of answers with the probability that one is better, asked in both orders, and
    how often the judge agrees with people on held-out pairs."""

    def stage() -> Stage:
        settings = checked_config(AiFeedbackConfig, config.model_dump())
        rules = constitution(context)

        def compute(work, log) -> Outcome:
            ours = prompts_under(read_records(store.path(prompts) / "train.jsonl", Prompt), rules, settings.prompt_tags)
            asked = ours[: settings.max_prompts or None]
            if not asked:
                raise no_prompts(rules, settings.prompt_tags, "ai_feedback.prompt_tags")
            heldout = pairs_of(rules, read_records(store.path(human_preferences) / "heldout.jsonl", PreferencePair))
            who = answerers(
                {"policy": settings.policy, "judge": settings.judge}, sft_checkpoint, store, settings.load, work.folder
            )
            compared = collect_feedback(who["policy"], who["judge"], asked, rules, settings, work=work.folder, log=log)
            accuracy, measured = measure_judge(who["judge"], heldout, rules, settings, work=work.folder, log=log)
            write_jsonl(work.out / "comparisons.jsonl", [c.comparison for c in compared if c.comparison is not None])
            write_jsonl(work.out / "heldout.jsonl", measured)
            return Outcome(
                metrics=feedback_metrics(compared) | accuracy,
                tables={"comparisons": _comparisons(compared), "heldout_pairs": _heldout(measured)},
                facts={name: answerer.identity for name, answerer in who.items()},
                summary=_examples(compared),
            )

        return Stage(
            kind=PreferenceDataset,
            config=settings,
            code_version=CODE_VERSION,
            inputs={
                "sft_checkpoint": sft_checkpoint,
                "prompts": prompts,
                "human_preferences": human_preferences,
            },
            constitution=rules,
            compute=compute,
            versioned=("comparisons.jsonl", "heldout.jsonl"),
        )

    return materialize(context, stage, Tools(store, tracking, dvc), force=config.force)


def _comparisons(compared: list[Compared]) -> list[dict]:
    rows = []
    for c in compared:
        found = c.comparison
        rows.append(
            {
                "prompt": c.prompt,
                "principle": found.principle if found else "",
                "a": found.a if found else "",
                "b": found.b if found else "",
                "a_better": found.probability if found else None,
                "a_better_shown_first": found.judgement.a_first if found else None,
                "a_better_shown_second": found.judgement.a_second if found else None,
                "reasoning": "\n\n".join(found.judgement.reasoning) if found else "",
                "dropped": c.dropped or "",
            }
        )
    return rows


def _heldout(measured: list[Measured]) -> list[dict]:
    return [
        {
            "prompt": m.prompt,
            "chosen": m.chosen,
            "rejected": m.rejected,
            "principle": m.principle,
            "chosen_better": m.judgement.probability if m.judgement else None,
            "chosen_better_shown_first": m.judgement.a_first if m.judgement else None,
            "chosen_better_shown_second": m.judgement.a_second if m.judgement else None,
        }
        for m in measured
    ]


def _examples(compared: list[Compared], count: int = 3) -> str:
    found = sorted((c.comparison for c in compared if c.comparison), key=lambda c: -c.label)[:count]
    return "\n\n".join(
        f"**{c.prompt}**\n\n- better with probability {c.label:.2f} ({c.principle}): {pair.chosen}\n- than: {pair.rejected}"
        for c, pair in ((c, c.pair("")) for c in found)
    )
