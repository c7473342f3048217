"""ClusComp: k-means codebooks, finetuned block by block.

The weight's transpose ``Wᵀ [in, out]`` is cut into vectors of ``d`` consecutive output channels of
one input channel, ``N = in · ceil(out / d)`` of them, and every vector becomes an index into a
codebook ``[K, d]``.

Source: ClusComp, arXiv 2503.13089, and its authors' code. Deviations, each a setting and each
measured in docs/ablations.md: one budget of true bits is spread over all matrices, which chooses
K, d and the codebook's precision (the paper fixes K = 65500, too large for small matrices); outputs
are scaled to one size; codes are chosen with error feedback as in GPTQ and outputs count by how
much the loss feels them; the block loss is relative to the size of each token's output, because a
few massive activations otherwise hold nearly all of a plain squared error.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn import functional

from llmpress.methods.base import (
    InputStatistics,
    Method,
    Need,
    Sensitivity,
    Shape,
    Term,
    Tunable,
    Work,
    checked_statistics,
    checked_weight,
)
from llmpress.methods.cluscomp.budget import (
    CodebookSize,
    allocate,
    choose_codebook_size,
    num_vectors,
    smallest_true_bits,
)
from llmpress.methods.cluscomp.feedback import assign_with_feedback, improve_codes, refit_codebook
from llmpress.nn.kernels.kmeans import kmeans, num_copies
from llmpress.nn.layers.base import rounded_to
from llmpress.nn.layers.codebook import CodebookLinear
from llmpress.numerics.linalg import damped_inverse_cholesky, with_positive_diagonal

CodebookDtype = Literal["int8", "float16"]
_DTYPES: dict[str, CodebookDtype] = {"int8": "int8", "float16": "float16"}


@dataclass(frozen=True)
class ClusComp(Method, Tunable):
    """Settings of ClusComp; give ``bits``, or both ``num_entries`` and ``vector_size``.

    Attributes:
        bits: True bits per weight over all matrices, at most: codes, codebooks, scales and padding.
        allocation: Whether the budget is spread over all matrices by their sensitivity, or the
            same for each.
        num_entries: ``K``, the paper's form.
        vector_size: ``d``, the paper's form.
        codebook_dtype: Stored precision of codebooks; auto takes what leaves the smaller error.
        scaled: Whether every output channel has a scale, which brings all to one size.
        weighted: Weight vectors by their input channel's second moment, where statistics exist.
        feedback: Choose codes so that later input channels absorb the error of earlier ones, where
            statistics exist.
        rounds: Times that codebook and codes are then improved in turn.
        importance: Weight outputs by how much the loss feels them, where it was measured.
        dampening: Added to the diagonal of the second moment, as a fraction of its mean.
        iterations: Lloyd iterations of k-means.
        loss: Block loss: squared error relative to each token's output (default) or plain.
        own_target: Also compare with the original block on the compressed model's hidden states.
    """

    uses_statistics: ClassVar[bool] = True
    size_from_shape: ClassVar[bool] = False

    bits: float | None = None
    allocation: Literal["global", "uniform"] = "global"
    num_entries: int | None = None
    vector_size: int | None = None
    codebook_dtype: Literal["auto", "int8", "float16"] = "auto"
    scaled: bool = True
    weighted: bool = True
    feedback: bool = True
    rounds: int = 2
    importance: bool = True
    dampening: float = 0.01
    iterations: int = 20
    loss: Literal["relative_mse", "mse"] = "relative_mse"
    own_target: bool = False

    @property
    def need(self) -> Need:
        """Statistics weight vectors, feed errors back, and spread a budget."""
        helped = self.weighted or self.feedback or self.spreads_budget
        return "used" if helped else "not used"

    def __post_init__(self) -> None:
        fixed = self.num_entries is not None and self.vector_size is not None
        partly = self.num_entries is not None or self.vector_size is not None
        if (self.bits is None) != fixed or (self.bits is not None and partly):
            raise ValueError("cluscomp: give either bits, or both num_entries and vector_size")
        if self.bits is not None and not 0.1 <= self.bits <= 16:
            raise ValueError(f"bits={self.bits}: allowed are 0.1 to 16")
        if self.iterations < 1:
            raise ValueError(f"iterations={self.iterations}: must be positive")
        if self.rounds < 0:
            raise ValueError(f"rounds={self.rounds}: must not be negative")
        if not 0 <= self.dampening < 1:
            raise ValueError(f"dampening={self.dampening}: allowed are 0 to below 1")
        if self.codebook_dtype == "int8" and not self.scaled:
            raise ValueError("codebook_dtype=int8: needs scaled: true")

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Precisions that a codebook may be stored in."""
        if self.codebook_dtype != "auto":
            return (self.codebook_dtype,)
        return ("int8", "float16") if self.scaled else ("float16",)

    def smallest_bits(self, shape: Shape) -> float | None:
        """Return the bits of the smallest codebook: two entries of the longest vectors."""
        return None if self.bits is None else smallest_true_bits(shape, self.dtypes, self.scaled)

    def codebook_size(self, shape: Shape) -> CodebookSize:
        """Return the codebook that a matrix of this shape gets.

        Raises:
            ValueError: No codebook fits the bits; names the smallest possible.
        """
        if self.bits is not None:
            return choose_codebook_size(shape, self.bits, self.dtypes, self.scaled)
        if self.num_entries is None or self.vector_size is None:
            raise ValueError("cluscomp: give either bits, or both num_entries and vector_size")
        dtype = "float16" if self.codebook_dtype == "auto" else self.codebook_dtype
        most = num_vectors(shape, self.vector_size)
        return CodebookSize(min(self.num_entries, most), self.vector_size, dtype)

    @property
    def spreads_budget(self) -> bool:
        """Whether there is a budget, to be spread by sensitivity."""
        return self.bits is not None and self.allocation == "global"

    def sensitivity(self, weight: Tensor, statistics: InputStatistics) -> Sensitivity:
        """Return ``Σ_o g_o Σ_i w_oi² h_i``: the loss if every weight had a relative error of one.

        ``h_i`` is ``E[x_i²]``, or with error feedback ``1 / [H⁻¹]_ii``: what is left of it when the
        other channels absorb what they can. Where the loss's gradients were not measured, nothing
        compares two layers, and every weight counts alike.
        """
        if statistics.output_sensitivity is None or not self.importance:
            return super().sensitivity(weight, statistics)
        problem = self._problem(checked_weight(weight), statistics)
        return float(problem.importance @ (weight.detach().float().square() @ problem.channels))

    def plan(
        self,
        shapes: Mapping[str, Shape],
        model_weights: int,
        sensitivity: Mapping[str, Sensitivity] | None = None,
    ) -> dict[str, Method | None]:
        """Spread the budget over all matrices; without sensitivities every weight counts alike."""
        if self.bits is None or not self.spreads_budget:
            return super().plan(shapes, model_weights)
        weight = {n: float(s.out_features * s.in_features) for n, s in shapes.items()}
        if sensitivity is not None:
            weight = {name: cast("float", felt) for name, felt in sensitivity.items()}
        sizes = allocate(shapes, weight, self.bits, self.dtypes, self.scaled)
        return {
            name: replace(
                self,
                bits=None,
                num_entries=size.num_entries,
                vector_size=size.vector_size,
                codebook_dtype=_DTYPES[size.dtype],
            )
            for name, size in sizes.items()
        }

    def compress(
        self, weight: Tensor, statistics: InputStatistics | None = None, *, seed: int = 0
    ) -> CodebookLinear:
        """Cluster the vectors of ``weight [out, in]``, choose codes, store codes and codebook."""
        checked = checked_weight(weight)
        out_features, in_features = checked.shape
        K, d, dtype = self.codebook_size(Shape(out_features, in_features))
        scales = _row_scales(checked) if self.scaled else checked.new_ones(out_features)
        scaled = torch.where(scales.unsqueeze(1) > 0, checked / scales.unsqueeze(1), 0.0)
        columns = functional.pad(scaled.t(), (0, -out_features % d)).contiguous()  # [in, G·d]
        problem = self._problem(checked, statistics)
        importance = problem.importance * scales.square()  # of a scaled output
        importance = functional.pad(importance / _positive_mean(importance), (0, -out_features % d))
        codebook, codes = kmeans(
            columns.reshape(-1, d),
            K,
            weights=_vector_weights(problem.channels, importance, d),
            iterations=self.iterations,
            seed=seed,
        )
        codes = codes.view(in_features, -1)  # [in, G]
        codebook, step = _rounded_codebook(codebook, dtype)
        if problem.feedback is not None:
            moment, factor, order = problem.feedback
            codes = assign_with_feedback(columns, codebook, importance, factor, order)
            for _ in range(self.rounds):
                codebook = refit_codebook(columns, codebook, codes, importance, moment)
                codebook, step = _rounded_codebook(codebook, dtype)
                codes = improve_codes(columns, codebook, codes, importance, moment)
        return CodebookLinear.from_codes(
            codes.reshape(-1),
            codebook / step,
            in_features,
            out_features,
            dtype,
            scales * step if self.scaled else None,
        )

    def empty_layer(self, shape: Shape) -> CodebookLinear:
        """Return the codebook that a matrix of this shape gets by itself, and its codes."""
        K, d, dtype = self.codebook_size(shape)
        return CodebookLinear.empty(
            shape, num_entries=K, vector_size=d, dtype=dtype, scaled=self.scaled
        )

    def work(self, shape: Shape) -> Work:
        """Return the work of k-means, and of the codes with error feedback."""
        K, d, _ = self.codebook_size(shape)
        n = shape.in_features
        N = num_vectors(shape, d)
        distances = float(N) * K * num_copies(N, K) * (self.iterations + 1)
        # faiss's products are only d long; comparing distances takes as long as 14 operations
        clustering = Work(
            fp32_flops=distances * (2 * d + 10), bytes_moved=200.0 * shape.num_weights
        )
        if not self.feedback:
            return clustering
        products = 2.0 * shape.num_weights * n  # of a weight and the second moment
        assigned = Work(fp32_flops=float(N) * K * (2 * d + 4) + 2 * products, calls=8.0 * n)
        refitted = Work(fp32_flops=11 * products, bytes_moved=11 * 30.0 * shape.num_weights)
        # the second moment is factorized twice: to weigh the layers, and here
        factorized = Work(fp32_flops=2 * 4.0 * n**3)
        passes = self.rounds + 1  # over all codes
        return clustering + factorized + assigned * passes + refitted * self.rounds

    def workspace_bytes(self, shape: Shape) -> int:
        """Return the bytes of the vectors, and of k-means or error feedback on them."""
        K, d, _ = self.codebook_size(shape)
        N = num_vectors(shape, d)
        copies = num_copies(N, K)
        chunk = min(N * copies, 16384) * K  # distances at a time
        clustering = (2 + copies) * N * d + 6 * N * copies + chunk
        moments = 4 * shape.in_features**2 if self.feedback else 0
        feedback = 4 * N * d + 3 * -(-shape.out_features // d) * K if self.feedback else 0
        return 4 * (shape.num_weights + N * d + moments + max(clustering, feedback))

    def loss_terms(self) -> tuple[Term, ...]:
        """Compressed block on its own chain against the original; optionally on the same inputs."""
        own = (Term("student", "student"),) if self.own_target else ()
        return (Term("student", "teacher"), *own)

    def block_loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Mean squared error, relative to each token's mean square unless ``loss`` is ``mse``."""
        error = (output - target).square().mean(dim=-1)
        if self.loss == "mse":
            return error.mean()
        return (error / target.square().mean(dim=-1).clamp(min=1e-12)).mean()

    def _problem(self, weight: Tensor, statistics: InputStatistics | None) -> "_Problem":
        """Return what an error in this weight costs, as far as the settings want to know it."""
        out_features, in_features = weight.shape
        importance = weight.new_ones(out_features)
        if statistics is None or not (self.weighted or self.feedback):
            return _Problem(weight.new_ones(in_features), importance, None)
        checked = checked_statistics(statistics, weight)
        if self.importance and checked.output_importance is not None:
            importance = checked.output_importance
        moment = with_positive_diagonal(checked.second_moment)
        if not self.feedback:
            return _Problem(moment.diagonal(), importance, None)
        order = moment.diagonal().argsort(descending=True, stable=True)
        factor, dampening, _ = damped_inverse_cholesky(moment[order][:, order], self.dampening)
        moment.diagonal().add_(dampening * float(moment.diagonal().mean()))
        left = torch.empty_like(moment.diagonal())
        left[order] = 1 / factor.square().sum(dim=0)  # 1 / [H⁻¹]_ii
        channels = left if self.weighted else torch.ones_like(left)
        return _Problem(channels, importance, (moment, factor, order))


class _Problem(NamedTuple):
    """What an error in a weight costs.

    Attributes:
        channels: Cost of a squared error by input channel, ``[in]``.
        importance: The same by output, ``[out]``.
        feedback: Damped second moment, factor of its inverse, order of channels; None without
            error feedback.
    """

    channels: Tensor
    importance: Tensor
    feedback: tuple[Tensor, Tensor, Tensor] | None


def _row_scales(weight: Tensor) -> Tensor:
    """Return the root mean square of each output's weights, ``[out]``, as fp16 holds it."""
    scales = weight.square().mean(dim=1).sqrt()
    if float(scales.max()) > torch.finfo(torch.float16).max:
        raise ValueError(f"weight: rows of size {float(scales.max()):g} are too large for fp16")
    return scales.half().float()


def _positive_mean(values: Tensor) -> float:
    mean = float(values.mean())
    return mean if mean > 0 else 1.0


def _vector_weights(channels: Tensor, importance: Tensor, d: int) -> Tensor:
    """Return the weight of every vector, fp32 ``[N]``: none is quite without one."""
    groups = importance.view(-1, d).mean(dim=1)  # [G]
    weights = torch.outer(channels / _positive_mean(channels), groups).reshape(-1)
    return weights.clamp(min=1e-6 * _positive_mean(weights))


def _rounded_codebook(codebook: Tensor, dtype: str) -> tuple[Tensor, float]:
    """Return the codebook with the values it is stored with, and the unit it is stored in."""
    if dtype != "int8":
        rounded = rounded_to(codebook, getattr(torch, dtype)).float()
        if not bool(torch.isfinite(rounded).all()):
            raise ValueError(f"weight: its values are too large for a codebook in {dtype}")
        return rounded, 1.0
    largest = float(codebook.abs().max())
    step = largest / 127 if largest > 0 else 1.0
    return (codebook / step).round() * step, step
