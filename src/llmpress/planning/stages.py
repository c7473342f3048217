"""What one stage needs, as functions of shapes and settings.

Memory is what has to be there at the peak: the imported packages, and the tensors that the stage's
code allocates. Weights that are read from safetensors are mapped: their pages show in the process's
resident size and are dropped by the system when memory runs short, so the stages that walk a model
block by block report them apart. Evaluation and training use all of them all the time and count
them as memory.

Work is one number that a stage's seconds grow with: operations of matrix products, or what takes as
long. `llmpress.planning.records` knows how many seconds.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.base import Method, Tunable
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES
from llmpress.models.checkpoints.files import MODEL_SHARD_BYTES
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import sizes
from llmpress.planning.shapes import ModelShapes
from llmpress.planning.sizes import ArtifactSize, Layers
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import (
    ADAPTERS,
    FinetuningSettings,
    TrainingSettings,
    Trains,
    with_precision,
)
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

PROPAGATE_WINDOWS = 8  # the batch size of BlockWalk.propagate
SCORED_REQUESTS = 16  # of one batch of lm-eval
LOGIT_CHUNK = 128


class TaskText(NamedTuple):
    """What the items of a task make a model read and write; by default a guess."""

    tokens: float = 240.0  # of an item: of all its requests, one for each answer
    longest: float = 150.0  # of the longest request
    generated: int = 0  # tokens per item; 0 where answers are scored
    items: int = 1000


@dataclass(frozen=True)
class Need:
    """What one stage needs.

    Attributes:
        work: What its time is proportional to.
        artifact: Bytes of the artifact that stays.
        device_bytes: Memory of the device that computes.
        host_bytes: Memory of the computer on top, also when a GPU computes.
        mapped_bytes: Pages of weight files on top, which the system may drop.
        scratch_bytes: Disk used on top until the stage is done.
    """

    work: float
    artifact: ArtifactSize
    device_bytes: int
    host_bytes: int = PACKAGES_BYTES
    mapped_bytes: int = 0
    scratch_bytes: int = 0


def calibrate(model: ModelShapes, settings: CalibrationSettings) -> Need:
    """One block, its moments, the hidden states of all windows before and after it."""
    windows, length = settings.num_texts * settings.windows, settings.length
    felt = settings.num_texts * min(settings.sensitivity_windows, settings.windows)
    moments = max(sum(4 * n * n for n in block.values()) for block in model.inputs)
    block = 4 * model.block_weights + _forward_bytes(model, windows, length) + moments
    squares = sum(n * n for inputs in model.inputs for n in inputs.values())
    passes = windows + 4 * felt  # gradients: twice forward, and back
    return Need(
        work=2.0 * length * (passes * model.linear_weights + windows * squares),
        artifact=sizes.calibration_size(model, settings),
        device_bytes=max(block, _embedding_bytes(model)),
        host_bytes=PACKAGES_BYTES + moments + 3 * _states_bytes(model, windows, length),
        mapped_bytes=model.num_bytes,
    )


def compress(model: ModelShapes, method: Method) -> Need:
    """One layer's work space, the compressed layers of one block, one shard of the writer.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    layers = sizes.planned_layers(model, method)
    artifact = _exact(sizes.compressed_model_size(model, layers), method)
    largest = 2 * max(t.numel() for t in model.tensors.values())  # an embedding, as bf16
    pending = max(min(artifact.tensor_bytes, MODEL_SHARD_BYTES), largest)
    return _compression(model, method, artifact, pending, model.num_bytes)


