"""Every kernel compiles for the GPUs it is written for; no GPU is needed."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
SCRIPT = Path(__file__).parents[3] / "benchmarks/kernel_resources.py"
OPERATIONS = {
    "codebook_matmul": ["_codebook_matmul_kernel", "_codebook_dequantize_kernel"],
    "codebook_grad": ["_codebook_grad_kernel"],
    "quantized_matmul": [
        "_quantized_matmul_kernel",
        "_quantized_runs_kernel",
        "_quantized_dequantize_kernel",
    ],
    "delta_matmul": [
        "_delta_left_kernel",
        "_delta_right_kernel",
        "row_left_kernel",
        "row_right_kernel",
    ],
    "kmeans": ["_assign_kernel"],
}


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_variant_compiles_and_fits(operation: str, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    subprocess.run(
        [sys.executable, SCRIPT, "--only", operation, "--out", out],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=SCRIPT.parents[1],
        capture_output=True,
    )
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == set(OPERATIONS[operation])
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["spilled_bytes"] == "0", row
        assert int(row["programs_per_multiprocessor"]) >= 1, row


def test_every_operation_is_compiled() -> None:
    folder = Path(__file__).parents[3] / "src/llmpress/nn/kernels"
    with_kernel = {path.parent.name for path in folder.glob("*/triton.py")}
    assert with_kernel == set(OPERATIONS)
