"""Compress an extracted delta layer by layer into a folder that `llmpress.deltas` applies."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from llmpress.artifacts import artifact_folder, fingerprint, write_json
from llmpress.calibration import check_calibration, load_statistics
from llmpress.compression import compress_layers, totals
from llmpress.delta_files import EXACT, DeltaFolder, DeltaWriter
from llmpress.errors import ConfigError
from llmpress.methods.base import InputStatistics, Method, Shape
from llmpress.resume import SCRATCH, BlockStore


def compress_delta(
    delta: DeltaFolder,
    method: Method,
    statistics: Mapping[str, InputStatistics] | None,
    folder: Path,
    *,
    method_name: str,
    seed: int,
    store: BlockStore,
    device: torch.device | None = None,
    max_shard_bytes: int = 1 << 30,
) -> None:
    """Compress every changed linear layer; carry what is kept exactly over as it is.

    Args:
        delta: What ``extract_delta`` wrote.
        method: How each layer's delta is compressed.
        statistics: Input statistics of the fine-tuned model by layer name.
        folder: Existing folder for delta.json, delta.safetensors and layers.json.
        method_name: For layers.json.
        seed: Same seed, same bytes.
        store: Keeps finished decoder blocks for a rerun.
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
    layers, records = {}, []
    for name, layer, record in compress_layers(
        _by_block(shapes),
        delta,
        method,
        statistics,
        model_weights=model_weights,
        seed=seed,
        device=device or torch.device("cpu"),
        store=store,
    ):
        if layer is None:
            raise ConfigError(
                f"{name}: {method_name} would leave this delta dense, which is not stored; choose "
                "settings that compress every layer"
            )
        for key, tensor in layer.tensors().items():
            writer.add(f"{name}.{key}", tensor)
        layers[name] = {"kind": layer.kind, "spec": layer.spec(), "shape": list(record.shape)}
        records.append(record)
    exact_bytes = 0
    for name in delta.exact_names():
        tensor = delta.tensor(EXACT + name)
        exact_bytes += tensor.numel() * tensor.element_size()
        writer.add(EXACT + name, tensor)
    kept = ("base", "finetuned", "exact", "tie_word_embeddings", "model_weights")
    header = {key: delta.header[key] for key in kept}
    writer.close("compressed_delta", {**header, "layers": layers})
    size = {**totals(records, model_weights), "exact_bytes": exact_bytes}
    rows = [{**asdict(record), "method": method_name} for record in records]
    write_json(folder / "layers.json", {"layers": rows, "blocks": [], "totals": size})


def compress_delta_artifact(
    delta: Path,
    out: Path,
    *,
    method_name: str,
    method: Method,
    calibration: Path | None,
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
        seed: Same seed, same bytes.
        device: Where to compute.
        scratch: Folder for the finished blocks of an unfinished call.

    Raises:
        ArtifactError: No delta, a damaged one, or statistics of another model.
        ConfigError: The method would leave a layer uncompressed.
        NumericalError: A delta that cannot be compressed; names the layer.
    """
    settings = {"method": method_name, **asdict(method), "seed": seed}
    opened = DeltaFolder(delta, "delta")
    inputs = {"delta": delta} | ({"calibration": calibration} if calibration else {})
    decided_by = {**settings, **{role: fingerprint(path) for role, path in inputs.items()}}
    store = BlockStore(f"compress-delta-{out.name}", decided_by, scratch)
    with (
        store,  # kept until the artifact is complete
        artifact_folder(out, stage="compress_delta", settings=settings, inputs=inputs) as folder,
    ):
        if calibration:
            finetuned = opened.header["finetuned"]
            check_calibration(calibration, finetuned["fingerprint"], finetuned["name"])
        compress_delta(
            opened,
            method,
            load_statistics(calibration) if calibration else None,
            folder,
            method_name=method_name,
            seed=seed,
            store=store,
            device=device,
        )


def _by_block(shapes: Mapping[str, Shape]) -> list[dict[str, Shape]]:
    """Group layers by decoder block: names share all up to the first number."""
    blocks: dict[str, dict[str, Shape]] = {}
    for name, shape in shapes.items():
        parts = name.split(".")
        number = next(i for i, part in enumerate(parts) if part.isdigit())
        blocks.setdefault(".".join(parts[: number + 1]), {})[name] = shape
    return list(blocks.values())
