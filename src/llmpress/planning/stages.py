"""What one stage needs, as functions of shapes and settings.

Memory is what has to be there at the peak: the imported packages, and the tensors that the stage's
code allocates. Weights that are read from safetensors are mapped: their pages show in the process's
resident size and are dropped by the system when memory runs short, so the stages that walk a model
block by block report them apart (``mapped_bytes``). Evaluation and training use all of them all the
time and count them as memory.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.methods.base import Method, Tunable, Work
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import sizes
from llmpress.planning.costs import knows_layers, layer_work, total
from llmpress.planning.estimates import (
    ACTIVATION_BYTES,
    FORWARD_BYTES,
    PACKAGES_BYTES,
    STARTUP_SECONDS,
    Estimate,
    TaskText,
    block_bytes,
    embedding_bytes,
    forward_work,
    held_bytes,
    layer_bytes,
    num_multiplied,
    num_trainable,
    rebuild_bytes,
    unpacked_bytes,
    written_work,
)
from llmpress.planning.shapes import ModelShapes
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import ADAPTERS, FinetuningSettings, Trains, with_precision
from llmpress.tuning.settings import TuningSettings

PROPAGATE_WINDOWS = 8  # the batch size of BlockWalk.propagate


def calibrate(model: ModelShapes, settings: CalibrationSettings) -> Estimate:
    """One block, its moments, the hidden states of all windows before and after it."""
    windows = settings.num_texts * settings.windows
    tokens = windows * settings.length
    batch = min(windows, PROPAGATE_WINDOWS) * settings.length
    states = 4 * tokens * model.hidden
    moments = 2 * max(sum(4 * n * n for n in block.values()) for block in model.inputs)
    block = block_bytes(model)
    activations = int(FORWARD_BYTES * batch * model.block_features)
    embedding = embedding_bytes(model)
    felt = settings.num_texts * min(settings.sensitivity_windows, settings.windows)
    artifact = sizes.calibration_size(
        model,
        windows,
        settings.num_texts * settings.validation_windows,
        settings.length,
        sensitive=felt > 0,
    )
    squares = sum(n * n for inputs in model.inputs for n in inputs.values())
    gradients = (
        forward_work(model, felt * settings.length, model.linear_weights, settings.autocast) * 4
    )
    work = (
        forward_work(model, tokens, model.linear_weights, settings.autocast)
        + gradients  # twice forward, and back
        + Work(fp32_flops=2.0 * tokens * squares, fixed_seconds=STARTUP_SECONDS)
        + written_work(artifact)
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


def compress(model: ModelShapes, method: Method) -> Estimate:
    """One layer's work space, the compressed layers of one block, one shard of the writer.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    layers = sizes.planned_layers(model, method)
    artifact = sizes.compressed_model_size(model, layers, exact=knows_layers(method))
    pending = min(artifact.tensor_bytes, sizes.MODEL_SHARD_BYTES)
    largest_rest = max(t.num_entries * 2 for t in model.tensors.values())  # an embedding, as bf16
    return _compression(
        model, method, layers, artifact, max(pending, largest_rest), model.num_bytes
    )


