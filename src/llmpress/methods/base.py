"""What a compression method is: settings, and a function from a weight to a smaller layer.

A method is one file in this package that defines exactly one concrete subclass of `Method`, a
frozen
dataclass whose fields are its settings. Tensors in, modules out: it knows no model, file or device.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from llmpress.nn.layers import CompressedLinear

Chain = Literal["teacher", "student"]
"""Whose hidden states enter a block: the original model's or the compressed model's."""

Need = Literal["needed", "used", "not used"]
"""What statistics of its input are to a method: it raises, or does worse, without them, or not."""

Sensitivity = float | list[float]
"""How much the loss rises per unit of a layer's relative error, or at each size it may get."""

LEAST_IMPORTANCE = 0.01
"""Of an output, relative to the mean: what the calibration text never needed may matter yet."""


class Shape(NamedTuple):
    """Shape of a linear layer's weight."""

    out_features: int
    in_features: int

    @property
    def num_weights(self) -> int:
        """Number of entries."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Work:
    """Amounts of work of each kind; they add up and scale.

    Attributes:
        fp32_flops: Operations of fp32 matrix products, two per multiply-add.
        fp64_flops: The same in fp64.
        svd_cubes: ``m · n · min(m, n)`` of fp32 singular value decompositions.
        eigh_cubes: ``n³`` of fp64 eigendecompositions.
        bytes_moved: Bytes read and written by elementwise passes.
        calls: Operations whose start takes longer than their work.
    """

    fp32_flops: float = 0.0
    fp64_flops: float = 0.0
    svd_cubes: float = 0.0
    eigh_cubes: float = 0.0
    bytes_moved: float = 0.0
    calls: float = 0.0

    @property
    def operations(self) -> float:
        """All of it in operations of fp32 matrix products that take a processor as long."""
        rates = (1.0, 2.0, 20.0, 15.0, 7.0, 500_000.0)
        amounts: tuple[float, ...] = astuple(self)
        return sum(rate * amount for rate, amount in zip(rates, amounts, strict=True))

    def __add__(self, other: "Work") -> "Work":
        """Return both amounts together."""
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, factor: float) -> "Work":
        """Return this amount ``factor`` times."""
        return Work(*(factor * amount for amount in astuple(self)))


@dataclass(frozen=True)
class InputStatistics:
    """What calibration knows of a linear layer's input ``x [in]``.

    Attributes:
        second_moment: ``E[x xᵀ]``, fp32 ``[in, in]``, symmetric, positive semi-definite.
        num_tokens: Tokens the mean was taken over.
        output_sensitivity: How much the loss feels a squared error of each output, fp32 ``[out]``,
            see `llmpress.calibration.sensitivity`; None where it was not measured.
    """

    second_moment: Tensor
    num_tokens: int
    output_sensitivity: Tensor | None = None

    @property
    def diagonal(self) -> Tensor:
        """``E[x²]`` per input channel, ``[in]``."""
        return self.second_moment.diagonal()

    @property
    def output_importance(self) -> Tensor | None:
        """How much an error of each output counts, positive ``[out]``; None if all count alike."""
        felt = self.output_sensitivity
        if felt is None or not bool((felt > 0).any()):
            return None
        return felt.float().clamp(min=LEAST_IMPORTANCE * float(felt.mean()))


@dataclass(frozen=True)
class Method(ABC):
    """Settings of a method as fields, and `compress`.

    Attributes:
        uses_statistics: Whether `compress` does better with `InputStatistics`, or needs them, with
            any settings; `need` says it of these.
        requires_statistics: Whether `compress` raises without them, with all settings.
        size_from_shape: Whether `empty_layer` has exactly the bytes of what `compress` makes;
            otherwise they depend on the values, within the method's budget.
    """

    uses_statistics: ClassVar[bool] = False
    requires_statistics: ClassVar[bool] = False
    size_from_shape: ClassVar[bool] = True

    @property
    def need(self) -> Need:
        """What statistics are to `plan` and `compress` with these settings."""
        if self.requires_statistics:
            return "needed"
        return "used" if self.uses_statistics else "not used"

    @property
    def spreads_budget(self) -> bool:
        """Whether `plan` gives more to layers of which `sensitivity` says that they need it."""
        return False

    def sensitivity(self, weight: Tensor, statistics: InputStatistics) -> Sensitivity:
        """Return what `plan` wants to know of this layer to compare it with others.

        By default every weight counts alike.

        Args:
            weight: ``[out, in]``.
            statistics: What is known of the layer's input and output.
        """
        del statistics
        return float(weight.numel())

    def plan(
        self,
        shapes: Mapping[str, Shape],
        model_weights: int,
        sensitivity: Mapping[str, Sensitivity] | None = None,
    ) -> dict[str, "Method | None"]:
        """Spread a budget over all layers; by default every layer gets the same settings.

        Args:
            shapes: Every compressible linear layer, from the bottom of the model upwards.
            model_weights: Number of weights of the whole model, embeddings included.
            sensitivity: Of each layer, where the method `spreads_budget` and statistics exist.

        Returns:
            For each layer the settings to compress it with, None where it is left as it is.

        Raises:
            ValueError: The budget is too small for some layer; names the smallest that is not.
        """
        del model_weights, sensitivity
        bits = getattr(self, "bits", None)
        least = {name: self.smallest_bits(shape) for name, shape in shapes.items()}
        name = max(least, key=lambda name: least[name] or 0.0, default="")
        needed = least.get(name)
        if bits is not None and needed is not None and bits < needed:
            raise ValueError(
                f"bits={bits}: the smallest possible budget here is "
                f"{math.ceil(1e4 * needed) / 1e4:.4f} bits per weight, which {name} of shape "
                f"{list(shapes[name])} needs"
            )
        return dict.fromkeys(shapes, self)

    def smallest_bits(self, shape: Shape) -> float | None:
        """Return the smallest ``bits`` that pay for a matrix of this shape; None without budget."""
        del shape
        return None

    @abstractmethod
    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> CompressedLinear:
        """Compress one weight or weight delta.

        Args:
            weight: ``[out, in]``, any float dtype; never modified.
            statistics: What is known of the layer's input.
            seed: Same seed, same bytes.

        Returns:
            A layer that computes with the compressed weight.

        Raises:
            ValueError: A weight of another shape, NaN or Inf, or settings it cannot take.
        """

    def empty_layer(self, shape: Shape) -> CompressedLinear:
        """Return the layer that `compress` makes of such a matrix, empty on the meta device.

        By default a random matrix is compressed; a method that can says it without.

        Raises:
            ValueError: Settings that cannot be met for this shape.
        """
        weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        statistics = InputStatistics(torch.eye(shape.in_features), num_tokens=1)
        return self.compress(weight, statistics).to("meta")

    def work(self, shape: Shape) -> Work:
        """Return what `compress` computes for such a matrix: by default some passes over it."""
        return Work(bytes_moved=280.0 * shape.num_weights)

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the largest tensors that `compress` holds at a time, the weight included."""
        return 48 * shape.num_weights


