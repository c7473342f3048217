"""A project as the pipeline leaves it before evaluation: its params.yaml, artifacts and tasks."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from llmpress.compression.layers import compress_layers, model_shapes
from llmpress.compression.writing import write_compressed_model
from llmpress.core.artifacts import artifact_folder
from llmpress.core.resume import BlockStore
from llmpress.deltas.compression import write_compressed_delta
from llmpress.deltas.extraction import write_delta
from llmpress.evaluation.metrics import Details, Metrics
from llmpress.evaluation.stage import evaluate_model
from llmpress.evaluation.subjects import find_subject
from llmpress.methods.rtn import RTN
from llmpress.methods.svd import SVD
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import skeleton

PARAMS: dict[str, Any] = {
    "runs": {"rtn": {"model": "tiny", "method": "rtn", "settings": {"num_bits": 4}}},
    "deltas": {"tuned": {"base": "models/tiny", "finetuned": "tuned"}},
    "delta_runs": {
        "delta": {"delta": "tuned", "base": "models/tiny", "finetuned": "tuned", "method": "svd"}
    },
    "finetunes": {"rtn-tuned": {"run": "rtn", "model": "tiny"}},
    "evaluation": {
        "models": ["tiny", "tuned"],
        "corpora": ["code"],
        "windows": 2,
        "length": 64,
        "dtype": "float32",
        "tasks": {"choice": None, "write": 4},
        "task_dtype": "bfloat16",
        "split": "test",
        "sample_tokens": 4,
    },
}


CHOICE_TASK = {
    "task": "choice",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{query}}",
    "doc_to_target": "gold",
    "doc_to_choice": "choices",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
WRITE_TASK = {
    "task": "write",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "test.jsonl"}},
    "test_split": "test",
    "output_type": "generate_until",
    "doc_to_text": "{{query}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "do_sample": False, "max_gen_toks": 6},
    "filter_list": [
        {
            "name": "first",
            "filter": [
                {"function": "regex", "regex_pattern": r"(\S+)"},
                {"function": "take_first"},
            ],
        }
    ],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
QUERIES = ("import", "def __init__(", "for key in", "if not", "raise", "return", "class", "self.")


def evaluated(
    name: str, params: Mapping[str, Any] = PARAMS, **changes: Any
) -> tuple[Metrics, Details]:
    """Evaluate as the script does, with other settings."""
    values = {k: v for k, v in PARAMS["evaluation"].items() if k != "models"} | changes
    corpora, tasks = values.pop("corpora"), values.pop("tasks")
    subject = find_subject(params, name)
    return evaluate_model(
        subject.folder,
        original=subject.original_folder,
        base=subject.base_folder,
        text=[Path("data/corpora") / corpus for corpus in corpora],
        tasks={Path("data/tasks") / task: items for task, items in tasks.items()},
        device="cpu",
        **values,
    )


def write_task(folder: Path, config: Mapping[str, Any], rows: list[dict[str, Any]]) -> Path:
    folder.mkdir(parents=True)
    (folder / "task.yaml").write_text(yaml.safe_dump(dict(config)), encoding="utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "test.jsonl").write_text(lines, encoding="utf-8")
    return folder


def choice_rows() -> list[dict[str, Any]]:
    answers = ("os", "self, name):", "self._items:", "isinstance(value, str):", "ValueError")
    return [
        {"query": query, "choices": [answers[i % 5], answers[(i + 1) % 5], "None"], "gold": i % 3}
        for i, query in enumerate(QUERIES)
    ]


def as_artifact(source: Path, out: Path) -> Path:
    with artifact_folder(out, stage="fetch_model", settings={"path": "tiny"}, inputs={}) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True)
    return out


def write_project(base: Path, finetuned: Path) -> None:
    """Fill the working folder: models ``tiny`` and ``tuned``, run ``rtn``, delta run ``delta``."""
    data = Path("data")
    base = as_artifact(base, data / "models/tiny")
    finetuned = as_artifact(finetuned, data / "models/tuned")
    _compress(base, data / "compressed/rtn")
    _compress_delta(base, finetuned, data)
    corpus = data / "corpora/code"
    text = Path(json.__file__).read_text(encoding="utf-8")
    with artifact_folder(corpus, stage="fetch_corpus", settings={}, inputs={}) as folder:
        (folder / "test.txt").write_text(text, encoding="utf-8")
        (folder / "validation.txt").write_text(text[::-1], encoding="utf-8")
    write_task(data / "tasks/choice", CHOICE_TASK, choice_rows())
    rows = [{"query": query, "answer": "x"} for query in QUERIES]
    write_task(data / "tasks/write", WRITE_TASK, rows)
    Path("params.yaml").write_text(yaml.safe_dump(PARAMS), encoding="utf-8")


def _compress(model: Path, out: Path) -> None:
    checkpoint = Checkpoint(model)
    method = RTN(num_bits=4, group_size=32)
    settings = {"method": "rtn", "num_bits": 4, "group_size": 32}
    with artifact_folder(
        out, stage="compress", settings=settings, inputs={"model": model}
    ) as folder:
        weights = sum(checkpoint.tensor(name).numel() for name in checkpoint.names())
        layers = compress_layers(
            model_shapes(skeleton(checkpoint)),
            checkpoint,
            method,
            None,
            model_weights=weights,
            seed=0,
            device=torch.device("cpu"),
            store=BlockStore("test", {}, Path("scratch")),
        )
        write_compressed_model(checkpoint, layers, weights, folder)


def _compress_delta(base: Path, tuned: Path, data: Path) -> None:
    inputs = {"base": base, "finetuned": tuned}
    delta = data / "deltas/tuned"
    with artifact_folder(delta, stage="extract_delta", settings={}, inputs=inputs) as folder:
        write_delta(Checkpoint(base), Checkpoint(tuned), folder)
    with artifact_folder(
        data / "compressed/delta",
        stage="compress_delta",
        settings={"method": "svd", "keep": 0.5},
        inputs={"delta": delta},
    ) as folder:
        write_compressed_delta(
            DeltaFolder(delta, "delta"),
            SVD(keep=0.5),
            None,
            folder,
            method_name="svd",
            seed=0,
            store=BlockStore("test-delta", {}, Path("scratch")),
        )
