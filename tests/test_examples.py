"""The examples run, and the documentation says what the code does."""

import dataclasses
import doctest
import json
import re
import runpy
import shlex
import shutil
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import typer.main
import yaml
from method_examples import example_layers
from transformers import LlamaForCausalLM

import llmpress
from llmpress import methods
from llmpress.cli import app
from llmpress.compression.stage import compress_model
from llmpress.core.artifacts import read_json
from llmpress.core.records import BlockRecord, LayerRecord
from llmpress.methods.registry import build_method, known_methods, method_class
from llmpress.nn.layers import KINDS
from llmpress.training.settings import FinetuningSettings
from llmpress.tuning.settings import TuningSettings

ROOT = Path(__file__).parents[1]
EXAMPLES, DOCS = ROOT / "examples", ROOT / "docs"
Run = Callable[..., str]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run an example as ``python examples/NAME.py ARGUMENTS`` would; return what it prints."""
    monkeypatch.chdir(tmp_path)

    def example(name: str, *arguments: Path | str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments)])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        return capfd.readouterr().out

    return example


@pytest.fixture
def compressed(run: Run, tiny_model_folder: Path, tmp_path: Path) -> Path:
    """What the first example writes."""
    run("01_compress_and_generate", tiny_model_folder, tmp_path / "compressed")
    return tmp_path / "compressed"


def test_compress_and_generate(run: Run, tiny_model_folder: Path, tmp_path: Path) -> None:
    printed = run(
        "01_compress_and_generate", tiny_model_folder, tmp_path / "out", "--prompt", "import "
    )
    assert "import " in printed
    assert "MB of weights" in printed
    assert llmpress.load_model(tmp_path / "out").config.quantization_config.layers


def test_load_with_transformers(run: Run, compressed: Path) -> None:
    assert "QuantizedLinear" in run("02_load_with_transformers", compressed)


def test_delta_for_two_tenants(
    run: Run, tiny_model_folder: Path, tiny_finetuned_folder: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    model = LlamaForCausalLM.from_pretrained(tiny_finetuned_folder)
    model.model.layers[1].mlp.up_proj.weight.data.mul_(1.05)
    model.save_pretrained(other)
    printed = run(
        "03_delta_for_two_tenants",
        tiny_model_folder,
        tiny_finetuned_folder,
        other,
        tmp_path / "deltas",
    )
    errors = [float(found) for found in re.findall(r"differ by (\S+) from", printed)]
    assert len(errors) == 2
    assert max(errors) < 0.05


@pytest.mark.slow
def test_export_for_other_tools(run: Run, compressed: Path, tmp_path: Path) -> None:
    printed = run("04_export_for_other_tools", compressed, tmp_path / "dense")
    assert "LlamaForCausalLM of torch.bfloat16" in printed


def test_own_method(run: Run) -> None:
    assert "bits per weight" in run("05_own_method")


def test_own_method_is_found_by_its_name(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own").mkdir()
    shutil.copy(EXAMPLES / "05_own_method.py", tmp_path / "own" / "ternary.py")
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "own")])
    compress_model(
        tiny_model_folder,
        method=build_method("ternary", {"threshold": 0.5}, "test"),
        seed=0,
        device=torch.device("cpu"),
        scratch=tmp_path / "scratch",
        out=tmp_path / "out",
    )
    del sys.modules["llmpress.methods.ternary"]
    assert read_json(tmp_path / "out" / "layers.json")["totals"]["bits_per_weight"] < 3
    assert (
        llmpress.load_model(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj").num_bits
        == 2
    )


def test_every_example_is_short_and_tested() -> None:
    tests = Path(__file__).read_text()
    examples = sorted(EXAMPLES.glob("*.py"))
    assert [path.stem for path in examples if f'"{path.stem}"' not in tests] == []
    assert [path.name for path in examples if len(path.read_text().splitlines()) >= 60] == []


def rows(page: Path, heading: str) -> dict[str, list[str]]:
    """Cells of the first table below a heading, without code marks, by the first one."""
    _, found, text = page.read_text().partition(heading)
    assert found, f"{page.name} has no {heading!r}"
    table = re.search(r"^\|.*(?:\n\|.*)*", text, re.MULTILINE)
    assert table is not None
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[0].splitlines()]
    return {row[0].strip("`"): [cell.strip("`") for cell in row[1:]] for row in cells[2:]}


def type_words(hint: Any) -> str:
    """A field's type as the pages write it; what limits its values stands in its meaning."""
    if typing.get_origin(hint) is typing.Annotated:
        return type_words(typing.get_args(hint)[0])
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return " or ".join(arguments)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(type_words(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {type_words(arguments[0])}"
    return "none" if hint is type(None) else str(hint.__name__)


def default_words(value: Any) -> str:
    """A field's default as params.yaml would have it."""
    if value is dataclasses.MISSING:
        return "required"
    return "none" if value is None else json.dumps(value).strip('"')


@pytest.mark.parametrize(
    ("page", "heading", "settings"),
    [
        *((f"{name}.md", "## Settings", method_class(name)) for name in known_methods()),
        ("index.md", "## Finetuning block by block", TuningSettings),
        ("../finetuning.md", "## Settings", FinetuningSettings),
    ],
)
def test_pages_show_every_setting(page: str, heading: str, settings: Any) -> None:
    shown = {name: cells[:2] for name, cells in rows(DOCS / "methods" / page, heading).items()}
    fields = {
        field.name: [type_words(field.type), default_words(field.default)]
        for field in dataclasses.fields(settings)
    }
    assert shown == fields


@pytest.mark.parametrize("name", known_methods())
def test_every_methods_page_says_what_the_overview_shows(name: str) -> None:
    head = (DOCS / "methods" / f"{name}.md").read_text().split("---\n")[1]
    assert yaml.safe_load(head).keys() == {"for", "stores", "calibration", "tuned"}


@pytest.mark.parametrize("kind", KINDS)
def test_format_page_describes_every_tensor(kind: str) -> None:
    page = (DOCS / "artifact-format.md").read_text()
    section = page.partition(f"\n**`{kind}`**")[2].partition("\n**`")[0].partition("\n### ")[0]
    dtypes = {torch.uint8: "uint8", torch.float16: "float16", torch.float32: "float32"}
    dtypes[torch.int8] = "int8"
    for layer in example_layers(33, 35)[kind]:
        for name, tensor in layer.tensors().items():
            generic = re.sub(r"^([UV])\d+", r"\1g", name)
            assert f"`{generic}`" in section
            assert dtypes.get(tensor.dtype, "spec (bfloat16)") in section
        for setting in layer.spec():
            assert f"`{setting}`" in section


def test_format_page_names_every_key(compressed: Path) -> None:
    page = DOCS / "artifact-format.md"
    record = read_json(compressed / "provenance.json")
    assert rows(page, "## provenance.json").keys() == {*record, "dequantized"}
    layer = {field.name for field in dataclasses.fields(LayerRecord)}
    assert rows(page, "An entry of `layers`:").keys() == layer
    blocks = page.read_text().partition("An entry of `blocks`:")[2].partition("\n## ")[0]
    assert [f.name for f in dataclasses.fields(BlockRecord) if f"`{f.name}`" not in blocks] == []
    stored = read_json(compressed / "config.json")["quantization_config"]
    assert rows(page, "`quantization_config` in `config.json`:").keys() == stored.keys()


def test_format_page_packs_as_the_code_does() -> None:
    page = DOCS / "artifact-format.md"
    result = doctest.testfile(str(page), module_relative=False, encoding="utf-8")
    assert result.attempted > 0
    assert result.failed == 0


def test_api_page_shows_every_public_name() -> None:
    page = (DOCS / "api" / "index.md").read_text()
    shown = re.findall(r"^::: llmpress\.(\w+)$", page, re.MULTILINE)
    assert sorted(shown) == sorted(llmpress.__all__)


def shown_commands() -> list[str]:
    """Every ``llmpress ...`` line of the pages' and the README's shell blocks, joined."""
    commands = []
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md"]:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(), re.DOTALL):
            lines = block.replace("\\\n", " ").replace("&&", "\n").splitlines()
            commands += [line.strip() for line in lines if line.strip().startswith("llmpress ")]
    return commands


def test_pages_show_commands_that_exist() -> None:
    shown = shown_commands()
    assert len(shown) > 10
    for line in shown:
        _, *words = shlex.split(line, comments=True)
        command: Any = typer.main.get_command(app)
        while hasattr(command, "commands"):
            command = command.commands[words.pop(0)]
        command.make_context(line, words)  # raises for an unknown option or a missing argument


def test_troubleshooting_quotes_lines_that_exist() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    sources = "\n".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
    quoted = re.findall(r"^\| (`+) ?(.+?) ?\1 \| ", page, re.MULTILINE)
    assert len(quoted) > 30
    assert [line for _, line in quoted if line not in sources] == []
