"""The public face: one call each, one rule for all, and a mistake leaves nothing behind."""

import ast
import importlib
import inspect
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from tiny_artifacts import WEIGHT_METHODS, Make
from tiny_models import library_text
from transformers import AutoModelForCausalLM

import llmpress
from llmpress.calibration.texts import read_texts
from llmpress.core.artifacts import read_json, read_provenance, sha256
from llmpress.core.errors import ArtifactError, ConfigError, SourceError

ROOT = Path(__file__).parents[1]
TEXT = library_text(("xml", "asyncio"))
FEW: dict[str, Any] = {"windows": 2, "length": 32, "device": "cpu"}
RTN: dict[str, Any] = {"method": "rtn", "bits": 4, "group_size": 16}
ONE_STEP: dict[str, Any] = {"steps": 1, "learning_rate": 1e-3, "held_out": 1, "length": 16}
# First the folders a function takes, as fixtures, then what else it needs.
WRITERS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "calibrate_model": (("model",), {"text": TEXT, **FEW}),
    "compress_model": (("model",), {**RTN, "device": "cpu"}),
    "finetune_model": (
        ("packed",),
        {"original": "model", "epochs": 1, "learning_rate": 0.01, "text": TEXT, **FEW},
    ),
    "train_model": (
        ("packed",),
        {"original": "model", "text": TEXT, **ONE_STEP, "windows": 8, "device": "cpu"},
    ),
    "extract_delta": (("model", "finetuned"), {}),
    "compress_delta": (("delta",), {"method": "svd", "rank": 4, "device": "cpu"}),
    "make_reference": (("model",), {"text": TEXT, **FEW}),
    "export_dense": (("packed",), {}),
    "export_factors": (("low_rank",), {}),
    "export_packed": (("grouped",), {}),
    "export_adapter": (("small_delta",), {}),
}
TAKE_SETTINGS = ("compress_model", "finetune_model", "train_model", "compress_delta")
OPENERS: dict[str, Callable[[Path], object]] = {
    "load_model": llmpress.load_model,
    "load_tokenizer": llmpress.load_tokenizer,
    "load_finetuned": lambda folder: llmpress.load_finetuned(folder, folder),
    "describe": llmpress.describe,
    "fetch_model": llmpress.fetch_model,
    "compare_models": lambda folder: llmpress.compare_models(folder, folder, text=TEXT),
    "evaluate_model": lambda folder: llmpress.evaluate_model(folder, text=TEXT),
    "push_artifact": lambda folder: llmpress.push_artifact(folder, "owner/name"),
}


@pytest.fixture
def folders(
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    compressed: Make,
    tiny_delta: Path,
    compressed_delta: Path,
) -> dict[str, Path]:
    return {
        "model": tiny_model_folder,
        "finetuned": tiny_finetuned_folder,
        "packed": compressed("cluscomp"),
        "low_rank": compressed("svd"),
        "grouped": compressed("rtn"),
        "delta": tiny_delta,
        "small_delta": compressed_delta,
    }


def call(name: str, folders: dict[str, Path], out: Path, *given: Path, **changes: Any) -> Path:
    """Call a function that writes; its first folder may be another one."""
    names, keywords = WRITERS[name]
    places = [*given, *(folders[place] for place in names[len(given) :])]
    keywords = {k: folders[v] if k == "original" else v for k, v in keywords.items()}
    written: Path = getattr(llmpress, name)(*places, out=out, **(keywords | changes))
    return written


