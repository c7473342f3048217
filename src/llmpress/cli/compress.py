"""``llmpress compress``: a model folder becomes a smaller one."""

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from llmpress.cli.calibrate import run_calibration
from llmpress.cli.options import (
    AsJson,
    Bits,
    Calibration,
    Device,
    Force,
    Length,
    MethodName,
    Model,
    Out,
    Seed,
    Set,
    Text,
    Windows,
)

if TYPE_CHECKING:
    from llmpress.methods.base import Method


SUMMARY = ("folder", "kind", "method", "settings", "size")


def compress(
    model: Model,
    method: MethodName,
    out: Out,
    bits: Bits = None,
    set_: Set = None,
    text: Text = None,
    calibration: Calibration = None,
    windows: Windows = 16,
    length: Length = 512,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress the linear layers of a model's decoder blocks.

    The result is a Hugging Face folder with packed weights that transformers opens after
    `import llmpress`. A killed run continues after its last finished block when it is repeated.

    Example: llmpress compress data/models/smollm2 --method rtn --bits 3 --out smollm2-3bit
    """
    from llmpress.cli.inspect import print_made
    from llmpress.cli.options import (
        check_out,
        method_settings,
        model_folder,
        quiet,
        scratch_folder,
    )
    from llmpress.compression.stage import compress_model
    from llmpress.core.devices import pick_device

    quiet()
    check_out(out, force=force)
    settings = method_settings(method, bits, set_)
    place = pick_device(device)
    folder = model_folder(model)
    source = statistics(folder, method, settings, text, calibration, windows, length, seed, device)
    with source as known:
        compress_model(
            folder,
            out,
            method_name=method,
            method=settings,
            calibration=known,
            seed=seed,
            device=place,
            scratch=scratch_folder(out),
        )
    print_made(out, SUMMARY, as_json=as_json)


@contextmanager
def statistics(
    model: Path,
    name: str,
    method: "Method",
    text: list[Path] | None,
    calibration: Path | None,
    windows: int,
    length: int,
    seed: int,
    device: str | None,
    delta: Path | None = None,
) -> Iterator[Path | None]:
    """Give the calibration to use, made from text for the moment when there is text.

    Raises:
        ConfigError: Text and a calibration, or neither for a method that needs one.
    """
    from llmpress.core.errors import ConfigError

    if text and calibration:
        raise ConfigError("--text and --calibration exclude each other: give one of them")
    if text:
        with tempfile.TemporaryDirectory(prefix="llmpress-") as temporary:
            out = Path(temporary) / "calibration"
            run_calibration(model, text, out, windows, length, seed, device, delta=delta)
            yield out
        return
    if calibration is None and method.requires_statistics:
        raise ConfigError(f"{name} needs calibration: name some --text, or a --calibration")
    if calibration is None and method.uses_statistics:
        sys.stderr.write(f"note: {name} does better with calibration (--text)\n")
    yield calibration
