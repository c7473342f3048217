"""Vary one choice of a method at a time, everything else kept: the tables of docs/ablations.md.

What is asked stands in ablations.yaml. A measured row is kept with its settings and the
fingerprints of what it was measured on, and is measured again when one of them changes.

    python benchmarks/ablations.py > build/ablations.md
"""

import argparse
import hashlib
import json
import statistics
import time
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from tqdm.auto import tqdm

from llmpress.calibration.files import load_statistics, load_windows
from llmpress.core.artifacts import fingerprint, read_json, read_provenance, write_json
from llmpress.core.errors import ArtifactError
from llmpress.core.params import build
from llmpress.core.records import BlockRecord, read_records
from llmpress.data.corpora import load_text, token_windows
from llmpress.evaluation.reference import refer
from llmpress.methods.base import Shape
from llmpress.methods.cluscomp.budget import CodebookSize, true_bits
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import load_model, load_tokenizer
from llmpress.numerics.linalg import relative_output_error
from llmpress.report.measures import significant

Row = dict[str, Any]
HERE = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """One table of the page.

    Attributes:
        key: Its anchor and the name of its rows.
        title: Its heading.
        measure: Output error of single layers, the record of a block finetuning, or perplexity.
        rows: What is varied, by label: settings that replace the base's for ``layers``, a folder
            of ``data`` otherwise.
        base: What all rows share.
        finding: What the numbers say, in a sentence.
    """

    key: str
    title: str
    measure: Literal["layers", "blocks", "perplexity"]
    rows: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)
    finding: str = ""


@dataclass(frozen=True)
class Ablation:
    """All questions to one method.

    Attributes:
        title: Of the page.
        method: Whose choices are varied.
        model: Name of the model, calibrated already.
        layers: Layers whose output errors are measured.
        questions: What is asked.
        windows: Windows of each corpus and text that perplexity is measured on.
        seed: Of the method.
    """

    title: str
    method: str
    model: str
    layers: tuple[str, ...]
    questions: tuple[Question, ...]
    windows: int = 4
    seed: int = 0


def measured(ablation: Ablation, cache: Path, data: Path = Path("data")) -> dict[str, list[Row]]:
    """Return the rows of every question; those that ``cache`` has of the same inputs are kept.

    Args:
        ablation: What is asked.
        cache: JSON file of rows, which is completed; rows that nobody asks for are dropped.
        data: Folder of models, calibration, corpora and compressed models. Where a row's inputs
            are not there, a known row is taken as it is.
    """
    known: dict[str, Row] = read_json(cache) if cache.is_file() else {}
    origins = _Origins(data)
    kept: dict[str, Row] = {}
    found: dict[str, list[Row]] = {question.key: [] for question in ablation.questions}
    asked = [(q, label, varied) for q in ablation.questions for label, varied in q.rows.items()]
    for question, label, varied in tqdm(asked, desc="ablations", unit="row"):
        key = _key(ablation, question, varied)
        of = origins.of(_inputs(ablation, question, varied))
        if key not in known or (of is not None and known[key]["inputs"] != of):
            known[key] = {
                "question": question.key,
                "varied": varied,
                "inputs": of,
                "measured": datetime.now(UTC).date().isoformat(),
                **_measure(ablation, question, varied, data),
            }
            write_json(cache, known)
        kept[key] = known[key]
        found[question.key].append({"label": label, **known[key]})
    if kept != known:
        write_json(cache, kept)
    return found


class _Origins:
    """Fingerprints of folders below ``data``, each computed once."""

    def __init__(self, data: Path) -> None:
        self._data = data
        self._known: dict[str, str] = {}

    def of(self, names: Iterable[str]) -> dict[str, str] | None:
        """Return the fingerprints by name; None where a folder is missing."""
        for name in names:
            if not (self._data / name).is_dir():
                return None
            if name not in self._known:
                self._known[name] = fingerprint(self._data / name)
        return {name: self._known[name] for name in names}


def _inputs(ablation: Ablation, question: Question, varied: Any) -> tuple[str, ...]:
    """Name the folders that decide a row."""
    if question.measure == "layers":
        return (f"models/{ablation.model}", f"calibration/{ablation.model}")
    if question.measure == "perplexity":
        return (f"calibration/{ablation.model}", varied)
    return (varied,)


