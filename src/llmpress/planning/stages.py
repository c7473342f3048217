"""What one stage needs, as functions of a model's shapes and the stage's settings.

Memory is what has to be there at the peak: the imported packages, and the tensors that the stage's
code holds. Files of weights are mapped, read or written: their pages show in the process's resident
size and are dropped by the system when memory runs short, so they do not count.

Work is one number that a stage's seconds grow with: operations of matrix products, or what takes as
long. A budget that the model or a layer cannot meet is a ValueError of every stage with a method.

Everywhere ``model`` is the original (of deltas the fine-tuned one), ``method`` that of compressed
layers, None without any, and ``text`` that of a training item, None for windows of a corpus.
"""

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.core.kinds import KindName
from llmpress.evaluation import likelihood, tasks
from llmpress.evaluation.settings import DType, EvaluationSettings
from llmpress.methods.base import Method, Tunable
from llmpress.methods.registry import method_name
from llmpress.models.walk import PROPAGATE_TOKENS, PROPAGATE_WINDOWS
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import shapes
from llmpress.planning.shapes import ModelShapes, empty, planned_layers
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import FinetuningSettings, TrainingSettings, Trains
from llmpress.tuning.settings import TuningSettings

PACKAGES_BYTES = 440_000_000
"""Resident after importing Python, torch, transformers and llmpress and opening a tokenizer:
437 MB measured (torch 2.13 CPU build, transformers 5.23); a CUDA build takes more."""
EVALUATION_PACKAGES_BYTES = 640_000_000
"""The same with lm-eval and datasets (100 MB measured), and what the allocator keeps (100 MB)."""
ACTIVATION_BYTES, FORWARD_BYTES = 9, 4
"""Per token, and per input and output of a block's linears: kept for the backward pass (two fp32
and some bf16 copies; a block of 10,176 of them keeps 95 kB a token), and without gradients."""
ITEM_BYTES: dict[DType, int] = {"float32": 4, "bfloat16": 2}
LOSS_BYTES = 20
"""Per prediction and word while its loss has a gradient: five fp32 copies, measured."""
NF4_BYTES = 0.516
"""Of a weight in 4 bits, its share of the doubly quantized scales included."""
STEP_TOKENS = 10
"""Tokens at once that take as long as a single one, which reads all weights too."""


class TaskText(NamedTuple):
    """What the items of a task make a model read and write; by default those of a published one."""

    tokens: float = 240.0  # of an item: of all its requests, one for each answer
    longest: float = 150.0  # of the longest request
    generated: int = 0  # tokens per item; 0 where answers are scored


GENERATED_TASK = TaskText(48, 67, 64)


@dataclass(frozen=True)
class Need:
    """What one stage needs."""

    work: float  # what its time is proportional to
    artifact_bytes: int  # of the weights that stay
    device_bytes: int  # memory of the device that computes
    host_bytes: int = PACKAGES_BYTES  # memory of the computer on top, also when a GPU computes
    by: str = ""  # the method, or what is trained, where the time depends on it


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
        host_bytes=PACKAGES_BYTES + 4 * max(squares) + 3 * 4 * windows * length * model.hidden,
    )


def compress(model: ModelShapes, method: Method) -> Need:
    """One layer's work space, the compressed layers of one block, one tensor that is written."""
    layers = planned_layers(model, method)
    works = Counter((own, model.linears[n]) for n, (own, _) in layers.items())
    # recording a layer compares three fp32 matrices in fp64 and two products with the moment
    record = max(32 * s.num_weights + 4 * s.in_features**2 for s in model.linears.values())
    return Need(
        work=sum(count * own.work(shape).operations for (own, shape), count in works.items()),
        artifact_bytes=shapes.model_bytes(model, method),
        device_bytes=max([record, *(own.workspace_bytes(shape) for own, shape in works)]),
        host_bytes=PACKAGES_BYTES + max(_stored(model, method)) + 2 * model.largest,
        by=method_name(method),
    )


def compress_delta(model: ModelShapes, method: Method, exact: Collection[str] = ()) -> Need:
    """The same for a delta; ``exact`` names what fine-tuning changed outside the linears."""
    return replace(compress(model, method), artifact_bytes=shapes.delta_bytes(model, method, exact))


