"""What each Triton kernel takes of a GPU, found by compiling it: no GPU is needed.

Every variant is compiled for the shapes of real models and both targets; registers, spills and
shared memory are what the assembler reports. How many programs fit on a multiprocessor follows from
them.

    python benchmarks/kernel_resources.py
"""

import os

os.environ["TRITON_INTERPRET"] = "0"  # before the first kernel is imported
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # what Triton does, said aloud

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton
import typer
from tables import append_rows, origin
from torch import Tensor
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from llmpress.nn.kernels.codebook_grad.triton import codebook_grad_triton
from llmpress.nn.kernels.codebook_matmul.dequantize import codebook_weight_triton
from llmpress.nn.kernels.codebook_matmul.triton import codebook_matmul_triton
from llmpress.nn.kernels.delta_matmul.reference import PackedVectors, TripletGroup
from llmpress.nn.kernels.delta_matmul.triton import (
    delta_matmul_triton,
    group_tensors,
    work_items,
)
from llmpress.nn.kernels.kmeans.triton import nearest_centroid_triton
from llmpress.nn.kernels.quantized_matmul.dequantize import quantized_weight_triton
from llmpress.nn.kernels.quantized_matmul.triton import quantized_matmul_triton
from llmpress.nn.packing import packed_size

TARGETS = {"sm_80": 80, "sm_90": 90}
REGISTERS, SHARED = 65536, {"sm_80": 164 * 1024, "sm_90": 228 * 1024}
"""Of a multiprocessor: A100 and H100 or H200."""
OUT, IN = 11008, 4096
TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
CODEBOOKS = (
    (65536, 4),
    (4096, 4),
    (65536, 8),
    (256, 2),
    (1000, 3),
    (16, 1),
    (8192, 6),
    (16384, 5),
)
Launch = Callable[[], Any]


def main(
    only: list[str] = typer.Option([""], help="Launches whose name holds one of these."),
    out: Path = typer.Option(
        Path("benchmarks/results/kernel_resources.csv"), help="Rows are appended."
    ),
) -> None:
    """Compile every kernel, append what it takes, and fail if one spills or fits nowhere."""
    known = launches()
    for part in only:
        if not any(part in name for name in known):
            raise SystemExit(f"error: no launch holds {part!r}; known are {', '.join(known)}")
    wanted = {name: known[name] for name in known if any(part in name for part in only)}
    misfits = []
    for name, launch in tqdm(wanted.items(), desc="compile", unit="variant"):
        with recorded() as calls:
            launch()
        for kernel, args, settings in calls:
            rows = [
                {"kernel": kernel.fn.__name__, "variant": name}
                | {"target": target}
                | resources(kernel, args, settings, target)
                | origin("triton")
                for target in TARGETS
            ]
            append_rows(out, rows)
            misfits += [
                f"{kernel.fn.__name__} of {name} on {row['target']}"
                for row in rows
                if row["spilled_bytes"] or not row["programs_per_multiprocessor"]
            ]
    if misfits:
        raise SystemExit(f"error: spills, or fits on no multiprocessor: {'; '.join(misfits)}")


def launches() -> dict[str, Launch]:
    """Return calls that launch every variant, by name; tensors have shapes and no content."""
    found: dict[str, Launch] = {}
    for dtype, rows in ((t, r) for t in TYPES if t.is_floating_point for r in (1, 8)):
        key, x = f"{TYPES[dtype]} rows={rows}", empty(rows, IN, dtype=dtype)
        every = dtype == torch.bfloat16
        for number, (K, d) in enumerate(CODEBOOKS if every else CODEBOOKS[:1]):
            stored = (torch.int8, torch.float16)[number % 2]
            name = f"codebook_matmul {key} K={K} d={d} {TYPES[stored]}"
            found[name] = codebook_launch(x, K, d, stored)
        for bits in range(1, 9) if every and rows != 8 else (4,):
            found[f"quantized_matmul {key} bits={bits} group=128"] = quantized_launch(x, bits, 128)
        if every or rows > 1:
            found[f"delta_matmul {key}"] = delta_launch(x)
    found["quantized_matmul bf16 rows=8 bits=4 group=100"] = quantized_launch(
        empty(8, IN, dtype=torch.bfloat16), 4, 100
    )
    for K, d in CODEBOOKS:
        found[f"codebook_matmul bf16 written out K={K} d={d}"] = codebook_weight_launch(K, d)
    for bits in range(1, 9):
        name = f"quantized_matmul bf16 written out bits={bits} group=128"
        found[name] = quantized_weight_launch(bits, 128)
    for number, (K, d) in enumerate(CODEBOOKS):
        dtype = (torch.bfloat16, torch.float16, torch.float32)[number % 3]
        name = f"codebook_grad {TYPES[dtype]} rows=2048 K={K} d={d}"
        found[name] = grad_launch(empty(2048, IN, dtype=dtype), K, d)
    for d in (2, 3, 4, 8, 16):
        found[f"kmeans fp32 d={d}"] = kmeans_launch(d)
    return found


