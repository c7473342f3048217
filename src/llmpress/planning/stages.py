"""What one stage needs, as functions of shapes and settings.

Memory is what has to be there at the peak: the imported packages, and the tensors that the stage's
code allocates. Weights that are read from safetensors are mapped: their pages show in the process's
resident size and are dropped by the system when memory runs short, so stages that walk a model
block by block do not count them.

Work is one number that a stage's seconds grow with: operations of matrix products, or what takes as
long. A budget that the model or a layer cannot meet is a ValueError of every stage with a method.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.core.kinds import KindName
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.base import Method, Tunable
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES
from llmpress.models.checkpoints.files import MODEL_SHARD_BYTES
from llmpress.models.walk import PROPAGATE_TOKENS, PROPAGATE_WINDOWS
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import sizes
from llmpress.planning.shapes import ModelShapes
from llmpress.planning.sizes import empty, planned_layers
from llmpress.training import settings as training
from llmpress.training.objectives import CHUNK
from llmpress.tuning.settings import TuningSettings

PACKAGES_BYTES = 440_000_000
"""Resident after importing Python, torch, transformers and llmpress and opening a tokenizer:
437 MB measured (torch 2.13 CPU build, transformers 5.23); a CUDA build takes more."""
EVALUATION_PACKAGES_BYTES = 640_000_000
"""The same with lm-eval and datasets (100 MB measured), and what the allocator keeps of the speed
measurement (100 MB, the least of what was seen)."""
ACTIVATION_BYTES = 9
"""Kept for the backward pass per token, and per input and output of a block's linears: two fp32
and some bf16 copies. Measured: a block of 10,176 of them keeps 95 kB a token."""
FORWARD_BYTES = 4
"""The same in a forward pass without gradients."""
STEP_TOKENS = 10
"""Tokens at once that take as long as a single one, which reads all weights too."""
SCORED_REQUESTS = 16
"""Of one batch of lm-eval."""
LOGIT_CHUNK = 32  # positions that are scored at once
"""Positions whose distributions are in memory at once, at most."""


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


def calibrate(model: ModelShapes, settings: CalibrationSettings) -> Need:
    """One block, its moments, the hidden states of all windows before and after it."""
    length, texts = settings.length, settings.num_texts
    counts = {"calibration": settings.windows, "validation": settings.validation_windows}
    drawn = {n: empty(texts * count, length, dtype=torch.int64) for n, count in counts.items()}
    felt = {n: empty(shape.out_features) for n, shape in model.linears.items()}
    moments = [
        {name.partition(f".{index}.")[2]: empty(n, n) for name, n in block.items()}
        for index, block in enumerate(model.inputs)
    ]
    files = [drawn, *moments, *([felt] if settings.sensitivity_windows else [])]
    windows = texts * settings.windows
    with_gradients = texts * min(settings.sensitivity_windows, settings.windows)
    passes = windows + 4 * with_gradients  # twice forward, and back
    squares = sum(moment.numel() for block in moments for moment in block.values())
    largest = max(sum(moment.nbytes for moment in block.values()) for block in moments)
    block = _walked_block(model, windows, length) + largest
    return Need(
        work=2.0 * length * (passes * model.linear_weights + windows * squares),
        artifact_bytes=sizes.files_bytes(files, metadata=False),
        device_bytes=max(block, _embedding_bytes(model)),
        host_bytes=PACKAGES_BYTES + largest + 3 * _states_bytes(model, windows, length),
    )


def compress(model: ModelShapes, method: Method) -> Need:
    """One layer's work space, the compressed layers of one block, one shard of the writer."""
    made = sizes.model_bytes(model, method)
    embedding = 2 * max(t.numel() for t in model.tensors.values())  # in bf16
    return _compression(model, method, made, max(min(made, MODEL_SHARD_BYTES), embedding))


def compress_delta(
    model: ModelShapes,
    method: Method,
    exact_tensors: Collection[str] | None = (),
    sequential: CalibrationSettings | None = None,
) -> Need:
    """The same for a delta; in true-sequential order one more block, and its hidden states."""
    made = sizes.delta_bytes(model, method, exact_tensors)
    alone = _compression(model, method, made, min(made, DELTA_SHARD_BYTES))
    if sequential is None:
        return alone
    windows, length = sequential.num_texts * sequential.windows, sequential.length
    return replace(
        alone,
        work=alone.work + 4 * 2.0 * windows * length * model.linear_weights,
        device_bytes=alone.device_bytes + _walked_block(model, windows, length),
        host_bytes=alone.host_bytes + 2 * _states_bytes(model, windows, length),
    )