@pytest.mark.parametrize("name", WRITERS)
def test_what_writes_a_folder_returns_it(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert call(name, folders, out) == out
    assert read_provenance(out)["files"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", WRITERS)
def test_folders_come_first_and_all_else_by_keyword(name: str) -> None:
    parameters = inspect.signature(getattr(llmpress, name)).parameters.values()
    places = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert len(places) == len(WRITERS[name][0])
    keywords = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert {"out", "force"} <= keywords


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("mistake", ["missing", "another kind", "out is there"])
def test_a_mistake_is_an_error_of_ours_and_leaves_nothing(
    mistake: str, name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    out, empty = tmp_path / "out", tmp_path / "empty"
    empty.mkdir()
    given = {"missing": [tmp_path / "nowhere"], "another kind": [empty]}.get(mistake, [])
    if not given:
        out.mkdir()
        (out / "mine").write_text("")
    named = out if not given else given[0]
    with pytest.raises(ArtifactError, match=named.name):
        call(name, folders, out, *given)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty",
        *([] if given else ["out"]),
    ]
    if not given:
        assert [path.name for path in out.iterdir()] == ["mine"]


def inputs_of(name: str, folders: dict[str, Path], text: Path) -> dict[str, Any]:
    """All that a function can be told to read, as paths."""
    places, keywords = WRITERS[name]
    given: dict[str, Any] = {f"place {i}": folders[place] for i, place in enumerate(places)}
    if "original" in keywords:
        given["original"] = folders["model"]
    if "text" in keywords:
        given["text"] = text
    of_others = {
        "compress_model": {"calibration": "calibration"},
        "compress_delta": {"calibration": "calibration", "base": "model"},
        "export_dense": {"tokenizer": "model"},
    }
    return given | {role: folders[key] for role, key in of_others.get(name, {}).items()}


@pytest.mark.parametrize("name", WRITERS)
def test_no_function_replaces_what_it_reads(
    name: str, folders: dict[str, Path], calibration: Path, tmp_path: Path
) -> None:
    kept = {
        key: Path(shutil.copytree(folder, tmp_path / "all" / key))
        for key, folder in {**folders, "calibration": calibration}.items()
    }
    text = tmp_path / "all" / "text" / "text.txt"
    text.parent.mkdir()
    text.write_text(TEXT[0])
    before = sorted(tmp_path.rglob("*"))
    given = inputs_of(name, kept, text)
    places = [path for role, path in given.items() if role.startswith("place")]
    keywords = {role: path for role, path in given.items() if not role.startswith("place")}
    for path in given.values():
        for out in (path, path.parent):
            with pytest.raises(ArtifactError, match=r"inputs? .*never replaced"):
                call(name, kept, out, *places, **keywords, force=True)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", TAKE_SETTINGS)
def test_an_unknown_setting_is_named(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no_such_setting"):
        call(name, folders, tmp_path / "out", no_such_setting=1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [name for name in WRITERS if "method" in WRITERS[name][1]])
def test_methods_are_named_or_given(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rnt.*'rtn'"):
        call(name, folders, tmp_path / "out", method="rnt")
    method = llmpress.build_method("rtn", {"num_bits": 4, "group_size": 16})
    with pytest.raises(ConfigError, match="settings already"):
        call(name, folders, tmp_path / "out", method=method)
    assert not list(tmp_path.iterdir())


NEEDY: dict[str, dict[str, Any]] = {  # settings that need calibration
    "gptq": {"bits": 4},
    "bitdelta": {},
    "svd": {"rank": 4, "whiten": True},
    "lillama": {"rank": 4},
}


@pytest.mark.parametrize("needy", NEEDY)
@pytest.mark.parametrize("name", [name for name in WRITERS if "method" in WRITERS[name][1]])
def test_calibration_that_is_needed_is_asked_for_once(
    name: str, needy: str, folders: dict[str, Path], tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    source = folders[WRITERS[name][0][0]]
    with pytest.raises(ConfigError, match=f"{needy} needs calibration"):
        getattr(llmpress, name)(source, method=needy, out=tmp_path / "out", **NEEDY[needy])
    with pytest.raises(ArtifactError, match="nowhere"):  # nothing is noted of work not begun
        getattr(llmpress, name)(
            tmp_path / "nowhere", method="cluscomp", bits=4, out=tmp_path / "out"
        )
    assert not caplog.text
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", OPENERS)
def test_what_opens_a_folder_names_the_missing_one(name: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="nowhere"):
        OPENERS[name](tmp_path / "nowhere")


def test_every_function_is_called_here() -> None:
    others = {"DeltaBank", "LLMPressError", "build_method", "dense_bytes", "dequantized"}
    others |= {"fetch_artifact", "known_methods", "load_delta", "method_class", "remove_delta"}
    assert {*WRITERS, *OPENERS} | others == set(llmpress.__all__)


def test_one_call_calibrates_and_compresses(tiny_model_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "small"
    llmpress.compress_model(
        str(tiny_model_folder), method="cluscomp", bits=2.6, iterations=2, text=TEXT, out=str(out),
        **FEW,
    )  # fmt: skip
    made = read_provenance(out)
    assert made["settings"]["method"] == "cluscomp"
    assert set(made["inputs"]) == {"model", "calibration"}
    assert read_json(out / "layers.json")["totals"]["bits_per_weight"] <= 2.6
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config.layers


def test_force_replaces_and_the_bytes_are_the_same(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    one = sha256(call("compress_model", folders, tmp_path / "out") / "model.safetensors")
    again = call("compress_model", folders, tmp_path / "out", force=True)
    assert sha256(again / "model.safetensors") == one
    method = llmpress.build_method("rtn", {"num_bits": 4, "group_size": 16})
    given = llmpress.compress_model(folders["model"], method=method, out=tmp_path / "given")
    assert sha256(given / "model.safetensors") == one


def test_finetuning_knows_the_method_from_the_model(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    made = read_provenance(call("finetune_model", folders, tmp_path / "out"))["settings"]
    before = read_provenance(folders["packed"])["settings"]
    assert made["method"] == "cluscomp"
    assert made["method_settings"] == {k: before[k] for k in made["method_settings"]}
    again = call("finetune_model", folders, tmp_path / "again", tmp_path / "out")
    assert read_provenance(again)["settings"]["method_settings"] == made["method_settings"]
    with pytest.raises(ConfigError, match="svd has nothing to finetune"):
        call("finetune_model", folders, tmp_path / "none", folders["low_rank"])


def test_no_setting_of_a_method_is_a_keyword_of_the_functions() -> None:
    for function in (llmpress.compress_model, llmpress.compress_delta):
        taken = set(inspect.signature(function).parameters)
        for name in llmpress.known_methods():
            assert taken.isdisjoint(field.name for field in fields(llmpress.method_class(name)))


def test_text_is_documents_or_places(tmp_path: Path) -> None:
    file, lines = tmp_path / "plain.txt", tmp_path / "lines.jsonl"
    file.write_text("".join(f"line {i}\n" for i in range(10)))
    lines.write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(5)))
    texts = read_texts([file, "one", lines, "two"])
    assert list(texts) == ["plain.txt", "text", "lines.jsonl"]
    assert texts["text"].statistics == ["one"]
    assert texts["text"].validation == ["two"]
    assert texts["plain.txt"].validation == ["line 8\nline 9\n"]
    assert texts["lines.jsonl"].validation == ["document 4"]
    with pytest.raises(ConfigError, match=r"plain\.txt"):
        read_texts([str(file)])
    with pytest.raises(ConfigError, match="text"):
        read_texts([])
    with pytest.raises(ConfigError, match="lines"):
        read_texts([lines, lines])
    with pytest.raises(ArtifactError, match="nowhere"):
        read_texts(tmp_path / "nowhere")
    lines.write_text('{"txt": ""}\n')
    with pytest.raises(SourceError, match="lines"):
        read_texts(lines)


def package_tree() -> ast.Module:
    return ast.parse((ROOT / "src/llmpress/__init__.py").read_text())


def test_the_three_lists_of_names_agree() -> None:
    where = next(
        ast.literal_eval(node.value)
        for node in package_tree().body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets) == "_WHERE"
    )
    typed = {
        alias.name: node.module
        for block in package_tree().body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert where == typed
    assert llmpress.__all__ == sorted(where)
    for name, module in where.items():
        assert getattr(llmpress, name) is getattr(importlib.import_module(module), name)


# What else than the package itself may be imported, by folder: what reads params.yaml and turns
# errors into lines; a stage's own entry in params.yaml; and what has no name in the package.
FRONT = ("llmpress.core",)
ENTRIES = (".settings", ".subjects")
ALLOWED: dict[str, tuple[str, ...]] = {
    "src/llmpress/cli": (
        *(*FRONT, "llmpress.cli", "llmpress.planning", "llmpress.methods.base"),
        *("llmpress.data.chats", "llmpress.models.generation"),  # for `generate` alone
        "llmpress.nn.kernels",  # for `doctor` alone
        "llmpress.serving",  # for `serve` alone
        *("llmpress.report", "llmpress.evaluation.uncertainty"),  # for `report` and `compare`
    ),
    "examples": ("llmpress.methods.base", "llmpress.nn.layers"),  # for a method of one's own
    "workflow/scripts": (*FRONT, "llmpress.report", "llmpress.data"),
}
# Scripts that make something of several parts instead of calling one function.
OWN_PARTS = {
    "train_task": "llmpress.training",
    "speed": "llmpress.evaluation",
    "peer": "llmpress.pipeline",
}


@pytest.mark.parametrize("folder", ALLOWED)
def test_users_import_from_the_package_itself(folder: str) -> None:
    found = []
    for file in sorted((ROOT / folder).glob("*.py")):
        allowed = (*ALLOWED[folder], *([OWN_PARTS[file.stem]] if file.stem in OWN_PARTS else []))
        for node in ast.walk(ast.parse(file.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is None or not module.startswith("llmpress."):
                continue
            entry = folder == "workflow/scripts" and module.endswith(ENTRIES)
            if not entry and not f"{module}.".startswith(tuple(f"{a}." for a in allowed)):
                found.append(f"{file.name}: {module}")
    assert found == []


WITHOUT = """
import sys
from importlib.machinery import PathFinder

class Declared(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in sys.argv[1].split(","):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[:] = [Declared if finder is PathFinder else finder for finder in sys.meta_path]
from pathlib import Path
import torch, llmpress
model, text, out, *packed = sys.argv[2:]
text = Path(text)
small = llmpress.compress_model(
    model, method="cluscomp", bits=4, iterations=1, text=text, windows=2, length=32, out=out,
)
for folder in (small, *packed):
    with torch.inference_mode():
        assert llmpress.load_model(folder)(torch.arange(8)[None]).logits.isfinite().all()
llmpress.export_dense(small, out=out + "-dense")
print(llmpress.compare_models(model, small, text=text, windows=2, length=32).other_size.ratio)
"""


def test_the_library_needs_what_it_declares_and_nothing_else(
    tiny_model_folder: Path, compressed: Make, tmp_path: Path
) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    entries = [entry for extra in ("workflow", "adapters") for entry in extras[extra]]
    others = {re.split(r"[<>=!;\[ ]", entry)[0].replace("-", "_") for entry in entries} - {"jinja2"}
    assert {"pandas", "datasets", "lm_eval"} <= others
    (tmp_path / "text.txt").write_text("def f(x):\n    return x\n\n" * 2000)
    packed = [str(compressed(name)) for name in WEIGHT_METHODS]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, ",".join(others), tiny_model_folder,
         tmp_path / "text.txt", tmp_path / "small", *packed],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 1
