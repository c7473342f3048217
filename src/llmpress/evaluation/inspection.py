"""What lies in a folder: an artifact's kind, size, layers and origin in one record."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from llmpress.calibration.files import WINDOWS
from llmpress.core.artifacts import PROVENANCE, folder_bytes, read_json, verify
from llmpress.core.errors import ArtifactError
from llmpress.core.records import entry
from llmpress.data.tasks.files import TASK_FILE
from llmpress.evaluation.reference import FILE as REFERENCE
from llmpress.evaluation.sizes import compressed_size, delta_size, model_size
from llmpress.models.architectures import left_out
from llmpress.models.checkpoints.delta_files import HEADER
from llmpress.models.checkpoints.dense_view import layer_records
from llmpress.models.checkpoints.files import Checkpoint

SIZES = {
    "model": model_size,
    "compressed model": compressed_size,
    "compressed delta": delta_size,
}
KINDS_BY_FILE = {
    WINDOWS: "calibration",
    "calibration.txt": "corpus",
    TASK_FILE: "task",
    REFERENCE: "reference",
}


def describe(folder: Path | str) -> dict[str, Any]:
    """Describe a model, a delta or another artifact, after verifying all its files.

    Returns:
        JSON-representable, always with these keys: ``folder``; ``kind``; ``verified``, false for a
        folder without provenance; ``bytes`` of all files; ``size``, as in the report's metrics, or
        None; ``left_out``, the matrices inside a compressed model's blocks that are no linear
        layers, with their weights; ``method``, or None, and its ``settings``; ``layers`` and
        ``blocks``, the records of each; ``provenance``, or None.

    Raises:
        ArtifactError: No such folder, nothing that llmpress knows, or damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ArtifactError(f"{folder}: no such folder")
    has_provenance = (folder / PROVENANCE).is_file()
    provenance = verify(folder) if has_provenance else None
    records = layer_records(folder)
    kind = _kind(folder, is_compressed=records is not None)
    settings = dict(provenance["settings"]) if provenance else {}
    return {
        "folder": str(folder),
        "kind": kind,
        "verified": has_provenance,
        "bytes": folder_bytes(folder, "*"),
        "size": SIZES[kind](folder).model_dump() if kind in SIZES else None,
        "left_out": left_out(Checkpoint(folder).skeleton()) if kind == "compressed model" else {},
        "method": settings.pop("method", None),
        "settings": settings,
        "layers": [entry(layer) for layer in records.layers] if records else [],
        "blocks": [asdict(block) for block in (records.blocks if records else None) or ()],
        "provenance": provenance,
    }


def _kind(folder: Path, *, is_compressed: bool) -> str:
    if (folder / HEADER).is_file():
        kind: str = read_json(folder / HEADER).get("kind", "delta").replace("_", " ")
        return kind
    if (folder / "config.json").is_file():
        return "compressed model" if is_compressed else "model"
    for name, kind in KINDS_BY_FILE.items():
        if (folder / name).is_file():
            return kind
    raise ArtifactError(f"{folder}: nothing that llmpress knows (no config.json, no {HEADER})")
