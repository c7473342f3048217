"""``llmpress inspect``: what lies in a folder, how large it is, where it comes from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from llmpress.cli.options import AsJson

WORST = 5


def inspect(
    folder: Annotated[Path, typer.Argument(help="A model, delta, calibration or other artifact.")],
    layers: Annotated[
        bool, typer.Option("--layers", help="List every layer, not the worst.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show method, sizes, errors of layers and provenance; every file is verified.

    Errors of layers are relative and squared: |W - Ŵ|² / |W|², and the same of their outputs on
    the calibration text.
    """
    from llmpress import describe
    from llmpress.cli.output import print_facts, print_json, print_table

    description = describe(folder)
    if as_json:
        print_json(description)
        return
    print_summary(description)
    if rows := description["layers"]:
        known = any(_error(row) is not None for row in rows)
        worst = sorted(rows, key=lambda row: _error(row) or 0.0, reverse=True)[:WORST]
        if layers or known:
            print_table(
                f"All {len(rows)} layers" if layers else f"Largest errors of {len(rows)} layers",
                ["layer", "kind", "shape", "bits", "weight error", "output error", "settings"],
                [_layer_row(row) for row in (rows if layers else worst)],
            )
        else:
            lines = [("layers", f"{len(rows)}; their own errors are unknown after finetuning")]
            print_facts("Layers", lines)
    if blocks := description["blocks"]:
        kept = [block for block in blocks if block["kept"]]
        gain = sum(block["loss_after"] for block in blocks) / sum(
            block["loss_before"] for block in blocks
        )
        improved = f"{len(kept)} of {len(blocks)} blocks improved"
        print_facts(
            "Finetuning", [("blocks", improved), ("held-out loss", f"{gain:.3f} of before")]
        )
    if provenance := description["provenance"]:
        print_facts("Provenance", _origin(provenance))


def print_made(out: Path, keys: Sequence[str], *, as_json: bool) -> None:
    """Print what a command has just made: these keys of its description, or the summary."""
    from llmpress import describe
    from llmpress.cli.output import print_json

    description = describe(out)
    if as_json:
        print_json({key: description[key] for key in keys})
    else:
        print_summary(description)


def print_summary(description: Mapping[str, Any]) -> None:
    """Print what an artifact is and how large."""
    from llmpress.cli.output import bytes_text, print_facts

    facts = [("kind", description["kind"]), ("size on disk", bytes_text(description["bytes"]))]
    if description["method"]:
        given = {key: v for key, v in description["settings"].items() if v is not None}
        settings = ", ".join(f"{key}={value}" for key, value in given.items())
        facts += [("method", description["method"]), ("settings", settings)]
    if size := description["size"]:
        bits = f"{size['bits_per_weight']:.3f} over {size['compressed_weights']:,} of "
        bits += f"{size['model_weights']:,} weights"
        facts += [("bits per weight", bits), ("ratio to bf16", f"{size['ratio']:.2f}")]
    if rest := description["left_out"]:
        names = ", ".join(sorted(rest, key=lambda name: -rest[name]))
        facts.append(("not compressed", f"{sum(rest.values()):,} weights in the blocks: {names}"))
    facts.append(
        ("verified", "yes" if description["verified"] else "no: it has no provenance.json")
    )
    print_facts(description["folder"], facts)


def _error(row: Mapping[str, Any]) -> float | None:
    output: float | None = row.get("relative_output_error")
    return row.get("relative_weight_error") if output is None else output


def _layer_row(row: Mapping[str, Any]) -> list[str]:
    return [
        row["name"],
        row["kind"],
        "×".join(str(size) for size in row["shape"]),
        f"{row['bits_per_weight']:.3f}",
        _number(row["relative_weight_error"]),
        _number(row["relative_output_error"]),
        ", ".join(f"{key}={_value(value)}" for key, value in row["settings"].items()),
    ]


def _value(value: Any) -> str:
    """Return a setting; groups of singular triplets as ``16@5b`` (rank at bits)."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return " ".join(f"{group['rank']}@{group['num_bits']}b" for group in value)
    return str(value)


def _number(value: float | None) -> str:
    return "—" if value is None else f"{value:.3g}"


def _origin(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    from llmpress.cli.output import bytes_text

    machine = record.get("hardware") or {}
    facts = [
        ("made by", f"{record['stage']}, {record['created']}, {record['seconds']:.1f} s"),
        ("peak memory", bytes_text(record["peak_memory_bytes"])),
        ("fingerprint", record["fingerprint"]),
        *((f"from {role}", digest) for role, digest in record["inputs"].items()),
    ]
    if machine:
        gpu = machine.get("gpu") or "no GPU"
        facts.append(("hardware", f"{machine['processor']}, {machine['cores']} cores, {gpu}"))
    versions = record.get("packages") or {}
    facts.append(("packages", ", ".join(f"{name} {number}" for name, number in versions.items())))
    return facts
