"""Train some parameters of a model with transformers' Trainer, judged by held-out examples.

Trainer's checkpoints hold the trained parameters, the optimizer and the random state; each is
sealed with a checksum of all its files, so that a rerun after a kill continues from the newest
whole one and gives the same bytes. Weights are read as safetensors and the rest through torch's
loader of plain tensors; no code in a checkpoint is run.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from tqdm.auto import tqdm
from transformers import (
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from llmpress.core.artifacts import read_json, save_tensors, sha256, write_json
from llmpress.core.errors import ArtifactError, ConfigError, NumericalError
from llmpress.numerics.linalg import root_mean_square
from llmpress.training.data import TrainingData
from llmpress.training.examples import Example, collate
from llmpress.training.full import learning_rate_share
from llmpress.training.objectives import model_loss
from llmpress.training.settings import FinetuningSettings
from llmpress.training.trainables import Parameters, holding, rounded

logger = logging.getLogger(__name__)

SEAL = "seal.json"
BEST = "best.safetensors"
SHORT = 128
"""Tokens; up to here plain matrix products beat the fused attention's backward pass on a CPU."""


@dataclass
class TrainingRecord:
    """What training did.

    Attributes:
        loss_before: Held-out loss of the start, in nats.
        loss_after: The same of what is stored.
        best_step: The step that is stored; 0 when no step lowered the held-out loss.
        held_out: Step and held-out loss of every look at it.
        losses: Training loss of each step.
    """

    loss_before: float
    loss_after: float
    best_step: int = 0
    held_out: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)


def train(
    model: PreTrainedModel,
    parameters: Parameters,
    dtypes: Mapping[str, torch.dtype],
    data: TrainingData,
    settings: FinetuningSettings,
    *,
    seed: int,
    folder: Path,
    teacher: PreTrainedModel | None = None,
    relative_rate: bool = False,
) -> tuple[dict[str, Tensor], TrainingRecord]:
    """Train parameters in fp32 and return their best values as they are stored.

    Args:
        model: On its device.
        parameters: What trains, fp32, by full name.
        dtypes: What each is stored in; it is judged rounded to that.
        data: Examples to train on and to judge by.
        settings: Steps, rates, objective.
        seed: Same seed, same bytes.
        folder: Where checkpoints lie; those that are there are continued from.
        teacher: The original model, for distillation.
        relative_rate: Scale each tensor's rate with the size of its entries at the start.

    Returns:
        The values with the lowest held-out loss, the start's when none is lower, and a record.

    Raises:
        NumericalError: A loss is NaN or infinite.
        ConfigError: A GPU that Trainer would not use.
    """
    device = model.device
    if max(len(example.tokens) for example in (*data.train, *data.held_out)) <= SHORT:
        model.set_attn_implementation("eager")
    if device.type == "cuda" and device.index not in (None, 0):
        raise ConfigError(f"device {device}: finetuning takes cuda:0; set CUDA_VISIBLE_DEVICES")
    part = _TrainedPart(model, parameters, settings, teacher)
    watch = _HeldOut(part, parameters, dtypes, data.held_out, settings)
    checkpoint = _last_checkpoint(folder)
    trainer = _Trainer(
        model=part,
        args=_arguments(settings, seed, folder, device),
        train_dataset=data.train,
        data_collator=_collate,
        optimizers=_optimizer(parameters, settings, relative=relative_rate),
        callbacks=[watch],
    )
    trainer.args._n_gpu = min(1, trainer.args.n_gpu)  # one process, one device
    trainer.watch = watch
    for talkative in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(talkative)
    watch.begin(checkpoint)
    with watch.progress:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    model.eval()
    return watch.best, watch.record