def compress_delta(
    model: ModelShapes,
    method: Method,
    exact_tensors: Collection[str] = (),
    sequential: CalibrationSettings | None = None,
) -> Need:
    """The same for a delta; in true-sequential order one more block, and its hidden states.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    layers = sizes.planned_layers(model, method)
    artifact = _exact(sizes.compressed_delta_size(model, layers, exact_tensors), method)
    pending = min(artifact.tensor_bytes, DELTA_SHARD_BYTES)
    mapped = sizes.delta_size(model, exact_tensors).tensor_bytes
    alone = _compression(model, method, artifact, pending, mapped)
    if sequential is None:
        return alone
    windows, length = sequential.num_texts * sequential.windows, sequential.length
    block = 4 * model.block_weights + _forward_bytes(model, windows, length)
    return replace(
        alone,
        work=alone.work + 4 * 2.0 * windows * length * model.linear_weights,
        device_bytes=alone.device_bytes + block,
        host_bytes=alone.host_bytes + 2 * _states_bytes(model, windows, length),
        mapped_bytes=alone.mapped_bytes + model.num_bytes,
    )


def finetune(
    model: ModelShapes, method: Method, settings: TuningSettings, calibration: CalibrationSettings
) -> Need:
    """Two blocks, both chains of hidden states, gradients and optimizer states of one block.

    Raises:
        ConfigError: A method that cannot be finetuned.
        ValueError: A budget that the model or a layer cannot meet.
    """
    if not isinstance(method, Tunable):
        raise ConfigError(f"{type(method).__name__} has nothing to finetune; leave it out")
    layers = sizes.planned_layers(model, method)
    own = [[layers[name] for name in linears] for linears in model.blocks]
    walked = 1 + max((i for i, b in enumerate(own) if sum(map(_num_trainable, b))), default=-1)
    artifact = _exact(sizes.compressed_model_size(model, layers), method)
    terms = method.loss_terms()
    students = len({term.student_input for term in terms})
    teachers = len({"teacher"} | {term.teacher_input for term in terms})
    trained = calibration.num_texts * calibration.windows
    windows = trained + calibration.num_texts * calibration.validation_windows
    length = calibration.length
    features = min(settings.batch_size, trained) * length * model.block_features
    # fp32 master, gradient, two moments, the best, the stored and the current state
    training = 28 * max(sum(map(_num_trainable, block)) for block in own) + students * (
        max(sum(map(_unpacked_bytes, block)) for block in own) + ACTIVATION_BYTES * features
    )
    block = 2 * 4 * model.block_weights + max(training, _forward_bytes(model, windows, length))
    states = (3 + teachers) * _states_bytes(model, windows, length)
    passes = windows * (teachers + 1) + 4 * students * settings.epochs * trained
    return Need(
        work=2.0 * length * passes * model.linear_weights * walked / len(own),
        artifact=artifact,
        device_bytes=max(block, _embedding_bytes(model)),
        host_bytes=PACKAGES_BYTES + states + min(artifact.tensor_bytes, MODEL_SHARD_BYTES),
        mapped_bytes=model.num_bytes + artifact.tensor_bytes,
        scratch_bytes=2 * sum(map(_num_trainable, layers.values())),
    )


def train_task(model: ModelShapes, settings: TrainingSettings, text: TaskText) -> Need:
    """All weights in fp32; gradients, two moments and bf16 copies of the blocks' linears."""
    tokens = settings.batch_size * (text.longest if settings.task else settings.length)
    activations = int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
    logits = int(5 * tokens * model.vocabulary)  # only where an answer is learnt
    return Need(
        work=6.0 * settings.steps * tokens * model.num_weights,
        artifact=sizes.trained_model_size(model),
        device_bytes=4 * model.num_weights + 14 * model.linear_weights + activations + logits,
    )


def train(
    model: ModelShapes,
    trains: Trains,
    settings: FinetuningSettings,
    text: TaskText | None,
    layers: Layers,
) -> Need:
    """The whole model, activations of all blocks, gradients and optimizer of what trains.

    Args:
        model: The original.
        trains: What trains.
        settings: How.
        text: Of a training item; None for windows of text.
        layers: Compressed layers of the start; none for adapters.
    """
    settings = with_precision(trains, settings)
    longest, learnt = (settings.length, 1.0) if text is None else (text.longest, 0.5)  # the answer
    tokens = settings.batch_size * longest
    distills, autocast = settings.objective == "distillation", settings.precision == "bfloat16"
    item = 2 if autocast else 4  # bytes of a number in a matrix product
    dense = (6 if autocast else 4) * model.linear_weights  # with copies for the backward pass
    packed = sum(map(_layer_bytes, layers.values()))
    unpacked = sum(layer.held_bytes() for layer in layers.values() if layer)
    trained = sum(map(_num_trainable, layers.values()))
    if trains in ADAPTERS:
        trained = settings.rank * sum(sum(shape) for shape in model.linears.values())
        artifact = sizes.adapter_size(model, settings.rank, quantized=trains == "qlora")
    elif trains == "delta":
        artifact = sizes.compressed_delta_size(model, layers)
    else:
        artifact = sizes.compressed_model_size(model, layers)
    held = {
        "lora": dense,
        "qlora": sizes.nf4_bytes(model),
        "compressed": packed + unpacked,
        "delta": dense + packed,
    }[trains]
    head = model.hidden * model.vocabulary
    logits = int(16 * min(CHUNK, tokens * learnt) * model.vocabulary)
    device = (
        held
        + 4 * (model.num_weights - model.linear_weights)
        + (item * head if autocast else 0)
        + (item * model.num_weights + logits if distills else 0)  # the teacher
        + 18 * trained  # fp32 values, gradients, two moments; the best state as it is stored
        + max(map(_unpacked_bytes, layers.values()), default=0)
        + int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
        + logits
    )
    looks = 1 + -(-settings.steps // settings.check_every)
    seen, judged = settings.steps * tokens, looks * settings.held_out * longest
    forwards = (4 if distills else 3) * seen + (2 if distills else 1) * judged
    return Need(
        work=2.0 * forwards * (model.linear_weights + learnt * head),
        artifact=artifact,
        device_bytes=device,
        mapped_bytes=model.num_bytes if trains in ADAPTERS else artifact.tensor_bytes,
        scratch_bytes=2 * 14 * trained,  # two checkpoints: values, moments, the best state
    )


def extract_delta(model: ModelShapes, exact_tensors: Collection[str] = ()) -> Need:
    """One tensor of each model and one shard; never on a GPU."""
    artifact = sizes.delta_size(model, exact_tensors)
    largest = 8 * max(math.prod(shape) for shape in model.linears.values())
    pending = min(artifact.tensor_bytes, DELTA_SHARD_BYTES)
    return Need(
        work=float(model.num_bytes + artifact.tensor_bytes),
        artifact=artifact,
        device_bytes=0,
        host_bytes=PACKAGES_BYTES + pending + largest,
        mapped_bytes=2 * model.num_bytes,
    )


def reference(model: ModelShapes, settings: EvaluationSettings) -> Need:
    """The original whole and the logits of one window; its last hidden states stay."""
    item = getattr(torch, settings.dtype).itemsize
    tokens = len(settings.corpora) * settings.windows * settings.length
    states = tokens * item * model.hidden
    logits = settings.length * item + 8 * LOGIT_CHUNK
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact=ArtifactSize(states + 4 * tokens, 3_000),
        device_bytes=item * model.num_weights + logits * model.vocabulary,
        host_bytes=PACKAGES_BYTES + 2 * states,
    )


