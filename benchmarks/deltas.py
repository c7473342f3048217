"""Fine-tuning deltas at several budgets: Delta-CoMe, its settings, and the baselines.

For each fine-tuned partner and setting: true bits, every stored byte, divergence from the
fine-tuned model on test text of two corpora and of its own task, accuracy, seconds. What is there
already is not made or measured again.

    python benchmarks/deltas.py data/models/smollm2 data/models/smollm2-arithmetic \
      --task data/tasks/arithmetic
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import typer
from tables import append_rows, is_done, origin
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from llmpress.calibration.stage import calibrate_model
from llmpress.calibration.texts import read_texts
from llmpress.core.artifacts import folder_bytes, read_provenance
from llmpress.core.records import read_records
from llmpress.data.corpora import load_text, token_windows
from llmpress.data.tasks.files import read_items
from llmpress.deltas.applying import load_delta
from llmpress.deltas.compression import compress_delta
from llmpress.deltas.extraction import extract_delta
from llmpress.evaluation.reference import refer
from llmpress.evaluation.tasks import evaluate_tasks
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.models.loading import dequantized, load_model, load_tokenizer
from llmpress.training.stage import train_model

PAPER = {
    "precisions": [8, 3, 2],
    "allocation": "fixed",
    "ranks": [2, 32],
    "correct_left": False,
}
METHODS: Mapping[str, tuple[str, Mapping[str, Any], bool]] = {
    "delta_come": ("delta_come", {}, False),
    "delta_come, sequential": ("delta_come", {}, True),
    "delta_come, plan": ("delta_come", {"allocation": "model"}, False),
    "delta_come, output basis": ("delta_come", {"basis": "output"}, False),
    "delta_come, loss basis, plan": (
        "delta_come",
        {"basis": "loss", "allocation": "model"},
        False,
    ),
    "delta_come, dampened": ("delta_come", {"dampening": 0.3}, False),
    "delta_come, dampened .95": ("delta_come", {"dampening": 0.95}, False),
    "delta_come, searched range": ("delta_come", {"search_range": True}, False),
    "delta_come, no cut penalty": ("delta_come", {"cut_penalty": 1.0}, False),
    "delta_come, paper": ("delta_come", PAPER, True),
    "delta_come, distilled": ("delta_come", {}, False),
    "svd": ("svd", {}, False),
    "svd, whitened": ("svd", {"whiten": True}, False),
    "dare": ("magnitude", {"mode": "dare"}, False),
    "magnitude": ("magnitude", {}, False),
    "bitdelta": ("bitdelta", {}, False),
    "bitdelta, distilled": ("bitdelta", {}, False),
    "gptq, 1 bit": ("gptq", {"num_bits": 1, "group_size": 576}, False),
    "rtn, 1 bit": ("rtn", {"num_bits": 1, "group_size": 576}, False),
}
"""Method, settings without a budget, and whether in true-sequential order."""

BUDGETED = ("delta_come", "svd", "magnitude")
DISTILLATION: Mapping[str, Any] = {
    "steps": 100,
    "learning_rate": 1e-2,
    "objective": "distillation",
    "length": 128,
    "batch_size": 4,
    "windows": 200,
    "held_out": 15,
}
"""Of scales in fp32, on the texts of calibration; BitDelta's paper: 200 steps."""
DISTILLED = ", distilled"
"""Ends the label of what is distilled; the rest of it is the start's."""


