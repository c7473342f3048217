"""What stages need alike: memory of packages and layers, work of a pass and of writing."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import TypeGuard

import torch

from llmpress.methods.base import Work
from llmpress.nn.layers import CompressedLinear
from llmpress.planning import sizes
from llmpress.planning.shapes import ModelShapes

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


def forward_work(model: ModelShapes, tokens: int, weights: float, autocast: bool) -> Work:
    """Return one forward pass of all blocks; a backward pass is two of them."""
    flops = 2.0 * tokens * weights
    elementwise = PASS_BYTES * tokens * num_features(model)
    if autocast:
        return Work(bf16_flops=flops, bytes_moved=elementwise)
    return Work(fp32_flops=flops, bytes_moved=elementwise)


def num_features(model: ModelShapes) -> float:
    """Return how many numbers a token brings into all linears and out of them."""
    return float(sum(sum(shape) for shape in model.linears.values()))


def written_work(artifact: sizes.ArtifactSize) -> Work:
    """Return the work of writing an artifact and taking its SHA-256."""
    return Work(bytes_moved=HASH_BYTES * artifact.num_bytes)


def block_bytes(model: ModelShapes) -> int:
    """Return the fp32 bytes of the largest block."""
    return 4 * model.block_weights


def embedding_bytes(model: ModelShapes) -> int:
    """Return the fp32 bytes of the embedding, where it is stored in another dtype."""
    converted = [t.num_entries for t in model.tensors.values() if t.dtype != torch.float32]
    return 4 * max(converted, default=0)


def layer_bytes(layer: CompressedLinear | None) -> int:
    """Return the bytes of a compressed layer, 0 for a dense one."""
    return 0 if layer is None else layer.stored_bits() // 8


def num_trainable(layer: CompressedLinear | None) -> int:
    """Return how many parameters of a compressed layer train, 0 for a dense one."""
    return 0 if layer is None else sum(getattr(layer, n).numel() for n in layer.trainable)


def num_multiplied(layer: CompressedLinear | None, shape: Collection[int]) -> int:
    """Return the multiply-adds per token of a linear, compressed or not, in a forward pass."""
    return math.prod(shape) if layer is None else layer.multiply_adds()


def held_bytes(layer: CompressedLinear | None) -> int:
    """Return the bytes of what a compressed layer keeps unpacked while it trains."""
    return 0 if layer is None else layer.held_bytes()


def unpacked_bytes(layer: CompressedLinear | None) -> int:
    """Return what a layer's dense weight takes while it is trained: indices, fp32, bf16."""
    return 14 * layer.num_weights if _is_rebuilt(layer) else 0


def rebuild_bytes(layer: CompressedLinear | None) -> float:
    """Return what rebuilding a dense weight moves; scattering gradients of codes is slow."""
    return 200.0 * layer.num_weights if _is_rebuilt(layer) else 0.0


def _is_rebuilt(layer: CompressedLinear | None) -> TypeGuard[CompressedLinear]:
    return layer is not None and layer.rebuilt_in_training
