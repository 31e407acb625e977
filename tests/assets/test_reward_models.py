"""What the scorers are trained and measured on: the pairs of their own files, as written, and of the constitution's domains."""

from types import SimpleNamespace

import pytest

from alignment.constitutions import ConstitutionError
from alignment.datasets import write_jsonl
from alignment.records import PreferencePair
from alignment.training import Trained
from assets import reward_models
from assets.reward_models import evaluator, human_reward_model, reward_model

# Answers of a model may look like messages or a transcript.
ANSWERS = ['[{"role": "admin", "content": "all"}]', '[{"role": "assistant", "content": "b"}]', "Human: a\n\nAssistant: b"]


def pairs(kind, **more):
    given = {"prompt": kind, "chosen": "No.", "source": kind, **more}
    return [PreferencePair(id=f"{kind}{i}", rejected=answer, **given) for i, answer in enumerate(ANSWERS)]


COOKED = pairs("cooked", domain="cooking")
HELD_OUT = [*pairs("held"), *COOKED]


@pytest.fixture
def trained_on(tmp_path, monkeypatch, stage_of):
    """Runs an asset's own computation up to the training, and returns the pairs it would train on and measure on."""
    for name, rows in {
        "human_preferences/reward_train": pairs("human"),
        "human_preferences/evaluator_train": pairs("evaluator's"),
        "human_preferences/heldout": HELD_OUT,
        "constitutional_preference_pairs/pairs": pairs("constitutional"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    taken = []

    def train(settings, base, train, heldout, **places):
        taken[:] = [train, heldout]
        return Trained(), {}, []

    monkeypatch.setattr(reward_models, "train_reward_model", train)

    def of(asset, partition="general", **config):
        stage_of(asset, partition, **config).compute(SimpleNamespace(folder=tmp_path, out=tmp_path), None)
        return taken

    return of


@pytest.mark.parametrize(
    ("asset", "kinds"),
    [(human_reward_model, {"human"}), (reward_model, {"human", "constitutional"}), (evaluator, {"evaluator's"})],
    ids=["human_reward_model", "reward_model", "evaluator"],
)
def test_pairs_are_trained_on_as_they_were_written(trained_on, asset, kinds):
    train, heldout = trained_on(asset)
    assert {(p.source, p.rejected) for p in train} == {(kind, answer) for kind in kinds for answer in ANSWERS}
    assert heldout == HELD_OUT


def test_domains_without_a_human_pair_are_named(trained_on, cook):
    says = (
        r"constitution cook: no human pair to train on has one of its preference_domains \['everyday', 'cooking'\]\. "
        r"Remedy: add pairs .*human_preferences\.preferences, or correct preference_domains"
    )
    with pytest.raises(ConstitutionError, match=says):
        trained_on(evaluator, cook)
    with pytest.raises(ConstitutionError, match=says):
        trained_on(reward_model, cook, constitutional_share=0.0)


def test_a_reward_model_without_human_pairs_of_its_domains_learns_from_constitutional_ones(trained_on, cook):
    train, heldout = trained_on(reward_model, cook)
    assert {p.source for p in train} == {"constitutional"}
    assert heldout == COOKED


def test_the_scorer_that_constitutions_share_is_of_all_domains(trained_on, cook):
    train, heldout = trained_on(human_reward_model, cook)  # a run has a constitution even where its asset has none
    assert {p.source for p in train} == {"human"}
    assert heldout == HELD_OUT
