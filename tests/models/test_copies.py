"""A model that is copied, pickled, saved whole or sent to another process is the same model."""

import copy
import io
import multiprocessing
import pickle  # noqa: TID251 - what is tested
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_artifacts import WEIGHT_METHODS, Make
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import llmpress
from llmpress.nn.layers import dense_bytes
from llmpress.serving.bank import DeltaBank

Copy = Callable[[PreTrainedModel], PreTrainedModel]


def saved_whole(model: PreTrainedModel) -> PreTrainedModel:
    file = io.BytesIO()
    torch.save(model, file)  # noqa: TID251 - what is tested
    file.seek(0)
    found: PreTrainedModel = torch.load(file, weights_only=False)  # noqa: TID251
    return found


COPIES: dict[str, Copy] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_whole,
}


def logits(model: PreTrainedModel, windows: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(windows).logits
    return found


def assert_copies(model: PreTrainedModel, windows: Tensor) -> None:
    for used in (False, True):
        expected = logits(model, windows) if used else None
        for name, make in COPIES.items():
            again = make(model)
            assert dense_bytes(again) == 0, name
            expected = logits(model, windows) if expected is None else expected
            torch.testing.assert_close(logits(again, windows), expected, msg=name)
            for key, tensor in model.state_dict().items():
                torch.testing.assert_close(again.state_dict()[key], tensor, rtol=0, atol=0)


@pytest.mark.parametrize("name", WEIGHT_METHODS)
def test_of_every_method(name: str, compressed: Make, tiny_windows: Tensor) -> None:
    assert_copies(llmpress.load_model(compressed(name)), tiny_windows[:1])
    model = AutoModelForCausalLM.from_pretrained(compressed(name), dtype="auto")
    assert_copies(model, tiny_windows[:1])


def test_with_a_delta(
    tiny_model_folder: Path, compressed_delta: Path, tiny_windows: Tensor
) -> None:
    model = llmpress.load_finetuned(tiny_model_folder, compressed_delta)
    assert_copies(model, tiny_windows[:1])
    before = logits(llmpress.load_model(tiny_model_folder), tiny_windows[:1])
    for make in COPIES.values():
        bare = llmpress.remove_delta(make(model))
        torch.testing.assert_close(logits(bare, tiny_windows[:1]), before, rtol=0, atol=0)


def test_with_a_bank(tiny_model_folder: Path, compressed_delta: Path, tiny_windows: Tensor) -> None:
    model = llmpress.load_model(tiny_model_folder)
    bank = DeltaBank(model)
    bank.add("mine", compressed_delta)
    for make in COPIES.values():
        torch.testing.assert_close(
            logits(make(model), tiny_windows[:1]), logits(model, tiny_windows[:1])
        )


@pytest.mark.parametrize("architecture", ["mixtral"], indirect=True)
def test_of_a_mixture(architecture_folder: Path, tiny_windows: Tensor, tmp_path: Path) -> None:
    packed = llmpress.compress_model(
        architecture_folder, method="rtn", bits=4, group_size=16, out=tmp_path / "packed"
    )
    assert_copies(llmpress.load_model(packed), tiny_windows[:1])


def _send(model: PreTrainedModel, windows: Tensor, results: "multiprocessing.Queue[list]") -> None:  # type: ignore[type-arg]
    results.put(logits(model, windows).flatten().tolist())


@pytest.mark.slow
def test_in_a_spawned_process(compressed: Make, tiny_windows: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(compressed("cluscomp"), dtype="auto")
    expected = logits(model, tiny_windows[:1, :8])
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_send, args=(model, tiny_windows[:1, :8], results))
    process.start()
    found = torch.tensor(results.get(timeout=120)).view_as(expected)
    process.join()
    torch.testing.assert_close(found, expected)