def evaluate(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    layers: Layers | None = None,
    *,
    delta: bool = False,
) -> Need:
    """The model and the original whole, the logits of one window; tasks in their own dtype.

    Args:
        model: The original.
        settings: How.
        texts: Of each task's items, by task.
        layers: Compressed layers of what is evaluated; None for the original itself.
        delta: Whether the layers are a delta that lies on a dense base.
    """
    item, task_item = (getattr(torch, d).itemsize for d in (settings.dtype, settings.task_dtype))
    models = 1 if layers is None else 2
    held = models * item * model.num_weights + sum(map(_layer_bytes, (layers or {}).values()))
    if delta:  # a dense layer replaces base and delta one by one; the base's file stays mapped
        held += item * model.linear_weights
    logits = models * settings.length * item + 4 * LOGIT_CHUNK * (2 if layers is None else 6)
    longest = max((texts[name].longest for name in settings.tasks), default=0.0)
    scores = int(SCORED_REQUESTS * longest * (task_item + 8))
    tokens = float(models * len(settings.corpora) * settings.windows * settings.length)
    tokens += STEP_TOKENS * (2 * settings.decode_tokens + settings.sample_tokens)
    for name, limit in settings.tasks.items():
        text = texts[name]
        items = text.items if limit is None else min(limit, text.items)
        tokens += items * text.tokens + STEP_TOKENS * -(-items // 64) * text.generated
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact=ArtifactSize(0, 100_000),
        device_bytes=max(
            held + logits * model.vocabulary,
            (item + task_item) * model.num_weights,  # while it is converted
            task_item * model.num_weights + scores * model.vocabulary,
        ),
        host_bytes=EVALUATION_PACKAGES_BYTES,
    )


def _compression(
    model: ModelShapes, method: Method, artifact: ArtifactSize, pending: int, mapped: int
) -> Need:
    plan, layers = sizes.planned_methods(model, method), sizes.planned_layers(model, method)
    compressed = [(own, model.linears[name]) for name, own in plan.items() if own is not None]
    works = {(own, shape): own.work(shape).operations for own, shape in set(compressed)}
    # recording a layer compares three fp32 matrices in fp64 and two products with the moment
    record = max(32 * math.prod(s) + 4 * s.in_features**2 for s in model.linears.values())
    block = max(sum(_layer_bytes(layers[name]) for name in linears) for linears in model.blocks)
    return Need(
        work=sum(works[key] for key in compressed),
        artifact=artifact,
        device_bytes=max([record, *(own.workspace_bytes(shape) for own, shape in works)]),
        host_bytes=PACKAGES_BYTES + pending + block,
        mapped_bytes=mapped,
        scratch_bytes=sum(map(_layer_bytes, layers.values())),
    )


def _exact(size: ArtifactSize, method: Method) -> ArtifactSize:
    """Note whether a plan without calibration gives each layer exactly what it will get."""
    return replace(size, exact=method.size_from_shape and not method.spreads_budget)


def _forward_bytes(model: ModelShapes, windows: int, length: int) -> int:
    return FORWARD_BYTES * min(windows, PROPAGATE_WINDOWS) * length * model.block_features


def _states_bytes(model: ModelShapes, windows: int, length: int) -> int:
    return 4 * windows * length * model.hidden


def _embedding_bytes(model: ModelShapes) -> int:
    """Return the fp32 bytes of the embedding, where it is stored in another dtype."""
    return max(
        (4 * t.numel() for t in model.tensors.values() if t.dtype != torch.float32), default=0
    )


def _layer_bytes(layer: CompressedLinear | None) -> int:
    return 0 if layer is None else layer.stored_bits() // 8


def _num_trainable(layer: CompressedLinear | None) -> int:
    return 0 if layer is None else sum(getattr(layer, n).numel() for n in layer.trainable)


def _unpacked_bytes(layer: CompressedLinear | None) -> int:
    """Return what a layer's dense weight takes while it is trained: indices, fp32, bf16."""
    return 14 * layer.num_weights if layer and layer.rebuilt_in_training else 0
