"""``llmpress export``: a plain checkpoint for tools that know nothing of llmpress."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmpress.cli.options import AsJson, Force, Model, Out

if TYPE_CHECKING:
    import torch


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
    from llmpress.cli.options import check_out, model_folder, quiet
    from llmpress.core.errors import ConfigError
    from llmpress.export.factors import export_factors

    if dense == factors:
        raise ConfigError(
            "export: say --dense (as large as the original model) or --factors (two linears for "
            "each low-rank matrix)"
        )
    if dense:
        write_dense(model_folder(model), out, None, None, dtype, force=force, as_json=as_json)
        return
    quiet()
    check_out(out, force=force)
    export_factors(model_folder(model), out, dtype=_torch_dtype(dtype))
    _say(out, dtype, as_json=as_json)


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
    from llmpress.cli.options import check_out, quiet
    from llmpress.export.dense import export_dense

    quiet()
    check_out(out, force=force)
    export_dense(model, out, delta=delta, dtype=_torch_dtype(dtype), tokenizer=tokenizer)
    _say(out, dtype, as_json=as_json)


def _torch_dtype(dtype: Dtype) -> "torch.dtype":
    import torch

    found: torch.dtype = getattr(torch, dtype.value)
    return found


def _say(out: Path, dtype: Dtype, *, as_json: bool) -> None:
    from llmpress.cli.output import bytes_text, print_facts, print_json
    from llmpress.core.artifacts import folder_bytes

    size = folder_bytes(out)
    if as_json:
        print_json({"folder": str(out), "dtype": dtype.value, "bytes": size})
    else:
        print_facts(str(out), [("dtype", dtype.value), ("size on disk", bytes_text(size))])
