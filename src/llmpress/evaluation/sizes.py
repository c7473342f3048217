"""True size of an artifact, and what it cost to make it, read from its folder."""

import math
from pathlib import Path
from typing import Any

from llmpress.core.artifacts import PEER, PROVENANCE, folder_bytes, read_json, read_provenance
from llmpress.core.errors import ArtifactError
from llmpress.core.records import Totals, has_records, read_records
from llmpress.evaluation.metrics import Cost, Size
from llmpress.models.adapters import adapter_sizes, is_adapter
from llmpress.models.checkpoints.delta_files import HEADER, DeltaFolder
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.models.checkpoints.files import Checkpoint, linear_bits

BF16_BYTES = 2


def model_size(folder: Path) -> Size:
    """Return the size of a model that is stored as it is."""
    checkpoint = Checkpoint(folder)
    weights, bits = linear_bits(checkpoint)
    model_weights = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    return _size(folder, weights, bits, model_weights, BF16_BYTES * model_weights)


def compressed_size(folder: Path) -> Size:
    """Return the size of a compressed model, measured against the whole model in bf16."""
    records = layer_records(folder)
    if records is None:
        raise ArtifactError(f"{folder}: holds no compressed model; compress makes one")
    totals = records.totals
    return _recorded_size(folder, totals, BF16_BYTES * totals.model_weights)


def trained_size(folder: Path, original: Path) -> Size:
    """Return the size of what was finetuned end to end; an adapter's with the model it needs."""
    if (folder / HEADER).is_file():
        return delta_size(folder)
    if not is_adapter(folder):
        return compressed_size(folder)
    sizes = adapter_sizes(folder, original)
    weights, bits, stored = sizes["linear_weights"], sizes["linear_bits"], sizes["model_bytes"]
    return Size(
        bits_per_weight=bits / weights,
        compressed_weights=weights,
        stored_bits=bits,
        model_weights=sizes["model_weights"],
        model_bytes=stored,
        ratio=BF16_BYTES * sizes["model_weights"] / stored,
    )


def delta_size(folder: Path) -> Size:
    """Return the size of a compressed delta, measured against the same delta in bf16."""
    totals = read_records(folder).totals
    delta = DeltaFolder(folder, "compressed_delta")
    exact = sum(delta.header["exact"].values())  # weights of the tensors that are kept as they are
    return _recorded_size(folder, totals, BF16_BYTES * (totals.compressed_weights + exact))


def peer_size(folder: Path) -> Size:
    """Return the size of what another tool made: as it packs it, not of the dense weights."""
    made = read_json(folder / PEER)
    weights, bits, stored = made["compressed_weights"], made["stored_bits"], made["model_bytes"]
    return Size(
        bits_per_weight=bits / weights,
        compressed_weights=weights,
        stored_bits=bits,
        model_weights=made["model_weights"],
        model_bytes=stored,
        ratio=BF16_BYTES * made["model_weights"] / stored,
    )


def cost(folder: Path) -> Cost:
    """Return what making the artifact took; zeros for a model that was only fetched or trained."""
    provenance = origin(folder)
    seconds = float(provenance.get("seconds", 0))
    memory = int(provenance.get("peak_memory_bytes", 0))
    stage = provenance.get("stage")
    if stage in ("finetune", "train"):
        return Cost(
            compress_seconds=read_records(folder).seconds if has_records(folder) else 0.0,
            compress_peak_memory_bytes=0,
            finetune_seconds=seconds,
            finetune_peak_memory_bytes=memory,
        )
    if stage not in ("compress", "compress_delta", "peer"):
        seconds, memory = 0.0, 0
    return Cost(
        compress_seconds=seconds,
        compress_peak_memory_bytes=memory,
        finetune_seconds=0.0,
        finetune_peak_memory_bytes=0,
    )


def _recorded_size(folder: Path, totals: Totals, reference_bytes: int) -> Size:
    weights, bits = totals.compressed_weights, totals.stored_bits
    return _size(folder, weights, bits, totals.model_weights, reference_bytes)


def origin(folder: Path) -> dict[str, Any]:
    """Return an artifact's provenance, nothing for a folder that llmpress did not make."""
    return read_provenance(folder) if (folder / PROVENANCE).is_file() else {}


def _size(folder: Path, weights: int, bits: int, model_weights: int, reference_bytes: int) -> Size:
    stored = folder_bytes(folder)
    return Size(
        bits_per_weight=bits / weights if weights else 0.0,
        compressed_weights=weights,
        stored_bits=bits,
        model_weights=model_weights,
        model_bytes=stored,
        ratio=reference_bytes / stored,
    )
