"""What the methods' pages set beside the papers' claims is in the rows that were measured."""

import csv
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROWS = ROOT / "benchmarks/results"
METHODS = ("cluscomp", "lillama", "delta_come")


def rows(name: str, key: str, **where: str) -> dict[str, dict[str, str]]:
    with (ROWS / name).open(newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    return {r[key]: r for r in found if all(r[column] == value for column, value in where.items())}


def claims(method: str) -> list[list[str]]:
    """The cells of the table of claims."""
    page = (ROOT / f"docs/methods/{method}.md").read_text()
    section = page.partition("## The paper's claims")[2].partition("\n## ")[0]
    return [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("|")
    ][2:]


@pytest.mark.parametrize("method", METHODS)
def test_every_claim_has_a_number_a_command_and_what_differs(method: str) -> None:
    found = claims(method)
    assert len(found) >= 3
    assert all(len(row) == 5 and all(row) for row in found)


def ours(method: str) -> str:
    return " ".join(row[2] for row in claims(method))


def test_lillama_keeps_what_the_rows_say() -> None:
    measured = rows("removal.csv", "name")
    for name in ("lillama-0.2", "lillama-tuned-0.2", "lillama-0.4", "lillama-tuned-0.4"):
        kept = float(measured[name]["mean_accuracy"]) / float(measured["smollm2"]["mean_accuracy"])
        assert f"{kept:.1%}".replace("%", " %") in ours("lillama")


def test_delta_come_keeps_what_the_rows_say() -> None:
    measured = rows("../../studies/deltas/results/report.csv", "name")
    for name in ("calls", "calls-come-1", "calls-svd-1", "calls-bitdelta", "arithmetic",
                 "arithmetic-come-1"):  # fmt: skip
        row = measured[name]
        assert f"{float(row['mean_accuracy']):.2f} ± {float(row['stderr_mean_accuracy']):.2f}" in (
            ours("delta_come")
        )
    signs, come = (
        float(measured[f"calls-{run}"]["kl_wikipedia"]) for run in ("bitdelta", "come-1")
    )
    assert f"{signs / come:.0f} times ours" in ours("delta_come")
    held = [float(row["held_mb"]) for row in rows("delta_serving.csv", "p50_ms").values()]
    for shown in (481, 4305):
        assert min(abs(value - shown) for value in held) < 1


def test_cluscomp_needs_what_the_rows_say() -> None:
    peak = max(float(row["peak_at_full_scale_bytes"])
               for row in rows("block_memory.csv", "scale").values())  # fmt: skip
    assert f"{peak / 1e9:.1f} GB" in ours("cluscomp")
    page = (ROOT / "docs/finetuning.md").read_text()
    (trained,) = re.findall(r"^\| `cluscomp` 4\.30 bits.*?\| ([\d,]{9}) \|", page, re.MULTILINE)
    share = int(trained.replace(",", "")) / 134_515_008
    assert f"{share:.2%}".replace("%", " %") in ours("cluscomp")
    for line in ("| QLoRA, rate 1e-3 |", "| full finetuning |", "| `cluscomp` 4.30 bits"):
        (row,) = [text for text in page.splitlines() if text.startswith(line)]
        assert re.findall(r"0\.\d\d ± 0\.\d\d", row)[0] in ours("cluscomp")
