"""Finetune a compressed model block by block, with two chains of hidden states.

Block ``i`` of the original gets the original's hidden states, block ``i`` of the compressed model
gets the compressed model's, so that errors of earlier blocks are seen and can be made good. Peak
memory is two blocks and two buffers of hidden states, a third one for each term that compares on
other hidden states, whatever the depth. Gradients never cross a
block boundary: both chains are stored as plain tensors between blocks.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from llmpress.core.errors import NumericalError
from llmpress.core.progress import progress
from llmpress.core.records import BlockRecord
from llmpress.core.resume import BlockStore
from llmpress.methods.base import Chain, Tunable
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import CompressedLinear
from llmpress.nn.layers.base import rounded_to
from llmpress.numerics.linalg import root_mean_square
from llmpress.tuning.settings import TuningSettings


def tune_blocks(
    teacher: BlockWalk,
    student: BlockWalk,
    method: Tunable,
    windows: Tensor,
    validation: Tensor,
    settings: TuningSettings,
    *,
    seed: int,
    store: BlockStore,
) -> Iterator[tuple[dict[str, Tensor], BlockRecord]]:
    """Finetune block after block; finished blocks are taken from the store.

    The best state by held-out loss is kept, rounded to the dtype it is stored in; a block that
    finetuning does not improve keeps its start. Blocks above the last one with something to train
    are neither loaded nor run.

    Args:
        teacher: The original model.
        student: The compressed model.
        method: Says which block outputs are compared, and how.
        windows: Token ids to train on, ``[windows, tokens]``.
        validation: Held-out token ids, ``[windows, tokens]``.
        settings: Optimiser settings.
        seed: Same seed, same bytes.
        store: Keeps finished blocks for a rerun.

    Yields:
        The block's trained tensors by full name in their stored dtype, and its record.

    Raises:
        NumericalError: A loss or a hidden state is NaN or Inf.
    """
    tokens = torch.cat([windows, validation])
    chains: dict[Chain, Tensor] = {
        "teacher": teacher.embed(tokens),
        "student": student.embed(tokens),
    }
    count = len(windows)
    fed = {term.student_input for term in method.loss_terms()}  # to the block that is finetuned
    trained_blocks = [i for i, block in enumerate(student.blocks) if _trainable(block)]
    for index in progress(range(max(trained_blocks, default=-1) + 1), "finetune blocks"):
        started = time.perf_counter()
        original, block = teacher.load(index), student.load(index)
        targets: dict[Chain, Tensor] = {
            chain: teacher.propagate(original, index, chains[chain], in_place=chain not in fed)
            for chain in _needed_targets(method)
        }
        del original
        finished = store.load(index)
        if finished is None:
            problem = _BlockProblem(student, block, index, method, chains, targets)
            record = _tune_block(problem, count, settings, seed + index)
            record.seconds = round(time.perf_counter() - started, 3)
            trained = {
                f"{student.prefix}.{index}.{name}": parameter.detach().cpu()
                for name, parameter in _trainable(block).items()
            }
            store.save(index, trained, asdict(record))
        else:
            trained, record = finished[0], BlockRecord(**finished[1])
            for name, parameter in _trainable(block).items():
                parameter.data = trained[f"{student.prefix}.{index}.{name}"].to(parameter.device)
        chains = {
            "teacher": targets["teacher"],
            "student": student.propagate(block, index, chains["student"], in_place=True),
        }
        yield trained, record


@dataclass
class _BlockProblem:
    """One block to finetune: where its inputs come from and what its outputs should be."""

    walk: BlockWalk
    block: nn.Module
    index: int
    method: Tunable
    chains: Mapping[Chain, Tensor]
    targets: Mapping[Chain, Tensor]

    def loss(self, rows: Tensor) -> Tensor:
        """Sum of the method's loss terms over some windows."""
        outputs = {
            chain: self.walk.forward(self.block, self.index, self.chains[chain][rows])
            for chain in {term.student_input for term in self.method.loss_terms()}
        }
        terms = [
            self.method.block_loss(
                outputs[term.student_input],
                self.targets[term.teacher_input][rows].to(self.walk.device),
            )
            for term in self.method.loss_terms()
        ]
        return torch.stack(terms).sum()

    @torch.no_grad()
    def mean_loss(self, rows: Tensor, batch_size: int) -> float:
        """Mean loss over all of ``rows``."""
        losses = [float(self.loss(batch)) * len(batch) for batch in rows.split(batch_size)]
        return sum(losses) / len(rows)


