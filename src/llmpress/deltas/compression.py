"""Compress an extracted delta layer by layer into a folder that `load_delta` puts on its base."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from llmpress.calibration.files import check_calibration, load_statistics, load_windows
from llmpress.calibration.stage import calibrated_artifact
from llmpress.compression.layers import compress_layers
from llmpress.core.artifacts import fingerprint, read_provenance
from llmpress.core.devices import pick_device
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.core.records import LayerRecord, Records, total_size, write_records
from llmpress.core.resume import BlockStore
from llmpress.data.corpora import Text
from llmpress.deltas.sequential import SequentialStatistics
from llmpress.methods.base import InputStatistics, Method, Shape
from llmpress.methods.registry import check_statistics, choose_method, method_name
from llmpress.models.checkpoints.delta_files import DELTA_SHARD_BYTES, DeltaFolder, DeltaWriter
from llmpress.models.checkpoints.dense_view import dense_checkpoint
from llmpress.models.checkpoints.finetuned_view import FinetunedCheckpoint
from llmpress.models.folders import model_folder
from llmpress.models.walk import BlockWalk
from llmpress.nn.layers import layer_entry


def write_compressed_delta(
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
        delta: What `write_delta` wrote.
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
    header = {key: delta.header[key] for key in (*kept, "config") if key in delta.header}
    writer.close("compressed_delta", {**header, "layers": layers})
    size = total_size(records, model_weights, delta.exact_bytes())
    write_records(folder, Records(tuple(records), size, blocks=()))


def compress_delta(
    delta: Path | str,
    *,
    method: Method | str,
    out: Path | str,
    base: Path | str | None = None,
    text: Text | None = None,
    calibration: Path | str | None = None,
    sequential: bool = False,
    windows: int = 16,
    length: int = 512,
    seed: int = 0,
    device: str | torch.device | None = None,
    scratch: Path | str | None = None,
    force: bool = False,
    **settings: Any,
) -> Path:
    """Compress an extracted delta into a folder that `llmpress.load_delta` puts on its base.

    What is no linear layer is kept exactly. A killed call continues after its last finished block
    when it is repeated.

    Args:
        delta: What `llmpress.extract_delta` wrote.
        method: A method's name, its settings as keywords of this function; or a method.
        out: Folder to write.
        base: The model that was fine-tuned, for ``text`` and ``sequential``.
        text: What to calibrate on first, for the moment: the base with this delta.
        calibration: What `calibrate_model` wrote for the fine-tuned model, or for the base with
            this delta, instead of ``text``.
        sequential: Compress each layer for the inputs that it gets once the layers before it are
            compressed, instead of those of the fine-tuned model.
        windows: Token windows of each text.
        length: Tokens of a window.
        seed: Same seed, same bytes.
        device: ``cpu``, ``cuda`` or ``cuda:1``; by default the first GPU, or the CPU without one.
        scratch: Folder for the finished blocks of an unfinished call; by default beside ``out``.
        force: Replace ``out`` where it exists.
        **settings: Of the method; ``bits`` for every method that is told bits.

    Returns:
        ``out``.

    Raises:
        ArtifactError: No delta, a damaged one, statistics of another model, or ``out`` exists.
        ConfigError: An unknown method or setting, a layer that would stay uncompressed, or a text
            or order that needs what is not given.
        NumericalError: A delta that cannot be compressed; names the layer.
    """
    chosen = choose_method(method, settings)
    check_statistics(chosen, given=bool(text or calibration))
    if base is None and (text or sequential):
        needs = "text" if text else "sequential"
        raise ConfigError(f"{needs}: name the `base` too (--base); with the delta it is run")
    if sequential and not (text or calibration):
        raise ConfigError("sequential: needs `text` or a `calibration`, whose windows it runs")
    out, place = Path(out), pick_device(device)
    model = None if base is None else model_folder(base)
    opened = DeltaFolder(Path(delta), "delta")
    name, order = method_name(chosen), {"sequential": True} if sequential else {}
    with calibrated_artifact(
        out,
        stage="compress_delta",
        settings={"method": name, **asdict(chosen), **order, "seed": seed},
        inputs={
            "delta": opened.folder,
            "calibration": None,
            "base": model if sequential else None,
        },
        model=model,
        text=text,
        calibration=calibration,
        windows=windows,
        length=length,
        device=place,
        scratch=scratch,
        force=force,
        delta=delta,
    ) as (folder, store, known):
        if known:
            _check_calibration(known, opened)
        statistics = load_statistics(known) if known else None
        ordered = None
        if sequential and model is not None and known and statistics is not None:
            tuned = FinetunedCheckpoint(dense_checkpoint(model), opened)
            walk = BlockWalk(tuned.skeleton(), tuned, device=place, autocast=True)
            ordered = SequentialStatistics(walk, load_windows(known)[0], statistics)
        write_compressed_delta(
            opened,
            chosen,
            statistics,
            folder,
            method_name=name,
            seed=seed,
            store=store,
            sequential=ordered,
            device=place,
        )
    return out


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
