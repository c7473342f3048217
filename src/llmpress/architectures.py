"""Where a model keeps its decoder blocks, and which layers of a block are compressed.

The rule: the blocks are the longest ``ModuleList`` that is not itself inside another one, and every
``nn.Linear`` inside a block is compressible. Embeddings and the language-model head lie outside the
blocks and stay as they are.
"""

from torch import nn


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the name and the list of a model's decoder blocks.

    Raises:
        ValueError: The model has no list of blocks, so it cannot be walked block by block.
    """
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
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
        {
            f"{prefix}.{index}.{name}": module
            for name, module in block.named_modules()
            if isinstance(module, nn.Linear)
        }
        for index, block in enumerate(blocks)
    ]


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` in the place of the submodule called ``name``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
