"""The two losses of a whole model, whatever part of the logits is in memory."""

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from llmpress.training.objectives import model_loss


@pytest.fixture
def model(tiny_model_folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)


@pytest.fixture
def teacher(tiny_finetuned_folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(tiny_finetuned_folder, dtype=torch.float32)


@pytest.fixture
def batch(tiny_windows: Tensor) -> tuple[Tensor, Tensor]:
    tokens = tiny_windows[:3, :9].clone()
    labels = tokens.clone()
    labels[:, :4] = -100
    labels[1, 7:] = -100
    return tokens, labels


@pytest.mark.parametrize("chunk", [1, 4, 512, None])
def test_next_token_is_transformers_own_loss(
    model: PreTrainedModel, batch: tuple[Tensor, Tensor], chunk: int | None
) -> None:
    tokens, labels = batch
    expected = model(input_ids=tokens, labels=labels).loss
    expected.backward()
    gradient = model.model.norm.weight.grad.clone()
    model.zero_grad()
    loss = model_loss(model, tokens, labels, chunk=chunk)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(model.model.norm.weight.grad, gradient, atol=1e-6, rtol=1e-4)


def test_distillation_is_the_divergence_from_the_teacher(
    model: PreTrainedModel, teacher: PreTrainedModel, batch: tuple[Tensor, Tensor]
) -> None:
    tokens, labels = batch
    learnt = labels[:, 1:] != -100
    ours, theirs = (
        m(input_ids=tokens).logits[:, :-1][learnt].double().log_softmax(-1)
        for m in (model, teacher)
    )
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    loss = model_loss(model, tokens, labels, teacher=teacher, chunk=4)
    torch.testing.assert_close(loss.double(), expected, atol=1e-6, rtol=1e-4)
    assert expected.item() > 1e-3
    loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_the_divergence_of_a_model_from_itself_is_zero(
    model: PreTrainedModel, batch: tuple[Tensor, Tensor]
) -> None:
    loss = model_loss(model, *batch, teacher=model)
    torch.testing.assert_close(loss.item(), 0.0, atol=1e-6, rtol=0)