class Term(NamedTuple):
    """One term of a block's loss: which hidden states the student's and the teacher's block get."""

    student_input: Chain
    teacher_input: Chain


class Tunable(ABC):
    """A method whose layers can be finetuned block by block against the original block."""

    @abstractmethod
    def loss_terms(self) -> tuple[Term, ...]:
        """Which pairs of block outputs are compared; the loss is their sum."""

    @abstractmethod
    def block_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Distance of two block outputs ``[..., hidden]``, a scalar."""


def checked_weight(weight: Tensor) -> Tensor:
    """Return ``weight`` as a detached fp32 copy-or-view after checking it.

    Raises:
        ValueError: Not a non-empty finite float matrix.
    """
    if weight.ndim != 2 or weight.numel() == 0 or not weight.is_floating_point():
        raise ValueError(
            f"weight: a non-empty float matrix [out, in] is needed, "
            f"not {weight.dtype} of shape {list(weight.shape)}"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"weight of shape {list(weight.shape)} holds NaN or Inf")
    return weight.detach().float()


def checked_statistics(statistics: InputStatistics | None, weight: Tensor) -> InputStatistics:
    """Return ``statistics`` after checking that they are there and fit ``weight [out, in]``.

    Raises:
        ValueError: Missing, of another size, or not finite.
    """
    if statistics is None:
        raise ValueError(
            "statistics: this method needs calibration statistics of the layer's input"
        )
    expected = (weight.shape[1], weight.shape[1])
    if tuple(statistics.second_moment.shape) != expected:
        raise ValueError(
            f"statistics: a second moment of shape {list(statistics.second_moment.shape)} "
            f"does not fit a weight with {weight.shape[1]} inputs"
        )
    if not bool(torch.isfinite(statistics.second_moment).all()):
        raise ValueError("statistics: the second moment holds NaN or Inf")
    felt = statistics.output_sensitivity
    if felt is not None and (tuple(felt.shape) != (weight.shape[0],) or not _is_size(felt)):
        raise ValueError(
            f"statistics: the output sensitivity must be {weight.shape[0]} finite numbers, not "
            "negative"
        )
    return statistics


def _is_size(values: Tensor) -> bool:
    return bool((torch.isfinite(values) & (values >= 0)).all())