def empty(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    """Return a tensor that is a shape only."""
    return torch.empty(*shape, dtype=dtype, device="meta")


def codebook_launch(x: Tensor, K: int, d: int, stored: torch.dtype) -> Launch:
    """Return a product with a weight of one codebook."""
    codes, codebook = codes_of(K, d), empty(K, d, dtype=stored)
    scales = empty(OUT, dtype=torch.float16)
    return lambda: codebook_matmul_triton(x, codes, codebook, scales, OUT)


def codebook_weight_launch(K: int, d: int) -> Launch:
    """Return a weight of one codebook written out."""
    stored = codes_of(K, d), empty(K, d, dtype=torch.float16), empty(OUT, dtype=torch.float16)
    return lambda: codebook_weight_triton(*stored, IN, OUT, torch.bfloat16)


def quantized_weight_launch(bits: int, group: int) -> Launch:
    """Return a group-quantized weight written out."""
    groups = -(-IN // group)
    codes, zeros = empty(packed_size(OUT * IN, bits)), empty(packed_size(OUT * groups, bits))
    scales = empty(OUT, groups, dtype=torch.float16)
    return lambda: quantized_weight_triton(codes, scales, zeros, bits, group, IN, torch.bfloat16)


def grad_launch(x: Tensor, K: int, d: int) -> Launch:
    """Return the gradient of one codebook."""
    gradient = empty(x.shape[0], OUT, dtype=x.dtype)
    return lambda: codebook_grad_triton(x, gradient, codes_of(K, d), K, d)


def codes_of(K: int, d: int) -> Tensor:
    """Return packed codes of the weight."""
    return empty(packed_size(IN * -(-OUT // d), max(1, (K - 1).bit_length())))


def quantized_launch(x: Tensor, bits: int, group: int) -> Launch:
    """Return a product with a group-quantized weight."""
    groups = -(-IN // group)
    codes, zeros = empty(packed_size(OUT * IN, bits)), empty(packed_size(OUT * groups, bits))
    scales = empty(OUT, groups, dtype=torch.float16)
    return lambda: quantized_matmul_triton(x, codes, scales, zeros, bits, group)


def delta_launch(x: Tensor) -> Launch:
    """Return the delta of one tenant for all rows."""

    def vectors(length: int) -> PackedVectors:
        count = -(-length // 128)
        scales = torch.empty(16, count, dtype=torch.float16)
        return PackedVectors(
            torch.empty(packed_size(16 * length, 3), dtype=torch.uint8),
            scales,
            torch.empty(packed_size(16 * count, 3), dtype=torch.uint8),
        )

    delta = [TripletGroup(3, vectors(IN), vectors(OUT), torch.empty(16))]
    groups = group_tensors([delta])
    items = work_items({0: range(len(x))}, groups.ranks, x.device)
    y = empty(len(x), OUT, dtype=x.dtype)
    return lambda: delta_matmul_triton(x, y, groups, items, 128)


def kmeans_launch(d: int) -> Launch:
    """Return an assignment of ten million points."""
    points, centroids = (empty(n, d, dtype=torch.float32) for n in (10**7, 65536))
    return lambda: nearest_centroid_triton(points, centroids)


Call = tuple[JITFunction, tuple[Any, ...], dict[str, Any]]


@contextmanager
def recorded() -> Iterator[list[Call]]:
    """Note launches of kernels instead of running them."""
    calls: list[Call] = []
    run = JITFunction.run

    def note(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **settings: Any) -> None:
        del grid, warmup
        calls.append((kernel, args, settings))

    JITFunction.run = note
    try:
        yield calls
    finally:
        JITFunction.run = run


def resources(
    kernel: JITFunction, args: tuple[Any, ...], settings: dict[str, Any], target: str
) -> dict[str, Any]:
    """Compile a launch and return what a program takes, and how many fit on a multiprocessor."""
    values = dict(zip(kernel.arg_names, args, strict=False)) | settings
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for place, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[place,] = value
            continue
        is_tensor = isinstance(value, Tensor)
        signature[parameter.name] = f"*{TYPES[value.dtype]}" if is_tensor else "i32"
        if is_tensor or value % 16 == 0:  # as at a launch: allocations are aligned
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": settings.get("num_warps", 4)}
    compiled = triton.compile(
        source, target=GPUTarget("cuda", TARGETS[target], 32), options=options
    )
    registers, spilled, loop = assembled(compiled.asm["cubin"])
    shared, threads = int(compiled.metadata.shared), 32 * int(compiled.metadata.num_warps)
    programs = min(
        REGISTERS // (max(1, registers) * threads),
        SHARED[target] // max(1, shared),
        2048 // threads,
    )
    tile = {key.lower(): value for key, value in settings.items() if key.startswith("BLOCK")}
    return {
        "tile": " ".join(f"{key}={value}" for key, value in tile.items()),
        "loop_instructions": loop,
        "registers": registers,
        "spilled_bytes": spilled,
        "shared_bytes": shared,
        "threads": threads,
        "programs_per_multiprocessor": programs,
    }


def assembled(cubin: bytes) -> tuple[int, int, int]:
    """Return registers of a thread, bytes of its stack (where spills go), and its longest loop.

    The loop is in instructions. It covers a tile of weights: times the threads and divided by the
    weights of the tile, what a weight costs.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, listing = (
            told("cuobjdump", option, file.name) for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise SystemExit(f"error: cuobjdump tells no registers: {usage}")
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", listing, re.MULTILINE)
    places = [int(place, 16) for place, _ in lines]
    loops = [
        sum(int(back[1], 16) <= other <= place for other in places)
        for place, (_, text) in zip(places, lines, strict=True)
        if (back := re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)) and int(back[1], 16) < place
    ]
    return int(found[1]), int(found[2]), max(loops, default=0)


def told(tool: str, option: str, file: str) -> str:
    """Return what one of Triton's own copies of NVIDIA's tools prints."""
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    path = f"{os.environ['PATH']}{os.pathsep}{folder}"  # cuobjdump calls nvdisasm
    done = subprocess.run(
        [folder / tool, option, file],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PATH": path},
    )
    return done.stdout


if __name__ == "__main__":
    typer.run(main)
