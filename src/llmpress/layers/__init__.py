"""Linear layers that compute from compressed weights, one file per storage format."""

from typing import Any

from llmpress.layers.base import CompressedLinear
from llmpress.layers.codebook import CodebookLinear
from llmpress.layers.delta import AdaptedLinear
from llmpress.layers.low_rank import LowRankLinear
from llmpress.layers.mixed_low_rank import MixedLowRankLinear
from llmpress.layers.quantized import QuantizedLinear
from llmpress.layers.sign import SignLinear
from llmpress.layers.sparse import SparseLinear

KINDS: dict[str, type[CompressedLinear]] = {
    layer.kind: layer
    for layer in (
        CodebookLinear,
        LowRankLinear,
        MixedLowRankLinear,
        QuantizedLinear,
        SignLinear,
        SparseLinear,
    )
}


def build_layer(
    kind: str, in_features: int, out_features: int, spec: dict[str, Any], *, bias: bool = False
) -> CompressedLinear:
    """Build an empty layer of a stored kind; fill it with ``load_state_dict``.

    Raises:
        ValueError: An unknown kind, or a spec that the kind does not take.
    """
    if kind not in KINDS:
        raise ValueError(f"layer kind {kind!r} is unknown; known are {', '.join(sorted(KINDS))}")
    try:
        return KINDS[kind](in_features, out_features, bias=bias, **spec)
    except TypeError as error:
        raise ValueError(f"layer kind {kind!r} does not take {sorted(spec)}: {error}") from None


__all__ = [
    "KINDS",
    "AdaptedLinear",
    "CodebookLinear",
    "CompressedLinear",
    "LowRankLinear",
    "MixedLowRankLinear",
    "QuantizedLinear",
    "SignLinear",
    "SparseLinear",
    "build_layer",
]
