"""What is trained on, in which order, and what is held out of it."""

from typing import Any

import pytest
from tiny_models import library_text
from transformers import AutoTokenizer
from transformers import PreTrainedTokenizerBase as Tokenizer

from llmpress.core.errors import SourceError
from llmpress.data.corpora import CalibrationText
from llmpress.data.tasks.arithmetic import generate
from llmpress.training.data import draw, task_data, text_data
from llmpress.training.examples import Example, encode
from llmpress.training.settings import FinetuningSettings

ITEMS = generate(40, 1, 0)["train"]


def settings(**changes: Any) -> FinetuningSettings:
    values = {"steps": 3, "learning_rate": 1e-3, "batch_size": 4, "held_out": 6, "length": 16}
    return FinetuningSettings(**{**values, "windows": 4, **changes})


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: str) -> Tokenizer:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


def test_items_come_as_in_full_finetuning(tokenizer: Tokenizer) -> None:
    data = task_data(ITEMS, tokenizer, settings(), seed=3)
    assert data.train == draw(encode(ITEMS, tokenizer), 12, seed=3)


def test_everything_is_seen_before_it_repeats() -> None:
    examples = [Example([number], 0) for number in range(7)]
    drawn = draw(examples, 20, seed=0)
    order = [example.tokens[0] for example in drawn]
    assert len(order) == 20
    rounds = [order[start : start + 7] for start in (0, 7, 14)]
    assert sorted(rounds[0]) == sorted(rounds[1]) == list(range(7))
    assert len(set(rounds[2])) == 6
    assert rounds[0] != rounds[1]
    assert drawn == draw(examples, 20, seed=0)
    assert drawn != draw(examples, 20, seed=1)


def test_held_out_items_are_never_trained_on(tokenizer: Tokenizer) -> None:
    data = task_data(ITEMS, tokenizer, settings(steps=30), seed=0)
    assert len(data.train) == 120
    assert len(data.held_out) == 6
    assert not [example for example in data.held_out if example in data.train]
    assert all(data.train.count(example) >= 3 for example in data.train)


def test_too_few_items_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(SourceError, match=r"40 .*`held_out`.* 40"):
        task_data(ITEMS, tokenizer, settings(held_out=40), seed=0)


def test_windows_are_cut_from_both_parts_of_every_text(tokenizer: Tokenizer) -> None:
    text = CalibrationText(library_text(("xml",)), library_text(("asyncio",)))
    other = CalibrationText(library_text(("http",)), library_text(("email",)))
    data = text_data({"a": text, "b": other}, tokenizer, settings(), seed=0)
    assert [len(example.tokens) for example in data.train] == [16] * 12
    assert len({tuple(example.tokens) for example in data.train}) == 8
    assert len({tuple(example.tokens) for example in data.held_out}) == 6
    assert not {tuple(e.tokens) for e in data.held_out} & {tuple(e.tokens) for e in data.train}
    assert data.train == text_data({"a": text, "b": other}, tokenizer, settings(), seed=0).train
    assert data.train != text_data({"a": text, "b": other}, tokenizer, settings(), seed=1).train


@pytest.mark.parametrize(("part", "says"), [(0, "^text a:"), (1, "^text a, held-out:")])
def test_text_that_is_too_short_is_named(tokenizer: Tokenizer, part: int, says: str) -> None:
    documents = [library_text(("xml",)), library_text(("asyncio",))]
    documents[part] = ["short"]
    with pytest.raises(SourceError, match=says):
        text_data({"a": CalibrationText(*documents)}, tokenizer, settings(), seed=0)
