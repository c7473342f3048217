"""What each layer was given: bits, ranks, codebooks, kept weights; as heat maps and as bars."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from llmpress.report.canvas import COLORS, Figure, add, array, new_figure, say
from llmpress.report.measures import LayerMeasure

Settings = Mapping[str, Any]
Shape = Sequence[int]


@dataclass(frozen=True)
class Allocated:
    """One number of a layer's allocation.

    Attributes:
        measure: Its column, its name, and that its axis is linear.
        of: ``(settings, shape [out, in])`` -> the number; None for a layer that has none.
    """

    measure: LayerMeasure
    of: Callable[[Settings, Shape], float | None]


def rank(settings: Settings, _: Shape) -> float | None:
    """Return the rank of a low-rank layer, that of all its groups together."""
    if "groups" in settings:
        return float(sum(group["rank"] for group in settings["groups"]))
    return settings.get("rank")


def code_bits(settings: Settings, _: Shape) -> float | None:
    """Return the bits of one weight's code, without scales and codebooks."""
    if "num_entries" in settings:
        return math.log2(settings["num_entries"]) / float(settings["vector_size"])
    return settings.get("num_bits")


def _share_of_rank(settings: Settings, shape: Shape) -> float | None:
    own = rank(settings, shape)
    return None if own is None else 100 * own / min(shape)


def _kept_weights(settings: Settings, shape: Shape) -> float | None:
    kept = settings.get("num_nonzeros")
    return None if kept is None else 100 * kept / (shape[0] * shape[1])


BITS = LayerMeasure("bits_per_weight", "Bits per weight", log=False)
ALLOCATED = (
    Allocated(LayerMeasure("rank", "Rank", log=False), rank),
    Allocated(LayerMeasure("rank_share", "Rank, % of the full rank", log=False), _share_of_rank),
    Allocated(LayerMeasure("code_bits", "Bits of a weight's code", log=False), code_bits),
    Allocated(
        LayerMeasure("num_entries", "Codebook entries K", log=False),
        lambda settings, _: settings.get("num_entries"),
    ),
    Allocated(
        LayerMeasure("vector_size", "Codebook vector length d", log=False),
        lambda settings, _: settings.get("vector_size"),
    ),
    Allocated(LayerMeasure("kept_weights", "Weights kept, %", log=False), _kept_weights),
)
MEASURES = (BITS, *(allocated.measure for allocated in ALLOCATED))


def with_allocation(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the layers with a column per number in `MEASURES`, NaN where it does not apply."""
    columns = {
        allocated.measure.column: [
            allocated.of(settings or {}, shape) if shape else None
            for settings, shape in zip(layers["settings"], layers["shape"], strict=True)
        ]
        for allocated in ALLOCATED
    }
    return layers.assign(**{c: pd.Series(v, layers.index, "float64") for c, v in columns.items()})


def rank_groups_figure(layers: pd.DataFrame) -> Figure:
    """Draw the ranks of one kind of layer by decoder block, stacked by their bits.

    Args:
        layers: Layers of one run and one module whose settings hold ``groups``.
    """
    rows = layers.sort_values("block")
    ranks = [_ranks_by_bits(settings["groups"]) for settings in rows["settings"]]
    widths = sorted({bits for groups in ranks for bits in groups}, reverse=True)
    figure = new_figure("decoder block", "rank", height=380)
    for index, bits in enumerate(widths):
        add(
            figure,
            "bar",
            x=array(rows["block"]),
            y=array([groups.get(bits, 0) for groups in ranks]),
            name=f"{bits}-bit",
            marker={"color": COLORS[index % len(COLORS)]},
            hovertemplate=f"block %{{x}}: rank %{{y}} at {bits} bits<extra></extra>",
        )
    figure["layout"] |= {"barmode": "stack", "bargap": 0.15, "showlegend": True}
    names = ", ".join(str(bits) for bits in widths)
    alt = f"Stacked bars of the ranks at {names} bits of {len(rows)} layers by decoder block."
    return say(figure, alt, "")


def _ranks_by_bits(groups: Sequence[Mapping[str, int]]) -> dict[int, int]:
    ranks: dict[int, int] = {}
    for group in groups:
        ranks[group["num_bits"]] = ranks.get(group["num_bits"], 0) + group["rank"]
    return ranks
