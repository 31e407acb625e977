"""What is finished is on disk and is not computed again."""

import pytest

from alignment.finished import in_chunks
from alignment.progress import SILENT
from alignment.records import Record


class Square(Record):
    """A number and its square."""

    n: int
    squared: int


class Said(Record):
    """A number and what was said of it."""

    n: int
    text: str


def number(x):
    return getattr(x, "n", x)


def squares(numbers):
    return [Square(n=n, squared=n * n) for n in numbers]


def run(path, numbers, chunk=2, dies_at=None):
    computed = []

    def compute(chunk):
        if dies_at in chunk:
            raise KeyboardInterrupt
        computed.extend(chunk)
        return squares(chunk)

    try:
        results = in_chunks(path, Square, numbers, number, compute, chunk, SILENT, "squares")
    except KeyboardInterrupt:
        return None, computed
    return [r.squared for r in results], computed


def test_results_come_in_the_order_of_the_items(tmp_path):
    assert run(tmp_path / "f", [3, 1, 2]) == ([9, 1, 4], [3, 1, 2])


def test_only_what_is_missing_is_computed(tmp_path):
    path = tmp_path / "f"
    assert run(path, [1, 2, 3, 4, 5], dies_at=5) == (None, [1, 2, 3, 4])
    path.write_bytes(path.read_bytes()[:-5])  # the kill cut the last line short
    assert run(path, [5, 4, 3, 2, 1]) == ([25, 16, 9, 4, 1], [5, 4])
    assert run(path, [5, 4, 3, 2, 1]) == ([25, 16, 9, 4, 1], [])
    assert len(path.read_bytes().splitlines()) == 5


HALF_LINES = [
    b"",
    b'{"n": 3, "squ',
    b'{"n": 3}\n',
    b"3\n",
    b"\x00\x00",
    '{"n": 3, "squared": 9, "text": "größ'.encode()[:-1],  # inside a character
]


@pytest.mark.parametrize("half_line", HALF_LINES, ids=repr)
def test_a_line_that_is_no_record_is_dropped_and_done_again(tmp_path, half_line):
    path = tmp_path / "f"
    run(path, [1, 2])
    whole = path.read_bytes()
    path.write_bytes(whole + half_line)
    assert run(path, [1, 2, 3]) == ([1, 4, 9], [3])
    assert path.read_bytes() == whole + b'{"n":3,"squared":9}\n'


def test_a_line_cut_anywhere_is_done_again(tmp_path):
    path = tmp_path / "f"
    run(path, [1, 2])
    first, second = path.read_bytes().splitlines(keepends=True)
    for cut in range(1, len(second)):
        path.write_bytes(first + second[:cut])
        only_the_line_break = cut == len(second) - 1
        assert run(path, [1, 2]) == ([1, 4], [] if only_the_line_break else [2])
        assert path.read_bytes() == first + second


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"], ids=repr)
def test_text_with_an_odd_line_separator_is_one_line(tmp_path, separator):
    said = [Said(n=1, text=f"One line.{separator}Another."), Said(n=2, text="größer")]

    def again(chunk):
        raise AssertionError("it was done")

    for compute in (lambda chunk: said, again):
        assert in_chunks(tmp_path / "f", Said, [1, 2], number, compute, 2, SILENT, "texts") == said


def test_what_finished_is_said_chunk_by_chunk(tmp_path):
    told = []
    in_chunks(tmp_path / "f", Square, [1, 2, 3], number, squares, 2, SILENT, "squares", lambda rs: told.append(len(rs)) or "")
    assert told == [2, 1]
