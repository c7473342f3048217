"""``llmpress delta``: fine-tuned minus base, compressed, and put back."""

from pathlib import Path
from typing import Annotated

import typer

from llmpress.cli.export import Dtype, DtypeOption, print_exported
from llmpress.cli.options import (
    AsJson,
    Bits,
    Calibration,
    Device,
    Force,
    Length,
    MethodName,
    Out,
    Seed,
    Set,
    Text,
    Windows,
)

app = typer.Typer(help="Fine-tuning deltas: extract, compress, apply, export.")
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model that was fine-tuned.")]


@app.command()
def extract(
    base: Base,
    finetuned: Annotated[
        str,
        typer.Argument(
            metavar="FINETUNED", help="What became of it: a model, or a LoRA adapter of peft."
        ),
    ],
    out: Out,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Subtract a base model from its fine-tuned version, tensor by tensor."""
    from llmpress import extract_delta, fetch_model
    from llmpress.cli.inspect import print_made
    from llmpress.core.artifacts import free_place

    free_place(out, force=force)
    changed = finetuned if Path(finetuned).is_dir() else fetch_model(finetuned)
    extract_delta(fetch_model(base), changed, out=out, force=force)
    print_made(out, ("folder", "kind", "bytes"), as_json=as_json)


@app.command()
def compress(
    delta: Annotated[Path, typer.Argument(help="What `llmpress delta extract` wrote.")],
    method: MethodName,
    out: Out,
    bits: Bits = None,
    set_: Set = None,
    base: Annotated[
        str | None,
        typer.Option(help="The model that was fine-tuned, for --text and --sequential."),
    ] = None,
    text: Text = None,
    calibration: Calibration = None,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential",
            help="Compress each layer for the inputs that it gets once those before it are "
            "compressed; takes 40 % longer.",
        ),
    ] = False,
    windows: Windows = 16,
    length: Length = 512,
    seed: Seed = 0,
    device: Device = None,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Compress an extracted delta; what is no linear layer is kept exactly, and counted."""
    from llmpress import compress_delta, fetch_model
    from llmpress.cli.compress import SUMMARY
    from llmpress.cli.inspect import print_made
    from llmpress.cli.options import chosen_method, quiet
    from llmpress.core.artifacts import free_place

    quiet()
    free_place(out, force=force)
    settings = chosen_method(method, bits, set_)
    compress_delta(
        delta,
        method=settings,
        out=out,
        base=None if base is None else fetch_model(base),
        text=text,
        calibration=calibration,
        sequential=sequential,
        windows=windows,
        length=length,
        seed=seed,
        device=device,
        force=force,
    )
    print_made(out, SUMMARY, as_json=as_json)


@app.command()
def apply(
    base: Base,
    delta: Annotated[Path, typer.Argument(help="A compressed delta that was made on BASE.")],
    out: Out,
    tokenizer: Annotated[
        Path | None, typer.Option(help="Folder of the tokenizer, if the delta added tokens.")
    ] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the dense fine-tuned model, base and delta in one; the same bytes every time."""
    from llmpress import export_dense, fetch_model
    from llmpress.cli.options import quiet
    from llmpress.core.artifacts import free_place

    quiet()
    free_place(out, force=force)
    model = fetch_model(base)
    export_dense(model, out=out, delta=delta, dtype=dtype.value, tokenizer=tokenizer, force=force)
    print_exported(out, dtype, as_json=as_json)


@app.command()
def export(
    delta: Annotated[Path, typer.Argument(help="A compressed delta of low-rank layers.")],
    out: Out,
    base_name: Annotated[
        str | None,
        typer.Option(help="What adapter_config.json calls the base; by default as the delta does."),
    ] = None,
    max_rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="The largest rank the reader takes (vLLM: 512); what it costs is said."
        ),
    ] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the low-rank part of a delta (svd, delta_come) as a LoRA adapter that peft loads.

    All layers get the rank of the largest, which peft, vLLM and llama.cpp read alike. Tensors that
    the delta keeps exactly have no place in an adapter; a warning names them.
    """
    from llmpress import export_adapter
    from llmpress.cli.options import quiet

    quiet()
    export_adapter(
        delta, out=out, base_name=base_name, max_rank=max_rank, dtype=dtype.value, force=force
    )
    print_exported(out, dtype, as_json=as_json)
