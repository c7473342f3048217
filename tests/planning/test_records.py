"""Seconds from synthetic records, and the table that comes along."""

import pytest

from llmpress.methods.registry import known_methods
from llmpress.planning.records import Record, Time, estimate_time, read_records

HERE = ("a processor", "")
KIND = ("compress", "rtn")


def record(work: float, seconds: float, *, gpu: str = "", processor: str = "a processor") -> Record:
    return Record(*KIND, "tiny", work, seconds, processor, gpu, 1)


def test_seconds_grow_as_the_work_does() -> None:
    time = estimate_time([record(1e9, 2.0)], KIND, 5e9, HERE)

    assert time == Time(10.0, "a processor", 5.0)


def test_the_record_of_the_nearest_work_counts() -> None:
    records = [record(1e7, 9.0), record(1.5e9, 6.0), record(1e12, 9e9)]

    time = estimate_time(records, KIND, 1e9, HERE)

    assert time is not None
    assert time.seconds == pytest.approx(4.0)


def test_records_of_this_machine_come_first() -> None:
    own, other = record(1e8, 2.0), record(1e9, 7.0, processor="another")

    assert estimate_time([other, own], KIND, 1e9, HERE) == Time(20.0, "a processor", 10.0)
    assert estimate_time([other], KIND, 1e9, HERE) == Time(7.0, "another", 1.0)


def test_a_gpu_says_nothing_of_a_processor_nor_one_method_of_another() -> None:
    records = [record(1e9, 1.0, gpu="a GPU"), record(1e9, 1.0)]

    assert estimate_time(records[:1], KIND, 1e9, HERE) is None
    assert estimate_time(records[1:], KIND, 1e9, ("x", "a GPU")) is None
    assert estimate_time(records, ("compress", "svd"), 1e9, HERE) is None
    assert estimate_time(records, KIND, 0.0, HERE) is None  # all layers stay dense


def test_the_table_knows_every_stage_and_method_of_a_cpu_once() -> None:
    records = read_records()
    known = {(r.stage, r.method) for r in records if not r.gpu}

    methods = {("compress", name) for name in known_methods()}
    others = ("calibrate", "train", "extract", "reference", "evaluate")
    assert known >= methods | {(stage, "") for stage in others}
    assert known >= {("finetune", "cluscomp"), ("finetune", "lillama"), ("train", "lora")}
    assert all(r.work > 0 and r.seconds > 0 and r.processor for r in records)
    assert len(
        {(r.stage, r.method, r.model, r.work, r.processor, r.gpu, r.threads) for r in records}
    ) == len(records)
