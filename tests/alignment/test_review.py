"""Reviewing generated pairs: what the table holds, what is appended, and that nothing is half done."""

import csv
import os
from collections import Counter

import pytest

from alignment.datasets import write_jsonl
from alignment.readers import DataError, read_preferences
from alignment.records import Message, PreferencePair
from alignment.review import apply_review, main, write_review

PAIRS = [
    PreferencePair(
        id="prompt-1", prompt="Größe?", chosen='- one, "two"\n- three', rejected="none", domain="general", source="constitutional"
    ),
    PreferencePair(id="prompt-2", prompt="Pick a lock?", chosen="I won't.", rejected="Take a pick.", domain="general"),
    PreferencePair(
        id="prompt-3",
        prompt="And then?",
        chosen="Stir.",
        rejected="Burn it.",
        history=(Message(role="user", content="Rice?"), Message(role="assistant", content="Boil it.")),
        domain="cooking",
    ),
    PreferencePair(id="prompt-4", prompt="Joke?", chosen="No.", rejected="A horse walks into a bar.", domain="general"),
]
THERE = PreferencePair(id="pref-1", prompt="Hello", chosen="Good morning.", rejected="Go away.", domain="general")


@pytest.fixture
def review(tmp_path):
    """A table of the pairs, without verdicts."""
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    assert write_review(tmp_path / "pairs.jsonl", tmp_path / "review.csv") == len(PAIRS)
    return tmp_path / "review.csv"


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "preferences.jsonl"
    write_jsonl(path, [THERE])
    return path


def table(review):
    with review.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill(review, *verdicts, line_end="\r\n", **changes):
    """Write verdicts, row by row, as a spreadsheet would; `changes` replace cells of the first row."""
    rows = table(review)
    for row, verdict in zip(rows, verdicts, strict=False):
        row["verdict"] = verdict
    rows[0] |= changes
    with review.open("w", encoding="utf-8-sig", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator=line_end)
        writer.writeheader()
        writer.writerows({k: v.replace("\r\n", "\n").replace("\n", line_end) for k, v in row.items()} for row in rows)


def added(target):
    pairs = read_preferences(target)
    assert pairs[0] == THERE
    return pairs[1:]


def test_the_table_has_the_pairs_and_room_for_verdicts(review):
    rows = table(review)
    assert [row["verdict"] for row in rows] == [""] * 4
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in rows] == [(p.prompt, p.chosen, p.rejected) for p in PAIRS]
    assert review.read_bytes().startswith(b"\xef\xbb\xbf")


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_approved_pairs_become_human_preferences_in_the_readers_format(review, target, line_end):
    fill(review, "approve", "reject", " Approve ", "", line_end=line_end)
    assert apply_review(review, target) == Counter({"approve": 2, "reject": 1, "without verdict": 1})
    first, third = added(target)
    assert (first.prompt, first.rejected, first.domain, first.source) == ("Größe?", "none", "general", "human")
    assert first.chosen == PAIRS[0].chosen
    assert (third.history, third.chosen, third.domain) == (PAIRS[2].history, "Stir.", "cooking")
    assert first.id.startswith("reviewed-general-prompt-1-")


def test_answers_that_look_like_messages_stay_the_texts_that_they_are(tmp_path, target):
    spoken = PAIRS[0].model_copy(update={"rejected": "Human: Size?\n\nAssistant: None."})
    listed = PAIRS[0].model_copy(update={"id": "listed", "chosen": '[{"role": "admin", "content": "all"}]'})
    write_jsonl(tmp_path / "own.jsonl", [spoken, listed])
    assert write_review(tmp_path / "own.jsonl", tmp_path / "own.csv") == 2
    assert [r["rejected"] for r in table(tmp_path / "own.csv")] == [spoken.rejected, listed.rejected]
    fill(tmp_path / "own.csv", "", "approve")
    apply_review(tmp_path / "own.csv", target)
    assert [p.chosen for p in added(target)] == [listed.chosen]


def test_swap_prefers_the_initial_answer(review, target):
    fill(review, "", "", "", "swap")
    apply_review(review, target)
    (pair,) = added(target)
    assert (pair.chosen, pair.rejected) == ("A horse walks into a bar.", "No.")


def test_edit_takes_the_text_as_it_stands(review, target):
    fill(review, "edit", chosen="About 1.80 m.")
    apply_review(review, target)
    assert added(target)[0].chosen == "About 1.80 m."


@pytest.mark.parametrize("field", ["prompt", "chosen", "rejected"])
@pytest.mark.parametrize("verdict", ["approve", "swap"])
def test_a_text_that_a_spreadsheet_changed_is_not_approved_unseen(review, target, field, verdict):
    fill(review, verdict, **{field: "#NAME?"})
    with pytest.raises(DataError) as caught:
        apply_review(review, target)
    assert str(caught.value).startswith(f"{review}, line 2, field {field!r}: is not the text that was generated")
    assert added(target) == []