def _key(ablation: Ablation, question: Question, varied: Any) -> str:
    asked = [ablation.model, ablation.seed, question.measure, dict(question.base), varied]
    if question.measure == "layers":
        asked += [ablation.method, list(ablation.layers)]
    if question.measure == "perplexity":
        asked.append(ablation.windows)
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def _measure(ablation: Ablation, question: Question, varied: Any, data: Path) -> Row:
    if question.measure == "layers":
        return _measure_layers(ablation, {**question.base, **varied}, data)
    if question.measure == "blocks":
        return _measure_blocks(data / varied)
    return _measure_perplexity(ablation, data / varied, data)


def _measure_layers(ablation: Ablation, settings: Mapping[str, Any], data: Path) -> Row:
    """Compress the layers alone: true bits, relative output error, seconds."""
    source = Checkpoint(data / "models" / ablation.model)
    known = load_statistics(data / "calibration" / ablation.model)
    errors, bits, weights, seconds, sizes = {}, 0, 0, 0.0, []
    for name in ablation.layers:
        weight = source.tensor(f"{name}.weight")
        method = build_method(
            ablation.method,
            with_largest_codebook(settings, Shape(*weight.shape)),
            f"ablation of {name}",
        )
        started = time.perf_counter()
        layer = method.compress(weight, known[name], seed=ablation.seed + zlib.crc32(name.encode()))
        seconds += time.perf_counter() - started
        moment = known[name].second_moment
        errors[name] = relative_output_error(weight, layer.dequantize().detach(), moment)
        bits += layer.stored_bits()
        weights += layer.num_weights
        sizes.append(layer.spec())
    mean = torch.tensor(list(errors.values()), dtype=torch.float64).log().mean().exp()
    return {
        "bits": bits / weights,
        "error": float(mean),
        "errors": errors,
        "seconds": seconds,
        "sizes": sizes,
    }


def with_largest_codebook(settings: Mapping[str, Any], shape: Shape) -> dict[str, Any]:
    """Replace ``bits`` with ``vector_size`` by the largest ``num_entries`` that fits a shape."""
    if not {"bits", "vector_size"} <= settings.keys():
        return dict(settings)
    d, bits = settings["vector_size"], settings["bits"]
    dtype, scaled = settings.get("codebook_dtype", "float16"), settings.get("scaled", True)

    def fits(entries: int) -> bool:
        return bool(true_bits(shape, CodebookSize(entries, d, dtype), scaled=scaled) <= bits)

    entries = 2
    for power in range(16, 0, -1):  # the longest codes that fit, then the most entries
        if fits((1 << power - 1) + 1) or power == 1:
            low, high = (1 << power - 1) + 1, 1 << power
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if fits(middle) else (low, middle - 1)
            entries = low
            break
    others = {k: v for k, v in settings.items() if k not in ("bits", "allocation")}
    return {**others, "num_entries": entries}


def _measure_blocks(folder: Path) -> Row:
    """Read what block finetuning recorded: losses by epoch, and seconds of both steps."""
    records = read_records(folder)
    if not records.blocks:
        raise ArtifactError(f"{folder}: was not finetuned block by block; name a run that was")
    return _losses(records.blocks) | {
        "bits": records.totals.bits_per_weight,
        "compress_seconds": records.seconds,
        "finetune_seconds": sum(block.seconds for block in records.blocks),
    }


def _losses(blocks: Sequence[BlockRecord]) -> Row:
    """Return the mean losses of finetuned blocks, before, after, and after every epoch.

    A block that was left early keeps the loss of its last epoch.
    """
    epochs = max(len(block.train_loss) for block in blocks)

    def by_epoch(losses: Iterable[list[float]]) -> list[float]:
        curves = [curve + curve[-1:] * (epochs - len(curve)) for curve in losses if curve]
        return [statistics.fmean(values) for values in zip(*curves, strict=True)]

    return {
        "blocks": len(blocks),
        "kept": sum(block.kept for block in blocks),
        "before": statistics.fmean(block.loss_before for block in blocks),
        "after": statistics.fmean(block.loss_after for block in blocks),
        "train": by_epoch(block.train_loss for block in blocks),
        "held_out": by_epoch(block.validation_loss for block in blocks),
    }


