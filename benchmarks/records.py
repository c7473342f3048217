"""Collect how long stages took: the table of records that `llmpress plan` comes with.

    python benchmarks/records.py

reads results/*.csv here and writes the table: of what was done repeatedly the median. On a GPU
single layers were measured, in parts: what their loops add up to is a record of one layer.
"""

import csv
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import astuple, fields, replace
from pathlib import Path
from statistics import median
from typing import Any

from transformers import LlamaConfig

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.core.params import build
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.base import Method, Shape
from llmpress.methods.registry import build_method, known_methods
from llmpress.planning import ModelShapes, read_shapes, stages
from llmpress.planning.records import SHIPPED, Record
from llmpress.planning.stages import GENERATED_TASK
from llmpress.training.settings import FinetuningSettings, TrainingSettings
from llmpress.tuning.settings import TuningSettings

RESULTS = Path(__file__).parent / "results"
TABLES = ("quality", "removal", "deltas", "deltas_first_training")
LENGTH = 512  # tokens of a calibration window of the benchmarks
SMOLLM2 = LlamaConfig(
    architectures=["LlamaForCausalLM"],
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    vocab_size=49152,
    tie_word_embeddings=True,
    dtype="float32",
)
TEXTS = {"calls": GENERATED_TASK}
CODEBOOKS = ((16, 1), (256, 2), (65536, 4), (8192, 6))


def main() -> None:
    """Write the table."""
    model = smollm2()
    records = [*default_run(model), *benchmark_records(model), *gpu_records()]
    alike = [replace(r, work=float(f"{r.work:.4g}"), seconds=0.0) for r in records]
    rows: dict[Record, list[float]] = {}
    for record, seconds in zip(alike, (r.seconds for r in records), strict=True):
        rows.setdefault(record, []).append(seconds)
    made = [replace(record, seconds=round(median(rows[record]), 2)) for record in rows]
    made.sort(key=lambda r: (r.gpu, r.stage, r.method, r.processor, r.work))
    with SHIPPED.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Record)])
        writer.writerows(map(astuple, made))


def smollm2() -> ModelShapes:
    """Return the layout of the benchmarks' model."""
    with tempfile.TemporaryDirectory() as folder:
        SMOLLM2.save_pretrained(folder)
        return read_shapes(Path(folder))


def rows(name: str) -> Iterator[dict[str, str]]:
    """Yield the rows of a table of results."""
    with (RESULTS / f"{name}.csv").open(encoding="utf-8", newline="") as file:
        yield from csv.DictReader(file)


def benchmark_records(model: ModelShapes) -> Iterator[Record]:
    """Yield what quality, removal and deltas say of compressing, finetuning and training."""
    for row in (row for name in TABLES for row in rows(name)):
        settings = json.loads(row["settings"] or "{}")
        if row["method"] not in known_methods():
            continue
        try:
            if "trains" in settings:
                trained = build(FinetuningSettings, kept(FinetuningSettings, settings), "trained")
                start = method_of({"method": row["method"]})
                need = stages.train(model, trained, "delta", None, start)
                yield of_row(row, "train", "delta", need.work, row["seconds"])
            elif "run" in settings:
                windows = int(row["calibration_tokens"]) // LENGTH
                texts = CalibrationSettings(("text",), windows, LENGTH)
                method = method_of({"method": row["method"], **settings["method_settings"]})
                tuned = build(TuningSettings, kept(TuningSettings, settings), "tuned")
                work = stages.finetune(model, tuned, method, texts).work
                yield of_row(row, "finetune", row["method"], work, row["finetune_seconds"])
            else:
                work = stages.compress(model, method_of(settings)).work
                seconds = row.get("compress_seconds") or row["seconds"]
                yield of_row(row, "compress", row["method"], work, seconds)
        except ConfigError as error:
            print(f"left out: {row.get('name') or row.get('label')}: {error}")


