"""Settings that methods are tried with; they stand in ``methods/test_<method>.py``.

There: ``EXAMPLES``, a list of `Example`; ``LADDERS``, lists of settings of rising size; and where
there is something to say ``BETTER_THAN``, rows of settings, a baseline and its settings at no less
size, and ``SMALLEST``, settings beside the smallest ``bits``.
"""

import runpy
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmpress.methods.base import InputStatistics
from llmpress.methods.registry import known_methods, method_class
from llmpress.nn.layers import CompressedLinear

Settings = dict[str, Any]
Ladder = list[Settings]


@dataclass(frozen=True)
class Example:
    """Settings to try a method with.

    Attributes:
        settings: Fields of the method's class.
        needs_statistics: Whether these settings raise without statistics.
        may_refuse: Smallest number of weights that the settings must be able to compress; a budget
            in bits may be too small for a tiny matrix, which must then be said with a ValueError.
    """

    settings: Settings
    needs_statistics: bool = False
    may_refuse: int = 0


@dataclass(frozen=True)
class MethodExamples:
    """What the test of one method says of it, see above."""

    examples: Sequence[Example]
    ladders: Sequence[Ladder]
    better_than: Sequence[tuple[Settings, str, Settings]] = ()
    smallest: Settings = field(default_factory=dict)


@cache
def examples_of(name: str) -> MethodExamples:
    """Return the examples of a method; fails where its test is missing or has none."""
    test = runpy.run_path(str(Path(__file__).parent / "methods" / f"test_{name}.py"))
    return MethodExamples(
        test["EXAMPLES"], test["LADDERS"], test.get("BETTER_THAN", ()), test.get("SMALLEST", {})
    )


@cache
def example_layers(out_features: int, in_features: int) -> dict[str, list[CompressedLinear]]:
    """Return by kind of layer what the methods' examples make of a matrix of at least 1,000."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(out_features, in_features, generator=generator)
    x = torch.randn(256, in_features, generator=generator)
    statistics = InputStatistics(x.T @ x / len(x), len(x))
    found: dict[str, list[CompressedLinear]] = {}
    for name in known_methods():
        for example in examples_of(name).examples:
            layer = method_class(name)(**example.settings).compress(weight, statistics)
            found.setdefault(layer.kind, []).append(layer)
    return found
