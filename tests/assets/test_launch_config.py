"""The launchpad: same fields, descriptions and values as the recipe's configuration; what is wrong is refused by name."""

import shutil
import traceback
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml
from pydantic import BaseModel

from alignment.ai_feedback import AiFeedbackConfig
from alignment.critique import CritiqueConfig
from alignment.datasets import HumanPreferencesConfig, PromptsConfig, SftDatasetConfig
from alignment.evaluation import ReportConfig, SftReportConfig
from alignment.methods import METHODS
from alignment.models import Config
from alignment.promotion import GateConfig
from alignment.recipes import RecipeError
from alignment.reward import RewardConfig, RewardMixConfig
from alignment.sft import SftConfig
from assets.base_model import base_model
from assets.launch_config import launch_config
from assets.settings import RECIPE, recipe_config
from assets.stage import checked_config
from dagster_project.definitions import defs
from resources.artifacts import ArtifactStore
from resources.dvc_data import DvcData
from resources.handle_io import HandleIOManager
from resources.model_sources import BaseModelConfig
from resources.tracking import MlflowTracking

JOB = defs.resolve_job_def("alignment")

# Stage of the recipe and configuration class by op.
STAGES: dict[str, tuple[str, type[Config]]] = {
    "base_model": ("base_model", BaseModelConfig),
    "sft_dataset": ("sft_dataset", SftDatasetConfig),
    "human_preferences": ("human_preferences", HumanPreferencesConfig),
    "prompts": ("prompts", PromptsConfig),
    "sft_checkpoint": ("sft_checkpoint", SftConfig),
    "human_reward_model": ("human_reward_model", RewardConfig),
    "constitutional_preference_pairs": ("constitutional_preference_pairs", CritiqueConfig),
    "ai_feedback": ("ai_feedback", AiFeedbackConfig),
    "reward_model": ("reward_model", RewardMixConfig),
    "evaluator": ("evaluator", RewardConfig),
    "sft_report": ("sft_report", SftReportConfig),
    "champion": ("champion", GateConfig),
    **{f"aligned_policy__{name}": (f"aligned_policy/{name}", method.config) for name, method in METHODS.items()},
    **{f"policy_report__{name}": ("policy_report", ReportConfig) for name in METHODS},
}
everywhere = pytest.mark.parametrize("op", STAGES)


def schema(op: str) -> Any:
    return JOB.graph.node_named(op).definition.config_schema.config_type


def test_every_step_of_the_job_is_tested_here():
    checks = {"prompts_nothing_leaks"}  # nothing to set
    assert sorted(node.name for node in JOB.nodes) == sorted({*STAGES, *checks})


@everywhere
def test_fields_descriptions_and_defaults_are_those_of_the_recipe(op):
    stage, kind = STAGES[op]
    fields = dict(schema(op).fields)
    force = fields.pop("force")
    assert force.default_value is False
    assert "anew" in force.description
    compare(fields, recipe_config(stage, kind))


def compare(fields: dict[str, Any], config: BaseModel) -> None:
    """Dagster's fields against a configuration, nested ones included."""
    assert sorted(fields) == sorted(type(config).model_fields)
    for name, info in type(config).model_fields.items():
        field, value = fields[name], getattr(config, name)
        assert info.description
        assert field.description == info.description
        assert not field.is_required
        if isinstance(value, BaseModel):
            assert field.default_value == value.model_dump()
            compare(field.config_type.fields, value)
        else:
            assert field.default_value == value


@everywhere
def test_what_dagster_hands_to_the_step_is_the_recipes_configuration(op):
    stage, kind = STAGES[op]
    config = recipe_config(stage, kind)
    opened = launch_config(stage, config)()
    assert opened.force is False
    assert checked_config(kind, opened.model_dump()) == config


def test_the_test_recipe_is_in_force_and_differs_from_the_defaults():
    assert RECIPE.name == "tiny"
    assert recipe_config("sft_checkpoint", SftConfig) != SftConfig()


