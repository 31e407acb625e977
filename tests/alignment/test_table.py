"""The table of methods: what a constitution says of the human pairs holds for every method that learns from them."""

import pytest

from alignment.datasets import write_jsonl
from alignment.methods import METHODS, Training
from alignment.models import LoraSettings, ModelFiles
from alignment.progress import SILENT
from alignment.records import PreferencePair
from alignment.training import OptimSettings


def pair(name, **values):
    return PreferencePair(id=name, prompt=f"Why {name}?", chosen="Because.", rejected="No.", **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a constitutional pair, and of human pairs of several domains."""
    folder = tmp_path_factory.mktemp("pairs")
    domains = ("cooking", "cooking", "cooking", "medical", "general")
    human = [pair(f"h{i}", source="human", domain=domain) for i, domain in enumerate(domains)]
    write_jsonl(folder / "pairs.jsonl", [pair("so", source="constitutional")])
    write_jsonl(folder / "reward_train.jsonl", human)
    return folder


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if "human_preferences" in method.inputs])
def test_only_human_pairs_of_the_constitutions_domains_are_learned_from(name, folder, tiny_model, float32, tmp_path):
    method = METHODS[name]
    for sub in ("work", "out"):
        (tmp_path / sub).mkdir()
    config = method.config(
        human_pairs=-1,
        load=float32,
        lora=LoraSettings(r=1, target_modules=["all-linear"]),
        optim=OptimSettings(epochs=1, batch_size=8, micro_batch_size=8),
    )
    training = Training(
        models={method.start: ModelFiles(tiny_model)},
        folders=dict.fromkeys(method.inputs, folder),
        prompt_tags=(),
        preference_domains=("cooking", "general"),
        work=tmp_path / "work",
        out=tmp_path / "out",
        log=SILENT,
    )
    _, metrics = method.train(config, training)
    assert metrics["train/human_pairs"] == 4
