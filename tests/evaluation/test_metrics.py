from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from llmpress.evaluation import metrics

ROOT = Path(__file__).parents[2]
SIZE = {
    "bits_per_weight": 4.5,
    "compressed_weights": 8,
    "stored_bits": 36,
    "model_weights": 10,
    "model_bytes": 9,
    "ratio": 2.0,
}


def records(record: type[BaseModel]) -> set[type[BaseModel]]:
    """A record and all records in it."""
    found = {record}
    for field in record.model_fields.values():
        nested, _ = metrics.nested_record(field.annotation)
        if nested is not None:
            found |= records(nested)
    return found


def test_the_document_is_current() -> None:
    written = (ROOT / metrics.DOCUMENT).read_text(encoding="utf-8")
    assert written == metrics.document(), "run python -m llmpress.evaluation.metrics"


def test_every_field_is_described() -> None:
    everything = set().union(*map(records, (metrics.Metrics, metrics.Details, metrics.Speed)))
    assert len(everything) == 12
    for record in everything:
        assert record.__doc__
        for name, field in record.model_fields.items():
            assert field.description, f"{record.__name__}.{name}"


def test_a_whole_record_is_taken() -> None:
    assert metrics.Size(**SIZE).model_dump() == SIZE


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"ratio": float("nan")},
        {"ratio": "2"},
        {"stored_bits": 36.5},
        {"model_bytes": -1},
    ],
    ids=["unknown", "nan", "text", "fraction", "negative"],
)
def test_what_is_not_right_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        metrics.Size(**{**SIZE, **change})


def test_the_document_names_nested_fields() -> None:
    document = metrics.document()
    for key in ("quality.tasks.<name>.stderr", "samples[].text", "evaluation.task_items.<name>"):
        assert f"| `{key}` |" in document
