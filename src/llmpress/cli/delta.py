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

app = typer.Typer(help="Fine-tuning deltas: extract, compress, apply.")
Base = Annotated[str, typer.Argument(metavar="BASE", help="The model that was fine-tuned.")]


@app.command()
def extract(
    base: Base,
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="What became of it.")],
    out: Out,
    force: Force = False,
    as_json: AsJson = False,
) -> None:
    """Subtract a base model from its fine-tuned version, tensor by tensor."""
    from llmpress.cli.inspect import print_made
    from llmpress.cli.options import check_out, model_folder
    from llmpress.delta_extraction import extract_delta_artifact

    check_out(out, force=force)
    extract_delta_artifact(model_folder(base), model_folder(finetuned), out)
    print_made(out, ("folder", "kind", "bytes"), as_json=as_json)


@app.command()
def compress(
    delta: Annotated[Path, typer.Argument(help="What `llmpress delta extract` wrote.")],
    method: MethodName,
    out: Out,
    bits: Bits = None,
    set_: Set = None,
    finetuned: Annotated[
        str | None, typer.Option(help="The fine-tuned model, to calibrate with --text.")
    ] = None,
    text: Text = None,
    calibration: Calibration = None,
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
    from llmpress.delta_compression import compress_delta_artifact
    from llmpress.devices import pick_device
    from llmpress.errors import ConfigError

    quiet()
    check_out(out, force=force)
    settings = method_settings(method, bits, set_)
    place = pick_device(device)
    if text and finetuned is None:
        raise ConfigError("--text: name the fine-tuned model too (--finetuned), to run it on")
    model = model_folder(finetuned) if finetuned is not None else Path()
    source = statistics(model, method, settings, text, calibration, windows, length, seed, device)
    with source as known:
        compress_delta_artifact(
            delta,
            out,
            method_name=method,
            method=settings,
            calibration=known,
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
