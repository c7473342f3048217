"""Layouts and a machine that need no computing."""

from pathlib import Path

import pytest
from planning_examples import large_shapes, write_config

from llmpress.planning import Machine, ModelShapes, read_shapes


@pytest.fixture(scope="session")
def llama_70b(tmp_path_factory: pytest.TempPathFactory) -> ModelShapes:
    return large_shapes(tmp_path_factory.mktemp("llama-70b"))


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> ModelShapes:
    """The layout of the default run's model."""
    widths = {"hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    folder = tmp_path_factory.mktemp("smollm2")
    return read_shapes(
        write_config(folder, **widths, **heads, num_hidden_layers=30, dtype="float32")
    )


@pytest.fixture(scope="session")
def tiny(tiny_model_folder: Path) -> ModelShapes:
    return read_shapes(tiny_model_folder)


@pytest.fixture
def machine() -> Machine:
    """Large enough for everything but a 70B model."""
    return Machine(16 * 10**9, 10**12, 0, processor="a processor", gpu="")