def _measure_perplexity(ablation: Ablation, folder: Path, data: Path) -> Row:
    """Score a model on text it was calibrated on and on test text."""
    calibration = data / "calibration" / ablation.model
    seen, _ = load_windows(calibration)
    corpora = read_provenance(calibration)["settings"]["corpora"]
    tokenizer = load_tokenizer(data / "models" / ablation.model)
    share = ablation.windows
    test = torch.cat(
        [
            token_windows(
                load_text(data / "corpora" / name, "test"), tokenizer, seen.shape[1], share
            )
            for name in corpora
        ]
    )
    of_corpus = len(seen) // len(corpora)
    rows = [i * of_corpus + j for i in range(len(corpora)) for j in range(min(share, of_corpus))]
    model = load_model(folder)
    texts = {"seen": seen[rows], "test": test}
    results = refer(model, texts).likelihoods
    return {name: result.perplexity for name, result in results.items()}


Table = tuple[list[str], list[list[str]]]


def markdown(ablation: Ablation, rows: Mapping[str, Sequence[Row]]) -> str:
    """Return a table for each question, with its finding."""
    parts = []
    for question in ablation.questions:
        headings, cells = TABLES[question.measure](rows[question.key])
        parts += [f"## {question.title}", "", question.finding, ""]
        parts += ["| " + " | ".join(headings) + " |"]
        parts += ["| " + " | ".join("---" for _ in headings) + " |"]
        parts += ["| " + " | ".join(row) + " |" for row in cells]
        parts += [""]
    return "\n".join(parts)


def _layers(rows: Sequence[Row]) -> Table:
    names = list(rows[0]["errors"])
    short = [_short(name) for name in names]
    headings = ["", "bits/weight", "output error", *short, "seconds"]
    cells = [
        [
            row["label"],
            f"{row['bits']:.3f}",
            significant(row["error"]),
            *(significant(row["errors"][name]) for name in names),
            f"{row['seconds']:.1f}",
        ]
        for row in rows
    ]
    return headings, cells


def _blocks(rows: Sequence[Row]) -> Table:
    headings = [
        "",
        "bits/weight",
        "held-out loss before",
        "after",
        "blocks improved",
        "training loss by epoch",
        "held-out loss by epoch",
        "compress, s",
        "finetune, s",
    ]
    cells = [
        [
            row["label"],
            f"{row['bits']:.3f}",
            significant(row["before"]),
            significant(row["after"]),
            f"{row['kept']} of {row['blocks']}",
            ", ".join(significant(value) for value in row["train"]),
            ", ".join(significant(value) for value in row["held_out"]),
            f"{row['compress_seconds']:.0f}",
            f"{row['finetune_seconds']:.0f}",
        ]
        for row in rows
    ]
    return headings, cells


def _perplexity(rows: Sequence[Row]) -> Table:
    headings = ["", "calibration text", "test text", "test / calibration"]
    cells = [
        [
            row["label"],
            *(f"{row[text]:.1f}" for text in ("seen", "test")),
            f"{row['test'] / row['seen']:.2f}",
        ]
        for row in rows
    ]
    return headings, cells


def _short(name: str) -> str:
    """Return block and projection of a layer's full name."""
    parts = name.split(".")
    number = next(part for part in parts if part.isdigit())
    return f"{parts[-1].removesuffix('_proj')} {number}"


TABLES = {"layers": _layers, "blocks": _blocks, "perplexity": _perplexity}


def main() -> None:
    """Print the tables; rows that are known are not measured again."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--asked", type=Path, default=HERE / "ablations.yaml")
    parser.add_argument("--rows", type=Path, default=HERE / "results/ablations.json")
    arguments = parser.parse_args()
    text = arguments.asked.read_text(encoding="utf-8")
    ablation = build(Ablation, yaml.safe_load(text), str(arguments.asked))
    print(markdown(ablation, measured(ablation, arguments.rows)))


if __name__ == "__main__":
    main()
