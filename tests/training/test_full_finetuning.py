"""Fine-tuning on worked answers: what trains, what is learnt, and that it repeats."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpress.core.errors import ConfigError, NumericalError, SourceError
from llmpress.core.params import build
from llmpress.data.tasks import calls
from llmpress.data.tasks.arithmetic import generate
from llmpress.models.architectures import block_linears
from llmpress.training.examples import Example, collate, encode, window_examples
from llmpress.training.full import add_tokens, finetune
from llmpress.training.settings import TrainingSettings

SETTINGS = TrainingSettings(
    base="b", steps=12, task="t", batch_size=4, learning_rate=2e-3, warmup=2, precision="float32"
)


@pytest.fixture
def tokenizer(tiny_model_folder: Path) -> Tokenizer:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture
def model(tiny_model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture
def examples(tokenizer: Tokenizer) -> list[Example]:
    return encode(generate(train=32, test=1, seed=0)["train"], tokenizer)


def test_encode_marks_the_query_and_ends_the_answer(tokenizer: Tokenizer) -> None:
    [example] = encode([{"query": "Q: 1\nA:", "target": " 2=2"}], tokenizer)
    assert tokenizer.decode(example.tokens[: example.num_query_tokens]) == "Q: 1\nA:"
    assert tokenizer.decode(example.tokens[example.num_query_tokens :]) == " 2=2\n"


def test_items_without_worked_answers_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SourceError, match=r"`query`.*`target`"):
        encode([{"query": "Q", "gold": 1}], tokenizer)


def test_collate_labels_answers_only() -> None:
    tokens, labels = collate([Example([5, 6, 7], 1), Example([8, 9], 1)])
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_finetuning_learns_and_changes_block_linears_only(
    model: PreTrainedModel, examples: list[Example]
) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    losses = finetune(model, examples, SETTINGS, seed=0)
    assert len(losses) == 12
    assert losses[-1] < 0.8 * losses[0]
    changed = {
        name for name, tensor in model.state_dict().items() if (tensor != before[name]).any()
    }
    assert changed == {f"{name}.weight" for block in block_linears(model) for name in block}
    assert not model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_every_token_of_a_window_but_the_first_is_learnt() -> None:
    tokens, labels = collate(window_examples(torch.tensor([[5, 6, 7], [8, 9, 4]])))
    assert tokens.tolist() == [[5, 6, 7], [8, 9, 4]]
    assert labels.tolist() == [[-100, 6, 7], [-100, 9, 4]]


@pytest.fixture
def untied(model: PreTrainedModel) -> PreTrainedModel:
    model.config.tie_word_embeddings = False
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().flip(0).clone())
    return model


def test_added_tokens_are_plain_and_start_at_the_mean(
    untied: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    count = len(tokenizer)
    embeddings, head = untied.get_input_embeddings(), untied.get_output_embeddings()
    before = [layer.weight.detach().clone() for layer in (embeddings, head)]
    assert add_tokens(untied, tokenizer, ("<call>", "</call>")) == [count, count + 1]
    embeddings, head = untied.get_input_embeddings(), untied.get_output_embeddings()
    for layer, old in zip((embeddings, head), before, strict=True):
        assert layer.weight.shape == (count + 2, old.shape[1])
        torch.testing.assert_close(layer.weight[:count], old, atol=0, rtol=0)
        torch.testing.assert_close(layer.weight[count:], old.mean(dim=0).expand(2, -1))
    assert untied.config.vocab_size == count + 2
    ids = tokenizer(" <call>f</call>").input_ids
    assert {count, count + 1} <= set(ids)
    assert tokenizer.decode(ids, skip_special_tokens=True) == " <call>f</call>"


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_of_the_vocabulary_only_the_new_rows_train(
    request: pytest.FixtureRequest, tokenizer: Tokenizer, tied: bool
) -> None:
    model = request.getfixturevalue("model" if tied else "untied")
    new = add_tokens(model, tokenizer, ("<call>", "</call>"))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    items = encode(calls.generate(32, 1, 0)["train"], tokenizer)
    finetune(model, items, SETTINGS, seed=0, new_tokens=new)
    after = model.state_dict()
    changed = {name for name, tensor in after.items() if (tensor != before[name]).any()}
    vocabulary = {"model.embed_tokens.weight", "lm_head.weight"}
    linears = {f"{name}.weight" for block in block_linears(model) for name in block}
    assert changed == linears | vocabulary
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    for name in vocabulary:
        rows = (after[name] != before[name]).any(dim=1).nonzero().flatten()
        assert rows.tolist() == new
    assert all(not parameter._backward_hooks for parameter in model.parameters())


def test_added_tokens_that_do_not_fit_are_refused(
    model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    with pytest.raises(ConfigError, match=r"added_tokens.*'e'"):
        add_tokens(model, tokenizer, ("<call>", "e"))
    rows = len(tokenizer)
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    with pytest.raises(ConfigError, match=f"{rows + 3} .*{rows} "):
        add_tokens(model, tokenizer, ("<call>",))
    assert len(tokenizer) == rows
    assert add_tokens(model, tokenizer, ()) == []


def test_finetuning_repeats_bit_for_bit(tiny_model_folder: Path, examples: list[Example]) -> None:
    def run(seed: int) -> list[float]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
        return finetune(model, examples, SETTINGS, seed)

    first = run(0)
    assert first == run(0)
    assert first != run(1)


def test_bfloat16_keeps_weights_in_fp32(model: PreTrainedModel, examples: list[Example]) -> None:
    settings = TrainingSettings("b", 2, "t", batch_size=4, precision="bfloat16")
    losses = finetune(model, examples, settings, seed=0)
    assert all(math.isfinite(loss) for loss in losses)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_learning_rate_rises_then_falls(
    model: PreTrainedModel, examples: list[Example], monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    step = torch.optim.AdamW.step

    def recorded(self: torch.optim.AdamW, *arguments: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.AdamW, "step", recorded)
    settings = TrainingSettings("b", 6, "t", batch_size=1, learning_rate=1.0, warmup=2)
    finetune(model, examples, settings, seed=0)
    assert rates == pytest.approx([1 / 3, 2 / 3, 1.0, 3 / 4, 2 / 4, 1 / 4])


def test_a_loss_that_is_not_finite_stops(model: PreTrainedModel, examples: list[Example]) -> None:
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    with pytest.raises(NumericalError, match=r"nan.* 1.*`learning_rate`"):
        finetune(model, examples, SETTINGS, seed=0)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"steps": 0}, r"\.steps: .* 0"),
        ({"steps": 1, "learning_rate": -1.0}, "learning_rate"),
        ({"steps": 1, "warmup": -1}, "warmup: .* -1"),
        ({"steps": 1, "precision": "int8"}, "precision: .*'int8'"),
        ({}, r"finetuned_models\.x\.steps"),
        ({"steps": 1, "corpus": "c"}, "`task` .*`corpus`"),
        ({"steps": 1, "task": None}, "`task` .*`corpus`"),
        ({"steps": 1, "length": 1}, "length: .* 1"),
        ({"steps": 1, "windows": 0}, "windows: .* 0"),
        ({"steps": 1, "added_tokens": ["<a>", "<a>"]}, "added_tokens"),
        ({"steps": 1, "added_tokens": [""]}, "added_tokens"),
        ({"steps": 1, "add_tokens": ["<a>"]}, "add_tokens.*added_tokens"),
    ],
    ids=[
        *("steps", "learning-rate", "warmup", "precision", "missing", "both", "neither", "length"),
        *("windows", "twice", "empty", "unknown"),
    ],
)
def test_settings_are_validated(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        build(TrainingSettings, {"base": "b", "task": "t", **values}, "finetuned_models.x")
