"""layers.json: what is written is read again; damage is named; a newer version does no harm."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmpress.core.errors import ArtifactError
from llmpress.core.records import (
    DENSE,
    BlockRecord,
    LayerRecord,
    Records,
    has_records,
    parse_records,
    read_records,
    total_size,
    write_records,
)

PACKED = LayerRecord("a.q", "low_rank", {"rank": 2}, (8, 10), 640, 8.0, 0.25, None, 0.5)
LEFT_DENSE = replace(PACKED, name="a.k", kind=DENSE, settings={}, stored_bits=1280)
NOTED = replace(PACKED, name="a.v", notes={"dampening": 0.5}, method="svd")
LAYERS = (PACKED, LEFT_DENSE, NOTED)
BLOCKS = (BlockRecord(0, 2.0, 1.0, True, [3.0], [1.0], 4.5), BlockRecord(1, 2.0))
MODEL = Records(LAYERS, total_size(LAYERS, 1000))
DELTA = Records(LAYERS, total_size(LAYERS, 1000, exact_bytes=0), blocks=())
EXAMPLES = {"model": MODEL, "tuned": MODEL.finetuned(BLOCKS), "delta": DELTA}


def content(**changes: Any) -> dict[str, Any]:
    written: dict[str, Any] = json.loads(json.dumps(MODEL.content()))
    return written | changes


@pytest.mark.parametrize("name", EXAMPLES)
def test_what_is_written_is_read_again(name: str, tmp_path: Path) -> None:
    assert not has_records(tmp_path)
    write_records(tmp_path, EXAMPLES[name])
    assert has_records(tmp_path)
    assert read_records(tmp_path) == EXAMPLES[name]
    (file,) = tmp_path.iterdir()
    before = file.read_bytes()
    write_records(tmp_path, read_records(tmp_path))
    assert file.read_bytes() == before


@pytest.mark.parametrize(
    ("name", "keys"),
    [
        ("model", ["layers", "totals"]),
        ("tuned", ["layers", "totals", "blocks"]),
        ("delta", ["layers", "blocks", "totals"]),
    ],
)
def test_keys_keep_their_order(name: str, keys: list[str]) -> None:
    found = EXAMPLES[name].content()
    assert list(found) == keys
    always = list(found["layers"][0])
    assert always[0] == "name"
    assert always[-1] == "seconds"
    assert list(found["layers"][2]) == [*always, "notes", "method"]
    assert ("exact_bytes" in found["totals"]) == (name == "delta")


def test_layers_left_dense_count_with_their_bits() -> None:
    size = total_size([PACKED, LEFT_DENSE], 1000)
    assert (size.compressed_weights, size.stored_bits, size.bits_per_weight) == (160, 1920, 12)
    assert total_size([], 1000).bits_per_weight == 0


def test_finetuning_forgets_errors_and_keeps_the_rest() -> None:
    found = EXAMPLES["tuned"].finetuned()
    assert found.blocks is None
    assert found.totals == MODEL.totals
    unknown = {"relative_weight_error": None, "relative_output_error": None}
    assert found.layers == tuple(replace(layer, **unknown) for layer in LAYERS)


def test_keys_of_a_newer_version_are_passed_over() -> None:
    newer = content(more=[1])
    newer["totals"]["more"] = 1
    for layer in newer["layers"]:
        layer["more"] = {"x": 1}
    assert parse_records(newer, "here") == MODEL


def lacking(key: str) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["layers"][1].pop(key)


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda found: found.pop("totals"), "totals"),
        (lambda found: found.update(layers=3), "layers"),
        (lacking("stored_bits"), r"layers\.1\.stored_bits"),
        (lambda found: found["layers"][0].update(shape=[1]), r"layers\.0\.shape"),
        (lambda found: found["totals"].update(model_weights="many"), "model_weights"),
        (lambda found: found.update(blocks=[{"index": 0}]), r"blocks\.0\.loss_before"),
    ],
)
def test_damage_is_named_in_one_line(
    damage: Callable[[dict[str, Any]], Any], named: str, tmp_path: Path
) -> None:
    write_records(tmp_path, MODEL)
    (file,) = tmp_path.iterdir()
    found = content()
    damage(found)
    file.write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ArtifactError, match=named) as caught:
        read_records(tmp_path)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_file_that_is_no_record_is_named(text: str, tmp_path: Path) -> None:
    write_records(tmp_path, MODEL)
    (file,) = tmp_path.iterdir()
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=str(file)):
        read_records(tmp_path)


def test_no_records_are_an_error_where_they_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=str(tmp_path)):
        read_records(tmp_path)
