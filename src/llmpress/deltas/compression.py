"""Compress an extracted delta layer by layer into a folder that `load_delta` puts on its base."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llmpress.calibration.files import check_calibration, load_statistics, load_windows
from llmpress.compression.layers import compress_layers
from llmpress.core.artifacts import artifact_folder, fingerprint, read_provenance
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.records import LayerRecord, Records, total_size, write_records
from llmpress.core.resume import SCRATCH, BlockStore
from llmpress.deltas.sequential import SequentialStatistics
from llmpress.methods.base import InputStatistics, Method, Shape
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES, DeltaFolder, DeltaWriter
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import layer_entry


def compress_delta(
    delta: DeltaFolder,
    method: Method,
    statistics: Mapping[str, InputStatistics] | None,
    folder: Path,
    *,
    method_name: str,
    seed: int,
    store: BlockStore,
    sequential: SequentialStatistics | None = None,
    device: torch.device | None = None,
    max_shard_bytes: int = DELTA_SHARD_BYTES,
) -> None:
    """Compress every changed linear layer; carry what is kept exactly over as it is.

    Args:
        delta: What ``extract_delta`` wrote.
        method: How each layer's delta is compressed.
        statistics: Input statistics of the fine-tuned model by layer name.
        folder: Existing folder for delta.json, delta.safetensors and layers.json.
        method_name: For the records.
        seed: Same seed, same bytes.
        store: Keeps finished decoder blocks for a rerun.
        sequential: Lets each layer be compressed for the inputs it gets once the layers before it
            are compressed; by default for those of the fine-tuned model.
        device: Where to compute; the CPU by default.
        max_shard_bytes: Size of a shard.

    Raises:
        ConfigError: The method would leave a layer uncompressed.
        NumericalError: A delta that cannot be compressed; names the layer.
    """
    shapes = {name: Shape(*shape) for name, shape in delta.header["linears"].items()}
    model_weights = int(delta.header["model_weights"])
    plan = method.plan(shapes, model_weights)
    if dense := [name for name, settings in plan.items() if settings is None]:
        raise ConfigError(
            f"{method_name} leaves {len(dense)} layers ({dense[0]} first) uncompressed, which "
            "cannot be stored in a delta; choose settings that compress every layer"
        )
    writer = DeltaWriter(folder, max_shard_bytes)
    layers: dict[str, dict[str, Any]] = {}
    records: list[LayerRecord] = []
    for name, layer, record in compress_layers(
        _by_block(shapes),
        delta,
        method,
        statistics,
        model_weights=model_weights,
        seed=seed,
        device=device or torch.device("cpu"),
        store=store,
        sequential=sequential,
    ):
        if layer is None:
            raise ConfigError(
                f"{name}: {method_name} would leave this delta dense, which is not stored; choose "
                "settings that compress every layer"
            )
        for key, tensor in layer.tensors().items():
            writer.add(f"{name}.{key}", tensor)
        layers[name] = {**layer_entry(layer.kind, layer.spec()), "shape": list(record.shape)}
        records.append(replace(record, method=method_name))
    for name, tensor in delta.exact_tensors():
        writer.add(name, tensor)
    kept = ("base", "finetuned", "exact", "exact_rows", "tie_word_embeddings", "model_weights")
    header = {key: delta.header[key] for key in kept}
    writer.close("compressed_delta", {**header, "layers": layers})
    size = total_size(records, model_weights, delta.exact_bytes())
    write_records(folder, Records(tuple(records), size, blocks=()))


def compress_delta_artifact(
    delta: Path,
    out: Path,
    *,
    method_name: str,
    method: Method,
    calibration: Path | None,
    base: Path | None = None,
    seed: int,
    device: torch.device,
    scratch: Path = SCRATCH,
) -> None:
    """Compress an extracted delta into a folder that `llmpress.load_delta` puts on its base.

    A killed call continues after its last finished block when it is repeated.

    Args:
        delta: What `extract_delta_artifact` wrote.
        out: The artifact to write.
        method_name: Name of the method, for the record.
        method: Its settings.
        calibration: A calibration artifact of the fine-tuned model; None for no statistics.
        base: The model that was fine-tuned: then layers are compressed in true-sequential order,
            each for the inputs that it gets once the layers before it are compressed. Needs a
            calibration.
        seed: Same seed, same bytes.
        device: Where to compute.
        scratch: Folder for the finished blocks of an unfinished call.

    Raises:
        ArtifactError: No delta, a damaged one, or statistics of another model.
        ConfigError: The method would leave a layer uncompressed, or a base without a calibration.
        NumericalError: A delta that cannot be compressed; names the layer.
    """
    if base is not None and calibration is None:
        raise ConfigError("true-sequential order needs a calibration, whose windows it runs")
    order = {"sequential": True} if base is not None else {}
    settings = {"method": method_name, **asdict(method), **order, "seed": seed}
    opened = DeltaFolder(delta, "delta")
    given = {"delta": delta, "calibration": calibration, "base": base}
    inputs = {role: path for role, path in given.items() if path is not None}
    decided_by = {**settings, **{role: fingerprint(path) for role, path in inputs.items()}}
    store = BlockStore(f"compress-delta-{out.name}", decided_by, scratch)
    with (
        store,  # kept until the artifact is complete
        artifact_folder(
            out, stage="compress_delta", settings=settings, inputs=inputs, seconds=store.seconds
        ) as folder,
    ):
        if calibration:
            _check_calibration(calibration, opened)
        statistics = load_statistics(calibration) if calibration else None
        sequential = None
        if base is not None and calibration is not None and statistics is not None:
            model = FinetunedCheckpoint(dense_checkpoint(base), opened)
            walk = BlockWalk(model.skeleton(), model, device=device, autocast=True)
            sequential = SequentialStatistics(walk, load_windows(calibration)[0], statistics)
        compress_delta(
            opened,
            method,
            statistics,
            folder,
            method_name=method_name,
            seed=seed,
            store=store,
            sequential=sequential,
            device=device,
        )


def _check_calibration(calibration: Path, delta: DeltaFolder) -> None:
    """Refuse statistics of anything but the fine-tuned model, or the base with this delta.

    Raises:
        ArtifactError: They are of another model.
    """
    inputs = read_provenance(calibration).get("inputs") or {}
    if "delta" in inputs:
        if inputs["delta"] != fingerprint(delta.folder):
            raise ArtifactError(
                f"{calibration}: was made on another delta than {delta.folder}; calibrate again"
            )
    else:
        finetuned = delta.header["finetuned"]
        check_calibration(calibration, finetuned["fingerprint"], finetuned["name"])


def _by_block(shapes: Mapping[str, Shape]) -> list[dict[str, Shape]]:
    """Group layers by decoder block: names share all up to the first number."""
    blocks: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(".".join(parts[: number + 1]), {})[name] = shape
    return list(blocks.values())
