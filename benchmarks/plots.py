"""Draw what benchmarks measured into pictures of the documentation.

python benchmarks/plots.py
"""

from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import typer
from matplotlib.axes import Axes

COLOURS = plt.get_cmap("tab10").colors
NAMES = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}


def main(
    results: Path = typer.Option(Path("benchmarks/results"), help="Folder of measured rows."),
    out: Path = typer.Option(Path("docs/images/decode.svg"), help="Picture to write."),
) -> None:
    """Draw speed and memory of decoding beside the dense model."""
    rows = pd.read_csv(results / "decode.csv")
    plt.rcParams |= {"svg.hashsalt": "llmpress", "font.size": 9, "axes.spines.top": False}
    figure, (speed, memory) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(2, 1))
    draw_speed(speed, rows[rows.keeps_unpacked])
    draw_memory(memory, rows[rows.batch == rows.batch.max()])
    processor, threads, date = (rows[key].iloc[-1] for key in ("processor", "threads", "date"))
    figure.suptitle(f"Decoding on {processor}, {threads} threads, {date}", fontsize=9)
    figure.tight_layout()
    figure.savefig(out, metadata={"Date": None})


def draw_speed(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw tokens per second over those of the dense model."""
    table = rows.pivot_table(
        index="model", columns=["dtype", "batch"], values="ratio_to_dense", sort=False
    ).drop(index="dense")
    for number, (dtype, batch) in enumerate(table.columns):
        places = [place + 0.2 * number - 0.3 for place in range(len(table))]
        label = f"{NAMES[dtype]}, batch {batch}"
        axes.bar(places, table[dtype, batch], 0.18, label=label, color=COLOURS[number])
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(range(len(table)), table.index)
    axes.set_ylabel("tokens per second, over dense")
    axes.legend(frameon=False, ncols=2)


def draw_memory(axes: Axes, rows: pd.DataFrame) -> None:
    """Draw the megabytes held in bf16, with and without what is kept."""
    table = rows[rows.dtype == "bfloat16"].pivot_table(
        index="model", columns="keeps_unpacked", values="held_mb", sort=False
    )
    both = ((True, "with what it keeps"), (False, "nothing kept"))
    for number, (keeps, label) in enumerate(both):
        places = [place + 0.4 * number - 0.2 for place in range(len(table))]
        axes.barh(places, table[keeps], 0.38, label=label, color=COLOURS[3 * number])
    axes.set_yticks(range(len(table)), table.index)
    axes.invert_yaxis()
    axes.set_xlabel("MB held, bf16")
    axes.legend(frameon=False, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


if __name__ == "__main__":
    typer.run(main)
