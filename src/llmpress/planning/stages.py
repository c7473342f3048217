"""What one stage needs, as functions of a model's shapes and the stage's settings.

Memory is what has to be there at the peak: the imported packages, and the tensors that the stage's
code holds. Files of weights are mapped, read or written: their pages show in the process's resident
size and are dropped by the system when memory runs short, so they do not count.

Work is one number that a stage's seconds grow with: operations of matrix products, or what takes as
long. A budget that the model or a layer cannot meet is a ValueError of every stage with a method.

Everywhere ``model`` is the original (of deltas the fine-tuned one), ``method`` that of compressed
layers, None without any, and ``text`` that of a training item, None for windows of a corpus.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.core.kinds import KindName
from llmpress.evaluation import likelihood, tasks
from llmpress.evaluation.settings import DType, EvaluationSettings, SpeedSettings
from llmpress.methods.base import Method, Tunable
from llmpress.models.walk import PROPAGATE_TOKENS, PROPAGATE_WINDOWS
from llmpress.planning import shapes
from llmpress.planning.shapes import ModelShapes, empty, planned_layers
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import FinetuningSettings, TrainingSettings
from llmpress.tuning.settings import TuningSettings

PACKAGES_BYTES = 440_000_000
"""Resident after importing Python, torch, transformers and llmpress and opening a tokenizer:
437 MB measured (torch 2.13 CPU build, transformers 5.23); a CUDA build takes more."""
EVALUATION_PACKAGES_BYTES = 640_000_000
"""The same with lm-eval and datasets (100 MB measured), and what the allocator keeps (100 MB)."""
ACTIVATION_BYTES, FORWARD_BYTES = 9, 4
"""Per token, and per input and output of a block's linears: kept for the backward pass (two fp32
and some bf16 copies; a block of 10,176 of them keeps 95 kB a token), and without gradients."""
LOSS_BYTES = 20
"""Per prediction and word while its loss has a gradient: five fp32 copies, measured."""
STEP_TOKENS = 10
"""Tokens at once that take as long as a single one, which reads all weights too."""


class TaskText(NamedTuple):
    """What the items of a task make a model read and write; by default a guess."""

    tokens: float = 240.0  # of an item: of all its requests, one for each answer
    longest: float = 150.0  # of the longest request
    generated: int = 0  # tokens per item; 0 where answers are scored
    items: int = 1000


@dataclass(frozen=True)
class Need:
    """What one stage needs."""

    work: float  # what its time is proportional to
    artifact_bytes: int  # of the weights that stay
    device_bytes: int  # memory of the device that computes
    host_bytes: int = PACKAGES_BYTES  # memory of the computer on top, also when a GPU computes
    scratch_bytes: int = 0  # disk used on top until the stage is done


class _Layers(NamedTuple):
    """What the compressed layers of each block add up to."""

    stored: list[int]  # bytes
    held: list[int]  # bytes beside them while they train
    trainable: list[int]  # numbers
    unpacked: list[int]  # bytes of dense weights while they train: indices, fp32, bf16


def calibrate(model: ModelShapes, settings: CalibrationSettings) -> Need:
    """One block, its moments, the hidden states of all windows; the gradient of one's loss."""
    length, texts = settings.length, settings.num_texts
    windows, felt = texts * settings.windows, texts * settings.sensitivity_windows
    counts = {"calibration": windows, "validation": texts * settings.validation_windows}
    files = [{n: empty(count, length, dtype=torch.int64) for n, count in counts.items()}]
    for index, block in enumerate(model.inputs):
        files.append({n.partition(f".{index}.")[2]: empty(w, w) for n, w in block.items()})
    if felt:
        files.append({n: empty(shape.out_features) for n, shape in model.linears.items()})
    squares = [sum(width**2 for width in block.values()) for block in model.inputs]
    rest = model.num_weights - model.linear_weights
    loss = 4 * rest + LOSS_BYTES * length * model.vocabulary if felt else 0
    passes = windows + 4 * felt  # twice forward, and back
    return Need(
        work=2.0 * length * (passes * model.linear_weights + windows * sum(squares)),
        artifact_bytes=shapes.files_bytes(files, metadata=False),
        device_bytes=max(_walked_bytes(model, windows, length) + 4 * max(squares), loss),
        host_bytes=PACKAGES_BYTES + 4 * max(squares) + 3 * _states_bytes(model, windows, length),
    )


