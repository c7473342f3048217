"""What published generation settings and chat templates ask for: generated, or said in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import llmpress
from transformers import AutoTokenizer

from llmpress.evaluation.samples import sample_texts
from llmpress.evaluation.speed import time_generation
from llmpress.evaluation.subjects import folder_subject

SETTINGS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 4},
    "beam groups": {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
    "sampling": {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9},
    "several answers": {"num_return_sequences": 2, "do_sample": True},
    "records": {"return_dict_in_generate": True, "output_scores": True},
    "contrastive": {"penalty_alpha": 0.6, "top_k": 4},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "lengths": {"max_length": 20, "min_length": 5},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": {"bias": 2.0}},
    "of a later version": {"some_new_key": 3},
}
TEMPLATES = {
    "refuses": "{{ raise_exception('System role not supported') }}",
    "is damaged": "{% for m in messages %}{{ m['content'] }",
    "is undefined": "{{ messages[5]['content'].strip() }}",
    "writes nothing": "",
}


def changed(model: Path, folder: Path, **settings: Any) -> Path:
    """A copy of a model with other generation settings."""
    shutil.copytree(model, folder)
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_strategies_of_the_models_are_not_the_commands(
    settings: dict[str, Any], tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = changed(tiny_model_folder, tmp_path / "model", **settings)
    command = ["generate", model, "import os\n", "--max-tokens", 6]
    plain = llmpress("generate", tiny_model_folder, *command[2:]).out
    for folder in (tiny_model_folder, model):
        done = llmpress("generate", folder, *command[2:])
        assert (done.code, done.out) == (0, plain), done.err
        record = llmpress("generate", folder, *command[2:], "--json").json
        assert record["text"] == plain.removesuffix("\n")


def test_stop_strings_stop_and_evaluation_passes_them_over(
    tiny_model_folder: Path, tmp_path: Path
) -> None:
    command = ["import os\n", "--max-tokens", 12, "--json"]
    text = llmpress("generate", tiny_model_folder, *command).json["text"]
    model = changed(tiny_model_folder, tmp_path / "model", stop_strings=[text[:3]])
    stopped = llmpress("generate", model, *command).json["text"]
    assert text.startswith(stopped)
    assert len(stopped) < len(text)


@pytest.mark.parametrize("name", ["beams", "beam groups", "records", "several answers", "lengths"])
def test_evaluation_measures_the_most_probable_text(
    name: str, tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = changed(tiny_model_folder, tmp_path / "model", **SETTINGS[name], stop_strings=["x"])
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = []
    for folder in (tiny_model_folder, model):
        loaded = folder_subject(folder).load(torch.float32, "cpu")
        texts.append(sample_texts(loaded, tokenizer, 8))
        assert time_generation(loaded, torch.arange(5), 2).decode_seconds > 0
    assert texts[0] == texts[1]


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("further", [[], ["--system", "be brief"]], ids=["plain", "system"])
def test_templates_that_fail_are_one_line(
    template: str, further: list[str], tiny_model_folder: Path, tmp_path: Path
) -> None:
    model = shutil.copytree(tiny_model_folder, tmp_path / "model")
    (model / "chat_template.jinja").write_text(template)
    done = llmpress("generate", model, "hi", *further, "--max-tokens", 2)
    assert "--no-chat" in done.error
    assert llmpress("generate", model, "hi", "--no-chat", "--max-tokens", 2).code == 0