def _tune_block(
    problem: _BlockProblem, count: int, settings: TuningSettings, seed: int
) -> BlockRecord:
    """Train one block in place; the first ``count`` windows train, the rest are held out."""
    total = len(problem.chains["teacher"])
    train_rows, held_out = torch.arange(count), torch.arange(count, total)
    parameters = _trainable(problem.block)
    stored = {name: p.detach().clone() for name, p in parameters.items()}
    record = BlockRecord(problem.index, problem.mean_loss(held_out, settings.batch_size))
    record.loss_after = record.loss_before
    best = stored
    if parameters:
        _prepare(problem.block, training=True)
        for epoch_loss in _epochs(problem, train_rows, list(parameters.values()), settings, seed):
            state = {
                name: rounded_to(p.detach(), stored[name].dtype) for name, p in parameters.items()
            }
            masters = {name: p.detach().clone() for name, p in parameters.items()}
            _assign(
                parameters, {n: t.float() for n, t in state.items()}
            )  # judged as it will be stored
            held_out_loss = problem.mean_loss(held_out, settings.batch_size)
            _assign(parameters, masters)
            record.train_loss.append(epoch_loss)
            record.validation_loss.append(held_out_loss)
            if held_out_loss < record.loss_after:
                best, record.loss_after, record.kept = state, held_out_loss, True
            if _fruitless_epochs(record) >= settings.patience:
                break
        _prepare(problem.block, training=False)
    _assign(parameters, best)
    return record


def _epochs(
    problem: _BlockProblem,
    rows: Tensor,
    parameters: list[nn.Parameter],
    settings: TuningSettings,
    seed: int,
) -> Iterator[float]:
    """Run AdamW and yield the mean training loss after each epoch."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(
        [{"params": [p], "lr": settings.learning_rate * root_mean_square(p)} for p in parameters],
        betas=(0.9, 0.95),
        weight_decay=settings.weight_decay,
    )
    steps = settings.epochs * -(-len(rows) // settings.batch_size)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))
    )
    for _ in range(settings.epochs):
        losses = []
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(
            settings.batch_size
        ):
            loss = problem.loss(batch)
            if not bool(torch.isfinite(loss)):
                raise NumericalError(
                    f"{problem.walk.prefix}.{problem.index}: the loss is {float(loss.detach())}; "
                    "lower learning_rate"
                )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(float(loss.detach()) * len(batch))
        yield sum(losses) / len(rows)


def _fruitless_epochs(record: BlockRecord) -> int:
    """Return the number of epochs since the held-out loss was lowest."""
    losses = [record.loss_before, *record.validation_loss]
    return len(losses) - 1 - losses.index(min(losses))


def _needed_targets(method: Tunable) -> set[Chain]:
    """Return the chains whose original-block outputs are needed; the teacher's always is."""
    always: set[Chain] = {"teacher"}
    return always | {term.teacher_input for term in method.loss_terms()}


def _trainable(block: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of a block that its layers allow to train."""
    return {
        f"{name}.{key}": getattr(layer, key)
        for name, layer in block.named_modules()
        if isinstance(layer, CompressedLinear)
        for key in layer.trainable
    }


def _prepare(block: nn.Module, *, training: bool) -> None:
    """Switch a block's trainable tensors to fp32 with gradients, or gradients off again."""
    for layer in block.modules():
        if isinstance(layer, CompressedLinear):
            layer.keep_unpacked(training)
    for parameter in _trainable(block).values():
        if training:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(training)


def _assign(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    for name, parameter in parameters.items():
        parameter.data = values[name].clone()
