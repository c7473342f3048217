"""Shapes and machines that need no computing, and real artifacts of the tiny model."""

from pathlib import Path

import pytest
from planning_examples import CALIBRATION, large_shapes, write_config

from llmpress.calibration.stage import calibrate_model
from llmpress.data.corpora import CalibrationText
from llmpress.planning import Machine, ModelShapes, read_shapes


@pytest.fixture(scope="session")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> ModelShapes:
    return large_shapes(tmp_path_factory.mktemp("llama-70b"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelShapes:
    """The layout of the default run's model."""
    folder = write_config(
        tmp_path_factory.mktemp("smollm2"),
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
        dtype="float32",
    )
    return read_shapes(folder)


@pytest.fixture(scope="session")
def tiny(tiny_model_folder: Path) -> ModelShapes:
    return read_shapes(tiny_model_folder)


@pytest.fixture
def machine() -> Machine:
    """Large enough for everything but a 70B model."""
    return Machine(
        memory_available_bytes=16 * 10**9,
        disk_free_bytes=10**12,
        device_memory_free_bytes=0,
        processor="a processor",
        gpu="",
    )


def calibrated(model: Path, out: Path) -> Path:
    text = CalibrationText(["def f(x): return x + 1\n" * 200], ["class A: pass\n" * 200])
    texts = dict.fromkeys(CALIBRATION.corpora, text)
    return calibrate_model(
        model,
        text=texts,
        out=out,
        windows=CALIBRATION.windows,
        length=CALIBRATION.length,
        validation_windows=CALIBRATION.validation_windows,
        device="cpu",
    )


@pytest.fixture(scope="session")
def tiny_calibration(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibrated(tiny_model_folder, tmp_path_factory.mktemp("calibration") / "tiny")


@pytest.fixture(scope="session")
def tiny_finetuned_calibration(
    tiny_finetuned_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return calibrated(tiny_finetuned_folder, tmp_path_factory.mktemp("calibration") / "tuned")
