"""What results/metrics/<name>.json and results/details/<name>.json hold: typed, and a word on each.

``python -m llmpress.evaluation.metrics`` writes docs/metrics.md from these descriptions.
"""

import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, NonNegativeInt, PositiveFloat

from llmpress.core.kinds import KindName

DOCUMENT = Path("docs/metrics.md")


class Record(BaseModel):
    """Unknown keys, wrong types, NaN and Inf are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class TaskAccuracy(Record):
    """Result on one task."""

    accuracy: float = Field(
        ge=0,
        le=1,
        description="Share of items answered correctly: the first metric of task.yaml.",
    )
    stderr: NonNegativeFloat = Field(
        description="Standard error of the accuracy from the choice of items. Two runs answer the "
        "same items, so their difference is known better than this."
    )
    num_items: NonNegativeInt = Field(
        description="Items asked; the same random ones for every run."
    )


class Quality(Record):
    """How good the predictions are, and how close to the original's."""

    perplexity: dict[str, PositiveFloat] = Field(
        description="By corpus: exp of the mean negative log-likelihood per token of the windows. "
        "It depends on the window's length (see details): never compare across lengths."
    )
    kl_divergence_nats: dict[str, float] = Field(
        description="By corpus: mean over tokens of KL(original ‖ this) of the next-token "
        "distribution, in nats. Deltas: the original is the fine-tuned model. A model itself: 0 by "
        "definition."
    )
    top1_agreement: dict[str, float] = Field(
        description="By corpus: share of tokens for which the most probable next token is the "
        "original's. A model itself: 1 by definition."
    )
    perplexity_stderr: dict[str, NonNegativeFloat | None] = Field(
        description="By corpus: its standard error over windows; null for a single window. Two "
        "runs read the same windows, so their difference is known better: compare the losses of "
        "each window (see details)."
    )
    kl_divergence_stderr_nats: dict[str, NonNegativeFloat | None] = Field(
        description="The same of the divergence."
    )
    top1_agreement_stderr: dict[str, NonNegativeFloat | None] = Field(
        description="The same of the agreement."
    )
    tasks: dict[str, TaskAccuracy] = Field(description="By task, through lm-eval.")


class Size(Record):
    """True size: everything that is stored."""

    bits_per_weight: NonNegativeFloat = Field(
        description="stored_bits / compressed_weights: codes, codebooks, scales, zero points, "
        "indices and padding included. A model: bits of the dtype it is stored in."
    )
    compressed_weights: NonNegativeInt = Field(
        description="Weights of the linear layers that the method was given; those that it left "
        "dense count, with 16 bits each. A model, and one with adapters: weights of the linear "
        "layers of its decoder blocks."
    )
    stored_bits: NonNegativeInt = Field(description="Bits stored for those layers.")
    model_weights: NonNegativeInt = Field(
        description="Weights of the whole original model, embeddings included, tied ones once."
    )
    model_bytes: NonNegativeInt = Field(
        description="Bytes of all weight files on disk. Deltas: of the delta alone; the base is "
        "stored once for all fine-tuned models. Adapters: of the adapter and the model it needs."
    )
    ratio: NonNegativeFloat = Field(
        description="Bytes of the whole model in bf16 / model_bytes. Deltas: bytes of the whole "
        "delta (changed linear layers and exactly kept tensors) in bf16 / model_bytes."
    )


class Cost(Record):
    """What making the artifact took; 0 where the step does not apply."""

    compress_seconds: NonNegativeFloat = Field(
        description="Wall time of the compress stage. Finetuned runs: the method's time, summed "
        "over the layers of the run that was finetuned."
    )
    compress_peak_memory_bytes: NonNegativeInt = Field(
        description="Largest resident memory plus largest GPU allocation while compressing. "
        "Finetuned runs: 0, see the run that was finetuned."
    )
    finetune_seconds: NonNegativeFloat = Field(
        description="Wall time of the finetune or the train stage."
    )
    finetune_peak_memory_bytes: NonNegativeInt = Field(
        description="Largest resident memory plus largest GPU allocation while finetuning."
    )


class Metrics(Record):
    """Numbers only, for ``dvc metrics show`` and ``dvc metrics diff``."""

    quality: Quality = Field(description="Quality of the predictions.")
    size: Size = Field(description="Size on disk.")
    cost: Cost = Field(description="Cost of making it.")


class Sample(Record):
    """A fixed prompt and what the model writes after it."""

    prompt: str = Field(description="The prompt.")
    text: str = Field(description="Its most probable continuation, token by token.")


class EvaluationRecord(Record):
    """How the numbers were measured; the same for all results that are compared."""

    split: str = Field(description="The part of each corpus that was read: test or validation.")
    windows: int = Field(description="Token windows per corpus, from the start of that part.")
    length: int = Field(description="Tokens per window; the first of them is not predicted.")
    tokens_scored: dict[str, int] = Field(description="By corpus: tokens predicted.")
    dtype: str = Field(description="Precision of perplexity, divergence and agreement.")
    task_dtype: str = Field(description="Precision of tasks and samples.")
    task_items: dict[str, int] = Field(description="By task: items asked.")
    task_metrics: dict[str, str] = Field(description="By task: lm-eval's name of the accuracy.")
    device: str = Field(description="Where the model ran.")
    num_threads: int = Field(description="Threads of the processor that were used.")


