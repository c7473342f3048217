"""``llmpress delta``: fine-tuned minus base, compressed, and put back."""

from pathlib import Path
from typing import Annotated

import typer

from llmpress.cli.export import Dtype, DtypeOption, write_dense
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
    from llmpress.cli.inspect import print_made
    from llmpress.cli.options import check_out, model_folder
    from llmpress.deltas.extraction import extract_delta_artifact
    from llmpress.models.adapters import is_adapter

    check_out(out, force=force)
    adapter = Path(finetuned)
    changed = adapter if is_adapter(adapter) else model_folder(finetuned)
    extract_delta_artifact(model_folder(base), changed, out)
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
    from llmpress.cli.compress import SUMMARY, statistics
    from llmpress.cli.inspect import print_made
    from llmpress.cli.options import (
        check_out,
        method_settings,
        model_folder,
        quiet,
        scratch_folder,
    )
    from llmpress.core.devices import pick_device
    from llmpress.core.errors import ConfigError
    from llmpress.deltas.compression import compress_delta_artifact

    quiet()
    check_out(out, force=force)
    settings = method_settings(method, bits, set_)
    place = pick_device(device)
    if base is None and (text or sequential):
        option = "--text" if text else "--sequential"
        raise ConfigError(f"{option}: name the base too (--base); with the delta it is run")
    model = model_folder(base) if base is not None else Path()
    source = statistics(
        model, method, settings, text, calibration, windows, length, seed, device, delta
    )
    with source as known:
        compress_delta_artifact(
            delta,
            out,
            method_name=method,
            method=settings,
            calibration=known,
            base=model if sequential else None,
            seed=seed,
            device=place,
            scratch=scratch_folder(out),
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
    from llmpress.cli.options import model_folder

    write_dense(model_folder(base), out, delta, tokenizer, dtype, force=force, as_json=as_json)


@app.command()
def export(
    delta: Annotated[Path, typer.Argument(help="A compressed delta of low-rank layers.")],
    out: Out,
    base_name: Annotated[
        str | None,
        typer.Option(help="What adapter_config.json calls the base; by default as the delta does."),
    ] = None,
    dtype: DtypeOption = Dtype.bfloat16,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Write the low-rank part of a delta (svd, delta_come) as a LoRA adapter that peft loads.

    Tensors that the delta keeps exactly have no place in an adapter; a warning names them.
    """
    import torch

    from llmpress.cli.options import check_out, quiet
    from llmpress.cli.output import bytes_text, print_facts, print_json
    from llmpress.core.artifacts import folder_bytes
    from llmpress.export.adapter import export_adapter

    quiet()
    check_out(out, force=force)
    export_adapter(delta, out, base_name=base_name, dtype=getattr(torch, dtype.value))
    size = folder_bytes(out)
    if as_json:
        print_json({"folder": str(out), "dtype": dtype.value, "bytes": size})
    else:
        print_facts(str(out), [("dtype", dtype.value), ("size on disk", bytes_text(size))])
