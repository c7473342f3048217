"""Settings, speeds and layouts that the tests of planning share."""

from pathlib import Path

from transformers import LlamaConfig

from llmpress.calibration.settings import CalibrationSettings
from llmpress.planning import ModelShapes, read_shapes
from llmpress.planning.machine import Rates

CALIBRATION = CalibrationSettings(
    corpora=("one", "two"), windows=3, length=64, validation_windows=1
)
REFERENCE_RATES = Rates(
    fp32_flops_per_second=105e9,
    bf16_flops_per_second=560e9,
    fp64_flops_per_second=50e9,
    svd_cubes_per_second=2.5e9,
    eigh_cubes_per_second=3.3e9,
    bytes_per_second=18e9,
    calls_per_second=172e3,
)
"""What the probe says on the machine of the default run when nothing else runs, one thread."""


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
