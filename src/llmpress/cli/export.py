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
    dense: Annotated[
        bool, typer.Option("--dense", help="Dense weights: the only form there is so far.")
    ] = False,
    dtype: DtypeOption = Dtype.bfloat16,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the dense model that a compressed one stands for, as a plain Hugging Face folder.

    It is as large as the original and as good as the compressed model.
    """
    from llmpress.cli.options import model_folder
    from llmpress.errors import ConfigError

    if not dense:
        raise ConfigError("export: say --dense; the result is as large as the original model")
    write_dense(model_folder(model), out, None, None, dtype, force=force, as_json=as_json)


def write_dense(
    model: Path,
    out: Path,
    delta: Path | None,
    tokenizer: Path | None,
    dtype: Dtype,
    *,
    force: bool,
    as_json: bool,
) -> None:
    """Export and say what was written."""
    import torch

    from llmpress.artifacts import folder_bytes
    from llmpress.cli.options import check_out, quiet
    from llmpress.cli.output import bytes_text, print_facts, print_json
    from llmpress.export import export_dense

    quiet()
    check_out(out, force=force)
    export_dense(model, out, delta=delta, dtype=getattr(torch, dtype.value), tokenizer=tokenizer)
    size = folder_bytes(out)
    if as_json:
        print_json({"folder": str(out), "dtype": dtype.value, "bytes": size})
    else:
        print_facts(str(out), [("dtype", dtype.value), ("size on disk", bytes_text(size))])
