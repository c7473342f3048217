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


def export(
    model: Model,
    out: Out,
    dense: Annotated[bool, typer.Option("--dense", help="Dense weights.")] = False,
    factors: Annotated[
        bool,
        typer.Option("--factors", help="Of a low-rank model, two plain linears for each matrix."),
    ] = False,
    dtype: DtypeOption = Dtype.bfloat16,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the model that a compressed one stands for, for tools that know nothing of llmpress.

    --dense: a plain Hugging Face folder, as large as the original and as good as the compressed
    model. --factors: tensors NAME.0.weight and NAME.1.weight of two linears in a row for each
    low-rank matrix, to be loaded where NAME has become nn.Sequential of two nn.Linear.
    """
    from llmpress import export_dense, export_factors, fetch_model
    from llmpress.cli.options import quiet
    from llmpress.core.artifacts import free_place
    from llmpress.core.errors import ConfigError

    if dense == factors:
        raise ConfigError(
            "export: say --dense (as large as the original model) or --factors (two linears for "
            "each low-rank matrix)"
        )
    quiet()
    free_place(out, force=force)
    write = export_dense if dense else export_factors
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
