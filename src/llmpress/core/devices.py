"""Which device computes, the one asked for or the best there is, and in which precision."""

import torch

from llmpress.core.errors import ConfigError

DTYPES = ("bfloat16", "float16", "float32")


def pick_device(name: str | torch.device | None = None) -> torch.device:
    """Return a device that is really there.

    Args:
        name: ``cpu``, ``cuda`` or ``cuda:1``; None takes the first GPU, or the CPU without one.

    Raises:
        ConfigError: No such device on this machine.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device {str(name)!r} is none: write cpu, cuda or cuda:1") from None
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device {str(name)!r} is not supported: write cpu, cuda or cuda:1")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ConfigError(
            f"device {str(name)!r} was asked for, but torch {torch.__version__} sees {count} GPUs: "
            "use cpu, or install a CUDA build of torch and check nvidia-smi"
        )
    return device


def pick_dtype(name: str | torch.dtype) -> torch.dtype:
    """Return what floats are stored or computed in.

    Raises:
        ConfigError: None of float32, bfloat16 and float16.
    """
    plain = str(name).removeprefix("torch.")
    if plain not in DTYPES:
        raise ConfigError(f"dtype {plain!r}: write float32, bfloat16 or float16")
    found: torch.dtype = getattr(torch, plain)
    return found
