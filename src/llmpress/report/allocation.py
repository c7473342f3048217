"""What each layer was given, as its evaluation says: as heat maps and as bars."""

import re

import pandas as pd

from llmpress.report.canvas import COLORS, Figure, add, array, new_figure, say
from llmpress.report.measures import LayerMeasure

BITS = LayerMeasure("bits_per_weight", "Bits per weight", log=False)
_PART = re.compile(r"(?P<number>.+) at (?P<part>.+)")


def measures(layers: pd.DataFrame) -> list[LayerMeasure]:
    """Return the numbers that some layer has, its parts apart: what `with_allocation` adds."""
    names = dict.fromkeys(name for given in layers["allocation"] for name in given or {})
    wholes = [name for name in names if not _PART.fullmatch(name)]
    return [BITS, *(LayerMeasure(name, name, log=False) for name in wholes)]


def with_allocation(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the layers with a column per number of `measures`, NaN where it does not apply."""
    return layers.assign(
        **{
            m.column: [float((given or {}).get(m.column, "nan")) for given in layers["allocation"]]
            for m in measures(layers)[1:]
        }
    )


def parts(allocation: dict[str, float] | None) -> dict[str, float]:
    """Return a number's parts by their name, in the layer's order; empty where it has none."""
    found = {_PART.fullmatch(name): value for name, value in (allocation or {}).items()}
    return {match["part"]: value for match, value in found.items() if match}


def parts_figure(layers: pd.DataFrame) -> Figure:
    """Draw the parts of a number of one kind of layer by decoder block, stacked.

    Args:
        layers: Layers of one run and one module whose allocation has parts.
    """
    rows = layers.sort_values("block")
    stacks = [parts(allocation) for allocation in rows["allocation"]]
    names = list(dict.fromkeys(name for stack in stacks for name in stack))
    figure = new_figure("decoder block", "rank", height=380)
    for index, name in enumerate(names):
        add(
            figure,
            "bar",
            x=array(rows["block"]),
            y=array([stack.get(name, 0) for stack in stacks]),
            name=name,
            marker={"color": COLORS[index % len(COLORS)]},
            hovertemplate=f"block %{{x}}: rank %{{y}} at {name}<extra></extra>",
        )
    figure["layout"] |= {"barmode": "stack", "bargap": 0.15, "showlegend": True}
    alt = f"Stacked bars of the ranks at {', '.join(names)} of {len(rows)} layers by decoder block."
    return say(figure, alt, "")
