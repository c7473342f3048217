"""Options that several commands share, and what they stand for."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmpress.core.errors import ConfigError

if TYPE_CHECKING:
    from llmpress.methods.base import Method

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder (config.json and safetensors), or owner/name@revision on the hub.",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to write.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing --out.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON on stdout and nothing else.")]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda or cuda:1; by default the first GPU, or the CPU without one."),
]
MethodName = Annotated[
    str,
    typer.Option("--method", "-m", help="Compression method; see `llmpress methods`."),
]
Bits = Annotated[
    float | None, typer.Option(help="Bits per weight, for methods that are told bits.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="A setting of the method; repeatable."),
]
Text = Annotated[
    list[Path] | None,
    typer.Option("--text", help="A text file, or a corpus folder of the pipeline; repeatable."),
]
Calibration = Annotated[
    Path | None, typer.Option(help="What `llmpress calibrate` wrote, instead of --text.")
]
Windows = Annotated[int, typer.Option(help="Token windows of each text.")]
Length = Annotated[int, typer.Option(help="Tokens of a window.")]
Seed = Annotated[int, typer.Option(help="Same seed, same bytes.")]


def chosen_method(name: str, bits: float | None, assignments: Sequence[str] | None) -> "Method":
    """Return a method with the settings of the command line, checked.

    Raises:
        ConfigError: An unknown method or setting, or bits for a method that is not told bits.
    """
    from llmpress import build_method

    values: dict[str, Any] = dict(map(assignment, assignments or ()))
    if bits is not None:
        values["bits"] = bits
    return build_method(name, values)


def quiet() -> None:
    """Keep transformers from talking, but not downloads from showing their progress."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    logging.set_verbosity_error()
    wanted = not are_progress_bars_disabled()
    logging.disable_progress_bar()  # turns the hub's bars off too
    if wanted:
        enable_progress_bars()


def assignment(text: str) -> tuple[str, Any]:
    """Split ``KEY=VALUE``; the value is read as YAML.

    Raises:
        ConfigError: It cannot be.
    """
    import yaml

    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text!r}: write KEY=VALUE, such as group_size=64")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise ConfigError(f"--set {text!r}: the value cannot be read; quote it") from None
