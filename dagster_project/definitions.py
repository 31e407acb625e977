"""The only Definitions: what the Dagster UI shows."""

import dagster as dg

from assets.ai_feedback import ai_feedback
from assets.base_model import base_model
from assets.champion import champion
from assets.checks import nothing_leaks
from assets.constitutional import constitutional_preference_pairs
from assets.data import data, human_preferences, prompts, sft_dataset
from assets.policies import policies, reports
from assets.revised_examples import revised_examples
from assets.reward_models import evaluator, human_reward_model, reward_model
from assets.settings import check_recipe
from assets.sft import sft_checkpoint
from assets.sft_report import sft_report
from dagster_project.executor import executor
from dagster_project.jobs import alignment_job, cai_demo_job
from dagster_project.resources import resources
from dagster_project.schedules import weekly_retraining
from dagster_project.sensors import new_data

check_recipe()

defs = dg.Definitions(
    assets=[
        data,
        base_model,
        sft_dataset,
        human_preferences,
        prompts,
        sft_checkpoint,
        human_reward_model,
        constitutional_preference_pairs,
        ai_feedback,
        revised_examples,
        reward_model,
        evaluator,
        sft_report,
        *policies,
        *reports,
        champion,
    ],
    asset_checks=[nothing_leaks],
    jobs=[alignment_job, cai_demo_job],
    schedules=[weekly_retraining],
    sensors=[new_data],
    resources=resources(),
    executor=executor,  # also of runs that are not of a job: "Materialize" in the asset graph, backfills
)
