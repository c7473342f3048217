"""What stages need: bounds, directions, and the default run they were checked against."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning_examples import large_shapes

from llmpress.calibration.settings import CalibrationSettings
from llmpress.core.errors import ConfigError
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.registry import build_method
from llmpress.planning import ModelShapes, stages
from llmpress.planning.sizes import planned_layers
from llmpress.planning.stages import Need, TaskText
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import FinetuningSettings, TrainingSettings, Trains
from llmpress.tuning.settings import TuningSettings

CALIBRATION = CalibrationSettings(  # as it was in the run below
    corpora=("wikipedia", "code"), windows=8, length=512, sensitivity_windows=0
)
EVALUATION = EvaluationSettings(
    corpora=("wikipedia", "code"),
    windows=3,
    length=256,
    dtype="float32",
    tasks={"arc-easy": 32, "piqa": 32, "arithmetic": 24},
    task_dtype="bfloat16",
    prefill_tokens=128,
    decode_tokens=8,
    sample_tokens=24,
)
SUMS = TaskText(45, 60, 0, 4000)
TEXTS = {
    "arc-easy": TaskText(132, 80, 0, 570),
    "piqa": TaskText(62, 100, 0, 1838),
    "arithmetic": TaskText(45, 62, 32, 200),
}
TUNING = TuningSettings(epochs=3, learning_rate=1e-3)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"num_bits": 3, "group_size": 64}),
    "gptq": ("gptq", {"num_bits": 3, "group_size": 64}),
    "cluscomp": ("cluscomp", {"bits": 2.6, "iterations": 10}),
    "svd": ("svd", {"keep": 0.8}),
    "lillama": ("lillama", {"reduction": 0.158}),
    "delta-svd": ("svd", {"bits": 1.0}),
    "delta-magnitude": ("magnitude", {"bits": 1.0}),
    "delta-bitdelta": ("bitdelta", {}),
    "delta-come": ("delta_come", {"bits": 1.0}),
}
# stage, run: peak resident bytes and safetensors bytes of the run of 2026-11-22
DEFAULT_RUN: dict[tuple[str, str], tuple[int, int]] = {
    ("train_task", ""): (3_352_064_000, 538_090_408),
    ("extract_delta", ""): (1_948_762_112, 424_698_640),
    ("calibrate", ""): (1_220_186_112, 402_662_544),
    ("compress", "rtn"): (1_159_122_944, 100_521_104),
    ("compress", "gptq"): (1_148_166_144, 100_521_104),
    ("compress", "cluscomp"): (1_161_875_456, 90_333_000),
    ("compress", "svd"): (1_224_433_664, 226_505_056),
    ("compress", "lillama"): (1_329_717_248, 225_779_584),
    ("compress_delta", "delta-svd"): (883_933_184, 13_221_904),
    ("compress_delta", "delta-magnitude"): (914_182_144, 13_350_904),
    ("compress_delta", "delta-bitdelta"): (976_867_328, 13_292_720),
    ("compress_delta", "delta-come"): (993_447_936, 13_945_326),
    ("finetune", "cluscomp"): (1_516_933_120, 90_333_000),
    ("finetune", "lillama"): (1_962_704_896, 225_779_584),
    ("evaluate", ""): (1_678_823_424, 0),
    ("evaluate", "rtn"): (2_026_123_264, 0),
    ("evaluate", "cluscomp"): (1_973_764_096, 0),
    ("evaluate", "lillama"): (1_880_137_728, 0),
    ("evaluate", "delta-come"): (2_655_928_320, 0),
}


def need(model: ModelShapes, stage: str, run: str) -> Need:
    if stage == "train_task":
        settings = TrainingSettings("base", 120, task="sums", batch_size=8)
        return stages.train_task(model, settings, SUMS)
    if stage == "extract_delta":
        return stages.extract_delta(model)
    if stage == "calibrate":
        return stages.calibrate(model, CALIBRATION)
    if stage == "evaluate" and not run:
        return stages.evaluate(model, EVALUATION, TEXTS)
    method = build_method(*RUNS[run], run)
    if stage == "compress":
        return stages.compress(model, method)
    if stage == "compress_delta":
        return stages.compress_delta(model, method)
    if stage == "finetune":
        return stages.finetune(model, method, TUNING, CALIBRATION)
    layers = planned_layers(model, method)
    return stages.evaluate(model, EVALUATION, TEXTS, layers, delta=run.startswith("delta"))


def peak_bytes(predicted: Need) -> int:
    """Resident bytes where the CPU computes."""
    return predicted.host_bytes + predicted.device_bytes + predicted.mapped_bytes


@pytest.mark.parametrize(("stage", "run"), DEFAULT_RUN, ids=map(" ".join, DEFAULT_RUN))
def test_default_run(stage: str, run: str, smollm2: ModelShapes) -> None:
    """Bytes to 2 %, memory to a quarter."""
    resident, tensor_bytes = DEFAULT_RUN[stage, run]

    predicted = need(smollm2, stage, run)

    assert predicted.artifact.tensor_bytes == pytest.approx(tensor_bytes, rel=0.02)
    assert 0.85 < peak_bytes(predicted) / resident < 1.25


@pytest.mark.parametrize(
    ("trains", "resident", "tensor_bytes"),
    [
        ("lora", 2_732_773_376, 9_824_056),
        ("qlora", 2_543_034_368, 9_824_056 + 111_879_761),
        ("compressed", 2_549_395_456, 113_832_664),  # codebooks of 4.3 bits
    ],
)
def test_trainings_of_the_default_run(
    trains: Trains, resident: int, tensor_bytes: int, smollm2: ModelShapes
) -> None:
    method = build_method("cluscomp", {"bits": 4.3}, "test")
    layers = planned_layers(smollm2, method) if trains == "compressed" else {}
    settings = FinetuningSettings(steps=120, learning_rate=1e-3)

    predicted = stages.train(smollm2, trains, settings, SUMS, layers)

    assert predicted.artifact.tensor_bytes == pytest.approx(tensor_bytes, rel=0.02)
    assert 0.85 < peak_bytes(predicted) / resident < 1.25


def test_distillation_holds_the_teacher_and_follows_it(smollm2: ModelShapes) -> None:
    plain = FinetuningSettings(steps=60, learning_rate=5e-3)
    layers = planned_layers(smollm2, build_method("cluscomp", {"bits": 2.2}, "test"))
    alone, distilled = (
        stages.train(smollm2, "compressed", settings, None, layers)
        for settings in (plain, replace(plain, objective="distillation"))
    )

    logits = 16 * CHUNK * smollm2.vocabulary
    assert distilled.device_bytes - alone.device_bytes == logits + 2 * smollm2.num_weights
    assert distilled.work > 1.2 * alone.work
    assert distilled.artifact == alone.artifact


def test_compression_of_70b_is_bounded(llama_70b: ModelShapes) -> None:
    """Far below the model's 141 GB: one layer, one block, one shard."""
    for name, settings in RUNS.values():
        needed = stages.compress(llama_70b, build_method(name, settings, "test"))
        assert 3e9 < needed.host_bytes + needed.device_bytes < 45e9, name
        assert needed.artifact.tensor_bytes < 0.85 * llama_70b.num_bytes, name


