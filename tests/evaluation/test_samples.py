import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from llmpress.evaluation.samples import PROMPTS, sample_texts


@torch.no_grad()
def continued(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str, count: int
) -> str:
    tokens = torch.tensor(tokenizer(prompt)["input_ids"])
    start = len(tokens)
    for _ in range(count):
        tokens = torch.cat([tokens, model(input_ids=tokens[None]).logits[0, -1:].argmax(dim=-1)])
    return tokenizer.decode(tokens[start:], skip_special_tokens=True)


def test_texts_are_the_greedy_ones_whatever_the_padding(
    tiny_model: PreTrainedModel, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    found = sample_texts(tiny_model, tiny_tokenizer, max_tokens=8)
    assert len({len(tiny_tokenizer(prompt)["input_ids"]) for prompt in PROMPTS}) > 1
    assert found == [
        {"prompt": prompt, "text": continued(tiny_model, tiny_tokenizer, prompt, 8)}
        for prompt in PROMPTS
    ]
