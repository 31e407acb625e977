"""Recipes: the shipped ones are valid to the last key, and a wrong one is refused in one clear sentence."""

import traceback
from pathlib import Path

import pytest
from pydantic import Field

from alignment.ai_feedback import AiFeedbackConfig
from alignment.alarms import AlarmConfig
from alignment.critique import CritiqueConfig
from alignment.datasets import HumanPreferencesConfig, PromptsConfig, SftDatasetConfig
from alignment.errors import UserError
from alignment.evaluation import ReportConfig, SftReportConfig
from alignment.methods import METHODS
from alignment.models import Config
from alignment.promotion import GateConfig
from alignment.recipes import RecipeError, load_recipe
from alignment.reward import RewardConfig, RewardMixConfig
from alignment.sft import SftConfig
from resources.model_sources import BaseModelConfig

RECIPES = Path(__file__).parents[2] / "conf" / "recipes"
STAGES = {
    "base_model": BaseModelConfig,
    "sft_dataset": SftDatasetConfig,
    "human_preferences": HumanPreferencesConfig,
    "prompts": PromptsConfig,
    "sft_checkpoint": SftConfig,
    "constitutional_preference_pairs": CritiqueConfig,
    "ai_feedback": AiFeedbackConfig,
    "reward_model": RewardMixConfig,
    "human_reward_model": RewardConfig,
    "evaluator": RewardConfig,
    **{f"aligned_policy/{name}": method.config for name, method in METHODS.items()},
    "sft_report": SftReportConfig,
    "policy_report": ReportConfig,
    "champion": GateConfig,
    "alarms": AlarmConfig,
}


class Inner(Config):
    """Settings inside settings."""

    rate: float = Field(0.1, gt=0, lt=1, description="A rate")
    steps: int = Field(10, ge=1, description="Steps")


class Stage(Config):
    """A stage's settings."""

    beta: float = Field(0.5, ge=0, description="A coefficient")
    names: list[str] = Field(["a"], description="Names")
    optim: Inner = Field(Inner(), description="More of it")


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.y*ml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("stage", STAGES)
def test_every_value_of_every_shipped_recipe_is_valid(path, stage):
    load_recipe(path).config(stage, STAGES[stage])


