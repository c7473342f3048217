"""layers.json: what became of each layer and block of an artifact, and its true size.

No other module knows the file's name or how its content is laid out. It stands at the bottom as it
needs files alone: evaluation, export and report read it without a need of what compresses, so their
stages do not run again when that changes. A key that a newer version added is passed over; one that
is missing or of another type is an error.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from llmpress.core.artifacts import read_json, write_json
from llmpress.core.errors import ArtifactError

DENSE = "dense"
"""Kind of a layer that was left as it is."""

_FILE = "layers.json"
_ABSENT_WITHOUT_VALUE = ("notes", "method", "allocation", "exact_bytes")


@dataclass(frozen=True)
class LayerRecord:
    """What became of one linear layer.

    Attributes:
        name: Its full name in the model.
        kind: Storage format, `DENSE` where the layer was left as it is.
        settings: The layer's own constructor arguments: widths, ranks, numbers of entries.
        shape: ``[out, in]``.
        stored_bits: Every stored bit.
        bits_per_weight: ``stored_bits`` over the number of weights.
        relative_weight_error: ``‖W - Ŵ‖² / ‖W‖²``; None after finetuning.
        relative_output_error: ``E‖(W - Ŵ) x‖² / E‖W x‖²`` over the calibration text; None without
            one and after finetuning.
        seconds: Time the method took.
        notes: What the method says of how it went, such as the dampening a factorization took.
        method: Of a delta: the method's name.
        allocation: What the method gave it, numbers by name. They follow from kind, settings and
            shape, so that they stand in an evaluation's details and not in an artifact.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    shape: tuple[int, int]
    stored_bits: int
    bits_per_weight: float
    relative_weight_error: float | None
    relative_output_error: float | None
    seconds: float
    notes: dict[str, float] = field(default_factory=dict)
    method: str | None = None
    allocation: dict[str, float] = field(default_factory=dict)


@dataclass
class BlockRecord:
    """What finetuning did to one block.

    Attributes:
        index: Which block.
        loss_before: Loss on the held-out windows with the block as it was compressed.
        loss_after: The same with the block as it is stored now.
        kept: Whether finetuning lowered it; otherwise the block stayed as it was.
        train_loss: Mean training loss of each epoch.
        validation_loss: Held-out loss after each epoch.
        seconds: Time for this block.
    """

    index: int
    loss_before: float
    loss_after: float = 0.0
    kept: bool = False
    train_loss: list[float] = field(default_factory=list)
    validation_loss: list[float] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Totals:
    """True size over all layers that a method was given, those that were left dense included.

    Attributes:
        compressed_weights: How many weights these layers have.
        stored_bits: Every bit stored of them.
        bits_per_weight: The second over the first.
        model_weights: Weights of the whole original model, embeddings included.
        exact_bytes: Of a delta: bytes of the tensors that are kept exactly.
    """

    compressed_weights: int
    stored_bits: int
    bits_per_weight: float
    model_weights: int
    exact_bytes: int | None = None


@dataclass(frozen=True)
class Records:
    """All that is recorded of an artifact.

    Attributes:
        layers: One for each linear layer of the decoder blocks; of a delta, for each that changed.
        totals: Their size.
        blocks: After finetuning block by block: one for each block; otherwise None, of a delta
            that was not trained further empty.
    """

    layers: tuple[LayerRecord, ...]
    totals: Totals
    blocks: tuple[BlockRecord, ...] | None = None

    @property
    def seconds(self) -> float:
        """Time that the method took for all layers."""
        return sum(layer.seconds for layer in self.layers)

    def finetuned(self, blocks: Sequence[BlockRecord] | None = None) -> "Records":
        """Return the records of the same layers with other values: their errors are unknown."""
        layers = tuple(
            replace(layer, relative_weight_error=None, relative_output_error=None)
            for layer in self.layers
        )
        return Records(layers, self.totals, None if blocks is None else tuple(blocks))

    def content(self) -> dict[str, Any]:
        """Return the content of the file, JSON-representable."""
        parts = {
            "layers": [entry(layer) for layer in self.layers],
            "totals": entry(self.totals),
            "blocks": None if self.blocks is None else [asdict(block) for block in self.blocks],
        }
        of_delta = self.totals.exact_bytes is not None
        order = ("layers", "blocks", "totals") if of_delta else ("layers", "totals", "blocks")
        return {key: parts[key] for key in order if parts[key] is not None}


def total_size(
    layers: Sequence[LayerRecord], model_weights: int, exact_bytes: int | None = None
) -> Totals:
    """Return the size over all layers; arguments as in `Totals`."""
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    bits = sum(layer.stored_bits for layer in layers)
    return Totals(weights, bits, bits / weights if weights else 0.0, model_weights, exact_bytes)


def has_records(folder: Path) -> bool:
    """Whether an artifact holds records: compressed models and compressed deltas do."""
    return (folder / _FILE).is_file()


def read_records(folder: Path) -> Records:
    """Read the records of an artifact.

    Raises:
        ArtifactError: It holds none, or damaged ones.
    """
    return parse_records(read_json(folder / _FILE), folder / _FILE)


def parse_records(content: Any, where: Path | str) -> Records:
    """Return the records that `Records.content` gave.

    Args:
        content: What was read.
        where: What it was read from, for the message.

    Raises:
        ArtifactError: A key is missing or of another type.
    """
    try:
        records: Records = TypeAdapter(Records).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise ArtifactError(f"{where}: damaged ({reason}); make the artifact again") from None
    return records


def write_records(folder: Path, records: Records) -> None:
    """Write the records into an artifact's folder."""
    write_json(folder / _FILE, records.content())


def entry(record: LayerRecord | Totals) -> dict[str, Any]:
    """Return a part of the content; what not every artifact has is left out where it is absent."""
    return {
        key: value
        for key, value in asdict(record).items()
        if key not in _ABSENT_WITHOUT_VALUE or value not in (None, {})
    }
