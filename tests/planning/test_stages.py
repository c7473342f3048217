"""What stages need: bounds, directions, and the default run they were checked against."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from planning_examples import CALIBRATION, large_shapes

from llmpress.core.errors import ConfigError
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.methods.registry import build_method
from llmpress.planning import ModelShapes, stages
from llmpress.planning.stages import Need, TaskText
from llmpress.training.objectives import CHUNK
from llmpress.training.settings import TRAINS, FinetuningSettings, TrainingSettings
from llmpress.tuning.settings import TuningSettings

EVALUATION = EvaluationSettings(
    corpora=("wikipedia", "code"),
    windows=8,
    length=256,
    dtype="float32",
    tasks={},
    task_dtype="bfloat16",
    split="test",
    sample_tokens=12,
)
SUMS = TaskText(45, 60, 0)
TUNING = TuningSettings(epochs=1, learning_rate=1e-2, batch_size=2)
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {"num_bits": 3, "group_size": 64}),
    "gptq": ("gptq", {"num_bits": 3, "group_size": 64}),
    "cluscomp": ("cluscomp", {"bits": 3.3, "iterations": 10}),
    "svd": ("svd", {"keep": 0.9}),
    "lillama": ("lillama", {"reduction": 0.079}),
    "codebooks": ("cluscomp", {"bits": 4.3}),
    "factors": ("lillama", {"rank": 512}),
    "delta-svd": ("svd", {"bits": 1.0}),
    "delta-magnitude": ("magnitude", {"bits": 1.0}),
    "delta-bitdelta": ("bitdelta", {}),
    "delta-come": ("delta_come", {"bits": 1.0}),
}
# stage, run: peak resident bytes of the run of 2026-11-28, and safetensors bytes
DEFAULT_RUN: dict[tuple[str, str], tuple[int, int]] = {
    ("train_task", ""): (3_861_143_552, 538_090_408),
    ("extract_delta", ""): (950_259_712, 424_696_632),
    ("calibrate", ""): (1_301_512_192, 403_289_360),
    ("compress", "rtn"): (714_543_104, 157_214_480),
    ("compress", "gptq"): (823_627_776, 157_214_480),
    ("compress", "cluscomp"): (853_905_408, 157_254_632),
    ("compress", "svd"): (833_744_896, 304_451_744),
    ("compress", "lillama"): (884_375_552, 304_528_680),
    ("compress_delta", "delta-svd"): (570_748_928, 13_244_960),
    ("compress_delta", "delta-magnitude"): (549_724_160, 13_356_960),
    ("compress_delta", "delta-bitdelta"): (589_369_344, 13_313_024),
    ("compress_delta", "delta-come"): (658_726_912, 13_787_512),
    ("finetune", "cluscomp"): (861_319_168, 157_254_632),
    ("reference", ""): (1_643_376_640, 9_417_312),
    ("evaluate", ""): (1_323_180_032, 0),
    ("evaluate", "rtn"): (2_342_187_008, 0),
    ("evaluate", "gptq"): (2_447_388_672, 0),
    ("evaluate", "svd"): (2_365_677_568, 0),
    ("evaluate", "delta-come"): (2_780_504_064, 0),
    ("lora", ""): (2_732_773_376, 9_824_056),  # of 2026-11-22, as the next two
    ("qlora", ""): (2_543_034_368, 9_824_056 + 111_879_761),
    ("compressed", "codebooks"): (2_549_395_456, 170_526_040),
}


def need(model: ModelShapes, stage: str, run: str = "") -> Need:
    method = build_method(*RUNS[run]) if run else None
    if stage == "train_task":
        settings = TrainingSettings("x", 40, "sums", batch_size=8)
        return stages.train(model, settings, "", SUMS)
    if stage == "extract_delta":
        return stages.extract_delta(model)
    if stage == "calibrate":
        return stages.calibrate(model, CALIBRATION)
    if stage == "reference":
        return stages.reference(model, EVALUATION)
    if stage == "evaluate":
        kind = "delta" if run.startswith("delta") else "compressed" if run else "model"
        return stages.evaluate(model, EVALUATION, {}, kind, method)
    if stage in TRAINS:
        return stages.train(model, FinetuningSettings(120, 1e-3), stage, SUMS, method)
    assert method is not None
    if stage == "finetune":
        return stages.finetune(model, TUNING, method, CALIBRATION)
    return (stages.compress if stage == "compress" else stages.compress_delta)(model, method)


def peak_bytes(model: ModelShapes, stage: str, needed: Need) -> int:
    """Resident bytes where the CPU computes, with the pages of files that are mapped."""
    embeddings = 4 * model.largest
    mapped = {
        "extract_delta": needed.artifact_bytes,
        "calibrate": embeddings,
        "compress": embeddings + needed.artifact_bytes,
        "compress_delta": needed.artifact_bytes,
        "finetune": embeddings + needed.artifact_bytes,
        "lora": model.num_bytes,
        "qlora": model.num_bytes,
        "compressed": needed.artifact_bytes,
    }
    return needed.host_bytes + needed.device_bytes + mapped.get(stage, 0)


@pytest.mark.parametrize(("stage", "run"), DEFAULT_RUN, ids=map(" ".join, DEFAULT_RUN))
def test_default_run(stage: str, run: str, smollm2: ModelShapes) -> None:
    """Bytes to 2 %, memory to a quarter."""
    resident, weights = DEFAULT_RUN[stage, run]

    needed = need(smollm2, stage, run)

    assert needed.artifact_bytes == pytest.approx(weights, rel=0.02)
    assert 0.85 < peak_bytes(smollm2, stage, needed) / resident < 1.25


def test_distillation_holds_the_teacher_and_follows_it(smollm2: ModelShapes) -> None:
    plain, method = FinetuningSettings(60, 5e-3), build_method("cluscomp", {"bits": 2.2})
    alone, distilled = (
        stages.train(smollm2, settings, "compressed", None, method)
        for settings in (plain, replace(plain, objective="distillation"))
    )

    logits = 16 * CHUNK * smollm2.vocabulary
    assert distilled.device_bytes - alone.device_bytes == logits + 2 * smollm2.num_weights
    assert distilled.work > 1.2 * alone.work
    assert distilled.artifact_bytes == alone.artifact_bytes


@pytest.mark.slow
def test_compression_of_70b_is_bounded(llama_70b: ModelShapes) -> None:
    """Far below the model's 141 GB: one layer, one block, one shard."""
    for run in RUNS:
        needed = need(llama_70b, "compress", run)
        assert 3e9 < needed.host_bytes + needed.device_bytes < 45e9, run
        assert needed.artifact_bytes < 0.95 * llama_70b.num_bytes, run