def compress_delta(
    model: ModelShapes,
    method: Method,
    exact_tensors: Collection[str] = (),
    sequential: CalibrationSettings | None = None,
) -> Estimate:
    """The same for the delta of a fine-tuned model of this layout.

    Args:
        model: The fine-tuned model.
        method: How its delta is compressed.
        exact_tensors: What is kept exactly.
        sequential: The calibration whose windows run through the model in true-sequential order:
            one more block and its hidden states, and each block about four times.

    Raises:
        ValueError: A budget that the model or a layer cannot meet.
    """
    layers = sizes.planned_layers(model, method)
    artifact = sizes.compressed_delta_size(
        model, layers, exact=knows_layers(method), exact_tensors=exact_tensors
    )
    pending = min(artifact.tensor_bytes, sizes.DELTA_SHARD_BYTES)
    mapped = sizes.delta_size(model, exact_tensors).tensor_bytes
    alone = _compression(model, method, layers, artifact, pending, mapped)
    if sequential is None:
        return alone
    tokens = sequential.num_texts * sequential.windows * sequential.length
    batch = min(PROPAGATE_WINDOWS, tokens // sequential.length) * sequential.length
    states = 4 * tokens * model.hidden
    device = block_bytes(model) + int(FORWARD_BYTES * batch * model.block_features)
    return replace(
        alone,
        host_bytes=alone.host_bytes + 2 * states + device,
        staging_bytes=alone.staging_bytes + 2 * states,
        device_bytes=alone.device_bytes + device,
        mapped_bytes=alone.mapped_bytes + model.num_bytes,
        work=alone.work + forward_work(model, tokens, model.linear_weights, autocast=True) * 4,
    )


def _compression(
    model: ModelShapes,
    method: Method,
    layers: Mapping[str, CompressedLinear | None],
    artifact: sizes.ArtifactSize,
    pending: int,
    mapped: int,
) -> Estimate:
    plan = sizes.planned_methods(model, method)
    distinct = {
        (settings, model.linears[name]) for name, settings in plan.items() if settings is not None
    }
    # recording a layer compares three fp32 matrices in fp64 and two products with the moment
    device = max((m.workspace_bytes(shape) for m, shape in distinct), default=0)
    record = max(
        32 * math.prod(shape) + 4 * shape.in_features**2 for shape in model.linears.values()
    )
    works = {key: layer_work(*key) for key in distinct}
    work = total([works[m, model.linears[n]] for n, m in plan.items() if m is not None])
    scratch = sizes.checkpoint_bytes(layers)
    block = max(sum(layer_bytes(layers[name]) for name in linears) for linears in model.blocks)
    return Estimate(
        host_bytes=PACKAGES_BYTES + pending + block + max(device, record),
        staging_bytes=PACKAGES_BYTES + pending + block + record,
        device_bytes=device,
        mapped_bytes=mapped,
        artifact=artifact,
        scratch_bytes=scratch,
        work=work
        + written_work(artifact)
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
    layers = sizes.planned_layers(model, method)
    own = [[layers[name] for name in linears] for linears in model.blocks]
    walked = 1 + max(
        (i for i, block in enumerate(own) if sum(map(num_trainable, block))), default=-1
    )
    artifact = sizes.compressed_model_size(model, layers, exact=knows_layers(method), blocks=walked)
    terms = method.loss_terms()
    student_chains = len({term.student_input for term in terms})
    targets = len({"teacher"} | {term.teacher_input for term in terms})
    texts, length = calibration.num_texts, calibration.length
    trained, held_out = texts * calibration.windows, texts * calibration.validation_windows
    batch = min(settings.batch_size, trained) * length
    states = 4 * (trained + held_out) * length * model.hidden

    parameters = max(sum(num_trainable(layer) for layer in block) for block in own)
    unpacked = max(sum(unpacked_bytes(layer) for layer in block) for block in own)
    activations = int(ACTIVATION_BYTES * batch * model.block_features) * student_chains
    propagating = int(
        FORWARD_BYTES * min(trained + held_out, PROPAGATE_WINDOWS) * length * model.block_features
    )
    # fp32 master, gradient, two moments, the best, the stored and the current state
    training = 28 * parameters + unpacked * student_chains + activations
    device = 2 * block_bytes(model) + max(training, propagating)
    chains = (2 + targets + 1) * states
    pending = min(artifact.tensor_bytes, sizes.MODEL_SHARD_BYTES)
    tokens = {
        "propagate": (trained + held_out) * length * (targets + 1),
        "train": trained * length * settings.epochs * student_chains,
        "judge": held_out * length * (settings.epochs + 1) * student_chains,
    }
    steps = settings.epochs * -(-trained // settings.batch_size)
    passes = steps * 3 + (settings.epochs + 1) + (trained + held_out) // PROPAGATE_WINDOWS + 1
    student_weights = sum(num_multiplied(layers[n], s) for n, s in model.linears.items())
    forwards = (
        forward_work(model, tokens["propagate"], model.linear_weights, settings.autocast)
        + forward_work(model, tokens["judge"], student_weights, settings.autocast)
        + forward_work(model, tokens["train"], student_weights, settings.autocast) * 3
    )
    work = (
        forwards * (walked / len(model.blocks))
        + Work(
            bytes_moved=passes * student_chains * sum(rebuild_bytes(x) for x in layers.values())
            + steps * 60.0 * sum(num_trainable(layer) for layer in layers.values()),
            fixed_seconds=STARTUP_SECONDS,
        )
        + written_work(artifact)
    )
    return Estimate(
        host_bytes=PACKAGES_BYTES + chains + pending + max(device, embedding_bytes(model)),
        staging_bytes=PACKAGES_BYTES + chains + pending,
        device_bytes=max(device, embedding_bytes(model)),
        mapped_bytes=model.num_bytes + artifact.tensor_bytes,
        artifact=artifact,
        scratch_bytes=2 * sum(num_trainable(layer) for layer in layers.values()),
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
    step = forward_work(model, int(tokens), linear, autocast=True) * 3 + Work(
        bf16_flops=6.0 * head * tokens / 2, bytes_moved=70.0 * linear
    )
    return Estimate(
        host_bytes=PACKAGES_BYTES + device,
        staging_bytes=PACKAGES_BYTES,
        device_bytes=device,
        mapped_bytes=0,
        artifact=artifact,
        scratch_bytes=0,
        work=step * steps + written_work(artifact) + Work(fixed_seconds=STARTUP_SECONDS),
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
    trained = adapters if trains in ADAPTERS else sum(num_trainable(x) for x in layers.values())
    held = {
        "lora": (6 if autocast else 4) * linear,  # and the copies that the backward pass needs
        "qlora": sizes.nf4_bytes(model),
        "compressed": sum(layer_bytes(layer) + held_bytes(layer) for layer in layers.values()),
        "delta": (6 if autocast else 4) * linear
        + sum(layer_bytes(layer) for layer in layers.values()),
    }[trains]
    unpacked = max((unpacked_bytes(layer) for layer in layers.values()), default=0)
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
    forward = forward_work(model, int(seen + judged), linear, autocast) + Work(
        **{kind: head * (seen + judged)}
    )
    backward = forward_work(model, int(seen), linear, autocast) * 2 + Work(
        **{kind: 3 * head * seen}
    )
    followed = forward if distills else Work()
    passes = 2 * settings.steps + looks * settings.held_out / settings.batch_size
    rebuilt = sum(rebuild_bytes(layer) for layer in layers.values())
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
        + written_work(artifact),
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
        + written_work(artifact),
    )