def test_bytes_of_a_compressed_70b(llama_70b: ModelShapes) -> None:
    method = build_method("rtn", {"num_bits": 4, "group_size": 128}, "test")
    rest = 2 * (llama_70b.num_weights - llama_70b.linear_weights)

    predicted = stages.compress(llama_70b, method).artifact

    bits = 4 + (16 + 4) / 128
    assert predicted.tensor_bytes - rest == pytest.approx(
        llama_70b.linear_weights * bits / 8, rel=1e-4
    )


# what gives the same layers at any depth
STREAMED: list[tuple[str, str, dict[str, Any]]] = [
    ("calibrate", "rtn", {}),
    ("compress", "rtn", {}),
    ("compress", "gptq", {}),
    ("compress", "svd", {"keep": 0.8}),
    ("compress", "lillama", {"rank": 512}),
    ("compress", "cluscomp", {"bits": 2.6, "allocation": "uniform"}),
    ("finetune", "lillama", {"rank": 512}),
    ("finetune", "cluscomp", {"bits": 2.6, "allocation": "uniform"}),
]


@pytest.mark.parametrize(
    ("stage", "name", "settings"), STREAMED, ids=[f"{s} {n}" for s, n, _ in STREAMED]
)
def test_depth_changes_work_and_not_memory(
    stage: str, name: str, settings: dict[str, Any], llama_70b: ModelShapes, tmp_path: Path
) -> None:
    method = build_method(name, settings, "test")

    def needed(model: ModelShapes) -> Need:
        if stage == "calibrate":
            return stages.calibrate(model, CALIBRATION)
        if stage == "finetune":
            return stages.finetune(model, method, TUNING, CALIBRATION)
        return stages.compress(model, method)

    shallow, deep = needed(large_shapes(tmp_path, layers=40)), needed(llama_70b)

    assert (shallow.host_bytes, shallow.device_bytes) == (deep.host_bytes, deep.device_bytes)
    assert shallow.artifact.tensor_bytes < 0.65 * deep.artifact.tensor_bytes
    assert deep.work == pytest.approx(2 * shallow.work)


