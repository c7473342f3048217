"""Everything that is measured of one model or run, in the order that keeps memory low."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from llmpress.core.artifacts import TRAINING, read_json
from llmpress.core.devices import pick_device, pick_dtype
from llmpress.core.environment import hardware, packages, peak_memory_bytes
from llmpress.core.errors import ConfigError
from llmpress.core.records import DENSE
from llmpress.data.corpora import Text, name_among
from llmpress.evaluation import metrics
from llmpress.evaluation.likelihood import Likelihood
from llmpress.evaluation.reference import read_reference, run_original
from llmpress.evaluation.samples import sample_texts
from llmpress.evaluation.sizes import (
    compressed_size,
    cost,
    delta_size,
    model_size,
    origin,
    peer_size,
    trained_size,
)
from llmpress.evaluation.subjects import Subject, folder_subject
from llmpress.evaluation.tasks import TaskScore, evaluate_tasks, read_task
from llmpress.evaluation.uncertainty import standard_error
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.nn.layers import KINDS

Tasks = Sequence[Path | str] | Mapping[Path | str, int | None]
SIZES: Mapping[str, Callable[[Path, Path], metrics.Size]] = {
    "model": lambda folder, _: model_size(folder),
    "compressed": lambda folder, _: compressed_size(folder),
    "finetuned": lambda folder, _: compressed_size(folder),
    "delta": lambda folder, _: delta_size(folder),
    "trained": trained_size,
    "peer": lambda folder, _: peer_size(folder),
}


def evaluate_model(
    model: Path | str,
    *,
    text: Text | None = None,
    reference: Path | str | None = None,
    original: Path | str | None = None,
    base: Path | str | None = None,
    tasks: Tasks = (),
    split: str = "test",
    windows: int = 8,
    length: int = 512,
    dtype: str = "float32",
    task_dtype: str = "bfloat16",
    sample_tokens: int = 24,
    device: str | torch.device | None = None,
) -> tuple[metrics.Metrics, metrics.Details]:
    """Measure quality with dense weights of the values that are stored.

    Args:
        model: A model, compressed or not, an adapter, or a compressed delta.
        text: What likelihood is measured on. See `measured_texts`.
        reference: A folder of `make_reference`, in place of ``text``, ``split``, ``windows`` and
            ``length``.
        original: What it is compared with; a plain model by default with itself.
        base: Of a delta: the model it is put on.
        tasks: Folders of tasks, or items (None: all) by folder.
        split: The part of a corpus: ``test`` or ``validation``.
        windows: Token windows of each text.
        length: Tokens of a window.
        dtype: Precision of likelihood and divergence.
        task_dtype: Precision of tasks and samples.
        sample_tokens: Tokens of each sample text.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.

    Returns:
        The numbers, and all that a reader may ask about them.

    Raises:
        ArtifactError: A folder that is needed is missing or damaged.
        ConfigError: A delta without its base, what is no plain model without an original, or not
            exactly one of ``text`` and ``reference``.
        SourceError: A text is too short.
        NumericalError: The model computes NaN or Inf.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}
    place = str(pick_device(device))
    precision, task_precision = pick_dtype(dtype), pick_dtype(task_dtype)
    subject = folder_subject(model, original, base)
    made_in = cost(subject.folder)
    size = SIZES[subject.kind](subject.folder, subject.original_folder)
    given = tasks if isinstance(tasks, Mapping) else dict.fromkeys(tasks)
    places = {Path(folder): number for folder, number in given.items()}
    folders = {name_among(place, list(places)): place for place in places}
    items = {name: places[place] for name, place in folders.items()}
    for folder in folders.values():
        read_task(folder)  # what is missing is named before anything is computed
    tokenizer = subject.tokenizer()
    with timed(seconds, "reference"):
        if text is not None and reference is None:
            compared = run_original(
                subject.original_folder,
                text=text,
                split=split,
                windows=windows,
                length=length,
                dtype=dtype,
                device=place,
            )
        elif reference is not None and text is None:
            compared = read_reference(reference, subject.original_folder, dtype=dtype, device=place)
        else:
            raise ConfigError("name either `text` or `reference`: what likelihood is measured on")
    with timed(seconds, "likelihood"):
        if subject.folder == subject.original_folder:
            loaded, likelihoods = compared.model, compared.likelihoods
        else:
            loaded = subject.load_dense(precision, place)
            likelihoods = compared.compare(loaded)
    read, split = next(iter(compared.windows.values())), compared.split
    del compared
    loaded = loaded.to(task_precision)  # type: ignore[arg-type]  # a decorator hides the signature
    with timed(seconds, "tasks"):
        scores = evaluate_tasks(loaded, tokenizer, folders, items)
    with timed(seconds, "samples"):
        samples = sample_texts(loaded, tokenizer, sample_tokens)
    seconds["all"] = round(time.perf_counter() - started, 2)

    numbers = metrics.Metrics(
        quality=_quality(likelihoods, scores),
        size=size,
        cost=made_in,
    )
    evaluation = metrics.EvaluationRecord(
        split=split,
        windows=read.shape[0],
        length=read.shape[1],
        tokens_scored={name: result.num_tokens for name, result in likelihoods.items()},
        dtype=dtype,
        task_dtype=task_dtype,
        task_items={name: score.num_items for name, score in scores.items()},
        task_metrics={name: score.metric for name, score in scores.items()},
        device=place,
        num_threads=torch.get_num_threads(),
    )
    return numbers, _details(subject, evaluation, likelihoods, scores, samples, seconds)


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Note the wall time of a part."""
    started = time.perf_counter()
    yield
    seconds[part] = round(time.perf_counter() - started, 2)


def _quality(
    likelihoods: Mapping[str, Likelihood], scores: Mapping[str, TaskScore]
) -> metrics.Quality:
    means = {name: result.by_window() for name, result in likelihoods.items()}

    def errors(of: str) -> dict[str, float]:
        return {name: standard_error(values[of]) for name, values in means.items()}

    perplexity = {name: result.perplexity for name, result in likelihoods.items()}
    return metrics.Quality(
        perplexity=perplexity,
        kl_divergence_nats={name: r.kl_divergence_nats for name, r in likelihoods.items()},
        top1_agreement={name: result.top1_agreement for name, result in likelihoods.items()},
        perplexity_stderr=_known({n: perplexity[n] * e for n, e in errors("loss_nats").items()}),
        kl_divergence_stderr_nats=_known(errors("kl_divergence_nats")),
        top1_agreement_stderr=_known(errors("top1_agreement")),
        tasks={
            name: metrics.TaskAccuracy(
                accuracy=score.accuracy, stderr=score.stderr, num_items=score.num_items
            )
            for name, score in scores.items()
        },
    )


def _known(errors: Mapping[str, float]) -> dict[str, float | None]:
    return {name: None if math.isnan(error) else error for name, error in errors.items()}


def _layers(folder: Path) -> dict[str, Any] | None:
    """Return what is recorded of the layers, and what each layer says it was given."""
    records = layer_records(folder)
    if records is None:
        return None
    layers = tuple(
        record
        if record.kind == DENSE
        else replace(
            record,
            allocation=KINDS[record.kind].empty(record.shape, **record.settings).allocation(),
        )
        for record in records.layers
    )
    return replace(records, layers=layers).content()


def _details(
    subject: Subject,
    evaluation: metrics.EvaluationRecord,
    likelihoods: Mapping[str, Likelihood],
    scores: Mapping[str, TaskScore],
    samples: list[dict[str, str]],
    seconds: dict[str, float],
) -> metrics.Details:
    folder = subject.folder
    training = folder / TRAINING
    artifact = origin(folder)
    settings = dict(artifact.get("settings", {}))
    is_model = subject.kind == "model"
    return metrics.Details(
        name=subject.name,
        kind=subject.kind,
        method=None if is_model else settings.pop("method", None),
        settings=settings,
        original=subject.original,
        base=subject.base,
        evaluation=evaluation,
        windows={
            name: metrics.WindowMeans(**result.by_window()) for name, result in likelihoods.items()
        },
        answers={name: list(score.answers) for name, score in scores.items()},
        layers=_layers(folder),
        training=read_json(training) if training.is_file() else None,
        provenance=metrics.Provenance(
            artifact=artifact,
            source=None if is_model else origin(subject.original_folder),
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
