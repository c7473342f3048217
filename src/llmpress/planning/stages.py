"""What one stage needs, as functions of shapes and settings.

Memory is what has to be there at the peak: the imported packages, and the tensors that the stage's
code allocates. Weights that are read from safetensors are mapped: their pages show in the process's
resident size and are dropped by the system when memory runs short, so the stages that walk a model
block by block report them apart (``mapped_bytes``). Evaluation and training use all of them all the
time and count them as memory.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

import torch

from llmpress.calibration.files import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.base import Method, Tunable
from llmpress.nn.layers import CodebookLinear, CompressedLinear, LowRankLinear
from llmpress.planning import sizes
from llmpress.planning.costs import (
    METHOD_COSTS,
    Work,
    dequantize_bytes,
    knows_layers,
    layer_work,
    total,
)
from llmpress.planning.shapes import ModelShapes
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import ADAPTERS, FinetuningSettings, Trains, with_precision
from llmpress.tuning.blocks import TuningSettings

PACKAGES_BYTES = 440_000_000
"""Resident after importing Python, torch, transformers and llmpress and opening a tokenizer:
437 MB measured (torch 2.13 CPU build, transformers 5.23); a CUDA build takes more."""

EVALUATION_PACKAGES_BYTES = 640_000_000
"""The same with lm-eval and datasets (100 MB measured), and what the allocator keeps of the speed
measurement (100 MB, the least of what was seen)."""

STARTUP_SECONDS = 7.0
"""Importing the packages; provenance.json does not count it."""

EVALUATION_STARTUP_SECONDS = 13.0
"""The same with lm-eval, and opening its tasks."""

ACTIVATION_BYTES = 9.0
"""Kept for the backward pass per token, and per input and output of a block's linears: two fp32
and some bf16 copies. Measured: a block of 10,176 of them keeps 95 kB a token."""

FORWARD_BYTES = 4.0
"""The same in a forward pass without gradients."""

PASS_BYTES = 40.0
"""Moved by the elementwise operations of one forward pass per token, input and output."""

PROPAGATE_WINDOWS = 8  # the batch size of BlockWalk.propagate
SCORED_REQUESTS = 16  # of one batch of lm-eval
LOGIT_CHUNK = 128
HASH_BYTES = 60.0
"""Equivalent in moved bytes of writing one byte of an artifact and taking its SHA-256."""


@dataclass(frozen=True)
class TaskText:
    """What one item of a task makes a model read and write.

    Attributes:
        requests: Answers scored per item, or 1 for a generated one.
        tokens: Mean tokens of one request.
        longest_tokens: Of the longest request.
        generated_tokens: Generated per item; 0 where answers are scored.
        items: Items the task has.
    """

    requests: float = 4.0
    tokens: float = 60.0
    longest_tokens: float = 150.0
    generated_tokens: int = 0
    items: int = 1000


@dataclass(frozen=True)
class Estimate:
    """What one stage needs.

    Attributes:
        host_bytes: Memory of the computer while everything computes on the CPU.
        staging_bytes: Memory of the computer when a GPU computes: what stays there.
        device_bytes: Memory of the GPU when it computes.
        mapped_bytes: Pages of weight files on top, which the system may drop.
        artifact: Bytes of the artifact that stays.
        scratch_bytes: Disk used on top until the stage is done.
        work: What it computes.
    """

    host_bytes: int
    staging_bytes: int
    device_bytes: int
    mapped_bytes: int
    artifact: sizes.ArtifactSize
    scratch_bytes: int
    work: Work


def calibrate(model: ModelShapes, settings: CalibrationSettings) -> Estimate:
    """One block, its moments, the hidden states of all windows before and after it."""
    windows = settings.num_texts * settings.windows
    tokens = windows * settings.length
    batch = min(windows, PROPAGATE_WINDOWS) * settings.length
    states = 4 * tokens * model.hidden
    moments = 2 * max(sum(4 * n * n for n in block.values()) for block in model.inputs)
    block = _block_bytes(model)
    activations = int(FORWARD_BYTES * batch * model.block_features)
    embedding = _embedding_bytes(model)
    felt = settings.num_texts * min(settings.sensitivity_windows, settings.windows)
    artifact = sizes.calibration_size(
        model,
        windows,
        settings.num_texts * settings.validation_windows,
        settings.length,
        sensitive=felt > 0,
    )
    squares = sum(n * n for inputs in model.inputs for n in inputs.values())
    gradients = _forward(model, felt * settings.length, model.linear_weights, settings.autocast) * 4
    work = (
        _forward(model, tokens, model.linear_weights, settings.autocast)
        + gradients  # twice forward, and back
        + Work(fp32_flops=2.0 * tokens * squares, fixed_seconds=STARTUP_SECONDS)
        + _written(artifact)
    )
    device = max(block + activations + moments, embedding)
    return Estimate(
        host_bytes=PACKAGES_BYTES + 3 * states + device,
        staging_bytes=PACKAGES_BYTES + 3 * states + moments // 2,
        device_bytes=device,
        mapped_bytes=model.num_bytes,
        artifact=artifact,
        scratch_bytes=0,
        work=work,
    )


def compress(model: ModelShapes, method_name: str, method: Method) -> Estimate:
    """One layer's work space, the compressed layers of one block, one shard of the writer.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    layers = sizes.planned_layers(model, method_name, method)
    artifact = sizes.compressed_model_size(model, layers, exact=knows_layers(method_name, method))
    pending = min(artifact.tensor_bytes, sizes.MODEL_SHARD_BYTES)
    largest_rest = max(t.num_entries * 2 for t in model.tensors.values())  # an embedding, as bf16
    return _compression(
        model, method_name, method, layers, artifact, max(pending, largest_rest), model.num_bytes
    )


