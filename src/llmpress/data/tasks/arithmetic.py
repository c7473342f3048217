"""The embedded task: two-step word problems, with the worked answer that a model learns to write.

A problem is an opening (first step), a turn (second step) and a question. Wordings, names, things
and numbers vary independently; test problems use calculations that no training problem uses.
"""

import random
from dataclasses import dataclass
from typing import Any

from llmpress.data.tasks.configs import generation_config

TRAIN_ITEMS = 4000
TEST_ITEMS = 200

# fmt: off
NAMES = (
    "Ada", "Amir", "Anna", "Ben", "Carla", "Chen", "Dan", "Dina", "Elif", "Emma", "Finn", "Grace",
    "Hugo", "Ines", "Ivan", "Jade", "Jonas", "Kate", "Lena", "Leo", "Lucy", "Mara", "Mia", "Nina",
    "Noah", "Olga", "Omar", "Paul", "Rosa", "Sam", "Sara", "Tara", "Tom", "Uma", "Vera", "Will",
    "Yuki", "Zoe",
)
THINGS = (
    "apples", "balls", "books", "boxes", "buttons", "cakes", "candles", "cards", "coins", "cups",
    "eggs", "flowers", "hats", "keys", "lemons", "marbles", "nuts", "oranges", "pears", "pencils",
    "photos", "plates", "rings", "shells", "shirts", "stamps", "stars", "stickers", "stones",
    "tickets", "toys", "trees",
)
# fmt: on
OPENINGS = {
    "+": (
        "{name} has {a} {things} and gets {b} more.",
        "{name} finds {a} {things} and then {b} others.",
        "{name} starts with {a} {things} and buys {b}.",
        "{name} takes a bag of {a} {things} and one of {b}.",
    ),
    "-": (
        "{name} has {a} {things} and gives {b} away.",
        "{name} collects {a} {things} but loses {b}.",
        "Out of {a} {things}, {name} sells {b}.",
        "{name} has {a} {things}, and {friend} takes {b}.",
    ),
    "*": (
        "{name} buys {a} packs of {b} {things}.",
        "{name} fills {a} shelves with {b} {things} each.",
        "{a} friends bring {name} {b} {things} each.",
        "{name} makes {b} {things} a day for {a} days.",
    ),
}
TURNS = {
    "+": ("{friend} brings {c} more.", "Later {name} gets another {c}.", "Then come {c} more."),
    "-": ("Then {c} of them break.", "Later {name} loses {c}.", "{friend} borrows {c}."),
    "*": ("That grows to {c} times as many.", "Then {name} gets {c} times as many in total."),
}
QUESTIONS = ("How many {things} now?", "How many in the end?", "How many are left?")


@dataclass(frozen=True)
class Calculation:
    """``(a first b) second c``, every intermediate result a natural number."""

    first: str
    second: str
    a: int
    b: int
    c: int

    @property
    def between(self) -> int:
        """The result of the first step."""
        return apply(self.first, self.a, self.b)

    @property
    def result(self) -> int:
        """The result of both steps."""
        return apply(self.second, self.between, self.c)


def apply(operator: str, left: int, right: int) -> int:
    """Return ``left operator right`` for one of ``+``, ``-`` and ``*``."""
    return {"+": left + right, "-": left - right, "*": left * right}[operator]


def generate(train: int, test: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Make word problems.

    Args:
        train: Number of training problems.
        test: Number of test problems; no calculation of theirs occurs in training.
        seed: Of everything random.

    Returns:
        Records of ``train`` and ``test`` with the keys ``query``, ``target`` (the worked answer,
        starting with a space) and ``answer`` (its number, as text).
    """
    random_state = random.Random(seed)
    seen: set[Calculation] = set()
    while len(seen) < train + test:
        seen.add(_calculation(random_state))
    ordered = sorted(seen, key=lambda item: (item.first, item.second, item.a, item.b, item.c))
    random_state.shuffle(ordered)
    records = [_record(calculation, random_state) for calculation in ordered]
    return {"train": records[test:], "test": records[:test]}


def task_config(name: str) -> dict[str, Any]:
    """Describe the task to lm-eval: generate the worked answer, compare its last number."""
    return generation_config(name, pattern=r"= ?(\d+)", max_new_tokens=32)


def _calculation(random_state: random.Random) -> Calculation:
    """Draw one calculation: sums of two- and three-digit numbers, products with a small factor."""
    while True:
        first, second = random_state.choice("+-*"), random_state.choice("+-*")
        a, b = random_state.randint(12, 99), random_state.randint(12, 99)
        if first == "*":
            a, b = random_state.randint(3, 9), random_state.randint(12, 49)
        c = random_state.randint(2, 5) if second == "*" else random_state.randint(12, 99)
        calculation = Calculation(first, second, a, b, c)
        if calculation.between >= 2 and 2 <= calculation.result < 1000:
            return calculation


def _record(calculation: Calculation, random_state: random.Random) -> dict[str, Any]:
    name, friend = random_state.sample(NAMES, 2)
    sentences = (
        random_state.choice(OPENINGS[calculation.first]),
        random_state.choice(TURNS[calculation.second]),
        random_state.choice(QUESTIONS),
    )
    problem = " ".join(sentences).format(
        name=name,
        friend=friend,
        things=random_state.choice(THINGS),
        a=calculation.a,
        b=calculation.b,
        c=calculation.c,
    )
    between, result = calculation.between, calculation.result
    first = f"{calculation.a}{calculation.first}{calculation.b}"
    return {
        "query": f"Question: {problem}\nAnswer:",
        "target": f" {first}={between}, {between}{calculation.second}{calculation.c}={result}",
        "answer": str(result),
    }
