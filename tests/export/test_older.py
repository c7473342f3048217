"""transformers 4 finds its names for what transformers 5 writes, and 5 reads the same as before."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig, AutoTokenizer

import llmpress
from llmpress.core.artifacts import read_json, write_json
from llmpress.export.older import with_older_names

THETA = {"rope_type": "default", "rope_theta": 7.0}
HALF = {**THETA, "partial_rotary_factor": 0.5}
LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}
LOCAL = {"rope_type": "default", "rope_theta": 3.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("llama", THETA, {"rope_theta": 7.0}),
    "part": ("phi", HALF, {"rope_theta": 7.0, "partial_rotary_factor": 0.5}),
    "neox": ("gpt_neox", HALF, {"rotary_emb_base": 7.0, "rotary_pct": 0.5}),
    "scaled": (
        "llama",
        LINEAR,
        {"rope_theta": 7.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ),
    "by-layer": (
        "gemma3_text",
        {"full_attention": THETA, "sliding_attention": LOCAL},
        {"rope_theta": 7.0, "rope_local_base_freq": 3.0},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_rotary_settings_have_both_names(case: str, tmp_path: Path) -> None:
    kind, rope, names = CASES[case]
    config = AutoConfig.for_model(kind, rope_parameters=rope, dtype="bfloat16")
    config.save_pretrained(tmp_path)
    written = read_json(tmp_path / "config.json")
    older = with_older_names(written)
    assert older == written | names | {"torch_dtype": "bfloat16"}
    write_json(tmp_path / "config.json", older)
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.rope_parameters == config.rope_parameters
    assert read.dtype == config.dtype


def test_a_part_of_a_model_has_both_names_too() -> None:
    older = with_older_names({"text_config": {"rope_parameters": THETA}, "dtype": "float32"})
    assert older["text_config"]["rope_theta"] == 7.0


def test_a_dense_export_names_a_tokenizer_that_both_know(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    llmpress.export_dense(tiny_model_folder, out=tmp_path / "dense")
    source = AutoTokenizer.from_pretrained(tiny_model_folder)
    exported = AutoTokenizer.from_pretrained(tmp_path / "dense")
    settings = read_json(tmp_path / "dense/tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    text = "def f(x):\n    return x  # ünïcode  <|im_end|>"
    assert exported(text).input_ids == source(text).input_ids
