"""The SFT report: its table of generations comes back as it was written."""

from assets.sft_report import read_table, write_table


def test_answers_with_line_separators_of_their_own_come_back(tmp_path):
    rows = [{"prompt": "é", "sft": "one\u2028two\x85three\x0cfour\nfive"}, {"prompt": "", "sft": "six"}]
    write_table(tmp_path / "generations.jsonl", rows)
    assert read_table(tmp_path / "generations.jsonl") == rows