@pytest.mark.parametrize("key", ["windows", "length"])
def test_more_calibration_text_needs_more_of_everything(key: str, smollm2: ModelShapes) -> None:
    more = replace(CALIBRATION, **{key: 4 * getattr(CALIBRATION, key)})
    method = build_method("cluscomp", {"bits": 2.6}, "test")

    calibrated = [stages.calibrate(smollm2, settings) for settings in (CALIBRATION, more)]
    tuned = [stages.finetune(smollm2, method, TUNING, texts) for texts in (CALIBRATION, more)]

    for less, larger in (calibrated, tuned):
        assert larger.host_bytes > less.host_bytes
        assert larger.work > 2 * less.work
    states = 4 * 576 * 512  # hidden states of one window
    assert tuned[1].host_bytes - tuned[0].host_bytes >= 4 * states * (3 * 16 - 4)


def test_larger_batches_and_more_epochs(smollm2: ModelShapes) -> None:
    method = build_method("lillama", {"reduction": 0.158}, "test")

    def tuned(**changes: int) -> Need:
        return stages.finetune(smollm2, method, replace(TUNING, **changes), CALIBRATION)

    assert tuned(batch_size=8).device_bytes > 1.5 * tuned().device_bytes
    assert tuned(epochs=6).host_bytes == tuned().host_bytes
    assert tuned(epochs=6).work > 1.5 * tuned().work


def test_evaluation_grows_with_windows_in_work_and_with_length_in_memory(
    smollm2: ModelShapes,
) -> None:
    longer = stages.evaluate(smollm2, replace(EVALUATION, length=4096), TEXTS)
    more = stages.evaluate(smollm2, replace(EVALUATION, windows=30), TEXTS)
    plain = stages.evaluate(smollm2, EVALUATION, TEXTS)

    assert longer.device_bytes > plain.device_bytes
    assert more.device_bytes == plain.device_bytes
    assert more.work > 1.5 * plain.work


def test_methods_without_training_are_refused(smollm2: ModelShapes) -> None:
    with pytest.raises(ConfigError, match="RTN"):
        stages.finetune(smollm2, build_method("rtn", {}, "test"), TUNING, CALIBRATION)


def test_blocks_above_the_last_compressed_one_are_not_finetuned(tiny: ModelShapes) -> None:
    def tuned(strategy: str) -> Need:
        method = build_method("lillama", {"reduction": 0.1, "strategy": strategy}, "lillama")
        return stages.finetune(tiny, method, TuningSettings(1, 1e-3), CALIBRATION)

    assert tuned("bottom").work < 0.6 * tuned("uniform").work
