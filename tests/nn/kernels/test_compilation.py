"""Every kernel compiles for the GPUs it is written for; make bench compiles every variant."""

import ast
import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[3]
VARIANTS = {
    "codebook_matmul bf16 rows=8 K=65536 d=4 i8": ["_codebook_matmul_kernel"],
    "codebook_matmul bf16 written out K=1000 d=3": ["_codebook_dequantize_kernel"],
    "codebook_grad fp16 rows=2048 K=4096 d=4": ["_codebook_grad_kernel"],
    "quantized_matmul bf16 rows=1 bits=3 group=128": ["_quantized_runs_kernel"],
    "quantized_matmul bf16 rows=8 bits=4 group=100": ["_quantized_matmul_kernel"],
    "quantized_matmul bf16 written out bits=3 group=128": ["_quantized_dequantize_kernel"],
    "delta_matmul bf16 rows=1": ["row_left_kernel", "row_right_kernel"],
    "delta_matmul bf16 rows=8": ["_delta_left_kernel", "_delta_right_kernel"],
    "kmeans fp32 d=3": ["_assign_kernel"],
}


def launches(function: ast.FunctionDef) -> bool:
    """Whether a function starts a kernel: ``kernel[grid](...)``."""
    calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
    return any(isinstance(call.func, ast.Subscript) for call in calls)


def test_kernels_start_on_the_device_of_their_tensors() -> None:
    """On a second GPU: Triton starts them on the current one."""
    folder, found = ROOT / "src/llmpress/nn/kernels", {}
    for file in folder.rglob("*.py"):
        for function in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(function, ast.FunctionDef) and launches(function):
                names = [d.id for d in function.decorator_list if isinstance(d, ast.Name)]
                found[function.name] = "on_its_device" in names
    assert len(found) == 7
    assert all(found.values()), found


@pytest.mark.slow
def test_a_variant_of_every_kernel_compiles_and_fits(tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    wanted = [argument for name in VARIANTS for argument in ("--only", name)]
    subprocess.run(
        [sys.executable, "benchmarks/kernel_resources.py", *wanted, "--out", out],
        check=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path / "cache")},
        cwd=ROOT,
        capture_output=True,
    )
    with out.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    expected = {(name, kernel) for name, kernels in VARIANTS.items() for kernel in kernels}
    for target in ("sm_80", "sm_90"):
        found = {(row["variant"], row["kernel"]) for row in rows if row["target"] == target}
        assert found == expected


def test_every_operation_is_compiled() -> None:
    with_kernel = {path.parent.name for path in ROOT.glob("src/llmpress/nn/kernels/*/triton.py")}
    assert with_kernel == {name.split()[0] for name in VARIANTS}
