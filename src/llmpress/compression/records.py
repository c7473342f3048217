"""What is recorded of each compressed layer, and of all together."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from llmpress.nn.layers import CompressedLinear
from llmpress.numerics.linalg import relative_output_error, relative_weight_error


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer.

    Attributes:
        name: Its full name in the model.
        kind: Storage format, ``dense`` where the layer was left as it is.
        settings: The layer's own constructor arguments: widths, ranks, numbers of entries.
        shape: ``[out, in]``.
        stored_bits: Every stored bit.
        bits_per_weight: ``stored_bits`` over the number of weights.
        relative_weight_error: ``‖W - Ŵ‖² / ‖W‖²``.
        relative_output_error: ``E‖(W - Ŵ) x‖² / E‖W x‖²`` over the calibration text; None without
            one.
        seconds: Time the method took.
        notes: What the method says of how it went, such as the dampening a factorization took.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    shape: tuple[int, int]
    stored_bits: int
    bits_per_weight: float
    relative_weight_error: float
    relative_output_error: float | None
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)

    def as_entry(self) -> dict[str, Any]:
        """Return the layer's entry in layers.json; without notes where there are none."""
        entry = asdict(self)
        return entry if self.notes else {k: v for k, v in entry.items() if k != "notes"}


def totals(records: Sequence[LayerRecord], model_weights: int) -> dict[str, float]:
    """Return the true size over all compressible layers, those that were left dense included."""
    weights = sum(r.shape[0] * r.shape[1] for r in records)
    bits = sum(r.stored_bits for r in records)
    return {
        "compressed_weights": weights,
        "stored_bits": bits,
        "bits_per_weight": bits / weights if weights else 0.0,
        "model_weights": model_weights,
    }


def layer_record(
    name: str, weight: Tensor, layer: CompressedLinear | None, moment: Tensor | None, seconds: float
) -> LayerRecord:
    """Measure a layer against its weight ``[out, in]``; ``layer`` None means left dense."""
    if layer is None:
        bits = weight.numel() * 16
        return LayerRecord(
            name,
            "dense",
            {},
            _pair(weight),
            bits,
            16.0,
            0.0,
            None if moment is None else 0.0,
            seconds,
        )
    approximation = layer.dequantize().detach()
    return LayerRecord(
        name=name,
        kind=layer.kind,
        settings=layer.spec(),
        shape=_pair(weight),
        stored_bits=layer.stored_bits(),
        bits_per_weight=layer.stored_bits() / layer.num_weights,
        relative_weight_error=relative_weight_error(weight, approximation),
        relative_output_error=(
            None if moment is None else relative_output_error(weight, approximation, moment)
        ),
        seconds=seconds,
        notes=dict(layer.notes),
    )


def _pair(weight: Tensor) -> tuple[int, int]:
    return weight.shape[0], weight.shape[1]
