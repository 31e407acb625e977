"""What is finished is on disk and is not computed again."""

from alignment.finished import in_chunks
from alignment.progress import SILENT
from alignment.records import Record


class Square(Record):
    """A number and its square."""

    n: int
    squared: int


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


def test_what_finished_is_said_chunk_by_chunk(tmp_path):
    told = []
    in_chunks(tmp_path / "f", Square, [1, 2, 3], number, squares, 2, SILENT, "squares", lambda rs: told.append(len(rs)) or "")
    assert told == [2, 1]