def _compression(model: ModelShapes, method: Method, made: int, pending: int) -> Need:
    layers = planned_layers(model, method)
    works = [(own.method, model.linears[name]) for name, own in layers.items()]
    amounts = {(own, shape): own.work(shape).operations for own, shape in set(works)}
    # recording a layer compares three fp32 matrices in fp64 and two products with the moment
    record = max(32 * s.num_weights + 4 * s.in_features**2 for s in model.linears.values())
    stored = {name: _layer_bytes(own.layer) for name, own in layers.items()}
    block = max(sum(stored.get(name, 0) for name in linears) for linears in model.blocks)
    return Need(
        work=sum(amounts[key] for key in works),
        artifact_bytes=made,
        device_bytes=max([record, *(own.workspace_bytes(shape) for own, shape in amounts)]),
        host_bytes=PACKAGES_BYTES + pending + block,
        scratch_bytes=sum(stored.values()),
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
    layers, made = planned_layers(model, method), sizes.model_bytes(model, method)
    own = [[layers[n].layer for n in block if n in layers] for block in model.blocks]
    trainable = [sum(map(_num_trainable, block)) for block in own]
    walked = 1 + max((index for index, count in enumerate(trainable) if count), default=-1)
    terms = method.loss_terms()
    students = len({term.student_input for term in terms})
    teachers = len({"teacher"} | {term.teacher_input for term in terms})
    length, trained = calibration.length, calibration.num_texts * calibration.windows
    windows = trained + calibration.num_texts * calibration.validation_windows
    features = min(settings.batch_size, trained) * length * model.block_features
    # fp32 master, gradient, two moments, the best, the stored and the current state
    learning = 28 * max(trainable) + students * (
        max(sum(map(_unpacked_bytes, block)) for block in own) + ACTIVATION_BYTES * features
    )
    weights = 4 * model.block_weights
    block = weights + max(weights + learning, _walked_block(model, windows, length))
    passes = windows * (teachers + 1) + 4 * students * settings.epochs * trained
    states = (3 + teachers) * _states_bytes(model, windows, length)
    return Need(
        work=2.0 * length * passes * model.linear_weights * walked / len(own),
        artifact_bytes=made,
        device_bytes=max(block, _embedding_bytes(model)),
        host_bytes=PACKAGES_BYTES + states + min(made, MODEL_SHARD_BYTES),
        scratch_bytes=2 * sum(trainable),
    )


def train_task(
    model: ModelShapes, settings: training.TrainingSettings, text: TaskText | None
) -> Need:
    """All weights in fp32; gradients, two moments and bf16 copies of the blocks' linears."""
    tokens = settings.batch_size * (text.longest if text else settings.length)
    activations = int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
    logits = int(5 * tokens * model.vocabulary)  # only where an answer is learnt
    return Need(
        work=6.0 * settings.steps * tokens * model.num_weights,
        artifact_bytes=sizes.files_bytes([model.stored_as(torch.float32).tensors]),
        device_bytes=4 * model.num_weights + 14 * model.linear_weights + activations + logits,
    )


def train(
    model: ModelShapes,
    settings: training.FinetuningSettings,
    trains: training.Trains,
    text: TaskText | None,
    method: Method | None,
) -> Need:
    """The whole model, activations of all blocks, gradients and optimizer of what trains.

    Args:
        model: The original.
        settings: How.
        trains: What trains.
        text: Of a training item; None for windows of text.
        method: Of the compressed layers of the start; None for adapters.
    """
    settings = training.with_precision(trains, settings)
    longest, learnt = (settings.length, 1.0) if text is None else (text.longest, 0.5)  # the answer
    tokens = settings.batch_size * longest
    distills, autocast = settings.objective == "distillation", settings.precision == "bfloat16"
    item = 2 if autocast else 4  # bytes of a number in a matrix product
    layers = [own.layer for own in planned_layers(model, method).values()] if method else []
    dense = (6 if autocast else 4) * model.linear_weights  # with copies for the backward pass
    if method is None:
        trained = settings.rank * sum(map(sum, model.linears.values()))
        made = sizes.adapter_bytes(model, settings.rank, quantized=trains == "qlora")
        held = sizes.nf4_bytes(model) if trains == "qlora" else dense
    else:
        trained = sum(map(_num_trainable, layers))
        count = sizes.delta_bytes if trains == "delta" else sizes.model_bytes
        made = count(model, method)
        unpacked = dense if trains == "delta" else sum(layer.held_bytes() for layer in layers)
        held = unpacked + sum(map(_layer_bytes, layers))
    head = model.hidden * model.vocabulary
    logits = int(16 * min(CHUNK, tokens * learnt) * model.vocabulary)
    device = (
        held
        + 4 * (model.num_weights - model.linear_weights)
        + (item * head if autocast else 0)
        + (item * model.num_weights + logits if distills else 0)  # the teacher
        + 18 * trained  # fp32 values, gradients, two moments; the best state as it is stored
        + max(map(_unpacked_bytes, layers), default=0)
        + int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
        + logits
    )
    looks = 1 + -(-settings.steps // settings.check_every)
    seen, judged = settings.steps * tokens, looks * settings.held_out * longest
    forwards = (4 if distills else 3) * seen + (2 if distills else 1) * judged
    return Need(
        work=2.0 * forwards * (model.linear_weights + learnt * head),
        artifact_bytes=made,
        device_bytes=device,
        scratch_bytes=2 * 14 * trained,  # two checkpoints: values, moments, the best state
    )


def extract_delta(
    model: ModelShapes, _: None = None, exact_tensors: Collection[str] | None = ()
) -> Need:
    """One tensor of each model and one shard; never on a GPU."""
    made = sizes.delta_bytes(model, None, exact_tensors)
    largest = 8 * max(shape.num_weights for shape in model.linears.values())
    return Need(
        work=float(model.num_bytes + made),
        artifact_bytes=made,
        device_bytes=0,
        host_bytes=PACKAGES_BYTES + min(made, DELTA_SHARD_BYTES) + largest,
    )


def reference(model: ModelShapes, settings: EvaluationSettings) -> Need:
    """The original whole, its linears and its head once more in blocks; its last states stay."""
    item = getattr(torch, settings.dtype).itemsize
    tokens = len(settings.corpora) * settings.windows * settings.length
    states = tokens * item * model.hidden
    held = item * (model.num_weights + model.linear_weights + model.vocabulary * model.hidden)
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact_bytes=states + 4 * tokens,
        device_bytes=held + 8 * LOGIT_CHUNK * model.vocabulary,
        host_bytes=PACKAGES_BYTES + 2 * states,
    )


def evaluate(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    kind: KindName = "model",
    method: Method | None = None,
) -> Need:
    """The model and the original whole, linears and head in blocks; tasks in their own dtype.

    Args:
        model: The original.
        settings: How.
        texts: Of each task's items, by task.
        kind: Of what is evaluated; a model is compared with nothing.
        method: Of its compressed layers, if it has any.
    """
    item, task_item = (getattr(torch, d).itemsize for d in (settings.dtype, settings.task_dtype))
    layers = planned_layers(model, method) if method else {}
    held, tokens = item * model.num_weights, STEP_TOKENS * float(settings.sample_tokens)
    if kind != "model":  # what a model predicts is its reference
        held += item * (model.num_weights + model.linear_weights + model.vocabulary * model.hidden)
        tokens += len(settings.corpora) * settings.windows * settings.length
    held += sum(_layer_bytes(own.layer) for own in layers.values())
    if kind == "delta":  # a dense layer replaces base and delta one by one; the base stays mapped
        held += item * model.linear_weights
    longest = max((texts[name].longest for name in settings.tasks), default=0.0)
    scores = int(SCORED_REQUESTS * longest * (task_item + 8))
    for name, limit in settings.tasks.items():
        text = texts[name]
        items = text.items if limit is None else min(limit, text.items)
        tokens += items * text.tokens + STEP_TOKENS * -(-items // 64) * text.generated
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact_bytes=0,
        device_bytes=max(
            held + 24 * LOGIT_CHUNK * model.vocabulary,
            (item + task_item) * model.num_weights,  # while it is converted
            task_item * model.num_weights + scores * model.vocabulary,
        ),
        host_bytes=EVALUATION_PACKAGES_BYTES,
    )


def _walked_block(model: ModelShapes, windows: int, length: int) -> int:
    """Return the bytes of a block in fp32 and of what it computes for as many windows as fit."""
    batch = min(windows, PROPAGATE_WINDOWS, max(1, PROPAGATE_TOKENS // length))
    return 4 * model.block_weights + FORWARD_BYTES * batch * length * model.block_features


def _states_bytes(model: ModelShapes, windows: int, length: int) -> int:
    return 4 * windows * length * model.hidden


def _embedding_bytes(model: ModelShapes) -> int:
    """Return the fp32 bytes of the embedding, where it is stored in another dtype."""
    stored = [t for t in model.tensors.values() if t.dtype != torch.float32]
    return max((4 * t.numel() for t in stored), default=0)


def _layer_bytes(layer: CompressedLinear) -> int:
    return layer.stored_bits() // 8


def _num_trainable(layer: CompressedLinear) -> int:
    return sum(getattr(layer, name).numel() for name in layer.trainable)


def _unpacked_bytes(layer: CompressedLinear) -> int:
    """Return what a layer's dense weight takes while it is trained: indices, fp32, bf16."""
    return 14 * layer.num_weights if layer.rebuilt_in_training else 0
