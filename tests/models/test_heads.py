"""A compressed decoder under other heads than the one it was compressed with, as a dense one."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_artifacts import Make
from torch import Tensor

import llmpress
from llmpress.core.errors import ArtifactError, SourceError
from llmpress.nn.layers import CompressedLinear

HEADS = {
    "AutoModelForSequenceClassification": "score.weight",
    "AutoModelForTokenClassification": "score.weight",
}


def opened(head: str, folder: Path, **settings: Any) -> Any:
    return getattr(transformers, head).from_pretrained(folder, **settings)


def hidden(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        states: Tensor = model(windows, output_hidden_states=True).hidden_states[-1]
    return states


def test_without_a_head(compressed: Make, tiny_windows: Tensor, tmp_path: Path) -> None:
    folder = compressed("cluscomp")
    model = opened("AutoModel", folder)
    whole = llmpress.load_model(folder)
    assert isinstance(model.layers[0].mlp.up_proj, CompressedLinear)
    expected = hidden(whole, tiny_windows[:1])
    torch.testing.assert_close(hidden(model, tiny_windows[:1]), expected)
    model.save_pretrained(tmp_path / "again")
    for head in ("AutoModel", "AutoModelForCausalLM"):  # the head is tied
        again = opened(head, tmp_path / "again")
        torch.testing.assert_close(hidden(again, tiny_windows[:1]), expected)


def test_every_architecture_without_a_head(
    architecture_folder: Path, tiny_windows: Tensor, tmp_path: Path
) -> None:
    packed = llmpress.compress_model(
        architecture_folder, method="rtn", bits=8, group_size=16, out=tmp_path / "packed"
    )
    expected = hidden(llmpress.load_model(packed), tiny_windows[:1])
    model = opened("AutoModel", packed)
    torch.testing.assert_close(hidden(model, tiny_windows[:1]), expected)
    model.save_pretrained(tmp_path / "again")
    again = opened("AutoModel", tmp_path / "again")
    torch.testing.assert_close(hidden(again, tiny_windows[:1]), expected)


@pytest.mark.parametrize("head", HEADS)
def test_a_new_head_is_initialised_and_said(
    head: str, compressed: Make, tiny_windows: Tensor, tmp_path: Path
) -> None:
    folder = compressed("rtn")
    model, loaded = opened(head, folder, output_loading_info=True)
    assert {HEADS[head]} <= loaded["missing_keys"] <= {"score.weight", "score.bias"}
    new = model.get_parameter(HEADS[head])
    assert 0 < float(new.detach().std()) < 0.1
    assert new.requires_grad
    states = hidden(model, tiny_windows[:1])
    torch.testing.assert_close(states, hidden(llmpress.load_model(folder), tiny_windows[:1]))
    model.save_pretrained(tmp_path / "again")
    assert HEADS[head] in load_file(tmp_path / "again/model.safetensors")
    again = opened(head, tmp_path / "again")
    torch.testing.assert_close(again.get_parameter(HEADS[head]), new, rtol=0, atol=0)
    torch.testing.assert_close(hidden(again, tiny_windows[:1]), states)


def test_a_head_that_transformers_gives_no_weights_to_is_refused(compressed: Make) -> None:
    with pytest.raises(ArtifactError, match="self_attn"):  # of a dense model all is random there
        opened("AutoModelForQuestionAnswering", compressed("rtn"))


@pytest.mark.parametrize("head", ["AutoModel", *HEADS])
def test_a_source_under_another_head_is_refused_by_name(
    head: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = opened(head, tiny_model_folder)
    model.save_pretrained(tmp_path / "source")
    with pytest.raises(SourceError, match=type(model).__name__):
        llmpress.compress_model(tmp_path / "source", method="rtn", bits=4, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
