"""What is kept of an original stands for the original."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ARCHITECTURES
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from whole_models import running

from llmpress.core.errors import ArtifactError
from llmpress.evaluation.likelihood import last_states, likelihood, predictions
from llmpress.evaluation.reference import Reference, make_reference, read_reference, run_original
from llmpress.evaluation.stage import evaluate_model

SMALL = {"vocab_size": 512, "hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 32}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma2": {**SMALL, **HEADS, "head_dim": 16, "final_logit_softcapping": 0.1},
    "granite": {**SMALL, **HEADS, "logits_scaling": 3.0},
    **{name: ARCHITECTURES[name].settings for name in ("gpt_neox", "mamba")},
}
TEXT: dict[str, Any] = {"windows": 2, "length": 32, "device": "cpu"}


@pytest.mark.parametrize("family", FAMILIES)
def test_predictions_follow_from_the_last_states(family: str) -> None:
    config = AutoConfig.for_model(family, **FAMILIES[family])
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    windows = torch.randint(512, (3, 9))
    part = slice(2, 7)
    expected = [running(model, windows)(index, part).clone() for index in range(3)]
    with torch.inference_mode():
        predict = predictions(model, last_states(model, windows, "text"))
        for index in (2, 0, 1):
            torch.testing.assert_close(predict(index, part), expected[index])
        torch.testing.assert_close(running(model, windows)(1, part), expected[1])  # it still runs


def made(**changes: Any) -> Path:
    text = Path("data/corpora/code")
    return make_reference("data/models/tiny", text=text, out="kept", **(TEXT | changes))


@pytest.mark.usefixtures("project")
def test_what_is_kept_gives_the_same_numbers(tiny_finetuned: PreTrainedModel) -> None:
    original = Path("data/models/tiny")
    read = read_reference(made(), original, device="cpu")
    fresh = run_original(original, text=Path("data/corpora/code"), **TEXT)
    windows: Tensor = read.windows["code"]
    torch.testing.assert_close(windows, fresh.windows["code"])
    whole = likelihood(
        running(tiny_finetuned, windows), running(fresh.model, windows), windows, "code"
    )
    alone = likelihood(running(fresh.model, windows), None, windows, "code")

    def numbers(reference: Reference) -> list[Tensor]:
        found = (reference.compare(tiny_finetuned)["code"], reference.likelihoods["code"])
        return [x for one in found for x in (one.losses, one.divergences, one.agreements)]

    expected = [x for one in (whole, alone) for x in (one.losses, one.divergences, one.agreements)]
    torch.testing.assert_close(numbers(read), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(numbers(fresh), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("project")
def test_a_reference_is_refused_for_another_model_or_precision() -> None:
    kept = made()
    with pytest.raises(ArtifactError, match="kept"):
        read_reference(kept, Path("data/models/tuned"), device="cpu")
    with pytest.raises(ArtifactError, match="kept"):
        read_reference(kept, Path("data/models/tiny"), dtype="bfloat16", device="cpu")
    (kept / "reference.safetensors").write_bytes(b"")
    with pytest.raises(ArtifactError, match="kept"):
        read_reference(kept, Path("data/models/tiny"), device="cpu")


@pytest.mark.usefixtures("project")
def test_settings_are_chosen_on_validation_text() -> None:
    original, kept = Path("data/models/tiny"), made(split="validation")
    read = read_reference(kept, original, device="cpu")
    test = run_original(original, text=Path("data/corpora/code"), **TEXT)
    assert read.split == "validation"
    assert (read.windows["code"] != test.windows["code"]).any()
    _, details = evaluate_model("data/models/tuned", original=original, reference=kept)
    assert details.evaluation.split == "validation"
