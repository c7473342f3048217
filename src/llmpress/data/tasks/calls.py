"""The embedded task of function calls: a request in words becomes one call as JSON.

A request is one of a function's wordings, with a polite frame around it. Wordings, frames, names
and values vary independently; test requests ask for calls that no training request asks for. Values
are said in several ways and called in one: times as ``HH:MM``, dates as ``MM-DD``, amounts in
euros, durations in minutes, days by three letters, lists in the order said, names copied.
"""

import json
import random
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from llmpress.data.tasks.arithmetic import NAMES
from llmpress.data.tasks.configs import generation_config

TOKENS = ("<call>", "</call>")
"""What stands around a call; a model may get them as added tokens."""

# fmt: off
DAYS = {
    "mon": "Monday", "tue": "Tuesday", "wed": "Wednesday", "thu": "Thursday", "fri": "Friday",
    "sat": "Saturday", "sun": "Sunday",
}
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September",
    "October", "November", "December",
)
TITLES = (
    "dentist", "team meeting", "piano lesson", "haircut", "yoga class", "book club", "eye test",
    "job interview", "car service", "chess evening", "dance class", "parents' evening",
    "birthday party", "choir practice", "bike repair", "flat viewing",
)
SUBJECTS = (
    "the train", "the meeting", "the parcel", "my flight", "dinner", "the game", "the bus",
    "our lesson", "the film", "the concert", "the party", "the boat",
)
NEWS = (
    "is late", "is cancelled", "starts early", "was great", "is tomorrow", "is sold out",
    "is on time", "is on Monday", "takes longer",
)
ADJECTIVES = ("Golden", "Blue", "Old", "Green", "Little", "Silver", "Red", "Quiet")
RESTAURANTS = ("Fork", "Garden", "Lantern", "Kitchen", "Olive", "Anchor", "Table", "Mill")
LABELS = (
    "pasta", "rice", "eggs", "tea", "bread", "cake", "pizza", "laundry", "oven", "nap", "workout",
    "break", "soup", "potatoes", "homework", "parking",
)
LISTS = ("grocery", "hardware", "party", "picnic", "holiday")
ITEMS = (
    "milk", "eggs", "rice", "bread", "butter", "cheese", "apples", "lemons", "onions", "coffee",
    "tea", "salt", "sugar", "flour", "candles", "batteries", "soap", "nails", "paint", "rope",
    "napkins", "olives", "juice", "water",
)
PLACES = (
    "Harbour", "Station", "Garden", "River", "Castle", "Market", "Mill", "Bridge", "Church",
    "Forest", "Lake", "King", "Queen", "Rose", "Oak",
)
STREETS = ("Street", "Square", "Road", "Park", "Lane")
BUILDINGS = ("Museum", "School", "Library", "Hall", "Hospital")
MODES = {
    "bike": ("by bike", "cycling"), "bus": ("by bus", "with the bus"),
    "car": ("by car", "driving"), "train": ("by train", "with the train"),
    "walk": ("on foot", "walking"),
}
SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
    "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
)
TENS = ("", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
# fmt: on
DURATIONS = {
    15: "a quarter of an hour",
    30: "half an hour",
    45: "three quarters of an hour",
    60: "an hour",
    75: "an hour and a quarter",
    90: "an hour and a half",
    120: "two hours",
    150: "two and a half hours",
    180: "three hours",
}
FRAMES = (
    "{request}.",
    "{request}, please.",
    "Please {request}.",
    "Could you {request}?",
    "Can you {request}, please?",
    "I would like you to {request}.",
    "Hi. {request}.",
    "Good morning. Please {request}.",
    "One more thing. {request}, please.",
    "{request}. Thanks!",
)


class Function(NamedTuple):
    """A function that can be called.

    Attributes:
        arguments: Their names, sorted; a name tells how its value is drawn and said.
        wordings: Requests for it, without frame, with the arguments in braces.
    """

    arguments: tuple[str, ...]
    wordings: tuple[str, ...]


FUNCTIONS = {
    "set_alarm": Function(
        ("days", "time"),
        (
            "wake me at {time} on {days}",
            "set an alarm for {time} on {days}",
            "set my alarm on {days} to {time}",
            "let the alarm ring on {days} at {time}",
        ),
    ),
    "add_event": Function(
        ("date", "time", "title"),
        (
            "add {title} to my calendar on {date} at {time}",
            "put {title} in the calendar for {date}, {time}",
            "note {title} at {time} on {date}",
            "schedule {title} for {date} at {time}",
        ),
    ),
    "send_message": Function(
        ("person", "text"),
        (
            "tell {person} that {text}",
            "send {person} a message that {text}",
            "text {person} that {text}",
            "let {person} know that {text}",
        ),
    ),
    "book_table": Function(
        ("date", "people", "place", "time"),
        (
            "book a table for {people} at the {place} on {date} at {time}",
            "reserve the {place} on {date} at {time} for {people} people",
            "get us a table at the {place} for {date}, {time}, {people} of us",
            "book the {place} for {people} at {time} on {date}",
        ),
    ),
    "transfer_money": Function(
        ("amount", "date", "person"),
        (
            "send {person} {amount} on {date}",
            "transfer {amount} to {person} on {date}",
            "pay {person} {amount} on {date}",
            "on {date} transfer {amount} to {person}",
        ),
    ),
    "set_timer": Function(
        ("label", "minutes"),
        (
            "set a timer of {minutes} for the {label}",
            "start a {label} timer of {minutes}",
            "remind me of the {label} in {minutes}",
            "count down {minutes} for the {label}",
        ),
    ),
    "add_items": Function(
        ("items", "list"),
        (
            "put {items} on the {list} list",
            "add {items} to my {list} list",
            "write {items} on my {list} list",
            "note on the {list} list that we need {items}",
        ),
    ),
    "find_route": Function(
        ("end", "mode", "start"),
        (
            "show me the way from {start} to {end} {mode}",
            "find a route to {end} from {start} {mode}",
            "tell me how to get from {start} to {end} {mode}",
            "plan a trip {mode} from {start} to {end}",
        ),
    ),
}
DRAWS: dict[str, Callable[[random.Random], Any]] = {
    "amount": lambda draw: _euros(100 * draw.randint(3, 99) + 25 * draw.randrange(4)),
    "date": lambda draw: f"{draw.randint(1, 12):02d}-{draw.randint(1, 28):02d}",
    "days": lambda draw: draw.sample(tuple(DAYS), draw.randint(1, 3)),
    "end": lambda draw: f"{draw.choice(PLACES)} {draw.choice(BUILDINGS)}",
    "items": lambda draw: draw.sample(ITEMS, draw.randint(1, 3)),
    "label": lambda draw: draw.choice(LABELS),
    "list": lambda draw: draw.choice(LISTS),
    "minutes": lambda draw: draw.choice((*range(2, 60), *DURATIONS)),
    "mode": lambda draw: draw.choice(tuple(MODES)),
    "people": lambda draw: draw.randint(2, 12),
    "person": lambda draw: draw.choice(NAMES),
    "place": lambda draw: f"{draw.choice(ADJECTIVES)} {draw.choice(RESTAURANTS)}",
    "start": lambda draw: f"{draw.choice(PLACES)} {draw.choice(STREETS)}",
    "text": lambda draw: f"{draw.choice(SUBJECTS)} {draw.choice(NEWS)}",
    "time": lambda draw: f"{draw.randint(6, 22):02d}:{5 * draw.randrange(12):02d}",
    "title": lambda draw: draw.choice(TITLES),
}
SAYINGS: dict[str, Callable[[Any], list[str]]] = {
    "amount": lambda amount: amount_sayings(amount),
    "date": lambda date: date_sayings(date),
    "days": lambda days: [_listed([DAYS[day] for day in days])],
    "items": lambda items: [_listed(items)],
    "minutes": lambda minutes: minutes_sayings(minutes),
    "mode": lambda mode: list(MODES[mode]),
    "people": lambda people: [str(people), number_words(people)],
    "time": lambda time: time_sayings(time),
}
"""The ways to say an argument's value; names and texts are not here: they are said as they are."""


def generate(train: int, test: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """Make requests with their calls.

    Args:
        train: Number of training requests.
        test: Number of test requests; no call of theirs occurs in training.
        seed: Of everything random.

    Returns:
        Records of ``train`` and ``test`` with the keys ``query``, ``target`` (the call, starting
        with a space) and ``answer`` (the call).
    """
    random_state = random.Random(seed)
    seen: dict[str, tuple[str, dict[str, Any]]] = {}
    while len(seen) < train + test:
        name = random_state.choice(tuple(FUNCTIONS))
        arguments = {key: DRAWS[key](random_state) for key in FUNCTIONS[name].arguments}
        seen[call(name, arguments)] = name, arguments
    ordered = sorted(seen)
    random_state.shuffle(ordered)
    records = [
        {
            "query": f"Request: {_request(*seen[answer], random_state)}\nCall:",
            "target": f" {answer}",
            "answer": answer,
        }
        for answer in ordered
    ]
    return {"train": records[test:], "test": records[:test]}


def task_config(name: str) -> dict[str, Any]:
    """Describe the task to lm-eval: generate the call, compare all of it."""
    return generation_config(name, pattern=f"({TOKENS[0]}.*{TOKENS[1]})", max_new_tokens=64)


def call(name: str, arguments: Mapping[str, Any]) -> str:
    """Return a call as the model writes it, the arguments in the order of their names."""
    ordered = dict(sorted(arguments.items()))
    return f"{TOKENS[0]}{json.dumps({'name': name, 'arguments': ordered})}{TOKENS[1]}"


def number_words(number: int) -> str:
    """Return a number from 0 to 99 in words."""
    if number < len(SMALL):
        return SMALL[number]
    tens, ones = divmod(number, 10)
    return f"{TENS[tens]}-{SMALL[ones]}" if ones else TENS[tens]


def time_sayings(time: str) -> list[str]:
    """Return the ways to say ``HH:MM``; without a part of the day, a time in words is a.m."""
    hour, minute = (int(part) for part in time.split(":"))
    twelve = (hour - 1) % 12 + 1
    this, following = number_words(twelve), number_words(twelve % 12 + 1)
    distance = min(minute, 60 - minute)
    amount = {15: "quarter", 30: "half"}.get(distance, number_words(distance))
    words = f"{amount} past {this}" if minute <= 30 else f"{amount} to {following}"
    if minute == 0:
        words = f"{this} o'clock"
    part = "morning" if hour < 12 else "afternoon" if hour < 18 else "evening"
    sayings = [
        f"{hour}:{minute:02d}",
        f"{twelve}:{minute:02d} {'am' if hour < 12 else 'pm'}",
        f"{words} in the {part}",
    ]
    return [*sayings, words] if hour < 12 else sayings


def date_sayings(date: str) -> list[str]:
    """Return the ways to say ``MM-DD``."""
    month, day = (int(part) for part in date.split("-"))
    name = MONTHS[month - 1]
    ending = "th" if 10 < day < 20 else {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th")
    return [f"the {day}{ending} of {name}", f"{name} {day}", f"{day} {name}"]


def amount_sayings(amount: float) -> list[str]:
    """Return the ways to say an amount of euros."""
    euros, cents = divmod(round(100 * amount), 100)
    if cents == 0:
        return [f"{euros} euros", f"{number_words(euros)} euros", f"{euros}.00 euros"]
    words = f"{number_words(euros)} {number_words(cents)}"
    return [f"{euros}.{cents:02d} euros", f"{euros} euros and {cents} cents", words]


def minutes_sayings(minutes: int) -> list[str]:
    """Return the ways to say a duration."""
    if minutes in DURATIONS:
        return [DURATIONS[minutes], f"{minutes} minutes"]
    return [f"{minutes} minutes", f"{number_words(minutes)} minutes"]


def _request(name: str, arguments: Mapping[str, Any], random_state: random.Random) -> str:
    said = {
        key: random_state.choice(SAYINGS[key](value)) if key in SAYINGS else value
        for key, value in arguments.items()
    }
    wording = random_state.choice(FUNCTIONS[name].wordings).format(**said)
    frame = random_state.choice(FRAMES)
    before = frame.partition("{")[0].rstrip()
    if before == "" or before.endswith("."):
        wording = wording[0].upper() + wording[1:]
    return frame.format(request=wording)


def _euros(cents: int) -> float:
    """Return an amount as JSON shows it best: 12, 12.5 or 12.25."""
    return cents // 100 if cents % 100 == 0 else cents / 100


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))
