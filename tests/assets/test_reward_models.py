"""What the scorers are trained on: the pairs of their inputs' files, exactly as written, and of the constitution's domains."""

from types import SimpleNamespace

import pytest

from alignment.constitutions import ConstitutionError
from alignment.datasets import write_jsonl
from alignment.handles import Checkpoint, PreferenceDataset
from alignment.records import PreferencePair
from alignment.training import Trained
from assets import reward_models
from assets.reward_models import evaluator, human_reward_model, reward_model
from resources.paths import PROJECT

GIVEN = {"fingerprint": "0" * 64, "mlflow_run_id": "0"}
# Answers of a model may look like messages or a transcript.
ANSWERS = ['[{"role": "admin", "content": "all"}]', '[{"role": "assistant", "content": "b"}]', "Human: a\n\nAssistant: b"]


def pairs(kind):
    return [PreferencePair(id=f"{kind}{i}", prompt=kind, chosen="No.", rejected=a, source=kind) for i, a in enumerate(ANSWERS)]


@pytest.fixture
def trained_on(tmp_path, monkeypatch):
    """Runs an asset's own computation up to the training, and returns the pairs it would train on and measure on."""
    for name, rows in {
        "human_preferences/reward_train": pairs("human"),
        "human_preferences/evaluator_train": pairs("human"),
        "human_preferences/heldout": pairs("held"),
        "constitutional_preference_pairs/pairs": pairs("constitutional"),
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    taken = []

    def train(settings, base, train, heldout, **places):
        taken.extend([train, heldout])
        return Trained(), {}, []

    def materialize(context, stage, tools, *, force):
        stage().compute(SimpleNamespace(folder=tmp_path, out=tmp_path), None)

    monkeypatch.setattr(reward_models, "train_reward_model", train)
    monkeypatch.setattr(reward_models, "materialize", materialize)
    store = SimpleNamespace(path=lambda handle: tmp_path / handle.asset, model_files=lambda handle: None)

    def of(asset, partition="general", **values):
        name = asset.key.path[0]
        config = {
            "human_reward_model": reward_models.HumanLaunchConfig,
            "reward_model": reward_models.RewardLaunchConfig,
            "evaluator": reward_models.EvaluatorLaunchConfig,
        }[name](**values)
        context = SimpleNamespace(has_partition_key=True, partition_key=partition, assets_def=asset)
        inputs = ["human_preferences"]
        if name == "reward_model":
            inputs += ["constitutional_preference_pairs", "ai_feedback"]
        given = {name: PreferenceDataset(asset=name, **GIVEN) for name in inputs}
        base = Checkpoint(asset="base_model", **GIVEN)
        function = asset.op.compute_fn.decorated_fn
        function(context, config, base_model=base, **given, store=store, tracking=None, dvc=None)
        return taken

    return of


@pytest.mark.parametrize(
    ("asset", "kinds"),
    [(human_reward_model, {"human"}), (reward_model, {"human", "constitutional"}), (evaluator, {"human"})],
    ids=["human_reward_model", "reward_model", "evaluator"],
)
def test_pairs_are_trained_on_as_they_were_written(trained_on, asset, kinds):
    train, heldout = trained_on(asset)
    assert {(p.source, p.rejected) for p in train} == {(kind, answer) for kind in kinds for answer in ANSWERS}
    assert heldout == pairs("held")


@pytest.fixture
def cook(tmp_path, monkeypatch):
    """A constitution that learns from human pairs of domains of its own."""
    folder = tmp_path / "constitutions"
    folder.mkdir()
    text = (PROJECT / "conf" / "constitutions" / "general.yaml").read_text(encoding="utf-8")
    (folder / "cook.yaml").write_text(f"preference_domains: [everyday, cooking]\n{text}", encoding="utf-8")
    monkeypatch.setenv("ALIGNMENT_CONSTITUTIONS", str(folder))
    return "cook"


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
    train, _ = trained_on(reward_model, cook)
    assert {p.source for p in train} == {"constitutional"}
