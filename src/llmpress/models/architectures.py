"""Where a model keeps its decoder blocks, and which layers of a block are compressed.

The rule: the blocks are the longest ``ModuleList`` that is not itself inside another one, and every
``nn.Linear`` inside a block is compressible. Embeddings and the language-model head lie outside the
blocks and stay as they are. Of a mixture of experts each matrix of each expert is a linear, see
`llmpress.models.experts`. What the rule does not know of an architecture stands in the tables here.
"""

import re
from collections.abc import Iterable
from fnmatch import fnmatch
from typing import Any

from torch import nn

from llmpress.core.errors import ArtifactError

ROUTERS = ("*.router", "*.router.*", "*.mlp.gate", "*.mlp.gate.*", "*.shared_expert_gate")
"""Linears that choose experts: tiny, and an error in them sends tokens to another expert."""

LEFT_MULTIPLIED = ("*.dt_proj",)
"""Linears whose module multiplies by their weight instead of calling them: Mamba's time steps."""

WORTH_SAYING = 0.05
"""Share of the blocks' weights that, when it is left out, is worth a warning."""


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's decoder blocks.

    Raises:
        ValueError: The model has no list of blocks, so it cannot be walked block by block.
    """
    decoder = getattr(model, "get_decoder", lambda: model)()  # of images or sound, too: the text's
    where = next((name for name, module in model.named_modules() if module is decoder), "")
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and f"{name}.".startswith(f"{where}." if where else "")
    ]
    outer = [
        (name, module)
        for name, module in lists
        if not any(name.startswith(f"{other}.") for other, _ in lists)
    ]
    if not outer:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks")
    return max(outer, key=lambda item: len(item[1]))


def block_linears(model: nn.Module) -> list[dict[str, nn.Linear]]:
    """Return, for each decoder block from the bottom up, its linear layers by full name."""
    prefix, blocks = decoder_blocks(model)
    return [
        {f"{prefix}.{index}.{name}": linear for name, linear in compressible(block).items()}
        for index, block in enumerate(blocks)
    ]


def compressible(block: nn.Module) -> dict[str, nn.Linear]:
    """Return the linears of one decoder block that are compressed, by their name in it."""
    return {
        name: module
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear) and not matches(name, ROUTERS)
    }


def left_out(model: nn.Module) -> dict[str, int]:
    """Return what the rule does not reach inside lists of blocks: matrices that are no linears.

    Routers are left out on purpose, and are not among them.

    Returns:
        Number of weights by name, layers and experts taken together as ``*``.
    """
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    reached = {name for block in block_linears(model) for name in block}
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        owner = name.rpartition(".")[0]
        inside = any(name.startswith(f"{place}.") for place in lists)
        if inside and parameter.ndim > 1 and owner not in reached and not matches(owner, ROUTERS):
            kind = re.sub(r"\.\d+(?=\.)", ".*", name)
            found[kind] = found.get(kind, 0) + parameter.numel()
    return found


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a module's name fits one of the patterns."""
    return any(fnmatch(f".{name}", pattern) for pattern in patterns)


def compressed_linear(name: str, model: nn.Module) -> nn.Linear:
    """Return the linear layer of a plain model that an artifact stores compressed.

    Raises:
        ArtifactError: The model has no such linear.
    """
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        linear = None
    if not isinstance(linear, nn.Linear):
        raise ArtifactError(f"{name}: compressed in the artifact, but the model has no such linear")
    return linear


def vocabulary_names(model: nn.Module) -> tuple[str, str]:
    """Return the names of the weights of embeddings and head, empty where there is no head."""
    layers: Any = model
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    embeddings, head = layers.get_input_embeddings(), layers.get_output_embeddings()
    return names[embeddings], names.get(head, "")


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
