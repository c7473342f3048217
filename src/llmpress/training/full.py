"""Fine-tune a causal language model on worked answers or text: how the fine-tuned models are made.

Only the linear layers inside the decoder blocks train, so that the delta to the base is in exactly
the weights that delta methods compress, and the rows of added tokens, which the base does not have.
Weights stay fp32 under bf16 autocast: in bf16 a small fine-tuning step is lost to rounding.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmpress.core.artifacts import TRAINING, write_json
from llmpress.core.errors import ConfigError
from llmpress.core.resume import SCRATCH, BlockStore
from llmpress.models.architectures import block_linears
from llmpress.models.checkpoints.files import refuse_quantized
from llmpress.training.data import TrainingData, draw
from llmpress.training.examples import Example
from llmpress.training.loop import train
from llmpress.training.objectives import model_loss
from llmpress.training.processes import trained_artifact
from llmpress.training.settings import TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def train_all_weights(
    base: Path,
    out: Path,
    *,
    settings: TrainingSettings,
    examples: Callable[["PreTrainedTokenizerBase"], list[Example]],
    text: Mapping[str, Path],
    seed: int,
    device: torch.device,
    scratch: Path = SCRATCH,
) -> None:
    """Train a model on disk into another one.

    A killed call continues from its last checkpoint when it is repeated, and gives the same bytes.

    Args:
        base: The model to start from.
        out: The model to write.
        settings: How.
        examples: Makes what is learnt with the tokenizer, added tokens included.
        text: The artifact that the examples come from, by role.
        seed: Same seed, same bytes.
        device: Where to compute.
        scratch: Folder for the checkpoints of an unfinished call.

    Raises:
        ArtifactError: A damaged folder.
        ConfigError: Tokens that cannot be added, a batch that processes cannot share evenly.
        NumericalError: A loss that is not finite.
    """
    with trained_artifact(
        out,
        stage="train_task",
        settings={**asdict(settings), "seed": seed},
        inputs={"base": base, **text},
        device=device,
        scratch=scratch,
    ) as made:
        refuse_quantized(base)
        tokenizer = AutoTokenizer.from_pretrained(base)
        # for answers this short, plain matrix products beat the fused attention's backward
        attention = "eager" if settings.task else "sdpa"
        model: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.float32, attn_implementation=attention
        )
        model.to(made.device)
        new_tokens = add_tokens(model, tokenizer, settings.added_tokens)
        losses = finetune(
            model, examples(tokenizer), settings, seed, new_tokens=new_tokens, store=made.store
        )
        if made.folder is not None:
            model.save_pretrained(made.folder)
            tokenizer.save_pretrained(made.folder)
            record = {"settings": asdict(settings), "seed": seed, "losses": losses}
            write_json(made.folder / TRAINING, record)


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


def finetune(
    model: "PreTrainedModel",
    examples: Sequence[Example],
    settings: TrainingSettings,
    seed: int,
    *,
    new_tokens: Sequence[int] = (),
    store: BlockStore | None = None,
) -> list[float]:
    """Train the linear layers of the decoder blocks in place.

    Args:
        model: In fp32, on its device.
        examples: What `encode` or `window_examples` returns.
        settings: Steps, batch size, learning rate.
        seed: Of the order of the examples.
        new_tokens: Ids whose rows of embeddings and head train too, what `add_tokens` returns.
        store: Where checkpoints lie; the newest whole one is continued from.

    Returns:
        The loss of each step, in nats per answer token.

    Raises:
        NumericalError: The loss is no longer finite.
    """
    parameters = {
        f"{name}.{part}": parameter
        for block in block_linears(model)
        for name, linear in block.items()
        for part, parameter in linear.named_parameters()
        if part == "weight"
    }
    masks = []
    if new_tokens:
        for number, weight in enumerate(_vocabulary_weights(model)):
            parameters[f"vocabulary.{number}"] = weight
            weight.requires_grad = True
            masks.append(weight.register_hook(partial(_rows_only, new_tokens)))
    drawn = draw(examples, settings.steps * settings.batch_size, seed)
    _, record = train(
        model,
        parameters,
        partial(model_loss, model, chunk=None),
        TrainingData(drawn, held_out=()),
        settings,
        seed=seed,
        store=store,
    )
    for mask in masks:
        mask.remove()
    return record.losses


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
