"""Random damage to params.yaml and to artifacts: an error that explains itself, or no harm done."""

import copy
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_artifacts import Make

import llmpress
from llmpress.calibration.settings import CalibrationSettings
from llmpress.compression.settings import Run, read_run
from llmpress.core.errors import LLMPressError
from llmpress.core.failures import one_line
from llmpress.core.params import build, read_params, section
from llmpress.data.documents import CorpusSource
from llmpress.data.sources.pretrained import ModelSource
from llmpress.data.tasks.source import TaskSource
from llmpress.deltas.settings import DeltaRun, read_delta_run
from llmpress.evaluation.inspection import describe
from llmpress.evaluation.settings import EvaluationSettings
from llmpress.evaluation.subjects import find_subject
from llmpress.methods.registry import build_method
from llmpress.models.checkpoints.delta_files import DeltaFolder
from llmpress.models.checkpoints.files import Checkpoint
from llmpress.report.tables import read_results
from llmpress.tuning.settings import read_finetune

ROOT = Path(__file__).parents[1]
PARAMS = yaml.safe_load((ROOT / "examples/all-methods.yaml").read_text())
pytestmark = pytest.mark.slow
FUZZ = settings(
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

junk = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["rtn", "smollm2", "../..", "0", "a==1", "x@y", "1e3", ".nan"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=4,
)


def paths(value: Any, prefix: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in nested mappings and lists."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for key, item in items:
        yield (*prefix, key)
        yield from paths(item, (*prefix, key))


SECTIONS = {
    "models": ModelSource,
    "corpora": CorpusSource,
    "tasks": TaskSource,
    "calibrations": CalibrationSettings,
}
PLACES = sorted(paths(PARAMS), key=str)


@st.composite
def damaged_params(draw: st.DrawFn) -> Any:
    """The project's params.yaml with one to three places replaced, removed or renamed."""
    params: Any = copy.deepcopy(PARAMS)
    for _ in range(draw(st.integers(1, 3))):
        *parents, last = draw(st.sampled_from(PLACES))
        container = params
        try:
            for key in parents:
                container = container[key]
            old = container[last]
        except (KeyError, IndexError, TypeError):
            continue  # an earlier change removed the place
        what = draw(st.sampled_from(["replace", "remove", "rename"]))
        if what == "replace" or isinstance(container, list):
            container[last] = draw(junk)
        else:
            del container[last]
            if what == "rename":
                container[draw(st.text(min_size=1, max_size=6))] = old
    return params


def explained(action: Callable[[], object]) -> str | None:
    """Do it: None when it worked, the line a user would see when it did not; a bug is raised."""
    try:
        action()
    except (LLMPressError, ValueError) as error:
        return one_line(error)
    return None


def readers(params: Any, folder: Path) -> Iterator[Callable[[], object]]:
    """What the stages read of params.yaml, each on its own."""
    for group, cls in SECTIONS.items():
        for key in keys(params, group):
            where = f"{group}.{key}"
            yield lambda where=where, cls=cls: build(cls, section(params, where), where)
    for group, read in (("runs", read_run), ("delta_runs", read_delta_run)):
        for key in keys(params, group):
            yield lambda key=key, read=read: built(read(params, key), key)
    for key in keys(params, "finetunes"):
        yield lambda key=key: read_finetune(params, key)
    yield lambda: build(EvaluationSettings, section(params, "evaluation"), "evaluation")
    yield lambda: find_subject(params, "rtn-3bit")
    yield lambda: read_results(folder / "metrics", folder / "details", params)


def keys(params: Any, group: str) -> list[str]:
    """The names that dvc.yaml makes stages of."""
    named = params.get(group)
    return list(named) if isinstance(named, dict) else []


def built(run: Run | DeltaRun, key: str) -> object:
    """The method of a run with its settings."""
    return build_method(run.method, run.settings, key)


@FUZZ
@given(damaged_params())
def test_no_params_yaml_gives_a_traceback(tmp_path: Path, params: Any) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(params, allow_unicode=True))
    if explained(lambda: read_params(path)) is None:
        for reader in readers(read_params(path), tmp_path):
            line = explained(reader)
            assert line is None or 0 < len(line) < 2000


@FUZZ
@given(st.binary(max_size=200) | st.text(max_size=200).map(str.encode))
def test_no_text_at_all_gives_a_traceback(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    line = explained(lambda: read_params(path))
    assert line is None or "params.yaml" in line


@st.composite
def damages(draw: st.DrawFn) -> tuple[int, str, float, bytes]:
    """Which file, what happens to it, where, and with which bytes."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "replace", "empty", "remove"]))
    where = draw(st.floats(0, 1, exclude_max=True))
    return draw(st.integers(0, 20)), kind, where, draw(st.binary(min_size=1, max_size=8))


def damage(folder: Path, how: tuple[int, str, float, bytes]) -> str:
    """Damage one file of a folder and return its name."""
    number, kind, where, extra = how
    files = sorted(path for path in folder.iterdir() if path.is_file())
    file = files[number % len(files)]
    data = file.read_bytes()
    position = int(where * len(data))
    changed = {
        "flip": data[:position] + bytes([data[position] ^ (extra[0] or 1)]) + data[position + 1 :],
        "cut": data[:position],
        "insert": data[:position] + extra + data[position:],
        "replace": data[:position] + extra + data[position + len(extra) :],
        "empty": b"",
    }
    if kind == "remove":
        file.unlink()
    else:
        file.write_bytes(changed[kind])
    return file.name


@pytest.fixture(scope="module")
def original_state(compressed: Make) -> dict[str, torch.Tensor]:
    return dict(llmpress.load_model(compressed("rtn")).state_dict())


@settings(FUZZ, max_examples=60)
@given(how=damages())
def test_a_damaged_artifact_is_refused_or_unharmed(
    how: tuple[int, str, float, bytes],
    compressed: Make,
    original_state: dict[str, torch.Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = Path(shutil.copytree(compressed("rtn"), tmp_path_factory.mktemp("fuzz") / "model"))
    name = damage(folder, how)
    if explained(lambda: (llmpress.load_model(folder), describe(folder))) is None:
        assert name == "provenance.json"  # what is said of its making may differ, nothing else
        state = dict(llmpress.load_model(folder).state_dict())
        assert state.keys() == original_state.keys()
        for key, tensor in original_state.items():
            torch.testing.assert_close(state[key], tensor, rtol=0, atol=0)
    shutil.rmtree(folder)


@settings(FUZZ, max_examples=60)
@given(how=damages())
def test_a_damaged_model_without_provenance_gives_no_traceback(
    how: tuple[int, str, float, bytes],
    tiny_model_folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Nobody knows what its bytes should be, but what cannot be read is said in one line."""
    folder = Path(shutil.copytree(tiny_model_folder, tmp_path_factory.mktemp("fuzz") / "model"))
    damage(folder, how)
    for action in (
        lambda: Checkpoint(folder).skeleton(),
        lambda: llmpress.load_model(folder),
        lambda: llmpress.load_tokenizer(folder),
    ):
        assert explained(action) != ""
    shutil.rmtree(folder)


@settings(FUZZ, max_examples=40)
@given(how=damages())
def test_a_damaged_delta_is_refused_or_unharmed(
    how: tuple[int, str, float, bytes],
    compressed_delta: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = Path(shutil.copytree(compressed_delta, tmp_path_factory.mktemp("fuzz") / "delta"))
    name = damage(folder, how)
    if explained(lambda: describe(folder)) is None:
        assert name == "provenance.json"
    (folder / "provenance.json").unlink(missing_ok=True)

    def read() -> None:
        delta = DeltaFolder(folder, "compressed_delta")
        for tensor in delta.names():
            delta.tensor(tensor)

    assert explained(read) != ""
    shutil.rmtree(folder)