def test_infinity_in_nested_settings_reaches_the_launchpad():
    config = SftConfig(optim={"max_grad_norm": float("inf")})
    opened = launch_config("unclipped", config)()
    assert opened.optim.max_grad_norm == float("inf")
    assert checked_config(SftConfig, opened.model_dump()) == config


def test_settings_that_differ_in_one_number_are_told_apart():
    small, large = (launch_config(f"r{r}", SftConfig(lora={"r": r}))() for r in (2, 4))
    assert (small.lora.r, large.lora.r) == (2, 4)


def test_a_partial_override_keeps_the_recipes_other_values():
    config = recipe_config("sft_checkpoint", SftConfig)
    given = {"ops": {"sft_checkpoint": {"config": {"optim": {"learning_rate": 0.5}}}}}
    resolved = dg.validate_run_config(JOB, given)["ops"]["sft_checkpoint"]["config"]
    changed = checked_config(SftConfig, resolved)
    expected = config.model_dump()
    expected["optim"]["learning_rate"] = 0.5
    assert changed.model_dump() == expected


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    """What the launchpad shows before anything is changed, by op."""
    ops = dg.validate_run_config(JOB, {})["ops"]
    return {op: {"config": ops[op]["config"]} for op in STAGES}


@everywhere
def test_the_run_config_that_resolves_from_nothing_is_the_recipe(resolved, op):
    stage, kind = STAGES[op]
    assert checked_config(kind, resolved[op]["config"]) == recipe_config(stage, kind)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"learning_rat": 1}, '"learning_rat" at path root:ops:sft_checkpoint:config'),
        ({"optim": {"epoch": 1}}, '"epoch" at path root:ops:sft_checkpoint:config:optim'),
        ({"max_length": "long"}, "root:ops:sft_checkpoint:config:max_length"),
        ({"finetuning": "qlora"}, "root:ops:sft_checkpoint:config:finetuning"),
        ({"lora": {"target_modules": "q_proj"}}, "root:ops:sft_checkpoint:config:lora:target_modules"),
    ],
    ids=["unknown", "unknown and nested", "wrong type", "no such choice", "text for a list"],
)
def test_dagster_refuses_what_does_not_fit_the_schema(config, named):
    with pytest.raises(dg.DagsterInvalidConfigError) as caught:
        dg.validate_run_config(JOB, {"ops": {"sft_checkpoint": {"config": config}}})
    assert named in str(caught.value)


@pytest.fixture(scope="module")
def launched(resolved) -> dict[str, Any]:
    """What it is when it was written as YAML and is launched unchanged."""
    return dg.validate_run_config(JOB, yaml.safe_load(yaml.safe_dump({"ops": resolved})))["ops"]


@everywhere
def test_the_yaml_of_the_launchpad_is_read_back_the_same(launched, op):
    """The launchpad shows the resolved configuration as YAML; launching it unchanged changes nothing."""
    stage, kind = STAGES[op]
    assert checked_config(kind, launched[op]["config"]) == recipe_config(stage, kind)


# --- bounds are checked when the step starts --------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, empty_database):
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return tmp_path


def materialize_base_model(folder: Path, config: dict[str, Any], data_root: Path) -> dg.ExecuteInProcessResult:
    return dg.materialize(
        [base_model],
        instance=dg.DagsterInstance.ephemeral(),
        resources={
            "store": ArtifactStore(root=str(folder / "artifacts")),
            "io_manager": HandleIOManager(root=str(folder / "handles")),
            "dvc": DvcData(root=str(data_root)),
            "tracking": tracking(folder),
        },
        run_config={"ops": {"base_model": {"config": config}}},
        raise_on_error=False,
    )


def tracking(folder: Path) -> MlflowTracking:
    return MlflowTracking(
        tracking_uri=f"sqlite:///{folder / 'mlflow.db'}",
        artifact_root=str(folder / "mlartifacts"),
        lock_folder=str(folder / "locks"),
    )