class _TrainedPart(nn.Module):
    """The trained parameters as a module of their own, whose output is the whole model's loss.

    So Trainer's checkpoints hold these parameters alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Parameters,
        settings: FinetuningSettings,
        teacher: PreTrainedModel | None,
    ) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)
        self._whole = (model, teacher)  # in a tuple, so that they are no submodules
        self._autocast = settings.precision == "bfloat16"

    def train(self, mode: bool = True) -> "_TrainedPart":
        """Switch the whole model."""
        self._whole[0].train(mode)
        super().train(mode)
        return self

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        model, teacher = self._whole
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._autocast):
            loss = model_loss(model, tokens.to(model.device), labels.to(model.device), teacher)
        return {"loss": loss}


class _Trainer(Trainer):
    """Goes through the examples in their order, and stops at a loss that is not finite."""

    watch: "_HeldOut"

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        examples: Any = train_dataset or self.train_dataset
        return SequentialSampler(examples)

    def compute_loss(  # type: ignore[override]  # of what Trainer passes, the inputs are needed
        self, model: nn.Module, inputs: Mapping[str, Tensor], **_: Any
    ) -> Tensor:
        loss: Tensor = model(**inputs)["loss"]
        self.watch.note(float(loss.detach()))
        return loss


class _HeldOut(TrainerCallback):
    """Looks at the held-out loss, keeps the best state, and seals checkpoints."""

    def __init__(
        self,
        part: _TrainedPart,
        parameters: Parameters,
        dtypes: Mapping[str, torch.dtype],
        examples: Sequence[Example],
        settings: FinetuningSettings,
    ) -> None:
        self.part, self.parameters, self.dtypes = part, parameters, dtypes
        self.examples, self.settings = examples, settings
        self.best: dict[str, Tensor] = {}
        self.record = TrainingRecord(math.nan, math.nan)
        self.progress = tqdm(
            total=settings.steps, desc="finetune", unit="step", dynamic_ncols=True, mininterval=1.0
        )

    def begin(self, checkpoint: Path | None) -> None:
        """Judge the start, or take up what a checkpoint says."""
        if checkpoint is None:
            self.best = rounded(self.parameters, self.dtypes)
            loss = self._judge(self.best, 0)
            self.record = TrainingRecord(loss, loss, held_out=[(0, loss)])
        else:
            self.best = load_file(checkpoint / BEST)
            self.record = TrainingRecord(**read_json(checkpoint / SEAL)["record"])
            done = len(self.record.losses)
            logger.warning("continues after step %d, which is read from %s", done, checkpoint)
            self.progress.update(done)

    def note(self, loss: float) -> None:
        """Keep the training loss of a step."""
        self.record.losses.append(loss)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the loss is {loss} at step {len(self.record.losses)}: lower `learning_rate`"
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Look at the held-out loss now and then, and after the last step."""
        del args
        step = state.global_step
        self.progress.update()
        if step % self.settings.check_every == 0 or step == self.settings.steps:
            values = rounded(self.parameters, self.dtypes)
            loss = self._judge(values, step)
            self.record.held_out.append((step, loss))
            if loss < self.record.loss_after:
                self.best, self.record.best_step, self.record.loss_after = values, step, loss
            self.progress.set_postfix(loss=f"{self.record.losses[-1]:.3f}", held_out=f"{loss:.3f}")
            control.should_save = step < self.settings.steps

    def on_save(self, args: TrainingArguments, state: TrainerState, *_: Any, **__: Any) -> None:
        """Add the best state to a checkpoint, and seal it: what has no seal is not used."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        save_tensors({name: t.contiguous() for name, t in self.best.items()}, folder / BEST)
        digests = {p.name: sha256(p) for p in sorted(folder.iterdir()) if p.name != SEAL}
        temporary = folder / f"{SEAL}.tmp"
        write_json(temporary, {"record": asdict(self.record), "files": digests})
        temporary.rename(folder / SEAL)

    @torch.no_grad()
    def _judge(self, values: Mapping[str, Tensor], step: int) -> float:
        """Return the held-out loss of the parameters as they would be stored."""
        size = self.settings.batch_size
        total = count = 0.0
        was_training = self.part.training
        self.part.eval()
        with holding(self.parameters, values):
            for start in range(0, len(self.examples), size):
                batch = _collate(self.examples[start : start + size])
                predicted = int((batch["labels"][:, 1:] != -100).sum())
                total += float(self.part(**batch)["loss"]) * predicted
                count += predicted
        self.part.train(was_training)
        loss = total / count
        if not math.isfinite(loss):
            raise NumericalError(
                f"the held-out loss is {loss} after {step} steps: lower `learning_rate`"
            )
        return loss


def _collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    tokens, labels = collate(examples)
    return {"tokens": tokens, "labels": labels}


def _optimizer(
    parameters: Parameters, settings: FinetuningSettings, *, relative: bool
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    sizes = [root_mean_square(p) if relative else 1.0 for p in parameters.values()]
    optimizer = torch.optim.AdamW(
        [
            {"params": [parameter], "lr": size * settings.learning_rate}
            for parameter, size in zip(parameters.values(), sizes, strict=True)
        ],
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
        fused=True,
    )
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, settings.steps, settings.warmup)
    )


def _arguments(
    settings: FinetuningSettings, seed: int, folder: Path, device: torch.device
) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=settings.steps,
        per_device_train_batch_size=settings.batch_size,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        use_cpu=device.type == "cpu",
        save_strategy="no",  # when the held-out loss was looked at, see on_step_end
        save_total_limit=2,  # the older one is removed before the newer one is sealed
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def _last_checkpoint(folder: Path) -> Path | None:
    """Return the newest whole checkpoint of a folder."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda p: int(p.name.partition("-")[2]))
    for checkpoint in reversed(found):
        try:
            digests = read_json(checkpoint / SEAL)["files"]
            if all(sha256(checkpoint / name) == digest for name, digest in digests.items()):
                return checkpoint
        except (ArtifactError, OSError, KeyError, TypeError, AttributeError):
            pass
        logger.warning("%s: incomplete, an older one is continued from", checkpoint)
    return None
