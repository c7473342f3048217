"""Task items and the task.yaml that lm-eval reads, offline."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from llmpress.core.errors import ArtifactError, ConfigError, SourceError
from llmpress.core.params import build
from llmpress.data.tasks import arithmetic, calls, multiple_choice
from llmpress.data.tasks.files import read_items, write_items, write_task
from llmpress.data.tasks.source import TaskSource

ARC_ROW = {
    "question": "Which is hot?",
    "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
PIQA_ROW = {"goal": "Open a jar.", "sol1": "Twist the lid.", "sol2": "Sing.", "label": 0}


def test_arc_rows_become_query_choices_gold() -> None:
    assert multiple_choice.convert([ARC_ROW], "arc", seed=0) == [
        {
            "query": "Question: Which is hot?\nAnswer:",
            "choices": ["ice", "fire", "snow"],
            "gold": 1,
        }
    ]


def test_piqa_rows_become_query_choices_gold() -> None:
    assert multiple_choice.convert([PIQA_ROW], "piqa", seed=0) == [
        {
            "query": "Question: Open a jar.\nAnswer:",
            "choices": ["Twist the lid.", "Sing."],
            "gold": 0,
        }
    ]


def test_items_come_in_a_seeded_random_order() -> None:
    rows = [{**PIQA_ROW, "goal": str(number)} for number in range(20)]
    first, again, other = (multiple_choice.convert(rows, "piqa", seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert sorted(item["query"] for item in first) == sorted(item["query"] for item in other)


@pytest.mark.parametrize(
    ("row", "template", "named"),
    [
        (PIQA_ROW, "arc", "row 0 .*'arc' .*goal, sol1, sol2, label"),
        ({**ARC_ROW, "answerKey": "9"}, "arc", "row 0 .*'arc'"),
        ({**PIQA_ROW, "label": -1}, "piqa", "row 0"),
    ],
    ids=["other-set", "no-such-label", "hidden-label"],
)
def test_rows_that_do_not_fit_are_named(row: dict[str, Any], template: str, named: str) -> None:
    with pytest.raises(SourceError, match=named):
        multiple_choice.convert([row], template, seed=0)


@pytest.fixture(scope="module")
def problems() -> dict[str, list[dict[str, Any]]]:
    return arithmetic.generate(train=600, test=100, seed=0)


def test_worked_answers_are_right(problems: dict[str, list[dict[str, Any]]]) -> None:
    for item in problems["train"] + problems["test"]:
        first, second = item["target"].strip().split(", ")
        a, b, between = re.fullmatch(r"(\d+)[-+*](\d+)=(\d+)", first).groups()  # type: ignore[union-attr]
        left, c, result = re.fullmatch(r"(\d+)[-+*](\d+)=(\d+)", second).groups()  # type: ignore[union-attr]
        for step in (first, second):
            calculation, _, claimed = step.partition("=")
            operator = re.search(r"[-+*]", calculation).group()  # type: ignore[union-attr]
            x, y = (int(number) for number in calculation.split(operator))
            assert {"+": x + y, "-": x - y, "*": x * y}[operator] == int(claimed)
        assert left == between
        assert result == item["answer"]
        assert {a, b, c} <= set(re.findall(r"\d+", item["query"]))
        assert item["query"].startswith("Question: ")
        assert item["query"].endswith("\nAnswer:")


def test_test_calculations_do_not_occur_in_training(
    problems: dict[str, list[dict[str, Any]]],
) -> None:
    assert len(problems["train"]) == 600
    assert len(problems["test"]) == 100
    trained = {item["target"] for item in problems["train"]}
    assert trained.isdisjoint(item["target"] for item in problems["test"])
    assert len(trained) == 600


def test_generator_depends_on_its_seed_alone(problems: dict[str, list[dict[str, Any]]]) -> None:
    assert arithmetic.generate(train=600, test=100, seed=0) == problems
    assert arithmetic.generate(train=600, test=100, seed=1) != problems


def test_all_nine_pairs_of_operations_occur(problems: dict[str, list[dict[str, Any]]]) -> None:
    pairs = {"".join(re.findall(r"[-+*]", item["target"])) for item in problems["train"]}
    assert len(pairs) == 9


def test_task_folder_holds_items_and_configuration(
    tmp_path: Path, problems: dict[str, list[dict[str, Any]]]
) -> None:
    write_task(tmp_path, arithmetic.task_config("sums"), problems)
    assert read_items(tmp_path / "train.jsonl") == problems["train"]
    assert read_items(tmp_path / "test.jsonl") == problems["test"]
    config = yaml.safe_load((tmp_path / "task.yaml").read_text(encoding="utf-8"))
    assert config == arithmetic.task_config("sums")
    assert config["dataset_kwargs"] == {"data_files": {"test": "test.jsonl"}}


@pytest.fixture(scope="module")
def requests() -> dict[str, list[dict[str, Any]]]:
    return calls.generate(train=600, test=100, seed=0)


def called(item: dict[str, Any]) -> dict[str, Any]:
    """Return the call of an item, parsed."""
    return json.loads(item["answer"].removeprefix("<call>").removesuffix("</call>"))


def test_calls_are_json_with_sorted_arguments(requests: dict[str, list[dict[str, Any]]]) -> None:
    found = set()
    for item in requests["train"] + requests["test"]:
        parsed = called(item)
        assert list(parsed) == ["name", "arguments"]
        assert tuple(parsed["arguments"]) == calls.FUNCTIONS[parsed["name"]].arguments
        assert list(parsed["arguments"]) == sorted(parsed["arguments"])
        assert item["answer"] == f"<call>{json.dumps(parsed)}</call>"
        assert item["target"] == f" {item['answer']}"
        assert re.fullmatch(r"Request: [A-Z][^\n{}]+[.?!]\nCall:", item["query"])
        found.add(parsed["name"])
    assert found == set(calls.FUNCTIONS)
    assert len(found) == 8


def test_requests_say_every_value_of_their_call(
    requests: dict[str, list[dict[str, Any]]],
) -> None:
    for item in requests["train"]:
        for key, value in called(item)["arguments"].items():
            sayings = calls.SAYINGS[key](value) if key in calls.SAYINGS else [value]
            assert any(saying in item["query"] for saying in sayings), (item, key)


@pytest.mark.parametrize(
    ("sayings", "expected"),
    [
        (
            calls.time_sayings("07:30"),
            ["7:30", "7:30 am", "half past seven in the morning", "half past seven"],
        ),
        (
            calls.time_sayings("12:45"),
            ["12:45", "12:45 pm", "quarter to one in the afternoon"],
        ),
        (
            calls.time_sayings("20:00"),
            ["20:00", "8:00 pm", "eight o'clock in the evening"],
        ),
        (calls.date_sayings("03-03"), ["the 3rd of March", "March 3", "3 March"]),
        (calls.date_sayings("12-11"), ["the 11th of December", "December 11", "11 December"]),
        (
            calls.amount_sayings(12.5),
            ["12.50 euros", "12 euros and 50 cents", "twelve fifty"],
        ),
        (calls.amount_sayings(40), ["40 euros", "forty euros", "40.00 euros"]),
        (calls.minutes_sayings(90), ["an hour and a half", "90 minutes"]),
        (calls.minutes_sayings(21), ["21 minutes", "twenty-one minutes"]),
        (calls.SAYINGS["days"](["tue", "mon", "sun"]), ["Tuesday, Monday and Sunday"]),
        (calls.SAYINGS["items"](["milk"]), ["milk"]),
    ],
    ids=lambda value: value[0].replace(" ", "-"),
)
def test_values_are_said_in_their_ways(sayings: list[str], expected: list[str]) -> None:
    assert sayings == expected


def test_no_two_times_in_words_are_said_alike() -> None:
    times = [f"{hour:02d}:{minute:02d}" for hour in range(6, 23) for minute in range(0, 60, 5)]
    sayings = [saying for time in times for saying in calls.time_sayings(time)]
    assert len(set(sayings)) == len(sayings)


def test_test_calls_do_not_occur_in_training(requests: dict[str, list[dict[str, Any]]]) -> None:
    trained = {item["answer"] for item in requests["train"]}
    assert (len(trained), len(requests["test"])) == (600, 100)
    assert trained.isdisjoint(item["answer"] for item in requests["test"])


def test_requests_depend_on_their_seed_alone(requests: dict[str, list[dict[str, Any]]]) -> None:
    assert calls.generate(train=600, test=100, seed=0) == requests
    assert calls.generate(train=600, test=100, seed=1) != requests


def test_the_filter_of_the_configuration_takes_the_whole_call(
    requests: dict[str, list[dict[str, Any]]],
) -> None:
    config = calls.task_config("calls")
    [regex, first] = config["filter_list"][0]["filter"]
    assert first == {"function": "take_first"}
    for item in requests["test"]:
        assert re.findall(regex["regex_pattern"], item["target"]) == [item["answer"]]
    assert config["generation_kwargs"]["until"] == ["\n"]
    assert config["metric_list"][0]["metric"] == "exact_match"


def test_items_survive_odd_characters(tmp_path: Path) -> None:
    items = [{"query": 'a\u2028b\n"c" é', "gold": 1}]
    write_items(tmp_path / "x.jsonl", items)
    assert read_items(tmp_path / "x.jsonl") == items


def test_missing_and_damaged_items_are_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"train\.jsonl"):
        read_items(tmp_path / "train.jsonl")
    (tmp_path / "test.jsonl").write_text('{"query"', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"test\.jsonl"):
        read_items(tmp_path / "test.jsonl")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"generator": "arithmetic", "files": "x"}, "generator.* files"),
        ({"generator": "algebra"}, "generator: .*'arithmetic' or 'calls'.* 'algebra'"),
        ({"path": "x"}, "`files:` and `template:`"),
        ({"path": "x", "files": "y", "template": "boolq"}, "template: .*'boolq'"),
        ({"files": "y", "template": "arc"}, "package, hub and path"),
    ],
    ids=["both", "unknown-generator", "no-template", "unknown-template", "no-source"],
)
def test_task_source_is_validated(values: dict[str, str], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        build(TaskSource, {"license": "MIT", **values}, "tasks.t")


def test_every_template_can_be_named_in_params() -> None:
    for template in multiple_choice.TEMPLATES:
        values = {"license": "MIT", "path": "x", "files": "y", "template": template}
        assert build(TaskSource, values, "tasks.t").template == template
