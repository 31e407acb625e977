"""The SFT report: what it measures on, and its table of generations, which the policy reports continue."""

from types import SimpleNamespace

import pytest

from alignment.constitutions import Constitution, Principle
from alignment.datasets import write_jsonl
from alignment.evaluation import Measured, SftReportConfig
from alignment.progress import SILENT
from alignment.records import Conversation, Message, Prompt
from assets.sft_report import heldout_data, read_table, sft_report, write_table

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


def test_every_model_is_measured_in_its_own_part(stage_of, heldout, tmp_path, monkeypatch):
    measured = Measured(settings=SftReportConfig(), answers=(), scores=(), rewards=(), nll=1.0, correct=())
    rows = [{"prompt": "Boil it.", "sft": "No."}]
    asked = {}

    def measure(settings, **given):
        asked.update(given)
        return measured, {"prompts": 1.0}, rows

    monkeypatch.setattr("assets.sft_report.measure_sft", measure)
    outcome = stage_of(sft_report).compute(SimpleNamespace(out=tmp_path), SILENT)
    assert asked == {
        "base": tmp_path / "base_model" / "model",
        "sft": tmp_path / "sft_checkpoint" / "model",
        "evaluator": tmp_path / "evaluator" / "model",
        "reward_model": tmp_path / "reward_model" / "model",
        "heldout": heldout,
        "log": SILENT,
    }
    assert outcome.metrics == {"prompts": 1.0}
    assert Measured.model_validate_json((tmp_path / "measured.json").read_text(encoding="utf-8")) == measured
    assert read_table(tmp_path / "generations.jsonl") == rows


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\r", "\r\n", "\n"], ids=ascii)
def test_a_text_may_hold_any_character_that_ends_a_line_elsewhere(tmp_path, character):
    rows = [
        {"prompt": f"Why?{character}Say it.", "sft": "Because.", "score_sft": 0.5},
        {"prompt": "And then?", "sft": f"{character}Nothing.{character}", "score_sft": -0.5},
    ]
    write_table(tmp_path / "generations.jsonl", rows)
    assert read_table(tmp_path / "generations.jsonl") == rows


def test_a_table_may_be_empty(tmp_path):
    write_table(tmp_path / "generations.jsonl", [])
    assert read_table(tmp_path / "generations.jsonl") == []
