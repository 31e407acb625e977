"""Writes `data/reasoning.jsonl`: short problems whose answer a program can check, drawn from a seed.

    python -m alignment.reasoning_problems data/reasoning.jsonl

Twelve kinds, each with several wordings; the answer is computed, never typed. The same seed gives the same file.
"""

import argparse
import datetime
import random
from collections.abc import Callable
from pathlib import Path

from alignment.records import Problem

NAMES = ["Ana", "Ben", "Chidi", "Dora", "Eva", "Farid", "Grace", "Hugo", "Ines", "Jonas", "Kofi", "Lena", "Mei", "Nils"]
THINGS = ["apples", "marbles", "stickers", "pencils", "postcards", "shells", "coins", "buttons", "eggs", "tickets"]
WORDS = [
    "banana",
    "committee",
    "parallel",
    "success",
    "balloon",
    "mississippi",
    "letter",
    "address",
    "coffee",
    "tomorrow",
]


def write_problems(count: int = 320, seed: int = 7) -> list[Problem]:
    """`count` different problems, the kinds taking turns."""
    rng = random.Random(seed)
    problems: dict[str, Problem] = {}
    kinds = list(KINDS.items())
    i = 0
    while len(problems) < count:
        kind, make = kinds[i % len(kinds)]
        i += 1
        prompt, answer = make(rng)
        if prompt not in problems:
            problems[prompt] = Problem(id=f"reason-{len(problems) + 1:04d}", prompt=prompt, answer=answer, kind=kind)
    return list(problems.values())


def _sum(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(12, 89), r.randint(12, 89)
    text = r.choice(["What is {a} + {b}?", "Add {a} and {b}.", "Find the sum of {a} and {b}.", "{a} plus {b} makes what?"])
    return text.format(a=a, b=b), str(a + b)


def _difference(r: random.Random) -> tuple[str, str]:
    b = r.randint(5, 60)
    a = b + r.randint(3, 70)
    text = r.choice(["Take {b} away from {a}.", "What is {a} - {b}?", "How much larger is {a} than {b}?"])
    return text.format(a=a, b=b), str(a - b)


def _product(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(3, 12), r.randint(3, 12)
    text = r.choice(["Multiply {a} by {b}.", "{a} rows of {b} chairs: how many chairs?", "What is {a} times {b}?"])
    return text.format(a=a, b=b), str(a * b)


def _two_steps(r: random.Random) -> tuple[str, str]:
    name, other, thing = *r.sample(NAMES, 2), r.choice(THINGS)
    a, b = r.randint(10, 40), r.randint(3, 20)
    c = r.randint(1, a + b - 1)
    text = r.choice(
        [
            "{n} has {a} {t}, gets {b} more and gives {c} to {o}. How many are left?",
            "After finding {b} {t}, {n}, who had {a} before, loses {c}. How many {t} remain?",
            "{o} took {c} of the {t} that {n} had. There were {a} at first and {b} were added. How many does {n} still have?",
        ]
    )
    return text.format(n=name, o=other, t=thing, a=a, b=b, c=c), str(a + b - c)


def _share(r: random.Random) -> tuple[str, str]:
    people, each, thing = r.randint(3, 9), r.randint(2, 12), r.choice(THINGS)
    text = r.choice(
        [
            "{t} {thing} are shared equally by {p} children. How many does each get?",
            "Pack {t} {thing} into {p} equal bags. How many go into one bag?",
        ]
    )
    return text.format(t=people * each, thing=thing, p=people), str(each)


def _percent(r: random.Random) -> tuple[str, str]:
    percent, base = r.choice([10, 20, 25, 50, 75]), 20 * r.randint(2, 20)
    text = r.choice(["What is {p}% of {b}?", "A shop takes {p}% off a {b} euro coat. How many euros are taken off?"])
    return text.format(p=percent, b=base), str(percent * base // 100)


def _next_number(r: random.Random) -> tuple[str, str]:
    start, step = r.randint(1, 20), r.randint(2, 9)
    row = [start + step * i for i in range(5)]
    text = r.choice(["Which number comes next: {s}?", "Continue the sequence {s} by one number."])
    return text.format(s=", ".join(map(str, row[:4]))), str(row[4])


def _remainder(r: random.Random) -> tuple[str, str]:
    b = r.randint(3, 9)
    a = r.randint(b + 1, 80)
    text = r.choice(
        [
            "What is the remainder when {a} is divided by {b}?",
            "{a} people queue for boats of {b}. After filling as many boats as possible, how many people are left?",
        ]
    )
    return text.format(a=a, b=b), str(a % b)


def _clock(r: random.Random) -> tuple[str, str]:
    start = datetime.datetime(2026, 1, 1, r.randint(7, 18), 5 * r.randint(0, 11))
    minutes = 5 * r.randint(3, 30)
    end = start + datetime.timedelta(minutes=minutes)
    text = r.choice(
        [
            "A film starts at {s} and lasts {m} minutes. When does it end? Answer as HH:MM.",
            "It is {s}. What time is it {m} minutes later? Answer as HH:MM.",
        ]
    )
    return text.format(s=f"{start:%H:%M}", m=minutes), f"{end:%H:%M}"


def _rectangle(r: random.Random) -> tuple[str, str]:
    a, b = r.randint(2, 15), r.randint(2, 15)
    if r.random() < 0.5:
        return f"A garden is {a} m long and {b} m wide. What is its area in square metres?", str(a * b)
    return f"How many metres of fence go around a field of {a} m by {b} m?", str(2 * (a + b))


def _letters(r: random.Random) -> tuple[str, str]:
    word = r.choice(WORDS)
    letter = r.choice(word)
    text = r.choice(["How often does the letter {l} occur in '{w}'?", "Count the letter {l} in the word {w}."])
    return text.format(l=letter, w=word), str(word.count(letter))


def _order(r: random.Random) -> tuple[str, str]:
    tall, middle, short = r.sample(NAMES, 3)
    first, second = f"{tall} is taller than {middle}", f"{short} is shorter than {middle}"
    facts = [first, second] if r.random() < 0.5 else [second, first]
    if r.random() < 0.5:
        return f"{facts[0]}. {facts[1]}. Who is the tallest?", tall
    return f"{facts[0]}, and {facts[1]}. Name the shortest of the three.", short


KINDS: dict[str, Callable[[random.Random], tuple[str, str]]] = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "two_steps": _two_steps,
    "share": _share,
    "percent": _percent,
    "next_number": _next_number,
    "remainder": _remainder,
    "clock": _clock,
    "rectangle": _rectangle,
    "letters": _letters,
    "order": _order,
}


def main() -> None:
    """Command line: the file to write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--count", type=int, default=320)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    problems = write_problems(arguments.count, arguments.seed)
    arguments.file.write_text("".join(p.model_dump_json() + "\n" for p in problems), encoding="utf-8")


if __name__ == "__main__":
    main()
