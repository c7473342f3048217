import copy
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from whole_models import running

from llmpress.core.errors import ArtifactError, NumericalError
from llmpress.evaluation import likelihood as module
from llmpress.evaluation.likelihood import Likelihood, likelihood, score


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """fp64 predictions of the second to the last tokens, ``[windows * (T - 1), V]``."""
    return model(input_ids=windows).logits[:, :-1].double().flatten(0, 1)


def compared(
    model: PreTrainedModel, original: PreTrainedModel | None, windows: Tensor
) -> Likelihood:
    reference = None if original is None else running(original, windows)
    return likelihood(running(model, windows), reference, windows, "code")


def test_score_is_the_textbook_definition() -> None:
    logits, reference = torch.randn(5, 11) * 3, torch.randn(5, 11) * 3
    targets = torch.tensor([0, 3, 10, 5, 5])
    model, original = (Categorical(logits=x.double()) for x in (logits, reference))
    agreements = sum(int(a.argmax() == b.argmax()) for a, b in zip(logits, reference, strict=True))
    expected = torch.stack(
        [
            -model.log_prob(targets).sum(),
            kl_divergence(original, model).sum(),
            torch.tensor(agreements, dtype=torch.float64),
        ]
    )
    torch.testing.assert_close(score(logits, reference, targets), expected, rtol=1e-5, atol=1e-6)


def test_tokens_the_original_excludes_add_nothing() -> None:
    reference = torch.tensor([[0.0, 1.0, -torch.inf]])
    logits = torch.tensor([[0.0, 1.0, -torch.inf]])
    found = score(logits, reference, torch.tensor([1]))
    torch.testing.assert_close(found[1:], torch.tensor([0.0, 1.0], dtype=torch.float64))


def test_perplexity_is_that_of_transformers(
    tiny_model: PreTrainedModel, tiny_windows: Tensor
) -> None:
    found = compared(tiny_model, None, tiny_windows[:4])
    with torch.no_grad():
        losses = [tiny_model(input_ids=w[None], labels=w[None]).loss for w in tiny_windows[:4]]
    assert found.perplexity == pytest.approx(math.exp(torch.stack(losses).mean()), rel=1e-5)
    assert found.num_tokens == 4 * 63
    assert (found.kl_divergence_nats, found.top1_agreement) == (0.0, 1.0)


@pytest.mark.parametrize("chunk", [1, 62, 63, 64])
def test_divergence_is_from_the_original_whatever_the_chunks(
    chunk: int,
    tiny_model: PreTrainedModel,
    tiny_finetuned: PreTrainedModel,
    tiny_windows: Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "CHUNK", chunk)
    windows = tiny_windows[:3]
    surer = copy.deepcopy(tiny_model)  # the two divergences of similar models are nearly the same
    surer.get_output_embeddings().weight.data *= 2
    found = compared(tiny_finetuned, surer, windows)
    model, original = logits_of(tiny_finetuned, windows), logits_of(surer, windows)
    expected = kl_divergence(Categorical(logits=original), Categorical(logits=model)).mean()
    backwards = kl_divergence(Categorical(logits=model), Categorical(logits=original)).mean()
    assert found.kl_divergence_nats == pytest.approx(float(expected), rel=1e-4)
    assert found.kl_divergence_nats != pytest.approx(float(backwards), rel=1e-2)
    agreement = (model.argmax(-1) == original.argmax(-1)).double().mean()
    assert found.top1_agreement == pytest.approx(float(agreement))
    assert 0 < found.top1_agreement < 1


def test_a_model_does_not_differ_from_itself(
    tiny_model: PreTrainedModel, tiny_windows: Tensor
) -> None:
    found = compared(tiny_model, tiny_model, tiny_windows[:2])
    assert (found.kl_divergence_nats, found.top1_agreement) == (0.0, 1.0)


def test_another_vocabulary_is_refused(tiny_model: PreTrainedModel, tiny_windows: Tensor) -> None:
    config = LlamaConfig(
        vocab_size=520,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    with pytest.raises(ArtifactError, match=r"512 .*520"):
        compared(tiny_model, LlamaForCausalLM(config).eval(), tiny_windows[:1])


def test_not_a_number_is_an_error(tiny_model: PreTrainedModel, tiny_windows: Tensor) -> None:
    broken = copy.deepcopy(tiny_model)
    broken.model.norm.weight.data[0] = torch.nan
    with pytest.raises(NumericalError, match=r"code: .*NaN"):
        compared(broken, tiny_model, tiny_windows[:1])


def test_an_infinite_perplexity_is_an_error(
    tiny_model: PreTrainedModel, tiny_windows: Tensor
) -> None:
    broken = copy.deepcopy(tiny_model)
    broken.model.norm.weight.data *= 1e6
    with pytest.raises(NumericalError, match=r"code: .*nats"):
        compared(broken, None, tiny_windows[:1])


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)], ids=str)
def test_windows_without_predictions_are_refused(
    shape: tuple[int, ...], tiny_model: PreTrainedModel
) -> None:
    with pytest.raises(ValueError, match="windows"):
        compared(tiny_model, None, torch.zeros(shape, dtype=torch.int64))
