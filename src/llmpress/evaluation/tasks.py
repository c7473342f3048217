"""Accuracy on tasks, computed by lm-eval from local files; nothing is downloaded or cached.

A task folder holds task.yaml, an lm-eval task configuration whose ``data_files`` are relative to
the folder. The first metric of its ``metric_list``, after its first filter, is the accuracy.
"""

import logging
import random
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.core.errors import ArtifactError
from llmpress.data.tasks.files import TASK_FILE

if TYPE_CHECKING:
    from lm_eval.api.task import Task

GENERATION = "generate_until"
SCORED = (
    16  # answers scored at the same time: sorted by length, so small batches waste less padding
)
GENERATED = 64  # texts generated at the same time: a step takes as long for one as for some dozen
SEED = 0  # which items are taken, and the few-shot examples of tasks that have some


@dataclass(frozen=True)
class TaskScore:
    """Result on one task.

    Attributes:
        accuracy: Share of items answered correctly.
        stderr: Standard error of that share, from sampling items.
        num_items: Items asked.
        metric: What lm-eval calls the accuracy, for example ``acc`` or ``exact_match``.
        answers: 1 for each item answered correctly, else 0, in the task's order.
    """

    accuracy: float
    stderr: float
    num_items: int
    metric: str
    answers: tuple[float, ...]


def evaluate_tasks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folders: Mapping[str, Path],
    limits: Mapping[str, int | None],
) -> dict[str, TaskScore]:
    """Run lm-eval on a model in memory.

    Args:
        model: What is evaluated.
        tokenizer: Its tokenizer.
        folders: Task folders by name.
        limits: Items by task name, the same random ones for every model; None takes all.

    Returns:
        A score for each task.

    Raises:
        ArtifactError: A task folder is missing, damaged, or has fewer items than asked for.
    """
    configs = {name: read_task(folder) for name, folder in folders.items()}
    if not configs:
        return {}
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="llmpress-tasks-") as cache:
        tasks = {name: _open_task(config, cache) for name, config in configs.items()}
        items = {name: _items(task, limits[name], folders[name]) for name, task in tasks.items()}
        for generates in (False, True):
            part = {n: t for n, t in tasks.items() if (t.OUTPUT_TYPE == GENERATION) == generates}
            results |= _run(model, tokenizer, part, items, GENERATED if generates else SCORED)
    return {name: _score(results[name], config) for name, config in configs.items()}


def read_task(folder: Path) -> dict[str, Any]:
    """Read a task's configuration and make the names of its data files absolute.

    Raises:
        ArtifactError: task.yaml or a data file is missing, or task.yaml is no such configuration.
    """
    file = folder / TASK_FILE
    if not file.is_file():
        raise ArtifactError(f"{folder}: no task here ({TASK_FILE} is missing); fetch it first")
    try:
        config: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        data_files = config["dataset_kwargs"]["data_files"]
        absolute = {split: (folder / name).resolve() for split, name in data_files.items()}
        config["metric_list"][0]["metric"]
    except (yaml.YAMLError, KeyError, IndexError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ArtifactError(f"{file}: no usable lm-eval task ({reason}); fetch it again") from None
    for path in absolute.values():
        if not path.is_file():
            raise ArtifactError(f"{path}: data of the task is missing; fetch the task again")
    config["dataset_kwargs"]["data_files"] = {split: str(p) for split, p in absolute.items()}
    return config


def _open_task(config: Mapping[str, Any], cache: str) -> "Task":
    """Make an lm-eval task whose data set cache lies in the folder ``cache``."""
    from lm_eval.api.task import ConfigurableTask

    settings = {**config["dataset_kwargs"], "cache_dir": cache}
    task = ConfigurableTask(config={"num_fewshot": 0, **config, "dataset_kwargs": settings})
    task.set_fewshot_seed(seed=SEED)
    return task


def _run(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, "Task"],
    items: Mapping[str, list[int]],
    batch_size: int,
) -> dict[str, Any]:
    """Return lm-eval's results by task, with its samples; probabilities are fp32 always."""
    if not tasks:
        return {}
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        softmax_dtype="float32",
        batch_size=batch_size,
    )
    chosen = {name: items[name] for name in tasks}
    found: dict[str, Any] = evaluate(wrapped, {"tasks": tasks}, samples=chosen, log_samples=True)
    return {name: {**found["results"][name], "samples": found["samples"][name]} for name in tasks}


def _items(task: "Task", limit: int | None, folder: Path) -> list[int]:
    available = len(task.eval_docs)
    if limit is None:
        return list(range(available))
    if limit > available:
        raise ArtifactError(f"{folder}: {limit} items were asked for, the task has {available}")
    return sorted(random.Random(SEED).sample(range(available), limit))


def _score(result: Mapping[str, Any], config: Mapping[str, Any]) -> TaskScore:
    metric = config["metric_list"][0]["metric"]
    filters = config.get("filter_list") or [{"name": "none"}]
    key = filters[0]["name"]
    samples = sorted(
        (sample for sample in result["samples"] if sample["filter"] == key),
        key=lambda sample: sample["doc_id"],
    )
    return TaskScore(
        accuracy=float(result[f"{metric},{key}"]),
        stderr=float(result[f"{metric}_stderr,{key}"]),
        num_items=int(result["sample_len"]),
        metric=metric,
        answers=tuple(float(sample[metric]) for sample in samples),
    )
