"""Layouts and settings that the tests of planning share."""

from pathlib import Path

from transformers import LlamaConfig

from llmpress.calibration.settings import CalibrationSettings
from llmpress.planning import ModelShapes, read_shapes

CALIBRATION = CalibrationSettings(  # of the measured run in test_stages.py
    corpora=("wikipedia", "code"), windows=8, length=512
)


def write_config(folder: Path, **settings: object) -> Path:
    """A folder that holds a Llama's config.json and nothing else."""
    defaults = {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    LlamaConfig(**{**defaults, **settings}).save_pretrained(folder)
    return folder


def large_shapes(folder: Path, layers: int = 80) -> ModelShapes:
    """A model with the widths of Llama-3-70B."""
    widths = {"hidden_size": 8192, "intermediate_size": 28672, "vocab_size": 128256}
    heads = {"num_attention_heads": 64, "num_key_value_heads": 8, "tie_word_embeddings": False}
    return read_shapes(write_config(folder, **widths, **heads, num_hidden_layers=layers))
