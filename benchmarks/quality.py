"""Quality against true bits: llmpress's artifacts and other tools' models, one evaluator for all.

A folder is an artifact of llmpress, a model as it is, or the dense weights that another tool's
quantized model stands for with a peer.json beside them (benchmarks/peers/). Perplexity is that of
the test text's first windows; KL is the mean divergence from the original's predictions, in nats.
Accuracy is zero-shot, lm-eval's `acc`, in bf16.

    python benchmarks/quality.py data/models/smollm2 data/compressed/gptq-3bit
"""

import json
from collections.abc import Iterable
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import typer
from tables import append_rows, origin
from tqdm import tqdm

from llmpress.calibration.files import INDEX
from llmpress.core.artifacts import (
    PROVENANCE,
    folder_bytes,
    read_json,
    read_provenance,
)
from llmpress.core.environment import hardware
from llmpress.evaluation.comparison import folder_size
from llmpress.evaluation.reference import run_original
from llmpress.evaluation.sizes import cost
from llmpress.evaluation.tasks import TaskScore, evaluate_tasks
from llmpress.models.loading import dequantized, load_model, load_tokenizer

PEER = "peer.json"


def main(
    folders: list[Path] = typer.Argument(help="Artifacts, models, or peers' dense exports."),
    original: Path = typer.Option(Path("data/models/smollm2"), help="What KL is measured from."),
    text: list[Path] = typer.Option(
        [Path("data/corpora/wikipedia"), Path("data/corpora/code")], help="Corpora; repeatable."
    ),
    windows: int = typer.Option(16, min=1, help="Windows of each test text."),
    length: int = typer.Option(512, min=2, help="Tokens of a window."),
    tasks: list[Path] = typer.Option([], help="Task folders, for accuracy; repeatable."),
    items: int = typer.Option(300, min=1, help="Items of each task, the same for every model."),
    calibrations: list[Path] = typer.Option(
        [Path("data/calibration"), Path("studies/quality/data/calibration")],
        help="Where calibrations are looked for, for the number of their tokens.",
    ),
    name: str = typer.Option(None, help="Name in the table, of a single folder."),
    out: Path = typer.Option(Path("benchmarks/results/quality.csv"), help="Rows are appended."),
) -> None:
    """Measure perplexity and divergence in fp32 and append a row per folder."""
    for folder in (*folders, *text, *tasks, original):
        if not folder.is_dir():
            raise SystemExit(f"error: {folder}: no such folder; make report makes the default ones")
    if name is not None and len(folders) > 1:
        raise SystemExit("error: --name names one folder")
    machine = hardware()
    reference = run_original(original, text=text, windows=windows, length=length)
    for folder in tqdm(folders, desc="folders", unit="folder"):
        is_original = folder.resolve() == original.resolve()
        results = (
            reference.likelihoods
            if is_original
            else reference.compare(dequantized(load_model(folder)))
        )
        scores = accuracies(folder, tasks, items)
        row = {"name": name or folder.name} | described(folder, calibrations)
        row |= {f"perplexity_{c}": round(r.perplexity, 4) for c, r in results.items()}
        row |= {f"kl_nats_{c}": round(r.kl_divergence_nats, 5) for c, r in results.items()}
        row |= {f"top1_agreement_{c}": round(r.top1_agreement, 4) for c, r in results.items()}
        if scores:
            row |= {f"accuracy_{name}": score.accuracy for name, score in scores.items()}
            row |= {"mean_accuracy": mean(score.accuracy for score in scores.values())}
            row |= {"model_bytes": folder_bytes(folder), "items": items}
        row |= {
            "windows": windows,
            "length": length,
            "dtype": "float32",
            "processor": machine["processor"],
            "cores": machine["cores"],
            **origin("transformers"),
        }
        append_rows(out, [row])
        tqdm.write(
            ", ".join(f"{key}={row[key]}" for key in ("name", "bits_per_weight"))
            + "".join(
                f", {key}={value}"
                for key, value in row.items()
                if key.startswith(("perp", "kl", "mean_acc"))
            )
        )


def accuracies(folder: Path, tasks: Iterable[Path], items: int) -> dict[str, TaskScore]:
    """Return zero-shot accuracy by task."""
    folders = {task.name: task for task in tasks}
    if not folders:
        return {}
    model = dequantized(load_model(folder, dtype=torch.bfloat16))
    return evaluate_tasks(model, load_tokenizer(folder), folders, dict.fromkeys(folders, items))


def described(folder: Path, calibrations: Iterable[Path]) -> dict[str, Any]:
    """Return what made a folder, how many bits it stores and how long that took."""
    if (folder / PEER).is_file():
        peer = json.loads((folder / PEER).read_text(encoding="utf-8"))
        return {
            "method": peer["method"],
            "settings": json.dumps(peer["settings"]),
            "nominal_bits": peer["nominal_bits"],
            "bits_per_weight": round(peer["stored_bits"] / peer["compressed_weights"], 4),
            "stored_bits": peer["stored_bits"],
            "compressed_weights": peer["compressed_weights"],
            "calibration_tokens": peer["calibration_tokens"],
            "compress_seconds": peer["seconds"],
            "finetune_seconds": 0.0,
            "versions": json.dumps(peer["versions"]),
            "made_on": peer["hardware"],
            "made": peer["date"],
        }
    size = folder_size(folder)
    row = dict.fromkeys(("method", "settings", "nominal_bits"), "") | {
        "bits_per_weight": round(size.bits_per_weight, 4),
        "stored_bits": size.stored_bits,
        "compressed_weights": size.compressed_weights,
        "calibration_tokens": 0,
        "compress_seconds": 0.0,
        "finetune_seconds": 0.0,
        "versions": "",
        "made_on": "",
        "made": "",
    }
    if not (folder / PROVENANCE).is_file():
        return row | {"method": "dense"}
    provenance, made_in = read_provenance(folder), cost(folder)
    settings = provenance["settings"]
    inner = settings.get("method_settings", settings)
    machine = provenance["hardware"]
    return row | {
        "method": settings.get("method", "dense"),
        "settings": json.dumps(settings),
        "nominal_bits": inner.get("bits", inner.get("num_bits", "")),
        "calibration_tokens": _calibration_tokens(provenance["inputs"], calibrations),
        "compress_seconds": round(made_in.compress_seconds, 1),
        "finetune_seconds": round(made_in.finetune_seconds, 1),
        "versions": json.dumps(provenance["packages"]),
        "made_on": f"{machine['gpu'] or machine['processor']}, {machine['threads']} threads",
        "made": provenance["created"][:10],
    }


def _calibration_tokens(inputs: dict[str, str], calibrations: Iterable[Path]) -> int | str:
    """Return the tokens of the calibration that was used; unknown is said, not guessed."""
    wanted = inputs.get("calibration")
    if wanted is None:
        return 0
    for parent in calibrations:
        for file in sorted(parent.glob(f"*/{PROVENANCE}")):
            if read_json(file)["fingerprint"] == wanted and (file.parent / INDEX).is_file():
                return int(read_json(file.parent / INDEX)["num_tokens"])
    return "unknown"


if __name__ == "__main__":
    typer.run(main)
