"""The table of generations: what the SFT report writes is what the policy reports continue."""

import pytest

from assets.sft_report import read_table, write_table


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