class WindowMeans(Record):
    """Means over the tokens of each window, in the order of the text."""

    loss_nats: list[float] = Field(
        description="Negative log-likelihood; exp of its mean is the perplexity."
    )
    kl_divergence_nats: list[float] = Field(description="KL(original ‖ this).")
    top1_agreement: list[float] = Field(description="Share of tokens that agree.")


class Provenance(Record):
    """Where the result comes from."""

    artifact: dict[str, Any] = Field(description="provenance.json of what was evaluated.")
    source: dict[str, Any] | None = Field(
        description="provenance.json of the original it is compared with; null for a model itself."
    )
    evaluation: dict[str, Any] = Field(
        description="When, on which hardware and with which packages; seconds of each part."
    )


class Details(Record):
    """Everything a reader of the report may ask about a result."""

    name: str = Field(description="Name in params.yaml.")
    kind: KindName = Field(description="What it is.")
    method: str | None = Field(description="Name of the compression method; null for a model.")
    settings: dict[str, Any] = Field(description="Settings it was made with.")
    original: str = Field(description="Model it is compared with; a model's own name.")
    base: str | None = Field(description="Deltas: the model the delta is put on; null otherwise.")
    evaluation: EvaluationRecord = Field(description="How it was measured.")
    windows: dict[str, WindowMeans] = Field(
        description="By corpus; the same windows for all results that are compared."
    )
    answers: dict[str, list[float]] = Field(
        description="By task: 1 for each item answered correctly, else 0; the same items for all "
        "results that are compared."
    )
    layers: dict[str, Any] | None = Field(
        description="Records of the artifact: size and errors of every layer, losses of every "
        "finetuned block; null for a model and for adapters."
    )
    training: dict[str, Any] | None = Field(
        description="training.json of the artifact: what was finetuned end to end, on what, with "
        "which losses; null where nothing was."
    )
    provenance: Provenance = Field(description="Origin of artifact, original and numbers.")
    samples: list[Sample] = Field(description="Texts written for a few fixed prompts.")


class SpeedOfRun(Record):
    """Of one run as it is stored, compressed layers packed; batch size 1."""

    original: str = Field(description="Model in turns with which it was timed.")
    prefill_tokens_per_second: PositiveFloat = Field(
        description="Tokens of the prompt over the median time until the first new token."
    )
    decode_tokens_per_second: PositiveFloat = Field(
        description="One over the median time of generating one more token."
    )
    prefill_ratios: list[float] = Field(
        description="By round: the original's time until the first new token over this run's; "
        "above 1 it is faster."
    )
    decode_ratios: list[float] = Field(description="The same of one more token.")


class Speed(Record):
    """Measured by a stage of its own that nothing else runs beside."""

    runs: dict[str, SpeedOfRun] = Field(description="By name of the run.")
    prefill_tokens: int = Field(description="Tokens of the prompt.")
    decode_tokens: int = Field(
        description="Tokens generated after the first one; 2 where they are slow."
    )
    dtype: str = Field(description="Precision of all that is not packed.")
    device: str = Field(description="Where the models ran.")
    num_threads: int = Field(description="Threads of the processor that were used.")
    hardware: dict[str, Any] = Field(description="The machine.")


def document() -> str:
    """Return docs/metrics.md."""
    parts = [
        "# Metrics and details\n",
        "Written by `python -m llmpress.evaluation.metrics`; `<name>`: a corpus or a task.\n",
    ]
    for title, record in (
        ("results/metrics/KEY.json", Metrics),
        ("results/details/KEY.json", Details),
        ("results/speed.json", Speed),
    ):
        parts += [
            f"## {title}\n",
            f"{record.__doc__}\n".replace("``", "`"),
            "| key | type | meaning |\n| --- | --- | --- |",
        ]
        parts += [f"| `{key}` | {kind} | {text} |" for key, kind, text in _rows(record)]
        parts.append("")
    return "\n".join(parts)


def _rows(record: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """Return dotted key, type and description of every field, records in it taken apart."""
    rows = []
    for name, field in record.model_fields.items():
        key, kind = f"{prefix}{name}", field.annotation
        nested, inner = nested_record(kind)
        if nested is None:
            rows.append((key + inner, _type_name(kind), field.description or ""))
        else:
            rows += _rows(nested, f"{key}{inner}.")
    return rows


def nested_record(kind: Any) -> tuple[type[BaseModel] | None, str]:
    """Return the record inside an annotation, and what stands between the key and its fields."""
    origin, arguments = get_origin(kind), get_args(kind)
    inner = ""
    if origin is dict and arguments[1] is not Any:
        kind, inner = arguments[1], ".<name>"
    elif origin is list:
        kind, inner = arguments[0], "[]"
    return (kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None), inner


def _type_name(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is dict:
        return "object" if arguments[1] is Any else _type_name(arguments[1])
    if origin is list:
        return f"list of {_type_name(arguments[0])}s"
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (types.UnionType, Union):
        return " or ".join(_type_name(argument) for argument in arguments)
    if hasattr(kind, "__metadata__"):  # such as NonNegativeFloat
        return _type_name(arguments[0])
    names = {str: "text", float: "number", int: "whole number", types.NoneType: "null"}
    return names[kind]


if __name__ == "__main__":
    DOCUMENT.write_text(document(), encoding="utf-8")