def finetune(
    model: ModelShapes, settings: TuningSettings, method: Method, calibration: CalibrationSettings
) -> Need:
    """Two blocks, both chains of hidden states, gradients and optimizer states of one block.

    Raises:
        ConfigError: A method that cannot be finetuned.
    """
    if not isinstance(method, Tunable):
        raise ConfigError(f"{type(method).__name__} has nothing to finetune; leave it out")
    trainable, terms = _trainable(model, method), method.loss_terms()
    # indices, fp32 and bf16 of the dense weights
    unpacked = _sums(model, method, lambda own: 14 * own.num_weights * own.rebuilt_in_training)
    walked = 1 + max((i for i, count in enumerate(trainable) if count), default=-1)
    students = len({term.student_input for term in terms})
    teachers = len({"teacher"} | {term.teacher_input for term in terms})
    length, trained = calibration.length, calibration.num_texts * calibration.windows
    windows = trained + calibration.num_texts * calibration.validation_windows
    features = min(settings.batch_size, trained) * length * model.block_features
    # fp32 master, gradient, two moments, the best, the stored and the current state
    learning = 28 * max(trainable) + 4 * model.block_weights
    learning += students * (max(unpacked) + ACTIVATION_BYTES * features)
    passes = windows * (teachers + 1) + 4 * students * settings.epochs * trained
    states = (3 + teachers) * 4 * windows * length * model.hidden
    return Need(
        work=2.0 * length * passes * model.linear_weights * walked / len(model.blocks),
        artifact_bytes=shapes.model_bytes(model, method),
        device_bytes=4 * model.block_weights + max(learning, _walked_bytes(model, windows, length)),
        host_bytes=PACKAGES_BYTES + states + 2 * model.largest,
        by=method_name(method),
    )


def train(
    model: ModelShapes,
    settings: FinetuningSettings | TrainingSettings,
    trains: Trains | Literal[""],
    text: TaskText | None = None,
    method: Method | None = None,
) -> Need:
    """The whole model, activations of all blocks, gradients and optimizer of what ``trains``.

    Nothing said, that is all linears of a model.
    """
    longest, learnt = (settings.length, 1.0) if text is None else (text.longest, 0.5)  # the answer
    tokens, head = settings.batch_size * longest, model.hidden * model.vocabulary
    distills = getattr(settings, "objective", "") == "distillation"
    fp32 = (settings.precision or ("float32" if trains == "delta" else "")) == "float32"
    copies = 0 if fp32 else 2  # bytes of a weight's, for products and the backward pass
    dense = (4 + copies) * model.linear_weights
    rest = model.num_weights - model.linear_weights
    state = 16  # of a number that trains: fp32 value, gradient, two moments
    if isinstance(settings, TrainingSettings):
        trained, held, state = model.linear_weights, dense, 12
        made = shapes.files_bytes([model.stored_as(torch.float32).tensors])
    elif method is None:
        quantized, rank = trains == "qlora", settings.rank
        factors = {
            f"base_model.model.{name}.lora_{key}.weight": empty(*sides, dtype=torch.bfloat16)
            for name, (out_features, in_features) in model.linears.items()
            for key, sides in (("A", (rank, in_features)), ("B", (out_features, rank)))
        }
        trained = rank * sum(map(sum, model.linears.values()))
        held = int(NF4_BYTES * model.linear_weights) if quantized else dense
        made = shapes.files_bytes([factors]) + (held + 2 * rest if quantized else 0)
    else:
        trained, held = sum(_trainable(model, method)), sum(_stored(model, method))
        made = (shapes.delta_bytes if trains == "delta" else shapes.model_bytes)(model, method)
        unpacked = _sums(model, method, CompressedLinear.held_bytes)
        held += dense if trains == "delta" else sum(unpacked)
    logits = int(16 * min(CHUNK, tokens * learnt) * model.vocabulary)
    teacher = (4 - copies) * model.num_weights + logits if distills else 0
    kept = int(ACTIVATION_BYTES * tokens * model.block_features) * len(model.blocks)
    passes = (4 if distills else 3) * settings.steps * tokens
    return Need(
        work=2.0 * passes * (model.linear_weights + learnt * head),
        artifact_bytes=made,
        device_bytes=4 * rest + copies * head + held + state * trained + kept + logits + teacher,
        by=trains,
    )