def main(
    base: Path = typer.Argument(help="The model that was fine-tuned."),
    finetuned: Path = typer.Argument(help="What became of it."),
    corpora: list[Path] = typer.Option(
        [Path("data/corpora/wikipedia"), Path("data/corpora/code")], help="Corpora; repeatable."
    ),
    task: Path = typer.Option(None, help="The task it was fine-tuned for, if it was one."),
    bits: list[float] = typer.Option([1.0, 0.5, 0.25], help="True bits; repeatable."),
    methods: list[str] = typer.Option(list(METHODS), "--method", help="Which; repeatable."),
    calibrate_on: str = typer.Option("both", help="general, task, or both."),
    windows: int = typer.Option(8, min=1, help="Calibration windows of each text."),
    length: int = typer.Option(512, min=2, help="Tokens of a calibration window."),
    seed: int = typer.Option(0, help="Of calibration and compression."),
    start: int = typer.Option(0, min=0, help="Calibrate on windows after the first START."),
    test_windows: int = typer.Option(4, min=1, help="Windows of each test text."),
    test_length: int = typer.Option(256, min=2, help="Tokens of a test window."),
    items: int = typer.Option(100, min=0, help="Test items for accuracy; 0 for none."),
    work: Path = typer.Option(Path("build/deltas/out"), help="Where artifacts are made."),
    out: Path = typer.Option(Path("benchmarks/results/deltas.csv"), help="Rows are appended."),
) -> None:
    """Compress the delta of FINETUNED in every way and append a row for each."""
    for folder in (base, finetuned, *corpora, *([task] if task else [])):
        if not folder.is_dir():
            raise SystemExit(f"error: {folder}: no such folder")
    if unknown := set(methods) - set(METHODS):
        raise SystemExit(f"error: {sorted(unknown)} unknown; known are {', '.join(METHODS)}")
    name = finetuned.name
    delta = work / name / "delta"
    if not is_done(delta):
        extract_delta(base, finetuned, out=delta)
    places = [*corpora] if calibrate_on != "task" else []
    texts = read_texts([*places, task] if task and calibrate_on != "general" else places)
    if start:
        texts = {k: type(t)(list(t.statistics)[start:], t.validation) for k, t in texts.items()}
    called = "-".join([*texts, str(windows), str(seed), *([str(start)] if start else [])])
    calibration = work / name / f"calibration-{called}"
    if not is_done(calibration):
        calibrate_model(
            finetuned,
            text=texts,
            out=calibration,
            windows=windows,
            length=length,
            validation_windows=2,
            seed=seed,
            device="cpu",
        )
    judge = Judge(finetuned, corpora, task, test_windows, test_length, items)
    known = {(r["partner"], r["label"], r["calibration"]) for r in _rows(out)}
    if (name, "fine-tuned", "") not in known:
        append_rows(out, [judge.row(name, "fine-tuned", None, finetuned)])
        if Checkpoint(base).config.vocab_size == Checkpoint(finetuned).config.vocab_size:
            append_rows(out, [judge.row(name, "base", None, base)])
    for label, budget in tqdm([(m, b) for b in bits for m in methods], desc=name, unit="setting"):
        method, settings, sequential = METHODS[label]
        if budget != max(bits) and (method not in BUDGETED or label.endswith(DISTILLED)):
            continue
        if method in BUDGETED:
            settings = {**settings, "bits": budget}
        budgeted = f" {budget:g}" if method in BUDGETED else ""
        title = f"{label}{budgeted}"
        if (name, title, called) in known:
            continue
        folder = work / name / _folder_name(title, called)
        made = work / name / _folder_name(label.removesuffix(DISTILLED) + budgeted, called)
        if not is_done(made):
            compress_delta(
                delta,
                method=build_method(method, settings, label),
                calibration=calibration,
                base=base,
                sequential=sequential,
                seed=seed,
                device="cpu",
                scratch=work / "scratch",
                out=made,
            )
        if not is_done(folder):
            train_model(
                made,
                original=finetuned,
                base=base,
                trains="delta",
                text=texts,
                record={"texts": list(texts)},
                seed=seed,
                device="cpu",
                scratch=work / "scratch",
                out=folder,
                **DISTILLATION,
            )
        append_rows(out, [judge.row(name, title, folder, base, calibration, called)])


def _folder_name(title: str, called: str) -> str:
    return f"{title.replace(',', '').replace(' ', '-')}-{called}"


