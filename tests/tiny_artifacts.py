"""Tiny artifacts of every kind, made once per test session through the library's front door."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import built_once, library_text

from llmpress.calibration.stage import calibrate_model
from llmpress.compression.stage import compress_model
from llmpress.data.corpora import CalibrationText
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.methods.registry import build_method

CPU = torch.device("cpu")
WEIGHT_METHODS = {
    "rtn": {"num_bits": 4, "group_size": 16},
    "gptq": {"num_bits": 3, "group_size": 16},
    "cluscomp": {"bits": 1.5, "iterations": 3},
    "svd": {"rank": 16},
    "lillama": {"reduction": 0.2},
    "bitdelta": {},
    "magnitude": {"sparsity": 0.5},
    "delta_come": {"bits": 4.0, "group_size": 16},
}

Make = Callable[[str], Path]


def calibrate_tiny(
    model: Path, out: Path, delta: Path | None = None, device: torch.device = CPU
) -> Path:
    """Calibrate a tiny model, or a base with its delta, on a little text; return ``out``."""
    calibrate_model(
        model,
        text={"code": CalibrationText(library_text(("xml",)), library_text(("asyncio",)))},
        out=out,
        windows=4,
        length=64,
        validation_windows=1,
        seed=0,
        device=device,
        delta=delta,
    )
    return out


@pytest.fixture(scope="session")
def calibration(shared_folder: Path, tiny_model_folder: Path) -> Path:
    """Statistics of the tiny model over a little text."""
    return built_once(
        shared_folder, "tiny-calibration", lambda out: calibrate_tiny(tiny_model_folder, out)
    )


@pytest.fixture(scope="session")
def finetuned_calibration(shared_folder: Path, tiny_finetuned_folder: Path) -> Path:
    """Statistics of the tiny fine-tuned model over the same text."""
    return built_once(
        shared_folder,
        "tiny-finetuned-calibration",
        lambda out: calibrate_tiny(tiny_finetuned_folder, out),
    )


@pytest.fixture(scope="session")
def compressed(shared_folder: Path, tiny_model_folder: Path, calibration: Path) -> Make:
    """The tiny model, compressed by a method."""

    def make(name: str) -> Path:
        return built_once(
            shared_folder,
            f"tiny-{name}",
            lambda out: compress_model(
                tiny_model_folder,
                method=build_method(name, WEIGHT_METHODS[name], name),
                calibration=calibration,
                seed=0,
                device=CPU,
                scratch=shared_folder / f"scratch-{name}",
                out=out,
            ),
        )

    return make


@pytest.fixture(scope="session")
def tiny_delta(shared_folder: Path, tiny_model_folder: Path, tiny_finetuned_folder: Path) -> Path:
    """What the tiny fine-tuned model learned, as it is."""
    return built_once(
        shared_folder,
        "tiny-delta",
        lambda out: extract_delta(tiny_model_folder, tiny_finetuned_folder, out=out),
    )


@pytest.fixture(scope="session")
def compressed_delta(shared_folder: Path, tiny_delta: Path) -> Path:
    """The same, compressed."""
    return built_once(
        shared_folder,
        "tiny-compressed-delta",
        lambda out: compress_delta(
            tiny_delta,
            method=build_method("svd", {"rank": 8}, "svd"),
            seed=0,
            device=CPU,
            scratch=shared_folder / "scratch-delta",
            out=out,
        ),
    )


def content(folder: Path) -> dict[str, Any]:
    """Every file of an artifact: bytes, and JSON without what differs between two runs."""
    return {
        path.name: without_times(json.loads(path.read_text(encoding="utf-8")))
        if path.suffix == ".json"
        else path.read_bytes()
        for path in sorted(folder.iterdir())
    }


def without_times(value: Any) -> Any:
    if isinstance(value, dict):
        times = ("seconds", "created", "peak_memory_bytes", "fingerprint", "files")
        return {k: without_times(v) for k, v in value.items() if k not in times}
    return [without_times(v) for v in value] if isinstance(value, list) else value