def default_run(model: ModelShapes) -> Iterator[Record]:
    """Yield the stages of whole runs of params.yaml as it was."""
    for row in rows("default_run"):
        stage, method, values = row["stage"], row["method"], json.loads(row["settings"])
        match stage:
            case "train_task":
                trained = build(TrainingSettings, values, stage)
                need = stages.train(model, trained, "", GENERATED_TASK)
            case "extract_delta":
                need = stages.extract_delta(model)
            case "calibrate":
                need = stages.calibrate(model, build(CalibrationSettings, values, stage))
            case "compress":
                need = stages.compress(model, build_method(method, values))
            case "finetune":
                order = build(CalibrationSettings, values.pop("calibration"), stage)
                made = build_method(method, values.pop("method_settings"))
                need = stages.finetune(model, build(TuningSettings, values, stage), made, order)
            case "train":
                start = build_method("cluscomp", {"bits": 4.3}) if method == "compressed" else None
                settings = build(FinetuningSettings, values, stage)
                need = stages.train(model, settings, method, GENERATED_TASK, start)
            case "reference":
                need = stages.reference(model, build(EvaluationSettings, values, stage))
            case "evaluate":
                kind, method = "model" if method == "dense" else "compressed", ""
                measured = build(EvaluationSettings, values, stage)
                need = stages.evaluate(model, measured, TEXTS, kind)
            case "speed":
                continue
        seconds, processor, threads = float(row["seconds"]), row["processor"], int(row["threads"])
        verb = stage.partition("_")[0]
        yield Record(verb, method, "smollm2", need.work, seconds, processor, "", threads)


def of_row(row: Mapping[str, str], stage: str, method: str, work: float, seconds: str) -> Record:
    """Return a row of results as a record."""
    processor, _, threads = row["made_on"].partition(", ")
    return Record(stage, method, "smollm2", work, float(seconds), processor, "", int(threads[:1]))


def method_of(settings: Mapping[str, Any]) -> Method:
    """Return the method that settings of a provenance name."""
    own = {key: value for key, value in settings.items() if key not in ("method", "seed")}
    return build_method(settings["method"], own, settings["method"])


def kept(cls: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return those settings that a class takes."""
    names = {field.name for field in fields(cls)}
    return {key: value for key, value in settings.items() if key in names}


def gpu_records() -> Iterator[Record]:
    """Yield single layers from the parts of gptq, svd and cluscomp that gpu_loops measured."""
    measured: dict[Shape, dict[str, dict[str, str]]] = {}
    for row in rows("gpu_loops"):
        measured.setdefault(Shape(int(row["out"]), int(row["in"])), {})[row["step"]] = row
    for shape, steps in measured.items():

        def total(*names: str, of: Mapping[str, dict[str, str]] = steps) -> float:
            found = [row for step, row in of.items() if step.startswith(names)]
            return sum(float(row["whole_matrix_seconds"]) for row in found)

        errors = ("relative_output_error", "relative_weight_error")
        made: list[tuple[Method, str, float]] = [
            (
                build_method("gptq", {"num_bits": 4}, "gptq"),
                "gptq",
                total("damped_inverse_cholesky", "feed_errors_back 4 bit", *errors),
            ),
            (build_method("svd", {"keep": 0.8}, "svd"), "svd", total("svd", *errors)),
        ]
        for entries, width in CODEBOOKS:
            settings = {"num_entries": entries, "vector_size": width}
            method = build_method("cluscomp", settings, "cluscomp")
            book = f"K={entries} d={width}"
            clustered = total(f"kmeans {book}", "damped_inverse_cholesky", *errors)
            # codes are chosen once, then codebook and codes by turns
            turns = total(f"refit_codebook {book}", f"improve_codes {book}")
            assigned = total(f"assign_with_feedback {book}")
            seconds = clustered + assigned + method.rounds * turns  # type: ignore[attr-defined]
            made.append((method, "cluscomp", seconds))
        for method, name, seconds in made:
            work, about = method.work(shape).operations, steps["svd"]
            layer = f"layer {shape.out_features}x{shape.in_features}"
            machine = about["processor"], about["gpu"], 1
            yield Record("compress", name, layer, work, round(seconds, 2), *machine)


if __name__ == "__main__":
    main()
