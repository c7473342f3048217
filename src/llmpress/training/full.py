"""Fine-tune a causal language model on worked answers or text: how the fine-tuned models are made.

Only the linear layers inside the decoder blocks train, so that the delta to the base is in exactly
the weights that delta methods compress, and the rows of added tokens, which the base does not have.
Weights stay fp32 under bf16 autocast: in bf16 a small fine-tuning step is lost to rounding.
"""

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from llmpress.core.errors import ConfigError, NumericalError
from llmpress.core.settings import Count, Model, NameOf, Natural, Positive, Settings, Task, Tokens
from llmpress.models.architectures import block_linears
from llmpress.training.examples import Example, collate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainingSettings(Settings):
    """One entry of ``finetuned_models`` in params.yaml.

    Attributes:
        base: Name of the model to start from.
        steps: Optimizer steps.
        task: Name of a task with training items.
        corpus: Name of a corpus whose calibration part is trained on, instead of a task.
        added_tokens: What the vocabulary grows by.
        length: Tokens of a window of the corpus.
        windows: Windows of the corpus to train on.
        batch_size: Items or windows per step.
        learning_rate: Its peak; it rises over ``warmup`` steps and falls linearly to zero.
        warmup: Steps.
        max_grad_norm: Gradients are scaled down to this norm.
        precision: Of the matrix products; weights and optimizer state are fp32.
    """

    base: Model
    steps: Count
    task: Task | None = None
    corpus: Annotated[str, NameOf("corpora")] | None = None
    added_tokens: tuple[str, ...] = ()
    length: Tokens = 256
    windows: Count = 1024
    batch_size: Count = 16
    learning_rate: Positive = 1e-4
    warmup: Natural = 10
    max_grad_norm: Positive = 1.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.task) == bool(self.corpus):
            raise ValueError("give either `task` or `corpus` to train on")
        if len(set(self.added_tokens)) < len(self.added_tokens) or "" in self.added_tokens:
            raise ValueError(f"added_tokens must be different texts, got {self.added_tokens}")


def add_tokens(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tokens: Sequence[str]
) -> list[int]:
    """Grow a vocabulary, in place; the new rows of embeddings and head are the others' mean.

    The tokens are plain ones: decoding keeps them.

    Args:
        model: Its embeddings have one row for each token of the tokenizer.
        tokenizer: The model's own.
        tokens: Different from each other.

    Returns:
        The ids of the new tokens, which are the numbers of their rows.

    Raises:
        ConfigError: A token that the vocabulary has already, or embeddings with spare rows.
    """
    from transformers import AddedToken

    if not tokens:
        return []
    known = sorted(set(tokens) & set(tokenizer.get_vocab()))
    if known:
        raise ConfigError(f"added_tokens: the vocabulary has {known[0]!r} already; leave it out")
    count = len(tokenizer)
    rows = len(_vocabulary_weights(model)[0])
    if rows != count:
        raise ConfigError(
            f"added_tokens: the model has {rows} rows for {count} tokens; use a base without spare "
            "rows, or add no tokens"
        )
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in tokens])
    model.resize_token_embeddings(count + len(tokens), mean_resizing=False)
    with torch.no_grad():
        for weight in _vocabulary_weights(model):
            weight[count:] = weight[:count].mean(dim=0)
    return list(range(count, count + len(tokens)))


def draw_batches(
    examples: Sequence[Example], steps: int, batch_size: int, seed: int
) -> Iterator[list[Example]]:
    """Yield ``steps`` batches, going through all examples in a new random order each time."""
    random_state = random.Random(seed)
    waiting: list[Example] = []
    for _ in range(steps):
        while len(waiting) < batch_size:
            waiting += random_state.sample(examples, len(examples))
        yield waiting[:batch_size]
        waiting = waiting[batch_size:]


def answer_loss(model: "PreTrainedModel", tokens: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in nats of the answers' tokens; logits are computed only there."""
    hidden_states = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    learnt = labels[:, 1:] != -100  # [B, T - 1]
    head: nn.Module = model.get_output_embeddings()
    logits = head(hidden_states[:, :-1][learnt])  # [answer tokens, V]
    return functional.cross_entropy(logits.float(), labels[:, 1:][learnt])


def finetune(
    model: "PreTrainedModel",
    examples: Sequence[Example],
    settings: TrainingSettings,
    seed: int,
    *,
    new_tokens: Sequence[int] = (),
) -> list[float]:
    """Train the linear layers of the decoder blocks in place.

    Args:
        model: In fp32, on its device.
        examples: What `encode` or `window_examples` returns.
        settings: Steps, batch size, learning rate.
        seed: Of the order of the examples.
        new_tokens: Ids whose rows of embeddings and head train too, what `add_tokens` returns.

    Returns:
        The loss of each step, in nats per answer token.

    Raises:
        NumericalError: The loss is no longer finite.
    """
    parameters = _only_block_linears(model)
    masks = []
    for weight in _vocabulary_weights(model) if new_tokens else ():
        weight.requires_grad = True
        masks.append(weight.register_hook(partial(_rows_only, new_tokens)))
        parameters.append(weight)
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: learning_rate_share(step, settings.steps, settings.warmup)
    )
    precision = torch.autocast(
        model.device.type, torch.bfloat16, enabled=settings.precision == "bfloat16"
    )
    batches = draw_batches(examples, settings.steps, settings.batch_size, seed)
    losses: list[float] = []
    model.train()
    with tqdm(batches, total=settings.steps, desc="fine-tuning", unit="step") as progress:
        for batch in progress:
            tokens, labels = (part.to(model.device) for part in collate(batch))
            with precision:
                loss = answer_loss(model, tokens, labels)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                raise NumericalError(
                    f"the loss is {losses[-1]} at step {len(losses)}: lower `learning_rate`"
                )
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            progress.set_postfix(loss=f"{losses[-1]:.3f}")
    for mask in masks:
        mask.remove()
    model.train(mode=False)
    return losses


def learning_rate_share(step: int, steps: int, warmup: int) -> float:
    """Return the share of the peak learning rate at a step counted from zero."""
    rising = (step + 1) / (warmup + 1)
    falling = (steps - step) / max(1, steps - warmup)
    return min(1.0, rising, falling)


def _only_block_linears(model: "PreTrainedModel") -> list[nn.Parameter]:
    model.requires_grad_(requires_grad=False)
    parameters = []
    for linears in block_linears(model):
        for linear in linears.values():
            linear.requires_grad_(requires_grad=True)
            if linear.bias is not None:
                linear.bias.requires_grad = False
            parameters += [item for item in linear.parameters() if item.requires_grad]
    return parameters


def _vocabulary_weights(model: "PreTrainedModel") -> list[nn.Parameter]:
    """Return the weights of embeddings and head: one when they are tied, otherwise two."""
    layers: Any = model
    embeddings, head = layers.get_input_embeddings(), layers.get_output_embeddings()
    weights = {id(layer.weight): layer.weight for layer in (embeddings, head)}
    return list(weights.values())


def _rows_only(rows: Sequence[int], grad: Tensor) -> Tensor:
    """Keep the gradient of some rows; without one AdamW leaves the others bit for bit."""
    kept = torch.zeros_like(grad)
    kept[list(rows)] = grad[list(rows)]
    return kept
