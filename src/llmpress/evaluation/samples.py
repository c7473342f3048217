"""A few texts a model continues, for readers who want to see and not only to measure."""

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROMPTS = (
    "The capital of France is",
    "Water boils when",
    "def mean(values):\n",
)


@torch.inference_mode()
def sample_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[dict[str, str]]:
    """Continue the fixed prompts, each with its most probable tokens.

    Args:
        model: What is evaluated.
        tokenizer: Its tokenizer.
        max_tokens: Tokens per text; a text ends earlier where the model ends it.

    Returns:
        ``{"prompt": ..., "text": ...}`` for each prompt, ``text`` without the prompt.
    """
    end = tokenizer.eos_token_id
    padding = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    width = max(len(row) for row in rows)
    padded = [[padding] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    output = model.generate(  # type: ignore[operator]
        torch.tensor(padded, device=model.device),  # [prompts, width]
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=max_tokens,
        do_sample=False,
        pad_token_id=padding,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    return [{"prompt": p, "text": text} for p, text in zip(PROMPTS, texts, strict=True)]
