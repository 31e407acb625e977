"""Constitutions share an evaluator where they learn from the same human pairs, and only there."""

import pytest

from alignment.fingerprint import fingerprint
from assets import reward_models


@pytest.fixture
def kitchen(tmp_path, cook):
    """A constitution that names the domains of `cook` in another order."""
    folder = tmp_path / "constitutions"
    text = (folder / f"{cook}.yaml").read_text(encoding="utf-8")
    (folder / "kitchen.yaml").write_text(text.replace("[everyday, cooking]", "[cooking, everyday]"), encoding="utf-8")
    return "kitchen"


@pytest.fixture
def fingerprint_of(stage_of):
    """The fingerprint of a reward model of a constitution, as `materialize` makes it."""

    def of(asset, partition):
        built = stage_of(asset, partition)
        inputs = {name: handle.fingerprint for name, handle in built.inputs.items()} | dict(built.versions)
        rules = built.constitution.text if built.constitution else None
        return fingerprint(
            asset="scorer", code_version=built.code_version, config=built.config, inputs=inputs, constitution=rules
        )

    return of


def test_other_principles_have_the_same_evaluator(fingerprint_of):
    assert fingerprint_of(reward_models.evaluator, "general") == fingerprint_of(reward_models.evaluator, "medical")


def test_other_domains_have_another(fingerprint_of, cook, kitchen):
    ours = fingerprint_of(reward_models.evaluator, cook)
    assert ours != fingerprint_of(reward_models.evaluator, "general")
    assert ours == fingerprint_of(reward_models.evaluator, kitchen)


def test_a_reward_model_is_of_one_constitution(fingerprint_of):
    first, second = (fingerprint_of(reward_models.reward_model, name) for name in ("general", "medical"))
    assert first != second
