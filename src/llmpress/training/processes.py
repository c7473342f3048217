"""Several processes that train together: which there are, and that one of them writes."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, DistributedType

from llmpress.core.artifacts import artifact_folder, claim, fingerprint
from llmpress.core.errors import ConfigError
from llmpress.core.resume import SCRATCH, BlockStore

KNOWN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def open_accelerator(device: torch.device, *, experts: bool = False) -> Accelerator:
    """Join the processes that a launcher started; alone without one.

    Args:
        device: Where a process alone computes; of several each has its own, ``accelerator.device``.
        experts: Whether a step may leave trained parameters out.

    Raises:
        ConfigError: A way to spread a model that is not supported, or fp16.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    accelerator = Accelerator(
        cpu=launched and device.type == "cpu",
        device_placement=False,
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=experts)],
    )
    if accelerator.distributed_type not in KNOWN or accelerator.mixed_precision == "fp16":
        raise ConfigError(
            f"accelerate: {accelerator.distributed_type.value} with precision "
            f"{accelerator.mixed_precision} is not supported: launch plain processes, one for a "
            "GPU; `precision` is a setting"
        )
    return accelerator


@dataclass
class Written:
    """An artifact in the making.

    Attributes:
        store: Where the checkpoints lie.
        folder: Where the artifact is written; None in a process that only helps to train.
        device: Where this process computes.
    """

    store: BlockStore
    folder: Path | None
    device: torch.device


@contextmanager
def trained_artifact(
    out: Path,
    *,
    stage: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path],
    device: torch.device,
    scratch: Path = SCRATCH,
    force: bool = True,
) -> Iterator[Written]:
    """Make an artifact by training, with checkpoints that are kept until it is complete.

    Of several processes the first one writes. How many there are, and in how many parts each takes
    its share, decides rounding: more than one is recorded, and others' checkpoints are not used.

    Args:
        out: The artifact's folder.
        stage: What makes it.
        settings: The settings it is made with.
        inputs: Folders it is made from, by role.
        device: Where to compute.
        scratch: Folder for the checkpoints of an unfinished call.
        force: Whether an older artifact is replaced.

    Raises:
        ArtifactError: An input is missing or damaged, or ``out`` is not free.
    """
    accelerator = open_accelerator(device)
    parts = {
        "processes": accelerator.num_processes,
        "gradient_accumulation_steps": accelerator.gradient_accumulation_steps,
    }
    recorded = {**settings, **{name: count for name, count in parts.items() if count > 1}}
    prints = {role: fingerprint(path) for role, path in inputs.items()}
    store = BlockStore(f"{stage}-{out.name}", {**recorded, **prints}, scratch)
    place = accelerator.device if accelerator.num_processes > 1 else device
    if not accelerator.is_main_process:
        yield Written(store, None, place)
        return
    with (
        claim(out, force=force, inputs=inputs.values()) as target,
        store,
        artifact_folder(
            target, stage=stage, settings=recorded, inputs=inputs, seconds=store.seconds
        ) as folder,
    ):
        yield Written(store, folder, place)