def compress(model: ModelShapes, method: Method, made: int | None = None) -> Need:
    """One layer's work space, the compressed layers of one block, one tensor that is written.

    ``made`` are the bytes of the artifact, by default those of a compressed model.
    """
    works = [(own, model.linears[n]) for n, (own, _) in planned_layers(model, method).items()]
    amounts = {(own, shape): own.work(shape).operations for own, shape in set(works)}
    # recording a layer compares three fp32 matrices in fp64 and two products with the moment
    record = max(32 * s.num_weights + 4 * s.in_features**2 for s in model.linears.values())
    stored = _layers(model, method).stored
    return Need(
        work=sum(amounts[key] for key in works),
        artifact_bytes=shapes.model_bytes(model, method) if made is None else made,
        device_bytes=max([record, *(own.workspace_bytes(shape) for own, shape in amounts)]),
        host_bytes=PACKAGES_BYTES + max(stored) + 2 * model.largest,
        scratch_bytes=sum(stored),
    )


def compress_delta(
    model: ModelShapes,
    method: Method,
    exact_tensors: Collection[str] | None = (),
    sequential: CalibrationSettings | None = None,
) -> Need:
    """The same for a delta; in true-sequential order one more block, and its hidden states."""
    alone = compress(model, method, shapes.delta_bytes(model, method, exact_tensors))
    if sequential is None:
        return alone
    windows, length = sequential.num_texts * sequential.windows, sequential.length
    return replace(
        alone,
        work=alone.work + 4 * 2.0 * windows * length * model.linear_weights,
        device_bytes=alone.device_bytes + _walked_bytes(model, windows, length),
        host_bytes=alone.host_bytes + 2 * _states_bytes(model, windows, length),
    )


def finetune(
    model: ModelShapes, settings: TuningSettings, method: Method, calibration: CalibrationSettings
) -> Need:
    """Two blocks, both chains of hidden states, gradients and optimizer states of one block.

    Raises:
        ConfigError: A method that cannot be finetuned.
    """
    if not isinstance(method, Tunable):
        raise ConfigError(f"{type(method).__name__} has nothing to finetune; leave it out")
    layers, terms = _layers(model, method), method.loss_terms()
    walked = 1 + max((i for i, count in enumerate(layers.trainable) if count), default=-1)
    students = len({term.student_input for term in terms})
    teachers = len({"teacher"} | {term.teacher_input for term in terms})
    length, trained = calibration.length, calibration.num_texts * calibration.windows
    windows = trained + calibration.num_texts * calibration.validation_windows
    features = min(settings.batch_size, trained) * length * model.block_features
    # fp32 master, gradient, two moments, the best, the stored and the current state
    learning = 28 * max(layers.trainable) + 4 * model.block_weights
    learning += students * (max(layers.unpacked) + ACTIVATION_BYTES * features)
    passes = windows * (teachers + 1) + 4 * students * settings.epochs * trained
    states = (3 + teachers) * _states_bytes(model, windows, length)
    return Need(
        work=2.0 * length * passes * model.linear_weights * walked / len(model.blocks),
        artifact_bytes=shapes.model_bytes(model, method),
        device_bytes=4 * model.block_weights + max(learning, _walked_bytes(model, windows, length)),
        host_bytes=PACKAGES_BYTES + states + 2 * model.largest,
        scratch_bytes=2 * sum(layers.trainable),
    )


def train(
    model: ModelShapes,
    settings: FinetuningSettings | TrainingSettings,
    trains: str,
    text: TaskText | None,
    method: Method | None,
) -> Need:
    """The whole model, activations of all blocks, gradients and optimizer of what ``trains``.

    That is one of `llmpress.training.settings.TRAINS`, or ``model`` for all its linears.
    """
    longest, learnt = (settings.length, 1.0) if text is None else (text.longest, 0.5)  # the answer
    tokens, head = settings.batch_size * longest, model.hidden * model.vocabulary
    distills = getattr(settings, "objective", "") == "distillation"
    fp32 = (settings.precision or ("float32" if trains == "delta" else "")) == "float32"
    copies = 0 if fp32 else 2  # bytes of a weight's, for products and the backward pass
    dense = (4 + copies) * model.linear_weights
    state = 16  # of a number that trains: fp32 value, gradient, two moments
    if isinstance(settings, TrainingSettings):
        trained, held, state = model.linear_weights, dense, 12
        made = shapes.files_bytes([model.stored_as(torch.float32).tensors])
    elif method is None:
        trained = settings.rank * sum(map(sum, model.linears.values()))
        made = shapes.adapter_bytes(model, settings.rank, quantized=trains == "qlora")
        held = shapes.nf4_bytes(model) if trains == "qlora" else dense
    else:
        layers = _layers(model, method)
        trained, held = sum(layers.trainable), sum(layers.stored)
        made = (shapes.delta_bytes if trains == "delta" else shapes.model_bytes)(model, method)
        held += dense if trains == "delta" else sum(layers.held)
    logits = int(16 * min(CHUNK, tokens * learnt) * model.vocabulary)
    teacher = (4 - copies) * model.num_weights + logits if distills else 0
    kept = int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
    rest = 4 * (model.num_weights - model.linear_weights) + copies * head
    passes = (4 if distills else 3) * settings.steps * tokens
    return Need(
        work=2.0 * passes * (model.linear_weights + learnt * head),
        artifact_bytes=made,
        device_bytes=rest + held + state * trained + kept + logits + teacher,
        scratch_bytes=2 * state * trained,  # two checkpoints
    )


