"""A policy learns from the human pairs of its constitution's domains, and its fingerprint says which."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from alignment.handles import PreferenceDataset
from alignment.methods import METHODS
from alignment.progress import SILENT
from assets import policies
from assets.launch_config import launch_config
from assets.settings import recipe_config

GENERAL = Path(__file__).parents[2] / "conf" / "constitutions" / "general.yaml"
HANDLE = PreferenceDataset(asset="any", fingerprint="0" * 64, mlflow_run_id="0")


@pytest.fixture
def trained(tmp_path, monkeypatch):
    """The domains that a method's training is given under a constitution, and what of them names its policy."""
    text = GENERAL.read_text(encoding="utf-8")
    (tmp_path / "general.yaml").write_text(text, encoding="utf-8")
    (tmp_path / "cook.yaml").write_text(f"preference_domains: [everyday, cooking]\n{text}", encoding="utf-8")
    monkeypatch.setenv("ALIGNMENT_CONSTITUTIONS", str(tmp_path))
    monkeypatch.setattr(policies, "materialize", lambda context, stage, tools, *, force: stage())
    store = SimpleNamespace(model_files=lambda handle: None, path=lambda handle: tmp_path)

    def run(name, partition, **settings):
        seen = []

        def train(config, training):
            seen.append(training)
            return SimpleNamespace(curves={}), {}

        method = replace(METHODS[name], train=train)
        context = SimpleNamespace(partition_key=partition, resources=SimpleNamespace(store=store, tracking=None, dvc=None))
        key = f"aligned_policy/{name}"
        config = launch_config(key, recipe_config(key, method.config))(**settings)
        asset = policies.policy_asset(name, method)
        stage = asset.op.compute_fn.decorated_fn(context, config, **dict.fromkeys(method.inputs, HANDLE))
        stage.compute(SimpleNamespace(folder=tmp_path, out=tmp_path), SILENT)
        return seen[0].preference_domains, stage.versions, set(stage.inputs)

    return run


def test_a_method_that_learns_from_human_pairs_is_told_their_domains_and_named_by_them(trained):
    assert trained("dpo", "cook")[:2] == (("everyday", "cooking"), {"preference_domains": "cooking,everyday"})
    assert trained("dpo", "general")[:2] == ((), {})


def test_where_no_human_pair_takes_part_their_domains_decide_nothing(trained):
    assert trained("ppo", "cook")[1] == {}
    assert trained("dpo", "cook", human_pairs=0)[1] == {}


def test_a_data_set_of_which_no_pair_is_wanted_is_no_input(trained):
    every = {"sft_checkpoint", "constitutional_preference_pairs", "human_preferences"}
    assert trained("dpo", "general")[2] == every
    assert trained("dpo", "general", constitutional_pairs=0)[2] == every - {"constitutional_preference_pairs"}
    assert trained("kto", "general", human_pairs=0)[2] == every - {"human_preferences"}