def attempts(folder: Path) -> list[Any]:
    found = tracking(folder)
    return [run for run in found.client().search_runs([found.experiment_id]) if run.data.tags["alignment.level"] == "attempt"]


def test_a_violated_bound_fails_once_and_names_the_key(folder, fresh_data):
    done = materialize_base_model(folder, {"source": "tiny", "seed": -1}, fresh_data)
    (failure,) = done.get_step_failure_events()
    description = failure.step_failure_data.user_failure_data.description
    assert description == "run config: key 'seed': Input should be greater than or equal to 0 (got -1)"
    assert not [e for e in done.all_events if e.event_type_value in {"STEP_UP_FOR_RETRY", "STEP_RESTARTED"}]
    (attempt,) = attempts(folder)
    assert attempt.info.status == "FAILED"
    assert attempt.data.tags["alignment.error"] == description
    assert {"dvc.md5", "git.commit", "alignment.stage", "dagster.run_id"} <= set(attempt.data.tags)  # as every attempt
    assert list((folder / "artifacts").rglob("artifact.json")) == []
    assert not (folder / "handles").exists()


def test_a_broken_data_pointer_fails_the_step_once(tmp_path):
    done = materialize_base_model(tmp_path, {"source": "tiny"}, tmp_path / "nowhere")
    assert not done.success
    assert not [e for e in done.all_events if e.event_type_value in {"STEP_UP_FOR_RETRY", "STEP_RESTARTED"}]
    (failure,) = done.get_step_failure_events()
    assert "data.dvc: is missing. Remedy" in failure.step_failure_data.user_failure_data.description


def test_a_value_that_was_deleted_in_the_launchpad_fails_once_and_is_named(folder, fresh_data):
    done = materialize_base_model(folder, {"source": "tiny", "seed": None}, fresh_data)
    assert not [e for e in done.all_events if e.event_type_value in {"STEP_UP_FOR_RETRY", "STEP_RESTARTED"}]
    (failure,) = done.get_step_failure_events()
    assert "key 'seed'" in failure.step_failure_data.user_failure_data.description


@pytest.mark.parametrize(
    ("kind", "values", "message"),
    [
        (SftConfig, {"optim": {"epochs": 0}}, "run config: key 'optim.epochs': Input should be greater than 0 (got 0)"),
        (SftConfig, {"lora": {"dropout": 1.0}}, "run config: key 'lora.dropout': Input should be less than 1 (got 1.0)"),
        (PromptsConfig, {"heldout_fraction": 1.5}, "run config: key 'heldout_fraction': Input should be less than 1 (got 1.5)"),
        (
            SftConfig,
            {"optim": {"epochs": -1, "seed": -1}},
            "run config: key 'optim.epochs': Input should be greater than 0 (got -1); "
            "key 'optim.seed': Input should be greater than or equal to 0 (got -1)",
        ),
    ],
)
def test_a_violated_bound_is_described_by_key_and_value(kind, values, message):
    with pytest.raises(RecipeError) as caught:
        checked_config(kind, {**values, "force": False})
    assert str(caught.value) == message


def test_a_pasted_key_is_in_no_message_of_a_run_configuration():
    values = {"critic": {"api_key_env": "sk-proj-4711"}}
    with pytest.raises(RecipeError, match=r"^run config: key 'critic\.api_key_env': must be the name of an") as caught:
        checked_config(CritiqueConfig, values)
    assert "4711" not in "".join(traceback.format_exception(caught.value))


def test_settings_that_contradict_each_other_name_both():
    with pytest.raises(RecipeError, match=r"key 'optim'.*batch_size 8 must be a multiple of micro_batch_size 3"):
        checked_config(SftConfig, {"optim": {"batch_size": 8, "micro_batch_size": 3}})
