"""What all figures of the report share: an empty figure in the report's look, and its texts.

A figure is plotly's JSON as a dictionary, ready for the page: building and validating graph objects
takes half a minute for a report, so the tests do that. The look is plotly's own template, which the
page holds once. Colours of text and background are left to the page's style.
"""

import base64
import html
from typing import Any

import numpy as np

Figure = dict[str, Any]

# Readable on white and on near-black: at least 3:1 against both.
COLORS = ("#2f7de1", "#d9700a", "#0c9a6c", "#a65be8", "#e0405e", "#0891a5", "#a07d12", "#d3459b")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon")
FONT = 'system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'  # the page's
GREY = "#808080"
GRID = "rgba(128,128,128,0.25)"

_AXIS = {
    "gridcolor": GRID,
    "zeroline": False,
    "showline": True,
    "linecolor": GREY,
    "automargin": True,
}
TEMPLATE: Figure = {
    "layout": {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": GREY},
        "margin": {"l": 8, "r": 16, "t": 34, "b": 8},  # the buttons stand above the plot
        "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": GREY, "activecolor": COLORS[0]},
        "dragmode": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "#1f2733", "bordercolor": "#1f2733", "font": {"color": "#fff"}},
        "legend": {
            "orientation": "h",
            "yref": "container",
            "y": 0,
            "yanchor": "bottom",
            "x": 0,
            "traceorder": "normal",
        },
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    },
}


def new_figure(x: str, y: str, *, height: int, log_y: bool = False) -> Figure:
    """Return an empty figure.

    Args:
        x: Title of the horizontal axis.
        y: Title of the vertical axis.
        height: In pixels; the width is the page's.
        log_y: Whether the vertical axis is logarithmic.
    """
    logarithmic = {"type": "log", "tickformat": ".3~g", "nticks": 4} if log_y else {}
    return {
        "data": [],
        "layout": {
            "height": height,
            "xaxis": {"title": {"text": text(x)}},
            "yaxis": {"title": {"text": text(y)}, **logarithmic},
        },
    }


def add(figure: Figure, kind: str, **trace: Any) -> None:
    """Add a trace of that kind: scatter, bar, heatmap."""
    figure["data"].append({"type": kind, **trace})


def say(figure: Figure, alt: str, note: str) -> Figure:
    """Attach what the page cannot know.

    Args:
        figure: A finished figure; it is returned.
        alt: A sentence for screen readers.
        note: What is not drawn, empty when everything is.
    """
    figure["layout"]["meta"] = {"alt": alt, "note": note}
    return figure


def text(text: Any) -> str:
    """Plotly reads tags in its texts; names are never tags."""
    return html.escape(str(text), quote=False)


def array(values: Any) -> dict[str, str]:
    """Return numbers as plotly's typed array, a third of the bytes of decimal digits.

    Args:
        values: ``[n]`` or ``[rows, columns]``; NaN leaves a gap.
    """
    numbers = np.asarray(values, dtype="<f4")
    encoded = {"dtype": "f4", "bdata": base64.b64encode(numbers.tobytes()).decode()}
    if numbers.ndim == 2:
        encoded["shape"] = ", ".join(str(size) for size in numbers.shape)
    return encoded
