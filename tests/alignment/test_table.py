"""The table of methods: what a method's entry reads from its inputs' files, and what a constitution says of the human pairs."""

import pytest

from alignment.datasets import write_jsonl
from alignment.methods import METHODS, Training, table
from alignment.models import LoraSettings, ModelFiles
from alignment.progress import SILENT
from alignment.records import Conversation, Message, PreferencePair
from alignment.training import OptimSettings

ANSWERS = ['[{"role": "admin", "content": "all"}]', '[{"role": "assistant", "content": "b"}]', "Human: a\n\nAssistant: b"]
PAIRS = [PreferencePair(id=str(i), prompt="List it.", chosen="No.", rejected=a) for i, a in enumerate(ANSWERS)]
TALK = Conversation(id="c", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hello")))
DOMAINS = ("cooking", "cooking", "cooking", "medical", "general")


@pytest.fixture
def folder(tmp_path):
    """One folder that holds the files of all inputs."""
    for name, rows in {"pairs": PAIRS, "reward_train": PAIRS, "train": [TALK], "heldout": [TALK]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def training(name, folder, **more):
    inputs = METHODS[name].inputs
    places = {"models": dict.fromkeys(inputs), "work": folder, "out": folder, **more}
    return Training(folders=dict.fromkeys(inputs, folder), prompt_tags=(), log=SILENT, **places)


@pytest.mark.parametrize("name", ["dpo", "kto", "orpo", "sl_cai"])
def test_answers_are_trained_on_as_the_model_wrote_them(name, folder, monkeypatch):
    taken = []

    def train(config, start, pairs, *more, **places):
        taken.extend(pairs)
        return None, {}

    method = METHODS[name]
    if name == "sl_cai":
        monkeypatch.setattr(table, "train_sl_cai", train)
        run = method.train
    else:
        run = table._on_pairs(train, method.start)
    run(method.config(), training(name, folder))
    assert {p.rejected for p in taken} == set(ANSWERS)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "human_preferences" in method.inputs])
def test_only_human_pairs_of_the_constitutions_domains_are_learned_from(name, folder, tiny_model, float32, tmp_path):
    def pair(name, **values):
        return PreferencePair(id=name, prompt=f"Why {name}?", chosen="Because.", rejected="No.", **values)

    method = METHODS[name]
    for sub in ("work", "out"):
        (tmp_path / sub).mkdir()
    write_jsonl(folder / "pairs.jsonl", [pair("so", source="constitutional")])
    write_jsonl(folder / "reward_train.jsonl", [pair(f"h{i}", source="human", domain=d) for i, d in enumerate(DOMAINS)])
    config = method.config(
        human_pairs=-1,
        load=float32,
        lora=LoraSettings(r=1, target_modules=["all-linear"], dropout=0.0),
        optim=OptimSettings(epochs=1, batch_size=8, micro_batch_size=8),
    )
    places = {"models": {method.start: ModelFiles(tiny_model)}, "work": tmp_path / "work", "out": tmp_path / "out"}
    given = training(name, folder, preference_domains=("cooking", "general"), **places)
    _, metrics = method.train(config, given)
    assert metrics["train/human_pairs"] == 4
