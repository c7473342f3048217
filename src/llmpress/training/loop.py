"""The training loop of all that is trained end to end, on accelerate.

The order of the examples, the rates and the random numbers of a step follow from its number and the
seed alone, so that a checkpoint is the trained values, the optimizer's state and the step, and a
rerun after a kill gives the same bytes. A step's batch is the same however many processes share it,
and in however many parts each of them takes its share: only rounding differs.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from llmpress.core.errors import ConfigError, NumericalError
from llmpress.core.resume import BlockStore
from llmpress.numerics.linalg import root_mean_square
from llmpress.training.data import TrainingData
from llmpress.training.examples import Example, collate, num_learnt
from llmpress.training.processes import open_accelerator
from llmpress.training.settings import FinetuningSettings, TrainingSettings
from llmpress.training.trainables import Parameters, holding, rounded, training

logger = logging.getLogger(__name__)

Objective = Callable[[Tensor, Tensor], Tensor]
"""The mean loss in nats of what is learnt, from tokens and labels ``[B, T]``."""


@dataclass
class TrainingRecord:
    """What training did.

    Attributes:
        held_out: Step and held-out loss, in nats, of every look at it; the start is step 0.
        losses: Training loss of each step.
    """

    held_out: list[tuple[int, float]] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def best(self) -> tuple[int, float]:
        """The step with the lowest held-out loss, 0 when none lowered it, and that loss."""
        step, loss = min(self.held_out, key=lambda look: look[1])
        return step, loss


def train(
    model: PreTrainedModel,
    parameters: Parameters,
    objective: Objective,
    data: TrainingData,
    settings: FinetuningSettings | TrainingSettings,
    *,
    seed: int,
    dtypes: Mapping[str, torch.dtype] | None = None,
    relative_rate: bool = False,
    store: BlockStore | None = None,
) -> tuple[dict[str, Tensor], TrainingRecord]:
    """Train parameters in fp32, in place.

    Args:
        model: On its device.
        parameters: What trains, by full name.
        objective: The loss of that model.
        data: Examples to train on and, if any, to judge by.
        settings: Steps, rates, precision.
        seed: Of the random numbers that the model draws.
        dtypes: What each is stored in, fp32 without: it is judged rounded to that.
        relative_rate: Scale each tensor's rate with the size of its entries at the start.
        store: Where checkpoints lie; the newest whole one is continued from.

    Returns:
        The values with the lowest held-out loss as they are stored, the start's when none is lower,
        none when nothing is held out; and a record.

    Raises:
        NumericalError: A loss is NaN or infinite.
        ConfigError: A batch that the processes cannot share evenly.
    """
    with training(model, parameters):
        loop = _Loop(model, parameters, objective, data, settings, seed, dtypes, relative_rate)
        loop.run(store)
    model.eval()
    return loop.best, loop.record


class _Part(nn.Module):
    """The trained parameters as a module of their own, whose output is the whole model's loss.

    So these alone are spread over processes.
    """

    def __init__(
        self, model: PreTrainedModel, parameters: Parameters, objective: Objective, precision: str
    ) -> None:
        super().__init__()
        for name, parameter in parameters.items():
            self.register_parameter(name.replace(".", "/"), parameter)
        self._whole = (model, objective)  # in a tuple, so that the model is no submodule
        # accelerate's own mixed precision is one for all of a process: the settings decide here
        self._autocast = precision == "bfloat16"

    def train(self, mode: bool = True) -> "_Part":
        """Switch the whole model."""
        self._whole[0].train(mode)
        super().train(mode)
        return self

    def forward(self, batch: Sequence[Example]) -> Tensor:
        model, objective = self._whole
        tokens, labels = (part.to(model.device) for part in collate(batch))
        with torch.autocast(model.device.type, torch.bfloat16, enabled=self._autocast):
            return objective(tokens, labels)


class _Loop:
    """One training: what it holds, its steps, its looks at the held-out loss, its checkpoints."""

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Parameters,
        objective: Objective,
        data: TrainingData,
        settings: FinetuningSettings | TrainingSettings,
        seed: int,
        dtypes: Mapping[str, torch.dtype] | None,
        relative_rate: bool,
    ) -> None:
        experts = any(".experts." in name for name in parameters)
        self.accelerator = open_accelerator(model.device, experts=experts)
        self.parameters, self.data, self.settings, self.seed = parameters, data, settings, seed
        self.dtypes = dtypes or dict.fromkeys(parameters, torch.float32)
        self.device = model.device
        self.part = _Part(model, parameters, objective, str(settings.precision))
        self.spread = self.accelerator.prepare_model(self.part, device_placement=False)
        self.optimizer = _optimizer(parameters, settings, relative=relative_rate)
        self.best: dict[str, Tensor] = {}
        self.record = TrainingRecord()

    def run(self, store: BlockStore | None) -> None:
        """Take all steps that are still to take."""
        settings, record = self.settings, self.record
        progress = tqdm(
            total=settings.steps,
            desc="finetune",
            unit="step",
            dynamic_ncols=True,
            mininterval=1.0,
            disable=not self.accelerator.is_main_process,
        )
        with progress:
            if not (store and self._continue(store)) and self.data.held_out:
                self._look()
            self.part.train()
            progress.update(len(record.losses))
            for step in range(len(record.losses), settings.steps):
                self._step(step)
                progress.update()
                done = step + 1
                if done % settings.check_every == 0 or done == settings.steps:
                    said = {"loss": f"{record.losses[-1]:.3f}"}
                    if self.data.held_out:
                        said["held_out"] = f"{self._look():.3f}"
                    progress.set_postfix(said)
                    if store and done < settings.steps and self.accelerator.is_main_process:
                        self._save(store)

    def _step(self, step: int) -> None:
        """Take one step, numbered from zero."""
        settings, accelerator = self.settings, self.accelerator
        size = settings.batch_size
        batch = self.data.train[step * size : (step + 1) * size]
        torch.manual_seed(
            (self.seed << 32) + step * accelerator.num_processes + accelerator.process_index
        )
        learnt = num_learnt(batch)
        total = torch.zeros((), device=self.device)
        for share in _shares(batch, accelerator):
            with accelerator.accumulate(self.spread):
                loss = self.spread(share) * (num_learnt(share) / learnt)
                # what accelerate divides by: it takes means over parts and processes
                divisor = accelerator.num_processes * accelerator.gradient_accumulation_steps
                accelerator.backward(loss * divisor)
                total += loss.detach()
        loss = float(accelerator.reduce(total, "sum"))
        self.record.losses.append(loss)
        if not math.isfinite(loss):
            raise NumericalError(f"the loss is {loss} at step {step + 1}: lower `learning_rate`")
        accelerator.clip_grad_norm_(self.parameters.values(), settings.max_grad_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate_share(step, settings.steps, settings.warmup)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _look(self) -> float:
        """Judge the parameters as they would be stored, and keep them if they are the best."""
        values = rounded(self.parameters, self.dtypes)
        step, loss = len(self.record.losses), self._judge(values)
        if not math.isfinite(loss):
            raise NumericalError(
                f"the held-out loss is {loss} after {step} steps: lower `learning_rate`"
            )
        self.record.held_out.append((step, loss))
        if self.record.best[0] == step:
            self.best = values
        return loss

    @torch.no_grad()
    def _judge(self, values: Mapping[str, Tensor]) -> float:
        """Return the held-out loss of values, in nats."""
        size, examples, accelerator = self.settings.batch_size, self.data.held_out, self.accelerator
        starts = range(0, len(examples), size)[
            accelerator.process_index :: accelerator.num_processes
        ]
        total = torch.zeros((), dtype=torch.float64)
        self.part.eval()
        with holding(self.parameters, values):
            for start in starts:
                batch = examples[start : start + size]
                total += float(self.part(batch)) * num_learnt(batch)
        self.part.train()
        return float(accelerator.reduce(total.to(self.device), "sum")) / num_learnt(examples)

    def _save(self, store: BlockStore) -> None:
        """Keep all that the next step needs; of older checkpoints the newest one stays."""
        for old in _checkpoints(store)[:-1]:
            store.drop(old)
        tensors = {f"best/{name}": tensor for name, tensor in self.best.items()}
        state = self.optimizer.state_dict()["state"]
        for index, (name, parameter) in enumerate(self.parameters.items()):
            tensors[f"value/{name}"] = parameter.detach()
            tensors |= {f"{key}/{name}": value for key, value in state.get(index, {}).items()}
        store.save(f"step-{len(self.record.losses):06d}", tensors, asdict(self.record))

    def _continue(self, store: BlockStore) -> bool:
        """Take up the newest whole checkpoint; whether there is one."""
        for name in reversed(_checkpoints(store)):
            if (found := store.load(name)) is not None:
                break
        else:
            return False
        tensors, record = found
        self.record.held_out = [(step, loss) for step, loss in record["held_out"]]
        self.record.losses += record["losses"]
        states: dict[int, dict[str, Tensor]] = {}
        numbers = {name: number for number, name in enumerate(self.parameters)}
        for full_name, tensor in tensors.items():
            key, _, name = full_name.partition("/")
            if key == "best":
                self.best[name] = tensor
            elif key == "value":
                self.parameters[name].data.copy_(tensor)
            else:
                states.setdefault(numbers[name], {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": states, "param_groups": groups})
        if self.accelerator.is_main_process:
            done = len(self.record.losses)
            logger.warning("continues after step %d, which is read from %s", done, store.folder)
        return True


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step counted from zero."""
    rising = (step + 1) / (warmup + 1)
    falling = (steps - step) / max(1, steps - warmup)
    return min(1.0, rising, falling)


def _optimizer(
    parameters: Parameters, settings: FinetuningSettings | TrainingSettings, *, relative: bool
) -> torch.optim.Optimizer:
    sizes = [root_mean_square(p) if relative else 1.0 for p in parameters.values()]
    groups = [
        {"params": [parameter], "peak": size * settings.learning_rate}
        for parameter, size in zip(parameters.values(), sizes, strict=True)
    ]
    return torch.optim.AdamW(
        groups, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )


def _shares(batch: Sequence[Example], accelerator: Accelerator) -> Iterator[Sequence[Example]]:
    """Yield the parts of a batch that this process takes, one after the other."""
    parts = accelerator.num_processes * accelerator.gradient_accumulation_steps
    if len(batch) % parts:
        raise ConfigError(
            f"batch_size {len(batch)} is no multiple of {parts}, the processes times "
            "gradient_accumulation_steps: change one of them"
        )
    first = accelerator.process_index * accelerator.gradient_accumulation_steps
    for number in range(first, first + accelerator.gradient_accumulation_steps):
        yield batch[number::parts]


def _checkpoints(store: BlockStore) -> list[str]:
    """Return the names of the checkpoints in a store, oldest first."""
    return sorted(path.stem for path in store.folder.glob("step-*.safetensors"))
