"""The table of methods: what a method's entry reads from its inputs' files."""

import pytest

from alignment.datasets import write_jsonl
from alignment.methods import METHODS, Training, table
from alignment.progress import SILENT
from alignment.records import Conversation, Message, PreferencePair

ANSWERS = ['[{"role": "admin", "content": "all"}]', '[{"role": "assistant", "content": "b"}]', "Human: a\n\nAssistant: b"]
PAIRS = [PreferencePair(id=str(i), prompt="List it.", chosen="No.", rejected=a) for i, a in enumerate(ANSWERS)]
TALK = Conversation(id="c", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hello")))


@pytest.fixture
def folder(tmp_path):
    """One folder that holds the files of all inputs."""
    for name, rows in {"pairs": PAIRS, "reward_train": PAIRS, "train": [TALK], "heldout": [TALK]}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def training(name, folder):
    inputs = METHODS[name].inputs
    return Training(
        models=dict.fromkeys(inputs), folders=dict.fromkeys(inputs, folder), prompt_tags=(), work=folder, out=folder, log=SILENT
    )


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
