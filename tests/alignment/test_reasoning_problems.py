"""Reasoning problems: every answer is worked out again here, from the words of the problem alone."""

import re
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from alignment import reasoning_problems
from alignment.readers import read_problems
from alignment.reasoning_problems import KINDS, write_problems

DATA = Path(__file__).parents[2] / "data" / "reasoning.jsonl"
PROBLEMS = write_problems(count=3000, seed=123)


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def solve_difference(text):
    a, b = numbers(text)
    return abs(a - b)


def solve_two_steps(text):
    n = numbers(text)
    if "gets" in text:  # has, gets, gives away
        return n[0] + n[1] - n[2]
    if text.startswith("After finding"):  # found, had, loses
        return n[1] + n[0] - n[2]
    assert " took " in text  # taken, had, added
    return n[1] + n[2] - n[0]


def solve_percent(text):
    percent, base = numbers(text)
    result = percent * base / 100
    assert result == int(result)
    return int(result)


def solve_next_number(text):
    row = numbers(re.search(r"[\d, ]+\d", text).group())
    steps = {b - a for a, b in pairwise(row)}
    assert len(row) == 4
    assert len(steps) == 1
    return row[-1] + steps.pop()


def solve_remainder(text):
    a, b = numbers(text)
    while a >= b:
        a -= b
    return a


def solve_clock(text):
    hours, minutes, more = re.search(r"(\d\d):(\d\d)\D+(\d+) minutes", text).groups()
    total = int(hours) * 60 + int(minutes) + int(more)
    return f"{total // 60 % 24:02d}:{total % 60:02d}"


def solve_rectangle(text):
    a, b = numbers(text)
    if "area" in text:
        return sum(b for _ in range(a))
    assert "fence" in text
    return a + b + a + b


def solve_letters(text):
    letter, word = re.search(r"letter (\w) .*?(\w+)[\W]*$", text.replace("?", "").replace("'", "")).groups()
    return len([c for c in word if c == letter])


def solve_order(text):
    taller = [(a, b) if how == "taller" else (b, a) for a, how, b in re.findall(r"(\w+) is (taller|shorter) than (\w+)", text)]
    assert len(taller) == 2
    names = {name for pair in taller for name in pair}
    assert len(names) == 3
    (top,) = names - {b for _, b in taller}
    (bottom,) = names - {a for a, _ in taller}
    return top if "tallest" in text else bottom


SOLVERS = {
    "sum": lambda text: sum(numbers(text)),
    "difference": solve_difference,
    "product": lambda text: numbers(text)[0] * numbers(text)[1],
    "two_steps": solve_two_steps,
    "share": lambda text: next(n for n in range(1000) if n * numbers(text)[1] == numbers(text)[0]),
    "percent": solve_percent,
    "next_number": solve_next_number,
    "remainder": solve_remainder,
    "clock": solve_clock,
    "rectangle": solve_rectangle,
    "letters": solve_letters,
    "order": solve_order,
}


def test_every_kind_has_a_solver():
    assert set(SOLVERS) == set(KINDS) == {p.kind for p in PROBLEMS}


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_answer_is_right(kind):
    problems = [p for p in PROBLEMS if p.kind == kind]
    assert len(problems) > 20
    wrong = [(p.prompt, p.answer) for p in problems if str(SOLVERS[kind](p.prompt)) != p.answer]
    assert not wrong


@pytest.mark.parametrize("kind", SOLVERS)
def test_every_kind_has_several_wordings(kind):
    frames = {re.sub(r"\d+", "#", p.prompt).split("#")[0] for p in PROBLEMS if p.kind == kind}
    assert len(frames) >= 2


def test_the_numbers_stay_small_and_no_answer_is_negative():
    for p in PROBLEMS:
        assert all(n <= 400 for n in numbers(p.prompt)), p.prompt
        assert not p.answer.startswith("-")


def test_no_placeholder_is_left_in_a_problem():
    assert not [p.prompt for p in PROBLEMS if re.search(r"[{}]", p.prompt)]


def test_problems_are_different_and_their_ids_unique():
    assert len({p.prompt for p in PROBLEMS}) == len({p.id for p in PROBLEMS}) == 3000


def test_the_kinds_take_turns():
    kinds = [p.kind for p in write_problems()]
    assert len(kinds) == 320
    assert all(24 <= kinds.count(kind) <= 28 for kind in KINDS)


def test_the_seed_decides():
    assert write_problems(seed=7) == write_problems()
    assert [p.prompt for p in write_problems(seed=8)] != [p.prompt for p in write_problems()]
    assert write_problems(count=50) == write_problems()[:50]


def test_the_script_writes_what_is_in_data(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["reasoning_problems", str(tmp_path / "out.jsonl")])
    reasoning_problems.main()
    assert read_problems(tmp_path / "out.jsonl") == write_problems()
    if not DATA.exists():
        pytest.skip("data/ is not checked out: dvc pull")
    assert (tmp_path / "out.jsonl").read_bytes() == DATA.read_bytes()
