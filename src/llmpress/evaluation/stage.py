"""Everything that is measured of one model or run, in the order that keeps memory low."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.core.artifacts import TRAINING, read_json, read_provenance
from llmpress.core.environment import hardware, packages, peak_memory_bytes
from llmpress.core.errors import SourceError
from llmpress.core.records import has_records, read_records
from llmpress.data.corpora import load_text, token_windows
from llmpress.evaluation import metrics
from llmpress.evaluation.likelihood import Likelihood, likelihood
from llmpress.evaluation.samples import sample_texts
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.evaluation.sizes import (
    compressed_size,
    cost,
    delta_size,
    model_size,
    trained_size,
)
from llmpress.evaluation.speed import measure_speed
from llmpress.evaluation.subjects import Subject
from llmpress.evaluation.tasks import TaskScore, evaluate_tasks, read_task
from llmpress.models.loading import load_model

SIZES: Mapping[str, Callable[[Path, Path], metrics.Size]] = {
    "model": lambda folder, _: model_size(folder),
    "compressed": lambda folder, _: compressed_size(folder),
    "finetuned": lambda folder, _: compressed_size(folder),
    "delta": lambda folder, _: delta_size(folder),
    "trained": trained_size,
}


def evaluate(
    subject: Subject, settings: EvaluationSettings, device: str
) -> tuple[metrics.Metrics, metrics.Details]:
    """Measure speed packed, then quality with dense weights of the same values.

    Args:
        subject: What is evaluated.
        settings: How.
        device: Where the models run, ``cpu`` or ``cuda``.

    Returns:
        The numbers, and all that a reader may ask about them.

    Raises:
        ArtifactError: A folder that is needed is missing or damaged.
        SourceError: The test text of a corpus is too short.
        NumericalError: The model computes NaN or Inf.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    made_in = cost(subject.folder)
    size = SIZES[subject.kind](subject.folder, subject.original_folder)
    tasks = settings.tasks_of(subject.original)
    for name in tasks:
        read_task(task_folder(name))  # what is missing is named before anything is computed
    tokenizer = subject.tokenizer()
    windows = read_windows(settings, tokenizer)
    dtype, task_dtype = getattr(torch, settings.dtype), getattr(torch, settings.task_dtype)

    with timed(seconds, "speed"):
        prompt = next(iter(windows.values())).flatten()[: settings.prefill_tokens]
        speed = measure_speed(subject.load(task_dtype, device), prompt, settings.decode_tokens)
    with timed(seconds, "likelihood"):
        model = subject.load_dense(dtype, device)
        likelihoods = _likelihoods(model, subject, windows, dtype)
    model = model.to(task_dtype)
    with timed(seconds, "tasks"):
        folders = {name: task_folder(name) for name in tasks}
        scores = evaluate_tasks(model, tokenizer, folders, tasks)
    with timed(seconds, "samples"):
        samples = sample_texts(model, tokenizer, settings.sample_tokens)
    seconds["all"] = round(time.perf_counter() - started, 2)

    numbers = metrics.Metrics(
        quality=_quality(likelihoods, scores),
        size=size,
        cost=made_in,
        speed=metrics.Speed(**asdict(speed)),
    )
    evaluation = metrics.EvaluationRecord(
        windows=settings.windows,
        length=settings.length,
        tokens_scored={name: result.num_tokens for name, result in likelihoods.items()},
        dtype=settings.dtype,
        task_dtype=settings.task_dtype,
        task_items={name: score.num_items for name, score in scores.items()},
        task_metrics={name: score.metric for name, score in scores.items()},
        prefill_tokens=len(prompt),
        decode_tokens=settings.decode_tokens,
        device=device,
        num_threads=torch.get_num_threads(),
    )
    return numbers, _details(subject, evaluation, samples, seconds)


def corpus_folder(name: str) -> Path:
    """Return where ``fetch_corpus`` puts a corpus."""
    return Path("data/corpora") / name


def task_folder(name: str) -> Path:
    """Return where ``fetch_task`` puts a task."""
    return Path("data/tasks") / name


def read_windows(
    settings: EvaluationSettings, tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    """Return the token windows ``[windows, length]`` of each corpus's test text."""
    windows = {}
    for name in settings.corpora:
        documents = load_text(corpus_folder(name), "test")
        try:
            windows[name] = token_windows(documents, tokenizer, settings.length, settings.windows)
        except SourceError as error:
            raise SourceError(f"corpus {name}, test text: {error}") from None
    return windows


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note the wall time of a part."""
    started = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - started, 2)


def _likelihoods(
    model: PreTrainedModel, subject: Subject, windows: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Likelihood]:
    original = None
    if subject.kind != "model":
        read_provenance(subject.original_folder)
        original = load_model(subject.original_folder, dtype=dtype, device=str(model.device))
    return {name: likelihood(model, original, tokens, name) for name, tokens in windows.items()}


def _quality(
    likelihoods: Mapping[str, Likelihood], scores: Mapping[str, TaskScore]
) -> metrics.Quality:
    return metrics.Quality(
        perplexity={name: result.perplexity for name, result in likelihoods.items()},
        kl_divergence_nats={name: r.kl_divergence_nats for name, r in likelihoods.items()},
        top1_agreement={name: result.top1_agreement for name, result in likelihoods.items()},
        tasks={
            name: metrics.TaskAccuracy(
                accuracy=score.accuracy, stderr=score.stderr, num_items=score.num_items
            )
            for name, score in scores.items()
        },
    )


def _details(
    subject: Subject,
    evaluation: metrics.EvaluationRecord,
    samples: list[dict[str, str]],
    seconds: dict[str, float],
) -> metrics.Details:
    folder = subject.folder
    training = folder / TRAINING
    artifact = read_provenance(folder)
    settings = dict(artifact["settings"])
    is_model = subject.kind == "model"
    return metrics.Details(
        name=subject.name,
        kind=subject.kind,
        method=None if is_model else settings.pop("method", None),
        settings=settings,
        original=subject.original,
        base=subject.base,
        evaluation=evaluation,
        layers=read_records(folder).content() if has_records(folder) else None,
        training=read_json(training) if training.is_file() else None,
        provenance=metrics.Provenance(
            artifact=artifact,
            source=None if is_model else read_provenance(subject.original_folder),
            evaluation={
                "created": datetime.now(UTC).isoformat(timespec="seconds"),
                "seconds": seconds,
                "peak_memory_bytes": peak_memory_bytes(),
                "hardware": hardware(),
                "packages": packages(),
            },
        ),
        samples=[metrics.Sample(**sample) for sample in samples],
    )
