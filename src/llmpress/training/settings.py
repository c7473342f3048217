"""How models are trained: params.yaml's sections ``finetuned_models`` and ``trainings``."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from llmpress.core.errors import ConfigError
from llmpress.core.params import build, suggestion
from llmpress.core.params import section as lookup
from llmpress.core.settings import (
    Count,
    FolderOf,
    Model,
    NameOf,
    Natural,
    NotNegative,
    Positive,
    Settings,
    Task,
    Tokens,
)

Trains = Literal["compressed", "delta", "lora", "qlora"]
TRAINS: tuple[Trains, ...] = get_args(Trains)
ADAPTERS = ("lora", "qlora")


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """One entry of ``finetuned_models`` in params.yaml.

    Attributes:
        base: Name of the model to start from.
        steps: Optimizer steps.
        task: Name of a task with training items.
        corpus: Name of a corpus whose calibration part is trained on, instead of a task.
        added_tokens: What the vocabulary grows by.
        length: Tokens of a window of the corpus.
        windows: Windows of the corpus to train on.
        batch_size: Items or windows per step.
        learning_rate: Its peak; it rises over ``warmup`` steps and falls linearly to zero.
        warmup: Steps.
        max_grad_norm: Gradients are scaled down to this norm.
        precision: Of the matrix products; weights and optimizer state are fp32.
    """

    base: Model
    steps: Count
    task: Task | None = None
    corpus: Annotated[str, NameOf("corpora")] | None = None
    added_tokens: tuple[str, ...] = ()
    length: Tokens = 256
    windows: Count = 1024
    batch_size: Count = 16
    learning_rate: Positive = 1e-4
    warmup: Natural = 10
    max_grad_norm: Positive = 1.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"

    weight_decay: ClassVar[float] = 0.0
    check_every: ClassVar[int] = 50  # steps between two checkpoints

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.task) == bool(self.corpus):
            raise ValueError("give either `task` or `corpus` to train on")
        if len(set(self.added_tokens)) < len(self.added_tokens) or "" in self.added_tokens:
            raise ValueError(f"added_tokens must be different texts, got {self.added_tokens}")


@dataclass(frozen=True)
class FinetuningSettings(Settings):
    """How it is trained.

    Attributes:
        steps: Optimizer steps.
        learning_rate: Peak rate of AdamW; rises over ``warmup`` steps, then falls linearly to zero.
            Of codebooks, factors, scales and norms: relative to each tensor's root mean square.
        batch_size: Items or windows of a step.
        warmup: Steps until the peak.
        objective: ``next_token``: cross-entropy of the text; ``distillation``: KL divergence from
            the original model's predictions.
        norms: Train the norms' weights too.
        rank: Of LoRA's and QLoRA's adapters.
        alpha: Their product is scaled by ``alpha / rank``.
        length: Tokens of a window of text.
        windows: Windows per text to train on.
        held_out: Items or windows the result is judged by, over all texts; none trains.
        check_every: Steps between two looks at the held-out loss; a killed run continues from one.
        weight_decay: Decoupled weight decay.
        max_grad_norm: Gradients are scaled down to this norm.
        precision: Of the matrix products; trained values and optimizer state are float32. Without
            one float32 for deltas, whose errors bfloat16's own rounding hides, else bfloat16.
    """

    steps: Count
    learning_rate: Positive
    batch_size: Count = 8
    warmup: Natural = 10
    objective: Literal["next_token", "distillation"] = "next_token"
    norms: bool = False
    rank: Count = 16
    alpha: Positive = 32.0
    length: Tokens = 256
    windows: Count = 256
    held_out: Count = 32
    check_every: Count = 20
    weight_decay: NotNegative = 0.0
    max_grad_norm: Positive = 1.0
    precision: Literal["bfloat16", "float32"] | None = None


@dataclass(frozen=True)
class Training(Settings):
    """One entry of ``trainings``.

    Attributes:
        start: What is trained, as its folder below data/: ``compressed/<run>`` or
            ``finetuned/<finetune>``; ``compressed/<delta run>`` for deltas; ``models/<model>`` for
            adapters.
        model: The original model, the one that ``start`` was made from or is; the fine-tuned one
            for deltas.
        trains: ``compressed``: codebooks or factors of the compressed layers; ``delta``: scales or
            factors of a compressed delta on its base; ``lora``: adapters beside the model's
            linears; ``qlora``: the same, and the linears in 4-bit NF4.
        settings: How.
        task: A task with training items.
        corpora: Corpora whose calibration part is trained on, instead of a task.
    """

    start: Annotated[str, FolderOf("models", "compressed", "finetuned")]
    model: Model
    trains: Trains
    settings: FinetuningSettings
    task: Task | None = None
    corpora: tuple[Annotated[str, NameOf("corpora")], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.task) == bool(self.corpora):
            raise ValueError("give either `task` or `corpora` to train on")
        check_settings(self.trains, self.settings)


def check_settings(trains: Trains, settings: FinetuningSettings) -> None:
    """Refuse to train norms beside adapters and deltas, or a delta on anything but its model."""
    if settings.norms and trains in ADAPTERS:
        raise ValueError(f"norms: {trains} trains adapters only; leave it out")
    if settings.norms and trains == "delta":
        raise ValueError("norms: a delta holds those of the fine-tuned model; leave it out")
    if settings.objective != "distillation" and trains == "delta":
        raise ValueError(
            f"objective: a delta follows its fine-tuned model: give distillation, not "
            f"{settings.objective}"
        )


def with_precision(trains: Trains, settings: FinetuningSettings) -> FinetuningSettings:
    """Return settings that say their precision."""
    chosen = settings.precision or ("float32" if trains == "delta" else "bfloat16")
    return replace(settings, precision=chosen)


def read_training(params: Mapping[str, Any], key: str) -> Training:
    """Return training ``key`` of params.yaml, checked.

    Raises:
        ConfigError: A start that does not exist, does not fit what trains, or has another model.
    """
    where = f"trainings.{key}"
    training = build(Training, lookup(params, where), where)
    kind, _, name = training.start.partition("/")
    wanted = {"compressed": ("compressed", "finetuned"), "delta": ("compressed",)}.get(
        training.trains, ("models",)
    )
    if kind not in wanted or not name:
        forms = " or ".join(f"{known}/NAME" for known in wanted)
        raise ConfigError(f"{where}.start: {training.trains} needs {forms}, got {training.start!r}")
    compressed = "delta_runs" if training.trains == "delta" else "runs"
    section = {"compressed": compressed, "finetuned": "finetunes"}.get(kind)
    if section is None:
        model = name
    else:
        known = params.get(section) or {}
        if name not in known:
            raise ConfigError(f"{where}.start: {section} has no {name!r}{suggestion(name, known)}")
        key = "finetuned" if training.trains == "delta" else "model"
        model = lookup(params, f"{section}.{name}.{key}")
    if model != training.model:
        raise ConfigError(
            f"{where}.model is {training.model!r}, but {training.start} has {model!r}"
        )
    return training


def start_folder(training: Training) -> Path:
    """Return where the start of a training lies."""
    return Path("data") / training.start


def base_folder(params: Mapping[str, Any], training: Training) -> Path | None:
    """Return where the base lies that a delta is trained on; None for what is no delta."""
    if training.trains != "delta":
        return None
    run = training.start.removeprefix("compressed/")
    return Path("data") / str(lookup(params, f"delta_runs.{run}.base"))
