"""What params.yaml says of finetuning block by block."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from llmpress.compression.settings import read_run
from llmpress.core.params import build, check_same
from llmpress.core.params import section as lookup
from llmpress.core.settings import Count, Model, NameOf, NotNegative, Positive, Settings


@dataclass(frozen=True)
class TuningSettings(Settings):
    """How each block is finetuned.

    Attributes:
        epochs: Passes over the calibration windows.
        learning_rate: Peak rate of AdamW, relative to each tensor's root mean square, so that one
            value serves every layer; rises over the first steps, then falls linearly to zero.
        batch_size: Windows of a step.
        weight_decay: Decoupled weight decay.
        clip_norm: Gradients of a block are scaled down to this norm.
        patience: Epochs without a lower held-out loss after which a block is left.
        autocast: Compute in bf16 where a matrix product allows it.
    """

    epochs: Count
    learning_rate: Positive
    batch_size: Count = 4
    weight_decay: NotNegative = 0.0
    clip_norm: Positive = 1.0
    patience: Count = 2
    autocast: bool = True


@dataclass(frozen=True)
class Finetune(Settings):
    """One entry of ``finetunes``.

    Attributes:
        run: The run whose compressed model is finetuned.
        model: The model that run compressed: the teacher.
        method: The method of that run; dvc.yaml needs it here, to depend on the method's file.
        settings: Optimiser settings.
    """

    run: Annotated[str, NameOf("runs")]
    model: Model
    method: str
    settings: TuningSettings


def read_finetune(params: Mapping[str, Any], key: str) -> Finetune:
    """Return finetune ``key`` of params.yaml, checked.

    Raises:
        ConfigError: Its model or method is not that of its run.
    """
    finetune = build(Finetune, lookup(params, f"finetunes.{key}"), f"finetunes.{key}")
    run = read_run(params, finetune.run)
    check_same(("model", "method"), f"finetunes.{key}", finetune, f"run {finetune.run!r}", run)
    return finetune
