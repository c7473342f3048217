"""Layouts with and without weights, of usual and unusual models."""

import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, MixtralConfig, OPTConfig, PretrainedConfig

from llmpress.core.errors import ArtifactError, SourceError
from llmpress.planning import ModelShapes, read_shapes


def test_config_alone_gives_the_layout_of_the_weights(
    tiny: ModelShapes, tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_model_folder / "config.json").read_bytes())

    expected = read_shapes(tmp_path)

    layouts = [{n: (t.dtype, t.shape) for n, t in m.tensors.items()} for m in (expected, tiny)]
    assert layouts[0] == layouts[1]  # the tied head is stored once
    assert expected.linears == tiny.linears
    assert (expected.hidden, expected.vocabulary) == (64, 512)


def test_layout_of_a_70b_model_needs_no_weights(llama_70b: ModelShapes) -> None:
    assert llama_70b.num_weights == 70_553_706_496
    assert llama_70b.num_bytes == 2 * llama_70b.num_weights
    assert llama_70b.linear_weights == 80 * (2 * 8192**2 + 2 * 1024 * 8192 + 3 * 28672 * 8192)
    assert llama_70b.block_weights == llama_70b.linear_weights // 80
    assert llama_70b.stored_as(torch.float32).num_bytes == 2 * llama_70b.num_bytes


def test_inputs_are_shared_as_calibration_finds_them(tiny: ModelShapes, calibration: Path) -> None:
    index = json.loads((calibration / "index.json").read_text())["layers"]

    leading = [name for name, (_, leader) in index.items() if name.endswith(f".{leader}")]
    assert sorted(leading) == sorted(name for block in tiny.inputs for name in block)
    assert [list(block.values()) for block in tiny.inputs] == [[64, 64, 64, 176]] * 3


@pytest.mark.parametrize(
    ("config", "inputs_per_block"),
    [
        (OPTConfig(num_hidden_layers=2, hidden_size=96, ffn_dim=128, word_embed_proj_dim=96), 4),
        # two of the attention, and of each of the eight experts
        (MixtralConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128), 18),
    ],
    ids=["opt", "mixtral"],
)
def test_other_architectures(
    config: PretrainedConfig, inputs_per_block: int, tmp_path: Path
) -> None:
    config.save_pretrained(tmp_path)

    shapes = read_shapes(tmp_path / "config.json")

    assert [len(block) for block in shapes.inputs] == [inputs_per_block] * 2


@pytest.mark.parametrize(
    "content", [None, "{}", '{"model_type": "never-heard-of"}', "no JSON", "no blocks"], ids=str
)
def test_folders_without_a_model_are_refused(content: str | None, tmp_path: Path) -> None:
    if content == "no blocks":
        LlamaConfig(num_hidden_layers=0).save_pretrained(tmp_path)
    elif content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises((ArtifactError, SourceError), match=r"config\.json"):
        read_shapes(tmp_path)
