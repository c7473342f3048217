"""What computing costs: the time of an amount of work, and the work of one layer.

Methods and layers say themselves what they compute. Their constants and those below were measured
on two hyperthreads of a Xeon with AMX, layer by layer on the model of the default run
(SmolLM2-135M: 192 to 1536 channels), one thread, little else running.
Checked against the whole default run and on a model of other widths (768 and 3072) with other
settings: memory within a quarter there, times within a factor of two but for one stage of the
default run; what rebuilding a codebook's weight costs in finetuning was set on both together.
A constant in bytes per weight stands for elementwise passes over the weights: time times the
bandwidth that `llmpress.planning.machine` measured on that machine.
"""

from collections.abc import Iterable, Mapping
from functools import lru_cache

from llmpress.methods.base import Method, Shape, Work
from llmpress.nn.layers import CompressedLinear
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


_RATE = {kind: "bytes" if kind == "bytes_moved" else kind for kind in EFFICIENCY}


def seconds(work: Work, rates: Rates) -> float:
    """Return the time that work takes one kind after the other, in seconds."""
    timed: Iterable[float] = (
        getattr(work, kind) / (efficiency * getattr(rates, f"{_RATE[kind]}_per_second"))
        for kind, efficiency in EFFICIENCY.items()
    )
    return work.fixed_seconds + MEAN_OVER_BEST * sum(timed)


def total(parts: Iterable[Work]) -> Work:
    """Return the sum of several amounts."""
    return sum(parts, Work())


@lru_cache(maxsize=256)
def compressed_layer(method: Method, shape: Shape) -> CompressedLinear:
    """Return the layer that the method makes of a matrix, on the meta device; each once.

    Raises:
        ValueError: Settings that the method refuses for this shape.
    """
    return method.empty_layer(shape)


def knows_layers(method: Method) -> bool:
    """Return whether a plan without calibration gives each layer exactly what it will get."""
    return method.size_from_shape and not method.spreads_budget


def layer_work(method: Method, shape: Shape) -> Work:
    """Return the work of compressing one layer and of measuring its errors."""
    o, n = shape
    layer = compressed_layer(method, shape)
    recorded = Work(
        fp32_flops=4.0 * o * n * n + layer.dequantize_flops(),
        bytes_moved=120.0 * o * n + layer.dequantize_bytes() + 4.0 * n * n,
        calls=200.0,
    )
    return method.work(shape) + recorded
