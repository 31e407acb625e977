"""Constitutions share an evaluator where they learn from the same human pairs, and only there."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.fingerprint import fingerprint
from alignment.handles import Checkpoint, PreferenceDataset
from assets import reward_models

CONSTITUTIONS = Path(__file__).parents[2] / "conf" / "constitutions"
GIVEN = {"fingerprint": "0" * 64, "mlflow_run_id": "0"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The shipped constitutions, and `cook`, which learns from two domains of human pairs."""
    shutil.copytree(CONSTITUTIONS, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "general.yaml").read_text()
    (tmp_path / "cook.yaml").write_text(f"preference_domains: [everyday, cooking]\n{text}")
    (tmp_path / "kitchen.yaml").write_text(f"preference_domains: [cooking, everyday]\n{text}")
    monkeypatch.setenv("ALIGNMENT_CONSTITUTIONS", str(tmp_path))
    return tmp_path


@pytest.fixture
def fingerprint_of(folder, monkeypatch):
    """The fingerprint of a reward model of a constitution, as `materialize` makes it."""

    def materialize(context, stage, tools, *, force):
        built = stage()
        inputs = {name: handle.fingerprint for name, handle in built.inputs.items()} | dict(built.versions)
        rules = built.constitution.text if built.constitution else None
        return fingerprint(
            asset="scorer", code_version=built.code_version, config=built.config, inputs=inputs, constitution=rules
        )

    monkeypatch.setattr(reward_models, "materialize", materialize)

    def of(asset, partition, **inputs):
        context = SimpleNamespace(has_partition_key=True, partition_key=partition, assets_def=asset)
        given = {
            "base_model": Checkpoint(asset="base_model", **GIVEN),
            "human_preferences": PreferenceDataset(asset="human_preferences", **GIVEN),
        }
        config = {"evaluator": reward_models.EvaluatorLaunchConfig, "reward_model": reward_models.RewardLaunchConfig}
        config = config[asset.key.path[0]]()
        return asset.op.compute_fn.decorated_fn(context, config, **given, **inputs, store=None, tracking=None, dvc=None)

    return of


def test_other_principles_have_the_same_evaluator(fingerprint_of):
    assert fingerprint_of(reward_models.evaluator, "general") == fingerprint_of(reward_models.evaluator, "medical")


def test_other_domains_have_another(fingerprint_of):
    cook = fingerprint_of(reward_models.evaluator, "cook")
    assert cook != fingerprint_of(reward_models.evaluator, "general")
    assert cook == fingerprint_of(reward_models.evaluator, "kitchen")


def test_a_reward_model_is_of_one_constitution(fingerprint_of):
    pairs = PreferenceDataset(asset="pairs", **GIVEN)
    inputs = {"constitutional_preference_pairs": pairs, "ai_feedback": pairs}
    first, second = (fingerprint_of(reward_models.reward_model, name, **inputs) for name in ("general", "medical"))
    assert first != second