@pytest.mark.parametrize("stage", ["calibrate", "compress", "finetune"])
def test_depth_changes_work_and_not_memory(
    stage: str, llama_70b: ModelShapes, tmp_path: Path
) -> None:
    shallow = need(large_shapes(tmp_path, layers=40), stage, "factors")
    deep = need(llama_70b, stage, "factors")

    assert (shallow.host_bytes, shallow.device_bytes) == (deep.host_bytes, deep.device_bytes)
    assert shallow.artifact_bytes < 0.65 * deep.artifact_bytes
    assert deep.work == pytest.approx(2 * shallow.work)


@pytest.mark.parametrize("key", ["windows", "length"])
def test_more_calibration_text_needs_more_of_everything(key: str, smollm2: ModelShapes) -> None:
    texts = replace(CALIBRATION, sensitivity_windows=0)
    both = texts, replace(texts, **{key: 4 * getattr(texts, key)})
    method = build_method("cluscomp", {"bits": 2.6})

    calibrated = [stages.calibrate(smollm2, texts) for texts in both]
    tuned = [stages.finetune(smollm2, TUNING, method, texts) for texts in both]

    for less, larger in (calibrated, tuned):
        assert larger.host_bytes > less.host_bytes
        assert larger.work > 2 * less.work
    # no more than 4,096 tokens are computed at a time
    assert calibrated[1].device_bytes == calibrated[0].device_bytes


def test_the_gradient_of_a_loss_takes_a_windows_predictions(smollm2: ModelShapes) -> None:
    without, short = replace(CALIBRATION, sensitivity_windows=0), replace(CALIBRATION, length=256)
    needed, plain, less = (stages.calibrate(smollm2, t) for t in (CALIBRATION, without, short))

    assert needed.device_bytes - less.device_bytes == 256 * 5 * 4 * smollm2.vocabulary
    assert needed.device_bytes > plain.device_bytes


def test_larger_batches_and_more_epochs(smollm2: ModelShapes) -> None:
    method = build_method("lillama", {"reduction": 0.158})

    def tuned(**changes: int) -> Need:
        return stages.finetune(smollm2, replace(TUNING, **changes), method, CALIBRATION)

    assert tuned(batch_size=8).device_bytes > 1.5 * tuned().device_bytes
    assert tuned(epochs=6).host_bytes == tuned().host_bytes
    assert tuned(epochs=6).work > 1.5 * tuned().work


def test_evaluation_grows_with_windows_in_work_and_not_in_memory(smollm2: ModelShapes) -> None:
    method = build_method("rtn", {"num_bits": 3})
    more, plain, itself = (
        stages.evaluate(smollm2, replace(EVALUATION, **changes), {}, kind, method)
        for changes, kind in (({"windows": 30}, "compressed"), ({}, "compressed"), ({}, "model"))
    )

    assert more.device_bytes == plain.device_bytes > itself.device_bytes
    assert more.work > 1.5 * plain.work
    assert plain.work > itself.work  # whose predictions are its reference


def test_methods_without_training_are_refused(smollm2: ModelShapes) -> None:
    with pytest.raises(ConfigError, match="RTN"):
        need(smollm2, "finetune", "rtn")


def test_blocks_above_the_last_compressed_one_are_not_finetuned(tiny: ModelShapes) -> None:
    def tuned(strategy: str) -> Need:
        method = build_method("lillama", {"reduction": 0.1, "strategy": strategy})
        return stages.finetune(tiny, TUNING, method, CALIBRATION)

    assert tuned("bottom").work < 0.6 * tuned("uniform").work
