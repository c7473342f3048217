"""Matrices inside the decoder blocks that are no linear layers: named, never passed over."""

from pathlib import Path

import pytest
from command_line import llmpress
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from llmpress.models.architectures import block_linears, compressible, left_out
from llmpress.models.checkpoints.files import Checkpoint, empty_model

EXPERTS = "model.layers.*.mlp.input_linear.weight"


@pytest.fixture
def mixture(tiny_model_folder: Path, tmp_path: Path) -> Path:
    """A model whose experts are tensors of a form that is not taken apart."""
    config = AutoConfig.for_model(
        "jetmoe",
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        kv_channels=16,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=128,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "mixture")
    PreTrainedTokenizerFast.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "mixture")
    return tmp_path / "mixture"


def test_compress_and_inspect_name_what_is_not_compressed(
    mixture: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    command = ["compress", mixture, "-m", "rtn", "--bits", 4, "-s", "group_size=16"]
    done = llmpress(*command, "-o", tmp_path / "out")
    assert done.code == 0, done.err
    assert EXPERTS in caplog.text
    assert EXPERTS in done.out
    assert EXPERTS in llmpress("inspect", tmp_path / "out", "--json").json["left_out"]


def test_a_model_of_linears_is_left_out_nowhere(
    tiny_model_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert left_out(Checkpoint(tiny_model_folder).skeleton()) == {}
    command = ["compress", tiny_model_folder, "-m", "rtn", "--bits", 4, "-s", "group_size=16"]
    done = llmpress(*command, "-o", tmp_path / "out")
    assert "not compressed" not in done.out
    assert "stay as they are" not in caplog.text


def test_a_router_of_another_name_stays_as_it_is(tmp_path: Path) -> None:
    config = AutoConfig.for_model("afmoe", num_hidden_layers=2, num_experts=4, num_dense_layers=0)
    model = empty_model(config, tmp_path)
    linears = {name for block in block_linears(model) for name in block}
    chooses = {n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "router" in n}
    assert len(chooses) == 2
    assert linears
    assert not linears & chooses


@pytest.mark.parametrize("name", ["mlp.gate", "mlp.gate.wg", "ffn.router.layer", "moe.router.proj"])
def test_names_of_routers(name: str) -> None:
    block = nn.Module()
    *owners, last = name.split(".")
    place = block
    for owner in owners:
        place.add_module(owner, nn.Module())
        place = place.get_submodule(owner)
    place.add_module(last, nn.Linear(4, 4))
    block.add_module("gate_proj", nn.Linear(4, 4))
    assert compressible(block).keys() == {"gate_proj"}