def extract_delta(
    model: ModelShapes, _: None = None, exact_tensors: Collection[str] | None = ()
) -> Need:
    """One tensor of each model; never on a GPU."""
    made = shapes.delta_bytes(model, None, exact_tensors)
    largest = max(shape.num_weights for shape in model.linears.values())
    return Need(float(model.num_bytes + made), made, 0, PACKAGES_BYTES + 8 * largest)


def reference(model: ModelShapes, settings: EvaluationSettings) -> Need:
    """The original whole, its linears and its head once more in blocks; its last states stay."""
    tokens = len(settings.corpora) * settings.windows * settings.length
    states = tokens * _itemsize(settings.dtype) * model.hidden
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact_bytes=states + 4 * tokens,
        device_bytes=_opened_bytes(model, settings.dtype) + 8 * likelihood.CHUNK * model.vocabulary,
        host_bytes=PACKAGES_BYTES + 2 * states,
    )


def evaluate(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    kind: KindName = "model",
    method: Method | None = None,
) -> Need:
    """The model and the original whole; tasks, each with its text, in their own dtype."""
    item, tokens = _itemsize(settings.dtype), STEP_TOKENS * float(settings.sample_tokens)
    held = item * model.num_weights + (sum(_layers(model, method).stored) if method else 0)
    if kind != "model":  # what a model predicts is its reference
        held += _opened_bytes(model, settings.dtype)
        tokens += len(settings.corpora) * settings.windows * settings.length
    if kind == "delta":  # a dense layer replaces base and delta one by one; the base stays mapped
        held += item * model.linear_weights
    for name, limit in settings.tasks.items():
        text = texts[name]
        items = text.items if limit is None else min(limit, text.items)
        steps = -(-items // tasks.GENERATED) * text.generated
        tokens += items * text.tokens + STEP_TOKENS * steps
    task_item = _itemsize(settings.task_dtype)
    longest = tasks.SCORED * max((texts[name].longest for name in settings.tasks), default=0.0)
    asked = task_item * model.num_weights + int((task_item + 8) * longest) * model.vocabulary
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact_bytes=0,
        device_bytes=max(held + 24 * likelihood.CHUNK * model.vocabulary, asked),
        host_bytes=EVALUATION_PACKAGES_BYTES,
    )


def speed(subjects: Sequence[tuple[ModelShapes, Method | None]], settings: SpeedSettings) -> Need:
    """Runs as they are stored, each in turns with its original, one after another."""
    tokens = (settings.prefill_tokens + STEP_TOKENS * settings.decode_tokens) * (
        1 + settings.rounds
    )
    item, held = _itemsize(settings.dtype), []
    for model, method in subjects:
        stored = sum(_layers(model, method).stored) if method else 0
        held.append(item * (2 * model.num_weights - model.linear_weights) + stored)
    return Need(sum(4.0 * model.num_weights * tokens for model, _ in subjects), 0, max(held))


@lru_cache(maxsize=64)
def _layers(model: ModelShapes, method: Method) -> _Layers:
    layers = planned_layers(model, method)
    blocks = [[layers[name][1] for name in block if name in layers] for block in model.blocks]
    return _Layers(
        stored=[sum(layer.stored_bits() // 8 for layer in block) for block in blocks],
        held=[sum(layer.held_bytes() for layer in block) for block in blocks],
        trainable=[
            sum(getattr(layer, name).numel() for layer in block for name in layer.trainable)
            for block in blocks
        ],
        unpacked=[
            sum(14 * layer.num_weights for layer in block if layer.rebuilt_in_training)
            for block in blocks
        ],
    )


def _itemsize(dtype: DType) -> int:
    return int(getattr(torch, dtype).itemsize)


def _opened_bytes(model: ModelShapes, dtype: DType) -> int:
    """Return the bytes of a model and, in blocks, of its linears and its head."""
    head = model.hidden * model.vocabulary
    return _itemsize(dtype) * (model.num_weights + model.linear_weights + head)


def _states_bytes(model: ModelShapes, windows: int, length: int) -> int:
    return 4 * windows * length * model.hidden


def _walked_bytes(model: ModelShapes, windows: int, length: int) -> int:
    """Return the bytes of a block in fp32 and of what it computes for as many windows as fit."""
    batch = min(windows, PROPAGATE_WINDOWS, max(1, PROPAGATE_TOKENS // length))
    block = 4 * model.block_weights + FORWARD_BYTES * batch * length * model.block_features
    return max(block, 4 * model.largest)  # the embeddings
