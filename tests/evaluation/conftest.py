"""The tiny models in memory, and a project folder around them."""

from pathlib import Path

import pytest
import torch
from tiny_project import write_project
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from llmpress.models.loading import load_tokenizer


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_finetuned(tiny_finetuned_folder: Path) -> PreTrainedModel:
    return LlamaForCausalLM.from_pretrained(tiny_finetuned_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_model_folder: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(tiny_model_folder)


@pytest.fixture
def project(
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The working folder of the test, with everything that evaluation needs."""
    monkeypatch.chdir(tmp_path)
    write_project(tiny_model_folder, tiny_finetuned_folder)
    return tmp_path