def compress_delta(
    model: ModelShapes,
    method_name: str,
    method: Method,
    exact_tensors: Collection[str] = (),
    sequential: CalibrationSettings | None = None,
) -> Estimate:
    """The same for the delta of a fine-tuned model of this layout.

    Args:
        model: The fine-tuned model.
        method_name: How its delta is compressed.
        method: The settings.
        exact_tensors: What is kept exactly.
        sequential: The calibration whose windows run through the model in true-sequential order:
            one more block and its hidden states, and each block about four times.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    layers = sizes.planned_layers(model, method_name, method)
    artifact = sizes.compressed_delta_size(
        model, layers, exact=knows_layers(method_name, method), exact_tensors=exact_tensors
    )
    pending = min(artifact.tensor_bytes, sizes.DELTA_SHARD_BYTES)
    mapped = sizes.delta_size(model, exact_tensors).tensor_bytes
    alone = _compression(model, method_name, method, layers, artifact, pending, mapped)
    if sequential is None:
        return alone
    tokens = sequential.num_texts * sequential.windows * sequential.length
    batch = min(PROPAGATE_WINDOWS, tokens // sequential.length) * sequential.length
    states = 4 * tokens * model.hidden
    device = _block_bytes(model) + int(FORWARD_BYTES * batch * model.block_features)
    return replace(
        alone,
        host_bytes=alone.host_bytes + 2 * states + device,
        staging_bytes=alone.staging_bytes + 2 * states,
        device_bytes=alone.device_bytes + device,
        mapped_bytes=alone.mapped_bytes + model.num_bytes,
        work=alone.work + _forward(model, tokens, model.linear_weights, autocast=True) * 4,
    )


def _compression(
    model: ModelShapes,
    method_name: str,
    method: Method,
    layers: Mapping[str, CompressedLinear | None],
    artifact: sizes.ArtifactSize,
    pending: int,
    mapped: int,
) -> Estimate:
    plan = sizes.planned_methods(model, method)
    cost = METHOD_COSTS[method_name]
    distinct = {
        (settings, model.linears[name]) for name, settings in plan.items() if settings is not None
    }
    # recording a layer compares three fp32 matrices in fp64 and two products with the moment
    device = max((cost.workspace_bytes(m, shape) for m, shape in distinct), default=0)
    record = max(
        32 * math.prod(shape) + 4 * shape.in_features**2 for shape in model.linears.values()
    )
    works = {key: layer_work(method_name, *key) for key in distinct}
    work = total([works[m, model.linears[n]] for n, m in plan.items() if m is not None])
    scratch = sizes.checkpoint_bytes(layers)
    block = max(sum(_bytes(layers[name]) for name in linears) for linears in model.blocks)
    return Estimate(
        host_bytes=PACKAGES_BYTES + pending + block + max(device, record),
        staging_bytes=PACKAGES_BYTES + pending + block + record,
        device_bytes=device,
        mapped_bytes=mapped,
        artifact=artifact,
        scratch_bytes=scratch,
        work=work
        + _written(artifact)
        + Work(bytes_moved=20.0 * scratch, fixed_seconds=STARTUP_SECONDS),
    )


def finetune(
    model: ModelShapes,
    method_name: str,
    method: Method,
    settings: TuningSettings,
    calibration: CalibrationSettings,
) -> Estimate:
    """Two blocks, both chains of hidden states, gradients and optimizer states of one block.

    Raises:
        ConfigError: A method that cannot be finetuned.
        ValueError: A budget that the model or a layer cannot meet.
    """
    if not isinstance(method, Tunable):
        raise ConfigError(f"method {method_name!r} has nothing to finetune")
    layers = sizes.planned_layers(model, method_name, method)
    own = [[layers[name] for name in linears] for linears in model.blocks]
    walked = 1 + max((i for i, block in enumerate(own) if sum(map(_trainable, block))), default=-1)
    artifact = sizes.compressed_model_size(
        model, layers, exact=knows_layers(method_name, method), blocks=walked
    )
    terms = method.loss_terms()
    student_chains = len({term.student_input for term in terms})
    targets = len({"teacher"} | {term.teacher_input for term in terms})
    texts, length = calibration.num_texts, calibration.length
    trained, held_out = texts * calibration.windows, texts * calibration.validation_windows
    batch = min(settings.batch_size, trained) * length
    states = 4 * (trained + held_out) * length * model.hidden

    parameters = max(sum(_trainable(layer) for layer in block) for block in own)
    unpacked = max(sum(_unpacked_bytes(layer) for layer in block) for block in own)
    activations = int(ACTIVATION_BYTES * batch * model.block_features) * student_chains
    propagating = int(
        FORWARD_BYTES * min(trained + held_out, PROPAGATE_WINDOWS) * length * model.block_features
    )
    # fp32 master, gradient, two moments, the best, the stored and the current state
    training = 28 * parameters + unpacked * student_chains + activations
    device = 2 * _block_bytes(model) + max(training, propagating)
    chains = (2 + targets + 1) * states
    pending = min(artifact.tensor_bytes, sizes.MODEL_SHARD_BYTES)
    tokens = {
        "propagate": (trained + held_out) * length * (targets + 1),
        "train": trained * length * settings.epochs * student_chains,
        "judge": held_out * length * (settings.epochs + 1) * student_chains,
    }
    steps = settings.epochs * -(-trained // settings.batch_size)
    passes = steps * 3 + (settings.epochs + 1) + (trained + held_out) // PROPAGATE_WINDOWS + 1
    student_weights = sum(_multiplied(layers[n], s) for n, s in model.linears.items())
    forwards = (
        _forward(model, tokens["propagate"], model.linear_weights, settings.autocast)
        + _forward(model, tokens["judge"], student_weights, settings.autocast)
        + _forward(model, tokens["train"], student_weights, settings.autocast) * 3
    )
    work = (
        forwards * (walked / len(model.blocks))
        + Work(
            bytes_moved=passes * student_chains * sum(_rebuild_bytes(x) for x in layers.values())
            + steps * 60.0 * sum(_trainable(layer) for layer in layers.values()),
            fixed_seconds=STARTUP_SECONDS,
        )
        + _written(artifact)
    )
    return Estimate(
        host_bytes=PACKAGES_BYTES + chains + pending + max(device, _embedding_bytes(model)),
        staging_bytes=PACKAGES_BYTES + chains + pending,
        device_bytes=max(device, _embedding_bytes(model)),
        mapped_bytes=model.num_bytes + artifact.tensor_bytes,
        artifact=artifact,
        scratch_bytes=2 * sum(_trainable(layer) for layer in layers.values()),
        work=work,
    )


def train_task(model: ModelShapes, steps: int, batch_size: int, text: TaskText) -> Estimate:
    """All weights in fp32; gradients, two moments and bf16 copies of the blocks' linears.

    Args:
        model: The base.
        steps: Optimizer steps.
        batch_size: Items per step, padded to the longest of them.
        text: Tokens of a training item.
    """
    linear = model.linear_weights
    tokens = batch_size * text.longest_tokens
    activations = int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
    logits = int(10 * tokens * model.vocabulary) // 2  # only where an answer is learnt
    device = 4 * model.num_weights + (12 + 2) * linear + activations + logits
    artifact = sizes.trained_model_size(model)
    head = float(model.hidden * model.vocabulary)
    step = _forward(model, int(tokens), linear, autocast=True) * 3 + Work(
        bf16_flops=6.0 * head * tokens / 2, bytes_moved=70.0 * linear
    )
    return Estimate(
        host_bytes=PACKAGES_BYTES + device,
        staging_bytes=PACKAGES_BYTES,
        device_bytes=device,
        mapped_bytes=0,
        artifact=artifact,
        scratch_bytes=0,
        work=step * steps + _written(artifact) + Work(fixed_seconds=STARTUP_SECONDS),
    )


def train(
    model: ModelShapes,
    trains: Trains,
    settings: FinetuningSettings,
    text: TaskText | None,
    layers: Mapping[str, CompressedLinear | None],
) -> Estimate:
    """The whole model, activations of all blocks, gradients and optimizer of what trains.

    Args:
        model: The original.
        trains: What trains.
        settings: How.
        text: Tokens of a training item; None for windows of text.
        layers: Compressed layers of the start; none for adapters.
    """
    settings = with_precision(trains, settings)
    longest = settings.length if text is None else text.longest_tokens
    learnt = 1.0 if text is None else 0.5  # of an item the answer
    tokens = settings.batch_size * longest
    positions = min(CHUNK, tokens * learnt)
    linear, rest = model.linear_weights, model.num_weights - model.linear_weights
    distills, autocast = settings.objective == "distillation", settings.precision == "bfloat16"
    item = 2 if autocast else 4  # bytes of a number in a matrix product
    adapters = sum(settings.rank * sum(shape) for shape in model.linears.values())
    trained = adapters if trains in ADAPTERS else sum(_trainable(x) for x in layers.values())
    held = {
        "lora": (6 if autocast else 4) * linear,  # and the copies that the backward pass needs
        "qlora": sizes.nf4_bytes(model),
        "compressed": sum(_bytes(layer) + _index_bytes(layer) for layer in layers.values()),
        "delta": (6 if autocast else 4) * linear + sum(_bytes(layer) for layer in layers.values()),
    }[trains]
    unpacked = max((_unpacked_bytes(layer) for layer in layers.values()), default=0)
    activations = int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
    logits = int(4 * 4 * positions * model.vocabulary) * (2 if distills else 1)
    head_copy = item * model.hidden * model.vocabulary if autocast else 0
    teacher = item * model.num_weights if distills else 0
    # fp32 values, their gradients, two moments; the best state as it is stored
    state = (16 + 2) * trained
    whole = held + 4 * rest + head_copy + teacher
    device = whole + state + unpacked + activations + logits
    if trains in ADAPTERS:
        artifact = sizes.adapter_size(model, settings.rank, quantized=trains == "qlora")
    elif trains == "delta":
        artifact = sizes.compressed_delta_size(model, layers, exact=False, exact_tensors=())
    else:
        artifact = sizes.compressed_model_size(model, layers, exact=False)
    looks = 1 + -(-settings.steps // settings.check_every)
    judged = looks * settings.held_out * longest
    seen = settings.steps * tokens
    head = 2.0 * model.hidden * model.vocabulary * learnt
    kind = "bf16_flops" if autocast else "fp32_flops"
    forward = _forward(model, int(seen + judged), linear, autocast) + Work(
        **{kind: head * (seen + judged)}
    )
    backward = _forward(model, int(seen), linear, autocast) * 2 + Work(**{kind: 3 * head * seen})
    followed = forward if distills else Work()
    passes = 2 * settings.steps + looks * settings.held_out / settings.batch_size
    rebuilt = sum(_rebuild_bytes(layer) for layer in layers.values())
    if trains in ADAPTERS:
        rebuilt = 12.0 * linear  # frozen weights cast, or unpacked, at every pass
    return Estimate(
        host_bytes=PACKAGES_BYTES + device,
        staging_bytes=PACKAGES_BYTES,
        device_bytes=device,
        mapped_bytes=model.num_bytes if trains in ADAPTERS else artifact.tensor_bytes,
        artifact=artifact,
        scratch_bytes=2 * 14 * trained,  # two checkpoints: values, moments, the best state
        work=forward
        + backward
        + followed
        + Work(
            bytes_moved=passes * rebuilt + settings.steps * 60.0 * trained,
            fixed_seconds=STARTUP_SECONDS,
        )
        + _written(artifact),
    )


def extract_delta(model: ModelShapes, exact_tensors: Collection[str] = ()) -> Estimate:
    """One tensor of each model and one shard."""
    artifact = sizes.delta_size(model, exact_tensors)
    pending = min(artifact.tensor_bytes, sizes.DELTA_SHARD_BYTES)
    largest = 8 * max(math.prod(shape) for shape in model.linears.values())
    host = PACKAGES_BYTES + pending + largest
    return Estimate(
        host_bytes=host,
        staging_bytes=host,
        device_bytes=0,
        mapped_bytes=2 * model.num_bytes,
        artifact=artifact,
        scratch_bytes=0,
        work=Work(bytes_moved=4.0 * model.num_bytes, fixed_seconds=STARTUP_SECONDS)
        + _written(artifact),
    )


def evaluate(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    layers: Mapping[str, CompressedLinear | None] | None = None,
    *,
    delta: bool = False,
) -> Estimate:
    """The model and the original whole, the logits of one window; tasks in their own dtype.

    Args:
        model: The original.
        settings: How.
        texts: Tokens of each task's items, by task.
        layers: Compressed layers of what is evaluated; None for the original itself.
        delta: Whether the layers are a delta that lies on a dense base.
    """
    item = getattr(torch, settings.dtype).itemsize
    task_item = getattr(torch, settings.task_dtype).itemsize
    whole = item * model.num_weights
    packed = 0 if layers is None else sum(_bytes(layer) for layer in layers.values())
    if delta:
        # a dense layer replaces base and delta one by one; the base's file stays mapped
        models = 2 * whole + item * model.linear_weights + packed
    else:
        models = (1 if layers is None else 2) * whole + packed
    logits = settings.length * model.vocabulary * item * (1 if layers is None else 2)
    chunk = 4 * LOGIT_CHUNK * model.vocabulary * (2 if layers is None else 6)
    likelihood = models + logits + chunk
    used = [texts.get(name, TaskText()) for name in settings.tasks]
    longest = max((text.longest_tokens for text in used), default=0.0)
    scores = int(SCORED_REQUESTS * longest * model.vocabulary * (task_item + 8))
    converting = (item + task_item) * model.num_weights
    device = max(likelihood, converting, task_item * model.num_weights + scores)
    work = _evaluation_work(model, settings, texts, layers, delta=delta)
    return Estimate(
        host_bytes=EVALUATION_PACKAGES_BYTES + device,
        staging_bytes=EVALUATION_PACKAGES_BYTES,
        device_bytes=device,
        mapped_bytes=0,
        artifact=sizes.ArtifactSize(0, 100_000),
        scratch_bytes=0,
        work=work,
    )


def _evaluation_work(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str, TaskText],
    layers: Mapping[str, CompressedLinear | None] | None,
    *,
    delta: bool,
) -> Work:
    weights = float(model.num_weights)
    task_item = getattr(torch, settings.task_dtype).itemsize
    kind = {"float32": "fp32_flops", "bfloat16": "bf16_flops"}
    unpacking = sum(dequantize_bytes(x) for x in (layers or {}).values() if x is not None)
    # packed layers that unpack at every token are slow enough to end the measurement early
    forwards = 4 if unpacking > 10.0 * weights else 2 * (settings.decode_tokens + 1)
    one_token = Work(bytes_moved=1.5 * task_item * weights, calls=60.0 * len(model.linears) / 2)
    loaded = Work(bytes_moved=20.0 * weights) * (1 if layers is None else 2)
    speed = (one_token + Work(bytes_moved=unpacking)) * forwards
    tokens = len(settings.corpora) * settings.windows * settings.length
    models = 1 if layers is None else 2
    likelihood = Work(
        bytes_moved=tokens * model.vocabulary * (20.0 if models == 1 else 90.0)
        + unpacking
        + (12.0 * model.linear_weights if delta else 0.0)
    ) + Work(**{kind[settings.dtype]: 2.0 * weights * tokens * models})
    read = written = 0.0
    for name, limit in settings.tasks.items():
        text = texts.get(name, TaskText())
        items = text.items if limit is None else min(limit, text.items)
        read += items * text.requests * text.tokens
        written += -(-items // 64) * text.generated_tokens
    tasks = Work(
        **{kind[settings.task_dtype]: 2.0 * weights * read},
        bytes_moved=read * (model.vocabulary * 12.0 + PASS_BYTES * _features(model)),
    )
    steps = one_token * 2.0 * (written + settings.sample_tokens)
    return (
        loaded + speed + likelihood + tasks + steps + Work(fixed_seconds=EVALUATION_STARTUP_SECONDS)
    )


def _forward(model: ModelShapes, tokens: int, weights: float, autocast: bool) -> Work:
    """Return one forward pass of all blocks; a backward pass is two of them."""
    flops = 2.0 * tokens * weights
    elementwise = PASS_BYTES * tokens * _features(model)
    if autocast:
        return Work(bf16_flops=flops, bytes_moved=elementwise)
    return Work(fp32_flops=flops, bytes_moved=elementwise)


def _features(model: ModelShapes) -> float:
    return float(sum(sum(shape) for shape in model.linears.values()))


def _written(artifact: sizes.ArtifactSize) -> Work:
    return Work(bytes_moved=HASH_BYTES * artifact.num_bytes)


def _block_bytes(model: ModelShapes) -> int:
    return 4 * model.block_weights


def _embedding_bytes(model: ModelShapes) -> int:
    """Return the fp32 bytes of the embedding, where it is stored in another dtype."""
    converted = [t.num_entries for t in model.tensors.values() if t.dtype != torch.float32]
    return 4 * max(converted, default=0)


def _bytes(layer: CompressedLinear | None) -> int:
    return 0 if layer is None else layer.stored_bits() // 8


def _trainable(layer: CompressedLinear | None) -> int:
    return 0 if layer is None else sum(getattr(layer, n).numel() for n in layer.trainable)


def _multiplied(layer: CompressedLinear | None, shape: Collection[int]) -> int:
    """Return the multiply-adds per token of a compressed layer in a forward pass."""
    if isinstance(layer, LowRankLinear):
        return layer.A.numel() + layer.B.numel()
    return math.prod(shape)


def _index_bytes(layer: CompressedLinear | None) -> int:
    """Return the bytes of a codebook's unpacked codes, which are kept while it trains."""
    return 4 * layer.num_vectors if isinstance(layer, CodebookLinear) else 0


def _unpacked_bytes(layer: CompressedLinear | None) -> int:
    """Return what a layer's dense weight takes while it is trained: indices, fp32, bf16."""
    if layer is None or isinstance(layer, LowRankLinear):
        return 0
    return 14 * layer.num_weights


def _rebuild_bytes(layer: CompressedLinear | None) -> float:
    """Return what rebuilding a dense weight moves; scattering gradients of codes is slow."""
    if layer is None or isinstance(layer, LowRankLinear):
        return 0.0
    return 200.0 * layer.num_weights
