"""Settings and layouts that the tests of planning share."""

from pathlib import Path

from transformers import LlamaConfig

from llmpress.calibration.settings import CalibrationSettings
from llmpress.planning import ModelShapes, read_shapes

CALIBRATION = CalibrationSettings(
    corpora=("one", "two"), windows=3, length=64, validation_windows=1
)


def write_config(folder: Path, **settings: object) -> Path:
    """A folder that holds a Llama's config.json and nothing else."""
    defaults = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    LlamaConfig(**{**defaults, **settings}).save_pretrained(folder)
    return folder


def large_shapes(folder: Path, layers: int = 80) -> ModelShapes:
    """A model with the widths of Llama-3-70B."""
    return read_shapes(
        write_config(
            folder,
            hidden_size=8192,
            intermediate_size=28672,
            num_hidden_layers=layers,
            num_attention_heads=64,
            num_key_value_heads=8,
            vocab_size=128256,
            tie_word_embeddings=False,
        )
    )
