"""What this machine has: free memory and disk, and how fast it computes at this moment."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch
from torch import Tensor

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
CGROUP_USED = Path("/sys/fs/cgroup/memory.current")
PROBE_SECONDS = 0.15


THREAD_GAIN = {
    "fp32_flops_per_second": 0.85,
    "bf16_flops_per_second": 0.4,
    "fp64_flops_per_second": 0.85,
    "svd_cubes_per_second": 0.3,
    "eigh_cubes_per_second": 0.5,
    "bytes_per_second": 0.85,
    "calls_per_second": 0.0,
}
"""A rate grows with the number of CPU threads to this power: measured from one thread to two. The
probe itself uses one thread, because several wait for each other on a machine that is busy."""


@dataclass(frozen=True)
class Rates:
    """Measured speeds; the best of a few tries.

    Attributes:
        fp32_flops_per_second: Of a matrix product, two operations per multiply-add.
        bf16_flops_per_second: The same in bfloat16.
        fp64_flops_per_second: The same in fp64.
        svd_cubes_per_second: ``m · n · min(m, n)`` of an fp32 singular value decomposition.
        eigh_cubes_per_second: ``n³`` of an fp64 symmetric eigendecomposition.
        bytes_per_second: Bytes read and written by an elementwise operation on large tensors.
        calls_per_second: Operations on tiny tensors: what a Python loop over them costs.
    """

    fp32_flops_per_second: float
    bf16_flops_per_second: float
    fp64_flops_per_second: float
    svd_cubes_per_second: float
    eigh_cubes_per_second: float
    bytes_per_second: float
    calls_per_second: float

    def with_threads(self, threads: int) -> "Rates":
        """Return what rates measured with one CPU thread become with several."""
        return Rates(**{k: getattr(self, k) * threads**gain for k, gain in THREAD_GAIN.items()})


@dataclass(frozen=True)
class Machine:
    """What a plan is compared with.

    Attributes:
        memory_available_bytes: Host memory that can be used without swapping, the limit of a
            container included.
        disk_free_bytes: On the file system that the plan writes to.
        device_memory_free_bytes: Of the GPU; None without one.
        device: ``cpu`` or ``cuda``.
        threads: Of the CPU, that the rates hold for.
        rates: Measured speeds of the device.
    """

    memory_available_bytes: int
    disk_free_bytes: int
    device_memory_free_bytes: int | None
    device: str
    threads: int
    rates: Rates


def measure_machine(folder: Path = Path()) -> Machine:
    """Measure this machine; takes one to two seconds.

    Args:
        folder: Lies on the disk that is written to.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rates = measure_rates(torch.device(device))
    finally:
        torch.set_num_threads(threads)
    return Machine(
        memory_available_bytes=_available_memory(),
        disk_free_bytes=shutil.disk_usage(folder).free,
        device_memory_free_bytes=torch.cuda.mem_get_info()[0] if device == "cuda" else None,
        device=device,
        threads=threads,
        rates=rates.with_threads(threads) if device == "cpu" else rates,
    )


@torch.inference_mode()
def measure_rates(device: torch.device) -> Rates:
    """Time matrix products, decompositions, a large and a tiny elementwise operation."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(1024, 1024, generator=generator).to(device)
    square = matrix[:384, :384].contiguous()
    gram = (square @ square.T).double()
    long = torch.zeros(1 << 23, device=device)
    tiny = torch.zeros(8, device=device)

    def product(dtype: torch.dtype) -> float:
        left, right = matrix[:512].to(dtype), matrix.to(dtype)
        seconds = _best(lambda: left @ right, device)
        return 2 * 512 * 1024 * 1024 / seconds

    def calls() -> Tensor:
        for _ in range(1000):
            tiny.add_(1)
        return tiny

    return Rates(
        fp32_flops_per_second=product(torch.float32),
        bf16_flops_per_second=product(torch.bfloat16),
        fp64_flops_per_second=product(torch.float64),
        svd_cubes_per_second=384**3
        / _best(lambda: torch.linalg.svd(square, full_matrices=False)[1], device),
        eigh_cubes_per_second=384**3 / _best(lambda: torch.linalg.eigh(gram)[0], device),
        bytes_per_second=8 * long.numel() / _best(lambda: long.add_(1), device),
        calls_per_second=1000 / _best(calls, device),
    )


def _best(operation: Callable[[], Tensor], device: torch.device) -> float:
    """Return the shortest of the times that fit into `PROBE_SECONDS`, two at least."""
    operation()
    best, started = float("inf"), time.perf_counter()
    while best == float("inf") or time.perf_counter() - started < PROBE_SECONDS:
        before = time.perf_counter()
        operation()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - before)
    return best


def _available_memory() -> int:
    available = int(psutil.virtual_memory().available)
    try:
        limit = CGROUP_LIMIT.read_text(encoding="ascii").strip()
        used = int(CGROUP_USED.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return available
    return min(available, max(0, int(limit) - used)) if limit.isdigit() else available
