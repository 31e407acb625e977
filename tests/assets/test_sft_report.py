"""The SFT report: what it measures on, and that its table of generations comes back as it was written."""

from types import SimpleNamespace

from alignment.constitutions import Constitution, Principle
from alignment.datasets import write_jsonl
from alignment.records import Conversation, Message, Prompt
from assets.sft_report import heldout_data, read_table, write_table

RULES = Constitution(
    name="c", description="d", prompt_tags=("code",), principles=(Principle(id="p", text="Choose the kind one."),), text="t"
)


def test_models_are_measured_without_problems_where_there_are_none(tmp_path):
    talk = Conversation(id="c", messages=(Message(role="user", content="Hi"), Message(role="assistant", content="Hello")))
    prompts = [Prompt(id="a", prompt="Sort it.", tags=("code",)), Prompt(id="b", prompt="Boil it.", tags=("cooking",))]
    parts = {"prompts/heldout": prompts, "prompts/problems_heldout": [], "sft_dataset/heldout": [talk]}
    for name, rows in parts.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    store = SimpleNamespace(path=lambda name: tmp_path / name)
    heldout = heldout_data(store, RULES, "prompts", "sft_dataset")
    assert (heldout.prompts, heldout.demonstrations, heldout.problems) == ((prompts[0],), (talk,), ())


def test_answers_with_line_separators_of_their_own_come_back(tmp_path):
    rows = [{"prompt": "é", "sft": "one\u2028two\x85three\x0cfour\nfive"}, {"prompt": "", "sft": "six"}]
    write_table(tmp_path / "generations.jsonl", rows)
    assert read_table(tmp_path / "generations.jsonl") == rows
