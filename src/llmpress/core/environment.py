"""What a computation ran on: hardware, versions of packages, memory used."""

import os
import platform
import resource
import sys
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]  # its stubs are a package of their own
import torch

CGROUP = Path("/sys/fs/cgroup")
RECORDED_PACKAGES = (
    "llmpress",
    "torch",
    "transformers",
    "safetensors",
    "numpy",
    "faiss-cpu",
    "triton",
)


def peak_memory_bytes() -> int:
    """Return the process's largest resident set so far, plus the largest allocation of each GPU."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024
    gpus = range(torch.cuda.device_count())
    return resident * unit + sum(map(torch.cuda.max_memory_allocated, gpus))


def available_memory_bytes() -> int:
    """Return what can be allocated without swapping, within the limit of a container."""
    available = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # no limit
        limit, used = (int((CGROUP / f"memory.{n}").read_text()) for n in ("max", "current"))
        available = min(available, max(0, limit - used))
    return available


def hardware() -> dict[str, Any]:
    """Return what the computation ran on: processor, cores, threads used, GPU."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def packages() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide a result."""
    found = {"python": platform.python_version()}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
