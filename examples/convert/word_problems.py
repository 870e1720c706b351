"""Arithmetic word problems with worked answers: generator, split and grader.

A problem is fixed by its `kind` and its three numbers; names and things only dress it up. The split
hashes exactly that pair, so a held-out question never occurs in training, whatever the names.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "heldout"]
Numbers = tuple[int, int, int]

NAMES = ["Mia", "Leo", "Ana", "Tom", "Zoe", "Ben", "Eva", "Max", "Ida", "Sam", "Lea", "Jon"]
THINGS = ["apples", "pens", "books", "coins", "stamps", "shells", "cards", "stones"]
BOXES = ["boxes", "bags", "jars"]

_HELDOUT_ONE_IN = 10
_ANSWER = re.compile(r"####\s*(-?\d+)\s*$")


@dataclass(frozen=True)
class Problem:
    """One question, its worked answer and what identifies it for the split."""

    kind: str
    numbers: Numbers
    question: str
    answer: str
    result: int


@dataclass(frozen=True)
class _Kind:
    """Two arithmetic steps and the words around them."""

    question: str
    answer: str
    first: Callable[[int, int], int]
    second: Callable[[int, int, int], int]  # (first result, a, c) -> result
    small_factors: bool = False


_KINDS: dict[str, _Kind] = {
    "buy_give": _Kind(
        "{n} has {a} {t}. {n} buys {b} more and gives {c} to {m}. How many {t} does {n} have now?",
        "{n} has {a} + {b} = {s} {t}. Then {s} - {c} = {r} are left.\n#### {r}",
        lambda a, b: a + b,
        lambda s, a, c: s - c,
    ),
    "two_gains": _Kind(
        "{n} has {a} {t}. {m} gives {n} {b} more, then {n} finds {c}. "
        "How many {t} does {n} have in all?",
        "{n} gets {a} + {b} = {s} {t}. Then {s} + {c} = {r} in all.\n#### {r}",
        lambda a, b: a + b,
        lambda s, a, c: s + c,
    ),
    "lose_buy": _Kind(
        "{n} had {a} {t} and lost {b}. Then {n} buys {c} more. How many {t} does {n} have now?",
        "{n} kept {a} - {b} = {s} {t}. Then {s} + {c} = {r} after buying.\n#### {r}",
        lambda a, b: a - b,
        lambda s, a, c: s + c,
    ),
    "boxes_give": _Kind(
        "{n} has {a} {x} with {b} {t} in each. {n} gives {c} {t} to {m}. How many are left?",
        "{n} has {a} * {b} = {s} {t}. Then {s} - {c} = {r} are left.\n#### {r}",
        lambda a, b: a * b,
        lambda s, a, c: s - c,
        small_factors=True,
    ),
    "boxes_find": _Kind(
        "{n} has {a} {x} with {b} {t} in each and finds {c} more. How many {t} is that in all?",
        "{n} has {a} * {b} = {s} {t}. Then {s} + {c} = {r} in all.\n#### {r}",
        lambda a, b: a * b,
        lambda s, a, c: s + c,
        small_factors=True,
    ),
    "together": _Kind(
        "{n} has {a} {t}. {m} has {b} more than {n}, and loses {c}. "
        "How many {t} does {m} have now?",
        "{m} had {a} + {b} = {s} {t}. Then {s} - {c} = {r} remain.\n#### {r}",
        lambda a, b: a + b,
        lambda s, a, c: s - c,
    ),
}
KINDS = tuple(_KINDS)


def split_of(kind: str, numbers: Numbers) -> Split:
    """Which side of the split a problem is on: a pure function of what is asked."""
    digest = hashlib.blake2b(f"{kind}:{numbers}".encode(), digest_size=8).digest()
    return "heldout" if int.from_bytes(digest, "big") % _HELDOUT_ONE_IN == 0 else "train"


def problem(split: Split, seed: int, index: int) -> Problem:
    """The `index`-th problem of a split: the same for the same arguments, on every machine."""
    rng = random.Random(f"{split}/{seed}/{index}")
    kind = rng.choice(KINDS)
    while True:
        numbers = _draw_numbers(_KINDS[kind], rng)
        if numbers is not None and split_of(kind, numbers) == split:
            return _dress(kind, numbers, rng)


def problems(split: Split, seed: int, count: int) -> Iterator[Problem]:
    """The first `count` problems of a split."""
    return (problem(split, seed, index) for index in range(count))


def grade(answer: str, result: int) -> bool:
    """Exact match: the answer's last line is `#### N` with N the right number, and nothing more."""
    match = _ANSWER.search(answer)
    return match is not None and int(match.group(1)) == result


def _draw_numbers(kind: _Kind, rng: random.Random) -> Numbers | None:
    """Three numbers whose two results both have two digits, or None (then draw again)."""
    if kind.small_factors:
        a, b = rng.randint(2, 9), rng.randint(2, 9)
    else:
        a, b = rng.randint(10, 89), rng.randint(10, 89)
    c = rng.randint(10, 89)
    first = kind.first(a, b)
    results = (first, kind.second(first, a, c))
    return (a, b, c) if all(10 <= value <= 99 for value in results) else None


def _dress(kind: str, numbers: Numbers, rng: random.Random) -> Problem:
    a, b, c = numbers
    shape = _KINDS[kind]
    name, other = rng.sample(NAMES, 2)
    s = shape.first(a, b)
    r = shape.second(s, a, c)
    words = {"n": name, "m": other, "t": rng.choice(THINGS), "x": rng.choice(BOXES)}
    words |= {"a": str(a), "b": str(b), "c": str(c), "s": str(s), "r": str(r)}
    return Problem(kind, numbers, shape.question.format(**words), shape.answer.format(**words), r)


def write_jsonl(path: Path, split: Split, seed: int, count: int) -> None:
    """Write prompt/response lines, the format `edlm convert --data` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for item in problems(split, seed, count):
            row = {"prompt": item.question, "response": item.answer}
            file.write(json.dumps(row) + "\n")


def main() -> None:
    """Write one split to a JSONL file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--split", choices=("train", "heldout"), default="train")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_jsonl(args.output, args.split, args.seed, args.count)


if __name__ == "__main__":
    main()
