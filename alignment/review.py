"""Reviewing generated pairs by hand, and curating the good ones into `data/`.

    python -m alignment.review PAIRS.jsonl --out review.csv
    python -m alignment.review --apply review.csv --to data/preferences.jsonl

The first writes a table with an empty column `verdict`, for a spreadsheet or an editor; the second appends what was approved to
a file of human preferences, all of it or nothing. `docs/reviewing_pairs.md` says what the verdicts mean.
"""

import argparse
import csv
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from alignment.errors import UserError
from alignment.readers import DataError, read_preferences, read_records, read_reviews
from alignment.records import PreferencePair, ReviewedPair
from alignment.splits import normalise

COLUMNS = ("verdict", "prompt", "chosen", "rejected", "id", "domain", "history", "check")
TEXTS = ("prompt", "chosen", "rejected")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pairs", nargs="?", type=Path, help="generated pairs: pairs.jsonl of an artifact or of generated/")
    parser.add_argument("--out", type=Path, help="the table to write, .csv")
    parser.add_argument("--apply", type=Path, help="the table with verdicts")
    parser.add_argument("--to", type=Path, help="the preferences that approved pairs are appended to, .jsonl")
    given = parser.parse_args(arguments)
    try:
        if given.pairs and given.out and not (given.apply or given.to):
            count = write_review(given.pairs, given.out)
            print(f"{count} pairs in {given.out}: write approve, edit, swap or reject into the column verdict, then --apply")
        elif given.apply and given.to and not (given.pairs or given.out):
            counts = apply_review(given.apply, given.to)
            print(f"{given.to}: {', '.join(f'{n} {verdict}' for verdict, n in counts.items())}. Now run `dvc add data`.")
        else:
            parser.error("give PAIRS.jsonl and --out, or --apply and --to")
    except UserError as error:
        sys.exit(str(error))


def write_review(pairs: Path, out: Path) -> int:
    """Write the table to review; returns the number of pairs.

    Raises:
        DataError: the pairs cannot be read, or there is such a table already: it may hold somebody's work.
    """
    if out.suffix != ".csv":
        raise DataError(str(out), "is not named .csv", "name the table review.csv")
    rows = [_review_row(pair) for pair in read_records(pairs, PreferencePair)]
    try:
        # With a byte order mark, or spreadsheets guess another encoding.
        with out.open("x", encoding="utf-8-sig", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
    except FileExistsError:
        raise DataError(str(out), "exists already, and may hold verdicts", "choose another name, or delete it") from None
    except OSError as error:
        raise DataError(str(out), f"cannot be written ({error})", "check the folder and its permissions") from error
    return len(rows)


def apply_review(review: Path, target: Path) -> Counter[str]:
    """Append the approved pairs to `target`, in a form that `read_preferences` reads; returns how many pairs had which verdict.

    The file is replaced in one step, by one that was read back: it holds all approved pairs afterwards, or is as it was.

    Raises:
        DataError: a row that cannot be read, texts that changed though they were only approved, a pair that is there already,
            or nothing approved. Names file, line and field.
    """
    if target.suffix != ".jsonl":
        raise DataError(str(target), "is not named .jsonl", "append to a .jsonl, such as data/preferences.jsonl")
    there = read_preferences(target) if target.exists() and target.stat().st_size else []
    known = {_key(pair): f"{target}, id {pair.id!r}" for pair in there}
    reviewed = read_reviews(review)
    new = []
    for r in reviewed:
        if r.verdict in ("", "reject"):
            continue
        if r.verdict != "edit":
            _refuse_changed_texts(review, r)
        pair = _curated(r)
        if _key(pair) in known:
            problem = f"the same two answers to this prompt are there already ({known[_key(pair)]})"
            raise DataError(str(review), problem, "clear the verdict, or delete the other", r.line, "verdict")
        known[_key(pair)] = f"line {r.line}"
        new.append(pair)
    if not new:
        raise DataError(str(review), "approves no pair", "write approve, edit or swap into the column verdict", None, "verdict")
    _append(target, new)
    return Counter(r.verdict or "without verdict" for r in reviewed)


def _review_row(pair: PreferencePair) -> dict[str, str]:
    history = [m.model_dump() for m in pair.history]
    return {
        "verdict": "",
        "prompt": pair.prompt,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "id": pair.id,
        "domain": pair.domain,
        "history": json.dumps(history, ensure_ascii=False) if history else "",
        "check": "-".join(_digest(getattr(pair, name)) for name in TEXTS),
    }


def _refuse_changed_texts(review: Path, r: ReviewedPair) -> None:
    # A spreadsheet turns an answer that begins with "-" or "=" into a formula, and saves what it makes of it.
    for name, digest in zip(TEXTS, r.check.split("-"), strict=False):
        if _digest(getattr(r.pair, name)) != digest:
            raise DataError(
                str(review),
                f"is not the text that was generated, but the verdict is {r.verdict}",
                "put the text back, or give the verdict edit to take it as it stands",
                r.line,
                name,
            )


def _curated(r: ReviewedPair) -> PreferencePair:
    """The pair as a human comparison, with an id that says where it came from and is as unique as its texts."""
    better, worse = (r.pair.rejected, r.pair.chosen) if r.verdict == "swap" else (r.pair.chosen, r.pair.rejected)
    digest = _digest("\0".join((*r.pair.user_turns, better, worse)))
    name = f"reviewed-{r.pair.domain or 'pair'}-{r.pair.id}-{digest}"
    texts = {"prompt": r.pair.prompt, "chosen": better, "rejected": worse}
    return r.pair.model_copy(update={**{k: _lines(v) for k, v in texts.items()}, "id": name, "source": "human"})


def _key(pair: PreferencePair) -> tuple[tuple[str, ...], frozenset[str]]:
    # Whichever is preferred: the opposite comparison would be a contradiction.
    return tuple(map(normalise, pair.user_turns)), frozenset((pair.chosen, pair.rejected))


def _append(target: Path, pairs: Sequence[PreferencePair]) -> None:
    before = target.read_bytes() if target.exists() else b""
    if before and not before.endswith(b"\n"):
        before += b"\n"
    rows = [p.model_dump(mode="json", exclude_defaults=True) for p in pairs]
    draft = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        with draft.open("xb") as file:
            file.write(before + "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        read_preferences(draft)
        os.replace(draft, target)  # never through a link: that would write into DVC's cache
    except OSError as error:
        raise DataError(str(target), f"cannot be written ({error})", "check the folder and its permissions") from error
    finally:
        draft.unlink(missing_ok=True)


def _digest(text: str) -> str:
    return hashlib.sha256(_lines(text.strip()).encode()).hexdigest()[:8]


def _lines(text: str) -> str:
    # Spreadsheets write line ends of their own.
    return text.replace("\r\n", "\n").replace("\r", "\n")


if __name__ == "__main__":
    main()