def extract_delta(model: ModelShapes, exact: Collection[str] = ()) -> Need:
    """One tensor of each model; never on a GPU."""
    made = shapes.delta_bytes(model, None, exact)
    largest = max(shape.num_weights for shape in model.linears.values())
    return Need(float(model.num_bytes + made), made, 0, PACKAGES_BYTES + 8 * largest)


def reference(model: ModelShapes, settings: EvaluationSettings) -> Need:
    """The original whole, its linears and its head once more in blocks; its last states stay."""
    tokens = len(settings.corpora) * settings.windows * settings.length
    states = tokens * ITEM_BYTES[settings.dtype] * model.hidden
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact_bytes=states + 4 * tokens,
        device_bytes=_opened_bytes(model, settings.dtype) + 8 * likelihood.CHUNK * model.vocabulary,
        host_bytes=PACKAGES_BYTES + 2 * states,
    )


def evaluate(
    model: ModelShapes,
    settings: EvaluationSettings,
    texts: Mapping[str | None, TaskText],
    kind: KindName = "model",
    method: Method | None = None,
) -> Need:
    """The model and the original whole; tasks, each with its text, in their own dtype."""
    item, tokens = ITEM_BYTES[settings.dtype], STEP_TOKENS * float(settings.sample_tokens)
    held = item * model.num_weights + (sum(_stored(model, method)) if method else 0)
    if kind != "model":  # what a model predicts is its reference
        held += _opened_bytes(model, settings.dtype)
        tokens += len(settings.corpora) * settings.windows * settings.length
    if kind == "delta":  # a dense layer replaces base and delta one by one; the base stays mapped
        held += item * model.linear_weights
    for name, limit in settings.tasks.items():
        text = texts[name]
        items = limit or 1000  # of all there is no number yet
        steps = -(-items // tasks.GENERATED) * text.generated
        tokens += items * text.tokens + STEP_TOKENS * steps
    task_item = ITEM_BYTES[settings.task_dtype]
    longest = tasks.SCORED * max((texts[name].longest for name in settings.tasks), default=0.0)
    asked = task_item * model.num_weights + int((task_item + 8) * longest) * model.vocabulary
    return Need(
        work=2.0 * model.num_weights * tokens,
        artifact_bytes=0,
        device_bytes=max(held + 24 * likelihood.CHUNK * model.vocabulary, asked),
        host_bytes=EVALUATION_PACKAGES_BYTES,
    )


def _sums(
    model: ModelShapes, method: Method, amount: Callable[[CompressedLinear], int]
) -> list[int]:
    """Return what the compressed layers of each block add up to."""
    layers = planned_layers(model, method)
    return [sum(amount(layers[n][1]) for n in block if n in layers) for block in model.blocks]


def _stored(model: ModelShapes, method: Method) -> list[int]:
    return _sums(model, method, lambda layer: layer.stored_bits() // 8)


def _trainable(model: ModelShapes, method: Method) -> list[int]:
    return _sums(model, method, lambda own: sum(getattr(own, n).numel() for n in own.trainable))


def _opened_bytes(model: ModelShapes, dtype: DType) -> int:
    """Return the bytes of a model and, in blocks, of its linears and its head."""
    head = model.hidden * model.vocabulary
    return ITEM_BYTES[dtype] * (model.num_weights + model.linear_weights + head)


def _walked_bytes(model: ModelShapes, windows: int, length: int) -> int:
    """Return the bytes of a block in fp32 and of what it computes for as many windows as fit."""
    batch = min(windows, PROPAGATE_WINDOWS, max(1, PROPAGATE_TOKENS // length))
    block = 4 * model.block_weights + FORWARD_BYTES * batch * length * model.block_features
    return max(block, 4 * model.largest)  # the embeddings
