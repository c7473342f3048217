from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_project import CHOICE_TASK, QUERIES, WRITE_TASK, choice_rows, write_task
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.core.errors import ArtifactError
from llmpress.evaluation.tasks import evaluate_tasks, read_task


@torch.no_grad()
def most_probable(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, query: str, choices: list[str]
) -> int:
    """The choice with the largest summed log-probability after the query, one at a time."""
    start = len(tokenizer(query)["input_ids"])
    scores = []
    for choice in choices:
        tokens = torch.tensor(tokenizer(f"{query} {choice}")["input_ids"])
        log_p = model(input_ids=tokens[None]).logits[0].log_softmax(dim=-1)
        scores.append(log_p[start - 1 : -1].gather(-1, tokens[start:, None]).sum())
    return int(torch.stack(scores).argmax())


@torch.no_grad()
def first_word(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, query: str) -> str:
    tokens = torch.tensor(tokenizer(query)["input_ids"])
    start = len(tokens)
    for _ in range(6):
        following = model(input_ids=tokens[None]).logits[0, -1].argmax()
        tokens = torch.cat([tokens, following[None]])
    words = tokenizer.decode(tokens[start:]).split("\n")[0].split()
    return words[0] if words else "[invalid]"


def test_multiple_choice_counts_the_most_probable_answers(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = choice_rows()
    folder = write_task(tmp_path / "choice", CHOICE_TASK, rows)
    score = evaluate_tasks(tiny_model, tiny_tokenizer, {"choice": folder}, {"choice": None})[
        "choice"
    ]
    correct = [
        most_probable(tiny_model, tiny_tokenizer, row["query"], row["choices"]) == row["gold"]
        for row in rows
    ]
    share = sum(correct) / len(rows)
    assert 0 < share < 1
    assert score.accuracy == pytest.approx(share)
    assert score.stderr == pytest.approx((share * (1 - share) / (len(rows) - 1)) ** 0.5)
    assert (score.num_items, score.metric) == (8, "acc")


def test_generated_answers_are_compared_after_the_filter(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    words = [first_word(tiny_model, tiny_tokenizer, query) for query in QUERIES]
    answers = [word if i < 5 else word + "?" for i, word in enumerate(words)]
    rows = [{"query": q, "answer": a} for q, a in zip(QUERIES, answers, strict=True)]
    folder = write_task(tmp_path / "write", WRITE_TASK, rows)
    score = evaluate_tasks(tiny_model, tiny_tokenizer, {"write": folder}, {"write": None})["write"]
    assert score.accuracy == pytest.approx(5 / 8)
    assert score.metric == "exact_match"


def test_a_limit_takes_the_same_items_each_time(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "choice", CHOICE_TASK, choice_rows())
    runs = [
        evaluate_tasks(tiny_model, tiny_tokenizer, {"choice": folder}, {"choice": 3})["choice"]
        for _ in range(2)
    ]
    assert runs[0].num_items == 3
    assert runs[0] == runs[1]


def test_changed_data_is_read_again(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    rows = choice_rows()
    best = [most_probable(tiny_model, tiny_tokenizer, row["query"], row["choices"]) for row in rows]
    for name, shift, expected in (("right", 0, 1.0), ("wrong", 1, 0.0)):
        gold = [{**row, "gold": (b + shift) % 3} for row, b in zip(rows, best, strict=True)]
        folder = write_task(tmp_path / name / "choice", CHOICE_TASK, gold)
        score = evaluate_tasks(tiny_model, tiny_tokenizer, {"choice": folder}, {"choice": None})
        assert score["choice"].accuracy == expected


def test_more_items_than_there_are_is_an_error(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    folder = write_task(tmp_path / "choice", CHOICE_TASK, choice_rows())
    with pytest.raises(ArtifactError, match=r"9 .*8"):
        evaluate_tasks(tiny_model, tiny_tokenizer, {"choice": folder}, {"choice": 9})


def test_no_tasks_give_no_scores(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert evaluate_tasks(tiny_model, tiny_tokenizer, {}, {}) == {}


def damaged(config: Any) -> str:
    return config if isinstance(config, str) else yaml.safe_dump(config)


@pytest.mark.parametrize(
    "text",
    ["a: [", "- 1", damaged({**CHOICE_TASK, "dataset_kwargs": {}}), "process_docs: !function a.b"],
    ids=["no-yaml", "no-mapping", "no-data", "code"],
)
def test_a_damaged_task_is_named(text: str, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "choice", CHOICE_TASK, choice_rows())
    (folder / "task.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"choice/task\.yaml"):
        read_task(folder)


@pytest.mark.parametrize("name", ["task.yaml", "test.jsonl"])
def test_a_missing_file_is_named(name: str, tmp_path: Path) -> None:
    folder = write_task(tmp_path / "choice", CHOICE_TASK, choice_rows())
    (folder / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        read_task(folder)