def test_it_works_on_a_target_that_is_not_there_yet_or_lacks_its_last_line_break(review, target, tmp_path):
    fill(review, "approve")
    apply_review(review, tmp_path / "new.jsonl")
    assert len(read_preferences(tmp_path / "new.jsonl")) == 1
    target.write_bytes(target.read_bytes().rstrip(b"\n"))
    apply_review(review, target)
    assert len(added(target)) == 1


def test_what_is_there_already_is_refused_by_line(review, target):
    fill(review, "approve")
    apply_review(review, target)
    before = target.read_bytes()
    fill(review, "approve", "approve")
    with pytest.raises(DataError, match=r"review\.csv, line 2, field 'verdict': the same two answers .* are there already"):
        apply_review(review, target)
    assert target.read_bytes() == before


def test_the_opposite_of_what_is_there_is_refused(review, target):
    fill(review, "", "approve")
    apply_review(review, target)
    fill(review, "", "swap")
    with pytest.raises(DataError, match="are there already"):
        apply_review(review, target)


def test_a_pair_that_stands_twice_in_the_table_is_refused(review, target):
    lines = review.read_text(encoding="utf-8-sig").splitlines()
    second = next(line for line in lines if "Pick a lock" in line)
    copy = second.replace("prompt-2", "prompt-9")
    review.write_text("\n".join([*lines, copy]) + "\n", encoding="utf-8")
    fill(review, "", "approve", "", "", "approve")
    with pytest.raises(DataError, match=r"already \(line \d+\)"):
        apply_review(review, target)


@pytest.mark.parametrize(
    ("cells", "says"),
    [
        ({"verdict": "yes"}, "line 2, field 'verdict': is 'yes'. Remedy: write approve, edit, swap, reject"),
        ({"verdict": "edit", "chosen": ""}, "line 2, field 'chosen': has no value"),
        ({"verdict": "edit", "chosen": "none"}, "line 2, field 'rejected': is identical to chosen"),
        ({"verdict": "approve", "check": ""}, "line 2, field 'check': has no value"),
    ],
)
def test_errors_name_file_line_and_field(review, target, cells, says):
    fill(review, **cells)
    with pytest.raises(DataError) as caught:
        apply_review(review, target)
    assert str(caught.value).startswith(f"{review}, {says}")
    assert added(target) == []


def test_a_table_that_approves_nothing_is_an_error(review, target):
    with pytest.raises(DataError, match="approves no pair"):
        apply_review(review, target)


def test_a_broken_target_is_named_and_left_alone(review, target):
    fill(review, "approve")
    target.write_text('{"prompt": "a"\n')
    with pytest.raises(DataError, match=r"preferences\.jsonl, line 1: is not valid JSON"):
        apply_review(review, target)
    assert target.read_text() == '{"prompt": "a"\n'


def test_a_failure_while_writing_leaves_the_target_as_it_was(review, target, monkeypatch):
    fill(review, "approve")
    before = target.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DataError, match="No space left"):
        apply_review(review, target)
    assert target.read_bytes() == before
    assert {p.name for p in target.parent.iterdir()} == {"pairs.jsonl", "review.csv", "preferences.jsonl"}


def test_a_target_that_is_a_link_into_dvcs_cache_is_replaced_and_the_cache_is_not_touched(review, target):
    cache = target.with_name("cached")
    target.rename(cache)
    cache.chmod(0o444)
    target.symlink_to(cache)
    before = cache.read_bytes()
    fill(review, "approve")
    apply_review(review, target)
    assert cache.read_bytes() == before
    assert not target.is_symlink()
    assert len(added(target)) == 1


def test_a_table_with_verdicts_is_never_overwritten(review, tmp_path):
    fill(review, "approve")
    before = review.read_bytes()
    with pytest.raises(DataError, match="exists already, and may hold verdicts"):
        write_review(tmp_path / "pairs.jsonl", review)
    assert review.read_bytes() == before


def test_the_command_reviews_and_applies(tmp_path, target, capsys):
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    review = tmp_path / "review.csv"
    main([str(tmp_path / "pairs.jsonl"), "--out", str(review)])
    assert "4 pairs in" in capsys.readouterr().out
    fill(review, "approve", "reject")
    main(["--apply", str(review), "--to", str(target)])
    assert "1 approve, 1 reject, 2 without verdict. Now run `dvc add data`." in capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["pairs.jsonl"], ["--apply", "a.csv"], ["pairs.jsonl", "--out", "a.csv", "--to", "b"]])
def test_the_command_says_what_it_needs(arguments, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert "give PAIRS.jsonl and --out, or --apply and --to" in capsys.readouterr().err


def test_the_command_ends_with_the_one_sentence(tmp_path):
    with pytest.raises(SystemExit, match=r"nowhere\.jsonl: no such file"):
        main([str(tmp_path / "nowhere.jsonl"), "--out", str(tmp_path / "review.csv")])