class Judge:
    """Measures what a base with a delta has kept of the fine-tuned model."""

    def __init__(
        self,
        finetuned: Path,
        corpora: Iterable[Path],
        task: Path | None,
        windows: int,
        length: int,
        items: int,
    ) -> None:
        self.task, self.items = task, items
        self.tokenizer = load_tokenizer(finetuned)
        self.tokens: dict[str, Tensor] = {
            path.name: token_windows(load_text(path, "test"), self.tokenizer, length, windows)
            for path in corpora
        }
        if task:
            documents = [i["query"] + i["target"] for i in read_items(task / "test.jsonl")]
            self.tokens["task"] = token_windows(documents, self.tokenizer, length, windows)
        self.settings = {"windows": windows, "length": length, "dtype": "float32"}
        self.reference = refer(load_model(finetuned), self.tokens)

    def row(
        self,
        partner: str,
        label: str,
        folder: Path | None,
        base: Path,
        calibration: Path | None = None,
        called: str = "",
    ) -> dict[str, Any]:
        """Measure one delta on its base, or a model without a delta."""
        model = self._load(base, folder, torch.float32)
        row: dict[str, Any] = {"partner": partner, "label": label, "calibration": called}
        row |= _described(folder, calibration)
        results = self.reference.compare(model)
        for text in ("wikipedia", "code", "task"):
            found = results.get(text)
            row |= {
                f"kl_nats_{text}": f"{found.kl_divergence_nats:.4e}" if found else "",
                f"top1_agreement_{text}": round(found.top1_agreement, 4) if found else "",
                f"perplexity_{text}": round(found.perplexity, 4) if found else "",
            }
        del model
        score = None
        if self.task and self.items:
            scored = self._load(base, folder, torch.bfloat16)
            score = evaluate_tasks(
                scored, self.tokenizer, {"task": self.task}, {"task": self.items}
            )["task"]
        return (
            row
            | {
                "accuracy": score.accuracy if score else "",
                "accuracy_stderr": round(score.stderr, 4) if score else "",
                "items": self.items if score else 0,
            }
            | self.settings
            | origin("transformers")
        )

    def _load(self, base: Path, folder: Path | None, dtype: torch.dtype) -> PreTrainedModel:
        model = load_model(base, dtype=dtype)
        return dequantized(load_delta(model, folder)) if folder else model


def _described(folder: Path | None, calibration: Path | None) -> dict[str, Any]:
    names = ("method", "settings", "bits_per_weight", "linear_bytes", "exact_bytes", "bytes")
    times = ("seconds", "weigh_and_write_seconds", "directions_seconds", "right_seconds")
    rest = (*times, "left_seconds", "calibrate_seconds", "relative_output_error", "made_on")
    if folder is None:
        return dict.fromkeys((*names, *rest), "")
    records, provenance = read_records(folder), read_provenance(folder)
    totals = records.totals

    def summed(key: str) -> float:
        return round(sum(layer.notes.get(key, 0.0) for layer in records.layers), 1)

    errors = [layer.relative_output_error or 0.0 for layer in records.layers]
    return {
        "method": provenance["settings"]["method"],
        "settings": json.dumps(provenance["settings"]),
        "bits_per_weight": round(totals.bits_per_weight, 4),
        "linear_bytes": totals.stored_bits // 8,
        "exact_bytes": totals.exact_bytes,
        "bytes": folder_bytes(folder),
        "seconds": round(provenance["seconds"], 1),
        "weigh_and_write_seconds": round(provenance["seconds"] - records.seconds, 1),
        **{key: summed(key) for key in ("directions_seconds", "right_seconds", "left_seconds")},
        "calibrate_seconds": round(read_provenance(calibration)["seconds"], 1)
        if calibration
        else "",
        "relative_output_error": round(sum(e**0.5 for e in errors) / len(errors), 4),
        "made_on": f"{provenance['hardware']['processor']}, "
        f"{provenance['hardware']['threads']} threads",
    }


def _rows(out: Path) -> list[dict[str, str]]:
    import csv

    if not out.is_file():
        return []
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    typer.run(main)
