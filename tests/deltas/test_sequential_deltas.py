from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llmpress.core.artifacts import read_json, read_provenance
from llmpress.core.errors import ArtifactError, ConfigError
from llmpress.deltas.compression import compress_delta
from llmpress.methods.delta_come import DeltaCoMe

CPU = torch.device("cpu")
METHOD = DeltaCoMe(bits=3.0, group_size=16)


def compressed(delta: Path, calibration: Path | None, out: Path, base: Path | None = None) -> Path:
    compress_delta(
        delta,
        method=METHOD,
        calibration=calibration,
        base=base,
        seed=0,
        device=CPU,
        scratch=out.parent / "scratch",
        sequential=base is not None,
        out=out,
    )
    return out


def same(one: Path, other: Path) -> bool:
    return (one / "delta.safetensors").read_bytes() == (other / "delta.safetensors").read_bytes()


def test_later_layers_are_compressed_for_what_enters_them(
    tiny_delta: Path, tiny_model_folder: Path, finetuned_calibration: Path, tmp_path: Path
) -> None:
    plain = compressed(tiny_delta, finetuned_calibration, tmp_path / "plain")
    ordered = compressed(tiny_delta, finetuned_calibration, tmp_path / "o", tiny_model_folder)
    again = compressed(tiny_delta, finetuned_calibration, tmp_path / "again", tiny_model_folder)
    assert same(ordered, again)
    assert not same(plain, ordered)
    one, other = (load_file(folder / "delta.safetensors") for folder in (plain, ordered))
    unlike = {name.split(".")[2] for name in one if one[name].tolist() != other[name].tolist()}
    assert unlike == {"0", "1", "2"}  # from the first layer that sees a changed one
    assert read_provenance(ordered)["settings"]["sequential"] is True
    assert "sequential" not in read_provenance(plain)["settings"]


def test_dampening_and_seconds_of_each_step_are_recorded(
    tiny_delta: Path, finetuned_calibration: Path, tmp_path: Path
) -> None:
    folder = compressed(tiny_delta, finetuned_calibration, tmp_path / "plain")
    for layer in read_json(folder / "layers.json")["layers"]:
        notes = layer["notes"]
        assert notes["right_dampening"] >= 1e-4
        assert notes["left_dampening"] >= 1e-4
        steps = [notes[f"{step}_seconds"] for step in ("directions", "right", "left")]
        assert 0 < sum(steps) <= layer["seconds"]


def test_an_interrupted_run_continues_to_the_same_bytes(
    tiny_delta: Path,
    tiny_model_folder: Path,
    finetuned_calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = compressed(tiny_delta, finetuned_calibration, tmp_path / "w", tiny_model_folder)
    compress, done = DeltaCoMe.compress, []

    def stop_in_the_second_block(self, weight, statistics=None, *, seed=0):  # type: ignore[no-untyped-def]
        if len(done) == 10:
            raise KeyboardInterrupt
        done.append(seed)
        return compress(self, weight, statistics, seed=seed)

    monkeypatch.setattr(DeltaCoMe, "compress", stop_in_the_second_block)
    with pytest.raises(KeyboardInterrupt):
        compressed(tiny_delta, finetuned_calibration, tmp_path / "cut", tiny_model_folder)
    assert not (tmp_path / "cut").exists()
    done.clear()

    def count(self, weight, statistics=None, *, seed=0):  # type: ignore[no-untyped-def]
        done.append(seed)
        return compress(self, weight, statistics, seed=seed)

    monkeypatch.setattr(DeltaCoMe, "compress", count)
    cut = compressed(tiny_delta, finetuned_calibration, tmp_path / "cut", tiny_model_folder)
    assert len(done) == 14  # the first block of three was kept
    assert same(cut, whole)


def test_what_the_order_needs_is_asked_for_by_name(
    tiny_delta: Path,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    finetuned_calibration: Path,
    tmp_path: Path,
) -> None:
    with pytest.raises(ConfigError, match="calibration"):
        compressed(tiny_delta, None, tmp_path / "out", tiny_model_folder)
    with pytest.raises(ArtifactError, match=str(tiny_finetuned_folder)):
        compressed(tiny_delta, finetuned_calibration, tmp_path / "out", tiny_finetuned_folder)
    assert not (tmp_path / "out").exists()
