"""Every file of every kind of artifact, damaged in every way: one line, never a wrong model."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_artifacts import Make, calibrate_tiny

import llmpress
from llmpress.core.failures import script_errors

pytestmark = pytest.mark.slow
Use = Callable[[Path, Path], object]
MODELS: dict[str, Use] = {
    "load": lambda folder, _: llmpress.load_model(folder),
    "tokenizer": lambda folder, _: llmpress.load_tokenizer(folder),
    "describe": lambda folder, _: llmpress.describe(folder),
    "export": lambda folder, out: llmpress.export_dense(folder, out=out),
}
KINDS = ("rtn", "cluscomp", "lillama", "dense", "calibration", "delta", "small delta")
WAYS = ("flip", "cut", "empty", "remove", "longer", "exchange")


def uses(kind: str, model: Path) -> dict[str, Use]:
    """What opens an artifact, by name; each takes its folder and one to write to."""
    if kind == "calibration":
        return {
            "compress": lambda folder, out: llmpress.compress_model(
                model, method="svd", rank=4, whiten=True, calibration=folder, out=out
            ),
            "describe": MODELS["describe"],
        }
    if kind == "delta":
        return {
            "compress": lambda folder, out: llmpress.compress_delta(
                folder, method="svd", rank=4, out=out
            ),
            "describe": MODELS["describe"],
        }
    if kind == "small delta":
        return {
            "load": lambda folder, _: llmpress.load_finetuned(model, folder),
            "apply": lambda folder, out: llmpress.export_dense(model, delta=folder, out=out),
            "adapter": lambda folder, out: llmpress.export_adapter(folder, out=out),
            "describe": MODELS["describe"],
        }
    return MODELS | {
        "compress": lambda folder, out: llmpress.compress_model(
            folder, method="rtn", bits=4, group_size=16, out=out
        )
    }


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def pairs(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    compressed: Make,
    calibration: Path,
    tiny_delta: Path,
    compressed_delta: Path,
) -> dict[str, tuple[Path, Path]]:
    """Two artifacts of each kind, the second with files of the same names."""
    made = tmp_path_factory.mktemp("pairs")
    found = {}
    for name in ("rtn", "cluscomp", "lillama"):
        one = compressed(name)
        found[name] = one, made / name
        settings = {"rtn": {"bits": 3, "group_size": 16}, "cluscomp": {"bits": 2.0}}.get(
            name, {"reduction": 0.3}
        )
        llmpress.compress_model(
            tiny_finetuned_folder, method=name, text=["x = 1\n" * 500] * 5, windows=2, length=32,
            out=made / name, **settings,
        )  # fmt: skip
    found["dense"] = made / "dense", made / "dense 2"
    for source, out in zip((tiny_model_folder, tiny_finetuned_folder), found["dense"], strict=True):
        llmpress.export_dense(source, out=out)
    found["calibration"] = calibration, calibrate_tiny(tiny_finetuned_folder, made / "calibration")
    found["delta"] = tiny_delta, made / "delta"
    llmpress.extract_delta(tiny_finetuned_folder, tiny_model_folder, out=made / "delta")
    found["small delta"] = compressed_delta, made / "small"
    llmpress.compress_delta(made / "delta", method="svd", rank=4, out=made / "small")
    return found


def damaged(file: Path, other: Path, way: str, draw: random.Random) -> None:
    data = bytearray(file.read_bytes())
    if way == "remove":
        file.unlink()
        return
    if way == "flip":
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif way == "cut":
        del data[draw.randrange(len(data)) :]
    elif way == "empty":
        data.clear()
    elif way == "longer":
        data += b" "
    else:
        data = bytearray(other.read_bytes())
    file.write_bytes(data)


@pytest.mark.parametrize("way", WAYS)
def test_damage_is_one_line(
    kind: str,
    way: str,
    pairs: dict[str, tuple[Path, Path]],
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    one, two = pairs[kind]
    draw = random.Random(f"{kind} {way}")
    wrong = []
    for name in sorted(path.name for path in one.iterdir()):
        if way == "exchange" and (two / name).read_bytes() == (one / name).read_bytes():
            continue
        for use, action in uses(kind, tiny_model_folder).items():
            folder, out = tmp_path / "artifact", tmp_path / "out"
            shutil.copytree(one, folder)
            damaged(folder / name, two / name, way, draw)
            code: object = 0
            try:
                with script_errors():
                    action(folder, out)
            except SystemExit as end:
                code = end.code
            except Exception as error:  # noqa: BLE001 - a traceback is what is looked for
                code = f"{type(error).__name__}: {error}"
            last = capsys.readouterr().err.rstrip("\n").rpartition("\n")[2]
            refused = code == 1 and last.startswith("error: ") and not out.exists()
            # what is said of its making may differ, as long as its files are those on the list
            unharmed = code == 0 and name == "provenance.json" and way in ("flip", "longer")
            foreign = code == 0 and name == "provenance.json" and way == "remove"
            if not (refused or unharmed or foreign):
                wrong.append((name, use, code, last))
            shutil.rmtree(folder)
            shutil.rmtree(out, ignore_errors=True)
    assert wrong == []
