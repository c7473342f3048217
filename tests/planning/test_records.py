"""Seconds from synthetic records."""

from pathlib import Path

import pytest

from llmpress.methods.registry import known_methods
from llmpress.planning.records import Record, estimate_time, read_records

HERE = ("a processor", "")


def record(work: float, seconds: float, *, gpu: str = "", processor: str = "a processor") -> Record:
    return Record("compress", "rtn", "tiny", work, seconds, processor, gpu, 1, "2026-11-28")


def test_seconds_grow_as_the_work_does() -> None:
    time = estimate_time([record(1e9, 2.0)], ("compress", "rtn"), 5e9, HERE)

    assert time is not None
    assert (time.seconds, time.low, time.high) == (10.0, 10.0, 10.0)
    assert time.basis == "1 of this processor, ×5"


def test_the_range_is_that_of_the_records_that_are_as_near() -> None:
    records = [record(1e9, 2.0), record(1e9, 3.0), record(1.5e9, 6.0), record(1e12, 9e9)]

    time = estimate_time(records, ("compress", "rtn"), 1e9, HERE)

    assert time is not None
    assert (time.low, time.seconds, time.high) == (2.0, 3.0, 4.0)
    assert time.basis == "3 of this processor"


@pytest.mark.parametrize(
    ("own_work", "seconds"), [(1e8, 20.0), (1e4, 7.0)], ids=["near enough", "too far away"]
)
def test_records_of_this_machine_come_first(own_work: float, seconds: float) -> None:
    own, other = record(own_work, own_work * 2e-8), record(1e9, 7.0, processor="another")

    time = estimate_time([own, other], ("compress", "rtn"), 1e9, HERE)

    assert time is not None
    assert time.seconds == pytest.approx(seconds)
    assert time.machine == ("this processor" if seconds == 20.0 else "another")


def test_a_gpu_says_nothing_of_a_processor_nor_one_method_of_another() -> None:
    records = [record(1e9, 1.0, gpu="a GPU"), record(1e9, 1.0)]

    assert estimate_time(records[:1], ("compress", "rtn"), 1e9, HERE) is None
    assert estimate_time(records[1:], ("compress", "rtn"), 1e9, ("x", "a GPU")) is None
    assert estimate_time(records, ("compress", "svd"), 1e9, HERE) is None
    assert estimate_time(records, ("compress", "rtn"), 0.0, HERE) is None  # all layers stay dense


def test_the_table_that_comes_along_knows_every_stage_and_method_of_a_cpu() -> None:
    known = {(r.stage, r.method) for r in read_records() if not r.gpu}

    methods = {("compress", name) for name in known_methods()}
    others = {"calibrate", "train_task", "extract_delta", "evaluate"}
    assert known >= methods | {(stage, "") for stage in others}
    assert known >= {("finetune", "cluscomp"), ("finetune", "lillama"), ("train", "lora")}
    assert all(r.work > 0 and r.seconds > 0 and r.processor for r in read_records())


def test_a_table_is_read_with_its_types(tmp_path: Path) -> None:
    (tmp_path / "records.csv").write_text(
        "stage,method,model,work,seconds,processor,gpu,threads,date\n"
        "compress,rtn,tiny,1e9,2.5,a processor,,1,2026-11-28\n"
    )
    assert read_records(tmp_path / "records.csv") == [record(1e9, 2.5)]
