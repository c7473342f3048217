"""What each layer was given, as its evaluation says: numbers beside its bits per weight."""

import pandas as pd

from llmpress.report.measures import LayerMeasure

BITS = LayerMeasure("bits_per_weight", "Bits per weight")


def measures(layers: pd.DataFrame) -> list[LayerMeasure]:
    """Return the numbers that some layer has: what `with_allocation` adds, and the bits."""
    names = dict.fromkeys(name for given in layers["allocation"] for name in given or {})
    return [BITS, *(LayerMeasure(name, name) for name in names)]


def with_allocation(layers: pd.DataFrame) -> pd.DataFrame:
    """Return the layers with a column per number of `measures`, NaN where it does not apply."""
    return layers.assign(
        **{
            m.column: [float((given or {}).get(m.column, "nan")) for given in layers["allocation"]]
            for m in measures(layers)[1:]
        }
    )
