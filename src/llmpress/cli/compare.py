"""``llmpress compare``: what a model lost, and how much smaller it is."""

from pathlib import Path
from typing import Annotated

import typer

from llmpress.cli.options import AsJson, Device, Length, Windows


def compare(
    original: Annotated[str, typer.Argument(help="The model compared with: folder or hub name.")],
    other: Annotated[str, typer.Argument(help="Another model, or a compressed delta (--base).")],
    text: Annotated[
        list[Path],
        typer.Option("--text", help="A text file, or a corpus (its test text); repeatable."),
    ],
    base: Annotated[
        str | None, typer.Option(help="The model that OTHER, a delta, is put on.")
    ] = None,
    windows: Windows = 8,
    length: Length = 512,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compare two models on the same text: size, perplexity, divergence, agreement.

    KL is the mean divergence of OTHER's next-token distribution from ORIGINAL's, in nats; top-1 is
    the share of positions where both find the same token most probable. The loss is OTHER's less
    ORIGINAL's, in pairs of windows. ± is one standard error over windows. Computed in fp32.
    """
    import dataclasses

    from llmpress import compare_models, fetch_model
    from llmpress.cli.options import quiet
    from llmpress.cli.output import bytes_text, print_json, print_table
    from llmpress.evaluation.uncertainty import with_error

    quiet()
    result = compare_models(
        fetch_model(original),
        fetch_model(other if base is None else base),
        text=text,
        delta=None if base is None else Path(other),
        windows=windows,
        length=length,
        device=device,
    )
    if as_json:
        texts_record = {name: dataclasses.asdict(row) for name, row in result.texts.items()}
        print_json(
            {
                "original": original,
                "other": other,
                "base": base,
                "windows": windows,
                "length": length,
                "original_size": result.original_size.model_dump(),
                "other_size": result.other_size.model_dump(),
                "texts": texts_record,
            }
        )
        return
    sizes = [
        [name, bytes_text(size.model_bytes), f"{size.bits_per_weight:.3f}", f"{size.ratio:.2f}"]
        for name, size in ((original, result.original_size), (other, result.other_size))
    ]
    print_table("Size", ["", "weight files", "bits per weight", "ratio to bf16"], sizes)
    rows = [
        [
            name,
            f"{row.original_perplexity:.4g}",
            f"{row.other_perplexity:.4g}",
            with_error(row.loss_difference_nats, row.loss_difference_stderr_nats, "+"),
            with_error(row.kl_divergence_nats, row.kl_divergence_stderr_nats),
            with_error(100 * row.top1_agreement, 100 * (row.top1_agreement_stderr or 0)),
            f"{row.num_tokens:,}",
        ]
        for name, row in result.texts.items()
    ]
    headings = [
        "text",
        "perplexity",
        "of OTHER",
        "loss, nats",
        "KL, nats",
        "top-1, %",
        "tokens scored",
    ]
    print_table(f"Quality, {windows} windows of {length} tokens", headings, rows)
