"""What is finished stays finished: each result of a long computation is a line of a file, and a killed run goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignment.progress import Log, Progress
from alignment.records import Record

R = TypeVar("R", bound=Record)
T = TypeVar("T")


def in_chunks(
    path: Path,
    kind: type[R],
    items: Sequence[T],
    key: Callable[[T | R], Hashable],
    compute: Callable[[Sequence[T]], list[R]],
    chunk: int,
    log: Log,
    what: str,
    detail: Callable[[list[R]], str] = lambda _: "",
) -> list[R]:
    """One record per item, in their order. Finished ones are appended to `path` chunk by chunk and not computed again.

    Args:
        key: tells items and their records apart; equal for an item and its record.
        compute: the records of a chunk of items, in their order.
        detail: said of a chunk's records beside the progress.
    """
    done = {key(r): r for r in read_whole_lines(path, kind.model_validate)}
    todo = [item for item in items if key(item) not in done]
    if done:
        log.say(f"{what}: {len(items) - len(todo)} of {len(items)} were already done")
    progress = Progress(log, what, len(todo))
    for start in range(0, len(todo), chunk):
        results = compute(todo[start : start + chunk])
        with path.open("a", encoding="utf-8") as file:
            file.writelines(r.model_dump_json() + "\n" for r in results)
        done |= {key(r): r for r in results}
        progress.advance(len(results), detail(results))
    return [done[key(item)] for item in items]


def read_whole_lines(path: Path, parse: Callable[[dict[str, Any]], T]) -> list[T]:
    """What `parse` makes of the JSON objects in a file of lines, in order; none if there is no file.

    A line that a kill cut short (no JSON, or `parse` raises ValueError or KeyError) is dropped from the file too: the next
    line appended must not continue it.
    """
    if not path.exists():
        return []
    lines, values = [], []
    for line in path.read_bytes().decode("utf-8", errors="replace").split("\n"):
        try:
            values.append(parse(dict(json.loads(line))))
        except (ValueError, KeyError, TypeError):
            continue
        lines.append(line + "\n")
    part = path.with_name(f"{path.name}.part")
    part.write_text("".join(lines), encoding="utf-8")
    part.replace(path)  # whole or not at all: a kill here must not lose what earlier runs kept
    return values
