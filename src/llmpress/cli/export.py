"""``llmpress export``: a plain checkpoint for tools that know nothing of llmpress."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from llmpress.cli.options import AsJson, Force, Model, Out


class Dtype(StrEnum):
    """What floats are stored in."""

    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"


DtypeOption = Annotated[Dtype, typer.Option(help="What floats are stored in.")]


class Format(StrEnum):
    """What an export is written as."""

    dense = "dense"
    factors = "factors"
    compressed_tensors = "compressed-tensors"


def export(
    model: Model,
    out: Out,
    format: Annotated[  # noqa: A002  # an option's name
        Format | None, typer.Option("--format", help="What is written, see below.")
    ] = None,
    dense: Annotated[bool, typer.Option("--dense", help="As --format dense.")] = False,
    factors: Annotated[
        bool,
        typer.Option("--factors", help="As --format factors."),
    ] = False,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="What floats are stored in; by default bfloat16, for compressed-tensors float16, "
            "which its scales have."
        ),
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the model that a compressed one stands for, for tools that know nothing of llmpress.

    dense: a plain Hugging Face folder, as large as the original and as good as the compressed
    model. factors: of a low-rank model, tensors NAME.0.weight and NAME.1.weight of two linears in a
    row for each matrix, to be loaded where NAME has become nn.Sequential of two nn.Linear.
    compressed-tensors: of rtn and gptq at 4 and 8 bits, the same integers as vLLM and SGLang run
    them.
    """
    from llmpress import export_dense, export_factors, export_packed, fetch_model
    from llmpress.cli.options import quiet
    from llmpress.core.artifacts import free_place
    from llmpress.core.errors import ConfigError

    flags = [Format.dense] * dense + [Format.factors] * factors
    asked = flags if format is None else [*flags, format]
    if len(asked) != 1:
        raise ConfigError(
            "export: say one of --format dense (as large as the original model), factors (two "
            "linears for each low-rank matrix) and compressed-tensors (integers of 4 or 8 bits)"
        )
    quiet()
    free_place(out, force=force)
    write, usual = {
        Format.dense: (export_dense, Dtype.bfloat16),
        Format.factors: (export_factors, Dtype.bfloat16),
        Format.compressed_tensors: (export_packed, Dtype.float16),
    }[asked[0]]
    dtype = dtype or usual
    write(fetch_model(model), out=out, dtype=dtype.value, force=force)
    print_exported(out, dtype, as_json=as_json)


def print_exported(out: Path, dtype: Dtype, *, as_json: bool) -> None:
    """Print what was written, and how large it is."""
    from llmpress.cli.output import bytes_text, print_facts, print_json
    from llmpress.core.artifacts import folder_bytes

    size = folder_bytes(out)
    if as_json:
        print_json({"folder": str(out), "dtype": dtype.value, "bytes": size})
    else:
        print_facts(str(out), [("dtype", dtype.value), ("size on disk", bytes_text(size))])
