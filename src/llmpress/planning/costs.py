"""What computing costs: amounts of work by kind, and the one table of every method's share.

Dimensions of a linear layer: ``o`` outputs, ``n`` inputs, ``w = o · n`` weights.

The constants below were measured on two hyperthreads of a Xeon with AMX, layer by layer on the
model of the default run (SmolLM2-135M: 192 to 1536 channels), one thread, little else running.
Checked against the whole default run and on a model of other widths (768 and 3072) with other
settings: memory within a quarter there, times within a factor of two but for one stage of the
default run; what rebuilding a codebook's weight costs in finetuning was set on both together.
A constant in bytes per weight stands for elementwise passes over the weights: time times the
bandwidth that `llmpress.planning.machine` measured on that machine.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from llmpress.methods.base import Method, Shape
from llmpress.methods.bitdelta import BitDelta
from llmpress.methods.cluscomp import ClusComp
from llmpress.methods.delta_come import DeltaCoMe
from llmpress.methods.gptq import GPTQ
from llmpress.methods.lillama import Lillama
from llmpress.methods.magnitude import Magnitude
from llmpress.methods.rtn import RTN
from llmpress.methods.svd import SVD
from llmpress.nn.layers import (
    CodebookLinear,
    CompressedLinear,
    LowRankLinear,
    MixedLowRankLinear,
    PivotedLowRankLinear,
    QuantizedLinear,
    SignLinear,
    SparseLinear,
)
from llmpress.nn.layers.sparse import smaller_index
from llmpress.planning.machine import Rates

EFFICIENCY: Mapping[str, float] = {
    "fp32_flops": 0.8,
    "bf16_flops": 0.3,
    "fp64_flops": 0.85,
    "svd_cubes": 1.6,
    "eigh_cubes": 1.7,
    "bytes_moved": 0.65,
    "calls": 1.0,
}
"""Share of the probed rate that the stages reach. Decompositions get faster with size, the probe is
small; bf16 products of narrow layers spend most of their time on casts."""


MEAN_OVER_BEST = 1.3
"""Time of a long computation over what the probe promises: the probe keeps the best of some tries,
a run gets the mean. Between a run on the idle machine (1.1) and one that shares it (1.5)."""


@dataclass(frozen=True)
class Work:
    """Amounts of work of each kind; they add up and scale.

    Attributes:
        fp32_flops: Operations of fp32 matrix products, two per multiply-add.
        bf16_flops: The same in bfloat16.
        fp64_flops: The same in fp64.
        svd_cubes: ``m · n · min(m, n)`` of fp32 singular value decompositions.
        eigh_cubes: ``n³`` of fp64 eigendecompositions.
        bytes_moved: Bytes read and written by elementwise passes.
        calls: Operations whose start takes longer than their work.
        fixed_seconds: What no rate shortens: starting Python, importing packages.
    """

    fp32_flops: float = 0.0
    bf16_flops: float = 0.0
    fp64_flops: float = 0.0
    svd_cubes: float = 0.0
    eigh_cubes: float = 0.0
    bytes_moved: float = 0.0
    calls: float = 0.0
    fixed_seconds: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        """Return both amounts together."""
        names = [field.name for field in fields(self)]
        return Work(*(getattr(self, name) + getattr(other, name) for name in names))

    def __mul__(self, factor: float) -> "Work":
        """Return this amount ``factor`` times."""
        return Work(*(factor * getattr(self, field.name) for field in fields(self)))

    def seconds(self, rates: Rates) -> float:
        """Return the time this takes one kind after the other, in seconds."""
        timed: Iterable[float] = (
            getattr(self, kind) / (efficiency * getattr(rates, f"{_RATE[kind]}_per_second"))
            for kind, efficiency in EFFICIENCY.items()
        )
        return self.fixed_seconds + MEAN_OVER_BEST * sum(timed)


_RATE = {kind: "bytes" if kind == "bytes_moved" else kind for kind in EFFICIENCY}


def total(parts: Iterable[Work]) -> Work:
    """Return the sum of several amounts."""
    return sum(parts, Work())


class MethodCost(NamedTuple):
    """What one method costs for one linear layer.

    Attributes:
        layer: The compressed layer, empty on the meta device: its stored bytes.
        work: What `compress` computes.
        workspace_bytes: Largest tensors that `compress` holds at a time, the weight included.
        exact: Whether ``layer`` has exactly the bytes of the real one; otherwise they depend on the
            values, within the method's budget.
    """

    layer: Callable[[Any, Shape], CompressedLinear]
    work: Callable[[Any, Shape], Work]
    workspace_bytes: Callable[[Any, Shape], int]
    exact: bool = True


@lru_cache(maxsize=256)
def compressed_layer(name: str, method: Method, shape: Shape) -> CompressedLinear:
    """Return the layer that the method makes of a matrix, on the meta device.

    Raises:
        ValueError: Settings that the method refuses for this shape.
    """
    with torch.device("meta"):
        return METHOD_COSTS[name].layer(method, shape)


def dequantize_bytes(layer: CompressedLinear) -> float:
    """Return what one `dequantize` of a packed layer, or a call that needs it, moves."""
    if isinstance(layer, LowRankLinear):
        return 0.0
    if isinstance(layer, MixedLowRankLinear):
        return 320.0 * layer.rank * (layer.in_features + layer.out_features)
    if isinstance(layer, SparseLinear):
        return 20.0 * layer.num_weights + 200.0 * layer.num_nonzeros
    per_weight = {CodebookLinear: 110.0, QuantizedLinear: 300.0, SignLinear: 260.0}
    return per_weight[type(layer)] * layer.num_weights


def _weights(shape: Shape) -> int:
    return shape.out_features * shape.in_features


def _quantized(settings: RTN | GPTQ, shape: Shape) -> CompressedLinear:
    return QuantizedLinear(
        shape.in_features,
        shape.out_features,
        num_bits=settings.num_bits,
        group_size=min(settings.group_size, shape.in_features),
    )


def _rtn_work(_: RTN, shape: Shape) -> Work:
    return Work(bytes_moved=280.0 * _weights(shape))


def _grid_search_bytes(searched: bool) -> float:
    return 700.0 if searched else 100.0


def _gptq_work(settings: GPTQ, shape: Shape) -> Work:
    n = shape.in_features
    per_weight = 600.0 + _grid_search_bytes(settings.search_range)
    return Work(
        fp32_flops=4.0 * n**3 + _weights(shape) * n,
        bytes_moved=per_weight * _weights(shape),
        calls=14.0 * n,
    )


def _gptq_workspace(_: GPTQ, shape: Shape) -> int:
    return 4 * (9 * _weights(shape) + 5 * shape.in_features**2)


def _codebook(settings: ClusComp, shape: Shape) -> CompressedLinear:
    K, d, dtype = settings.codebook_size(shape)
    return CodebookLinear(
        shape.in_features,
        shape.out_features,
        num_entries=K,
        vector_size=d,
        dtype=dtype,
        scaled=settings.scaled,
    )


def _codebook_copies(num_vectors: int, num_entries: int) -> int:
    """Return how often few points are repeated, see `llmpress.nn.kernels.kmeans`."""
    return -(-33_000 // num_vectors) if num_vectors * num_entries > 33_000 else 1


def _cluscomp_work(settings: ClusComp, shape: Shape) -> Work:
    K, d, _ = settings.codebook_size(shape)
    n = shape.in_features
    N = n * -(-shape.out_features // d)
    distances = float(N) * K * _codebook_copies(N, K) * (settings.iterations + 1)
    # faiss's products are only d long; comparing distances takes as long as some 14 operations
    clustering = Work(fp32_flops=distances * (2 * d + 10), bytes_moved=200.0 * _weights(shape))
    if not settings.feedback:
        return clustering
    passes = settings.rounds + 1  # over all codes
    products = 2.0 * _weights(shape) * n  # of a weight and the second moment
    assigned = Work(fp32_flops=float(N) * K * (2 * d + 4) + 2 * products, calls=8.0 * n)
    refitted = Work(fp32_flops=11 * products, bytes_moved=11 * 30.0 * _weights(shape))
    # the second moment is factorized twice: to weigh the layers, and here
    factorized = Work(fp32_flops=2 * 4.0 * n**3)
    return clustering + factorized + assigned * passes + refitted * settings.rounds


def _cluscomp_workspace(settings: ClusComp, shape: Shape) -> int:
    K, d, _ = settings.codebook_size(shape)
    N = shape.in_features * -(-shape.out_features // d)
    copies = _codebook_copies(N, K)
    chunk = min(N * copies, 16384) * K  # distances at a time
    clustering = (2 + copies) * N * d + 6 * N * copies + chunk
    moments = 4 * shape.in_features**2 if settings.feedback else 0
    feedback = 4 * N * d + 3 * -(-shape.out_features // d) * K if settings.feedback else 0
    return 4 * (_weights(shape) + N * d + moments + max(clustering, feedback))


def _low_rank(settings: SVD | Lillama, shape: Shape) -> CompressedLinear:
    wanted = settings.rank_of(*shape) if isinstance(settings, SVD) else settings.rank or 1
    rank = min(wanted, *shape)
    pivoted = isinstance(settings, Lillama) and settings.form == "pivoted"
    layer = PivotedLowRankLinear if pivoted else LowRankLinear
    return layer(shape.in_features, shape.out_features, rank=rank)


def _svd_cubes(shape: Shape) -> float:
    """Return ``o · n · min(o, n)``, half as much again for wide matrices."""
    wide = 1.5 if shape.in_features > shape.out_features else 1.0
    return wide * _weights(shape) * min(shape)


def _svd_work(settings: SVD, shape: Shape) -> Work:
    o, n = shape
    whitening = Work(fp32_flops=n**3 / 3 + 4.0 * o * n * n) if settings.whiten else Work()
    return whitening + Work(svd_cubes=_svd_cubes(shape), bytes_moved=60.0 * _weights(shape))


def _svd_workspace(settings: SVD, shape: Shape) -> int:
    o, n = shape
    small = min(shape)
    moment = 3 * n * n if settings.whiten else 0
    return 4 * (4 * o * n + 6 * small * small + moment)


def _lillama_work(settings: Lillama, shape: Shape) -> Work:
    o, n = shape
    rank = min(settings.rank or 1, o, n)
    if settings.start == "weights":
        return Work(svd_cubes=1.7 * _svd_cubes(shape), bytes_moved=60.0 * o * n)
    small = min(shape)
    tall = o > n  # then the second moment is decomposed, too, and the directions made orthonormal
    directions = Work(
        fp64_flops=2.0 * o * n * n + 2.0 * small * o * n + (6.0 * o * n * n if tall else 0.0),
        eigh_cubes=float(small) ** 3 * (2 if tall else 1),
    )
    times = 2 if settings.strategy == "loss" else 1  # to weigh the layers, and here
    pivoting = 6.0 * rank * rank * o if settings.form == "pivoted" else 0.0
    factors = Work(fp64_flops=2.0 * rank * o * n + pivoting, bytes_moved=60.0 * o * n)
    return directions * times + factors


def _lillama_workspace(settings: Lillama, shape: Shape) -> int:
    o, n = shape
    if settings.start == "weights":
        return 8 * (5 * o * n + 6 * min(shape) ** 2)
    small = min(shape)
    return 8 * (5 * o * n + 3 * n * n + 5 * small * small)


def _sparse(settings: Magnitude, shape: Shape) -> CompressedLinear:
    o, n = shape
    count = settings.num_kept(torch.empty(o, n, device="meta"))
    index = smaller_index(n, o, count)
    return SparseLinear(n, o, num_nonzeros=count, index=index)


def _magnitude_work(settings: Magnitude, shape: Shape) -> Work:
    per_weight = 1700.0 if settings.mode == "magnitude" else 500.0  # a stable sort of all entries
    return Work(bytes_moved=per_weight * _weights(shape))


def _bitdelta_work(settings: BitDelta, shape: Shape) -> Work:
    o, n = shape
    flops = 2.0 * o * n * n if settings.scale == "output" else 0.0
    return Work(fp64_flops=flops, bytes_moved=330.0 * o * n + 16.0 * n * n)


def _bitdelta_workspace(settings: BitDelta, shape: Shape) -> int:
    o, n = shape
    output = 8 * (3 * o * n + n * n) if settings.scale == "output" else 0
    return 14 * o * n + max(output, 40 * o * n)


def _mixed_low_rank(settings: DeltaCoMe, shape: Shape) -> CompressedLinear:
    # Which precision a triplet gets depends on the variances. Those of the default run's delta fall
    # like the inverse square; any falling row spends the budget up to less than one triplet.
    values = torch.arange(1, min(shape) + 1, dtype=torch.float64, device="cpu") ** -2
    with torch.device("cpu"):
        groups = settings.plan_groups(values, *shape)
    return MixedLowRankLinear(
        shape.in_features,
        shape.out_features,
        groups=[{"rank": rank, "num_bits": num_bits} for rank, num_bits in groups],
        group_size=settings.group_size,
    )


def _delta_come_work(settings: DeltaCoMe, shape: Shape) -> Work:
    o, n = shape
    groups = compressed_layer("delta_come", settings, shape).spec()["groups"]
    rank = sum(group["rank"] for group in groups)
    small = min(shape)
    gram = 4.0 * o * n * small + (2.0 * o * n * n if settings.basis != "weight" else 0.0)
    bases = small**3 + (float(n) ** 3 if settings.basis != "weight" and o > n else 0.0)
    search = _grid_search_bytes(settings.search_range)
    return Work(
        fp64_flops=gram + 2.0 * rank * o * n,
        fp32_flops=2.0 * n**3 + rank * (4.0 * o * n + 3.0 * n * n),
        eigh_cubes=bases * (2 if settings.spreads_budget else 1),
        bytes_moved=(600.0 + search) * rank * (o + n) + 120.0 * o * n,
        calls=14.0 * (n * len(groups) + rank) + 2000.0,
    )


def _delta_come_workspace(settings: DeltaCoMe, shape: Shape) -> int:
    o, n = shape
    small = min(shape)
    moment = n * n * (8 if settings.basis != "weight" else 4)
    return 4 * 4 * o * n + 8 * (2 * o * n + 5 * small * small) + moment + 8 * n * n


def _per_weight(num_bytes: int) -> Callable[[Method, Shape], int]:
    return lambda _, shape: num_bytes * _weights(shape)


def _signs(_: BitDelta, shape: Shape) -> CompressedLinear:
    return SignLinear(shape.in_features, shape.out_features)


METHOD_COSTS: Mapping[str, MethodCost] = {
    "bitdelta": MethodCost(_signs, _bitdelta_work, _bitdelta_workspace),
    "cluscomp": MethodCost(_codebook, _cluscomp_work, _cluscomp_workspace, exact=False),
    "delta_come": MethodCost(_mixed_low_rank, _delta_come_work, _delta_come_workspace, exact=False),
    "gptq": MethodCost(_quantized, _gptq_work, _gptq_workspace),
    "lillama": MethodCost(_low_rank, _lillama_work, _lillama_workspace),
    "magnitude": MethodCost(_sparse, _magnitude_work, _per_weight(60)),
    "rtn": MethodCost(_quantized, _rtn_work, _per_weight(48)),
    "svd": MethodCost(_low_rank, _svd_work, _svd_workspace),
}
"""Every method of `llmpress.methods`; a new one adds its row."""


def knows_layers(name: str, method: Method) -> bool:
    """Return whether a plan without calibration gives each layer exactly what it will get."""
    return METHOD_COSTS[name].exact and not method.spreads_budget


def layer_work(name: str, method: Method, shape: Shape) -> Work:
    """Return the work of compressing one layer and of measuring its errors."""
    o, n = shape
    layer = compressed_layer(name, method, shape)
    low_rank = 2.0 * getattr(layer, "rank", 0) * o * n  # dequantize multiplies the factors
    recorded = Work(
        fp32_flops=4.0 * o * n * n + low_rank,
        bytes_moved=120.0 * o * n + dequantize_bytes(layer) + 4.0 * n * n,
        calls=200.0,
    )
    return METHOD_COSTS[name].work(method, shape) + recorded


def stored_bytes(layer: CompressedLinear) -> int:
    """Return the bytes of a layer's stored tensors."""
    return sum(t.numel() * t.element_size() for t in layer.tensors().values())