@pytest.mark.parametrize("path", sorted(RECIPES.rglob("*.y*ml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_names_stages_that_exist_only(path):
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert set(recipe.stages) <= set(STAGES)


@pytest.fixture
def recipe(tmp_path):
    """Writes recipes, loads the last of them."""

    def load(**files):
        for name, text in files.items():
            (tmp_path / f"{name}.yaml").write_text(text, encoding="utf-8")
        return load_recipe(tmp_path / f"{name}.yaml")

    return load


def test_what_is_not_named_keeps_its_default(recipe):
    assert recipe(r="").config("stage", Stage) == Stage()
    config = recipe(r="stage: {optim: {rate: 0.3}}").config("stage", Stage)
    assert config == Stage(optim=Inner(rate=0.3))
    assert recipe(r="other: {beta: 1}").config("stage", Stage) == Stage()


def test_stages_are_in_the_order_of_the_file(recipe):
    assert recipe(r="b: {x: 1}\na: {y: 2}").stages == ["b", "a"]


def test_a_recipe_may_extend_another_key_by_key(recipe):
    files = {
        "base": "stage: {beta: 1, names: [x, y], optim: {rate: 0.2, steps: 5}}\nother: {a: 1}",
        "middle": "extends: base\nstage: {optim: {steps: 7}}",
        "top": "extends: middle\nstage: {names: [z]}\nmore: {}",
    }
    top = recipe(**files)
    assert top.config("stage", Stage) == Stage(beta=1, names=["z"], optim=Inner(rate=0.2, steps=7))
    assert top.stages == ["stage", "other", "more"]
    assert recipe(base=files["base"]).config("stage", Stage).names == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage: {betta: 1}", r"key 'stage\.betta': is not a known key$"),
        ("stage: {optim: {lr: 1}}", r"key 'stage\.optim\.lr': is not a known key$"),
        ("stage: {beta: much}", r"key 'stage\.beta': .*valid number.*\(got 'much'\)$"),
        ("stage: {beta: -1}", r"key 'stage\.beta': .*greater than or equal to 0.*\(got -1\)$"),
        ("stage: {beta: null}", r"key 'stage\.beta': .*valid number.*\(got None\)$"),
        ("stage: {optim: {rate: 1.0}}", r"key 'stage\.optim\.rate': .*less than 1.*\(got 1\.0\)$"),
        ("stage: {optim: {steps: 2.5}}", r"key 'stage\.optim\.steps': .*integer.*\(got 2\.5\)$"),
        ("stage: {optim: 3}", r"key 'stage\.optim': .*\(got 3\)$"),
        ("stage: {names: a}", r"key 'stage\.names': .*list.*\(got 'a'\)$"),
        ("stage: {names: [a, 1]}", r"key 'stage\.names\.1': .*string.*\(got 1\)$"),
        ("stage: {beta: -1, gamma: 2}", r"key 'stage\.beta': .*; key 'stage\.gamma': is not a known key$"),
    ],
)
def test_a_wrong_value_is_named_by_file_and_key(recipe, tmp_path, text, says):
    loaded = recipe(r=text)
    with pytest.raises(RecipeError, match=says) as error:
        loaded.config("stage", Stage)
    assert str(error.value).startswith(f"{tmp_path / 'r.yaml'}: ")
    assert "\n" not in str(error.value)
    assert isinstance(error.value, UserError)


@pytest.mark.parametrize(
    "settings",
    [
        "[{kind: endpoint, api_key_env: sk-proj-secret}]",
        '"http://me:secret@host/v1"',
        "{api_key_env: sk-proj-secret, retries: -1}",
        "{kind: endpoint, model: m, retries: -1, base_url: 'https://host/v1?key=secret'}",
    ],
)
def test_what_may_hold_a_password_or_a_key_is_not_shown(recipe, settings):
    loaded = recipe(r=f"stage: {{critic: {settings}, sampler: {{retries: -2}}}}")
    with pytest.raises(RecipeError, match=r"key 'stage\.sampler\.retries': .* \(got -2\)") as error:
        loaded.config("stage", CritiqueConfig)
    assert ("(got -1)" in str(error.value)) == ("-1" in settings)
    for told in (str(error.value), "".join(traceback.format_exception(error.value))):
        assert "secret" not in told


def test_values_that_contradict_each_other_are_named(recipe):
    wrong = recipe(r="sft_checkpoint: {optim: {batch_size: 6, micro_batch_size: 4}}")
    with pytest.raises(RecipeError, match=r"key 'sft_checkpoint\.optim': .*batch_size 6 must be a multiple of .* 4"):
        wrong.config("sft_checkpoint", SftConfig)
    wrong = recipe(r="sft_checkpoint: {optim: {save_every: 5, log_every: 2}}")
    with pytest.raises(RecipeError, match=r"save_every 5 must be a multiple of log_every 2"):
        wrong.config("sft_checkpoint", SftConfig)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("stage: [a", r"r\.yaml: is not readable YAML"),
        ("- stage", r"r\.yaml: must map each stage to a mapping"),
        ("stage: 3", r"r\.yaml: key 'stage': must be a stage with a mapping of its settings \(got 3\)"),
        ("stage:", r"r\.yaml: key 'stage': must be a stage with a mapping of its settings"),
        ("extends: r", r"r\.yaml: extends itself, through r$"),
        ("extends: other", r"other\.yaml: no such recipe\. Remedy: choose one of r"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe, text, says):
    with pytest.raises(RecipeError, match=says):
        recipe(r=text)


def test_a_circle_of_recipes_is_refused(recipe):
    with pytest.raises(RecipeError, match=r"b\.yaml: extends itself, through b -> a$"):
        recipe(a="extends: b", b="extends: a")


def test_bytes_that_are_no_text_are_refused(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"stage: \xff")
    with pytest.raises(RecipeError, match="is not readable YAML"):
        load_recipe(tmp_path / "r.yaml")


def test_a_missing_recipe_is_refused_with_those_that_exist(recipe, tmp_path):
    recipe(a="", b="")
    with pytest.raises(RecipeError, match=r"none\.yaml: no such recipe\. Remedy: choose one of a, b, or write it"):
        load_recipe(tmp_path / "none.yaml")


def test_a_parent_in_another_folder_is_refused_like_any_other_that_is_missing(recipe):
    with pytest.raises(RecipeError, match="base"):
        recipe(r="extends: ../base")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError):
        load_recipe(tmp_path)


def test_a_recipe_anywhere_may_extend_a_shipped_one(tmp_path):
    mine, shipped = tmp_path / "mine", tmp_path / "shipped"
    mine.mkdir()
    shipped.mkdir()
    (shipped / "demo.yaml").write_text("sft_checkpoint: {max_length: 77}")
    (mine / "own.yaml").write_text("extends: demo\nreward_model: {max_length: 99}")
    assert load_recipe(mine / "own.yaml", shipped).stages == ["sft_checkpoint", "reward_model"]
    (mine / "demo.yaml").write_text("evaluator: {max_length: 55}")  # the one beside it comes first
    assert load_recipe(mine / "own.yaml", shipped).stages == ["evaluator", "reward_model"]
    with pytest.raises(RecipeError, match="no such recipe"):
        load_recipe(shipped / "none.yaml", shipped)
