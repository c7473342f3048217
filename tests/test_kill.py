"""Stages killed by SIGKILL in their own process: a rerun continues, and gives the same bytes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_artifacts import content

from llmpress.core.artifacts import artifact_folder, read_json, read_provenance, write_json
from llmpress.core.errors import ArtifactError

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
METHODS = {  # settings of the method and rate of its finetuning
    "cluscomp": ({"num_entries": 16, "vector_size": 4, "iterations": 2}, 0.03),
    "lillama": ({"reduction": 0.2}, 0.01),
}
PARAMS = {
    "seed": 0,
    "models": {"tiny": {"path": "data/models/tiny"}},
    "trainings": {
        "small": {
            "start": "compressed/small",
            "model": "tiny",
            "trains": "compressed",
            "task": "sums",
            "settings": {
                "steps": 3,
                "learning_rate": 0.01,
                "batch_size": 2,
                "held_out": 2,
                "check_every": 1,
            },
        }
    },
}


def params(method: str) -> dict[str, Any]:
    """A project with one run of a method, finetuned block by block, and trained."""
    settings, rate = METHODS[method]
    same = {"model": "tiny", "method": method}
    tuning = {"run": "small", "settings": {"epochs": 1, "learning_rate": rate}}
    return {
        **PARAMS,
        "runs": {"small": {**same, "settings": settings}},
        "finetunes": {"small": {**same, **tuning}},
    }


OUTPUTS = {
    "compress": "data/compressed/small",
    "finetune": "data/finetuned/small",
    "train": "data/trained/small",
}
BLOCKS = 3
ITEMS = [{"query": f"What is {n} + 1?", "target": f" {n + 1}"} for n in range(20)]

# Imports everything once, then runs the script of each stage it is told of in a process of its own,
# which kills itself at the point asked for.
SERVER = """
import json, os, runpy, signal, sys, traceback
from pathlib import Path
import accelerate, torch, faiss, transformers.models.llama.modeling_llama
import llmpress.methods.cluscomp, llmpress.tuning.blocks
import llmpress.compression.stage, llmpress.compression.settings, llmpress.compression.writing
import llmpress.training.loop
import llmpress.core.artifacts, llmpress.core.resume, llmpress.core.shards

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def wrap(module, name, action):
    original = getattr(module, name)
    setattr(module, name, lambda *a, **k: action(original, *a, **k))

def after_first_block(original, store, index, *rest):
    original(store, index, *rest)
    if index == 0:
        die()

def after_weighing(original, store, index, *rest):
    original(store, index, *rest)
    if index == resume.NOT_A_BLOCK:
        die()

def half_of_second_checkpoint(original, tensors, path, *rest, **more):
    original(tensors, path, *rest, **more)
    if path.name == "0001.safetensors":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die()

def before_second_record(original, path, value):
    if path.name == "0001.tmp":
        die()
    original(path, value)

def half_of_the_weights(original, tensors, path, *rest, **more):
    original(tensors, path, *rest, **more)
    if path.name.startswith("part-"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die()

def before_provenance(original, path, value):
    if path.name == "provenance.json":
        die()
    original(path, value)

def inside_the_second_step(original, *rest, steps=[], **more):
    steps.append(original(*rest, **more))
    if len(steps) == 2:
        die()

def half_of_the_second_state(original, tensors, path, *rest, **more):
    original(tensors, path, *rest, **more)
    if path.name == "step-000002.safetensors":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        die()

def before_the_second_seal(original, path, value):
    if path.name == "step-000002.tmp":
        die()
    original(path, value)

artifacts, resume, shards = llmpress.core.artifacts, llmpress.core.resume, llmpress.core.shards

# a point has the name of the function above that kills there
PLACES = {
    "after_weighing": (resume.BlockStore, "save"),
    "after_first_block": (resume.BlockStore, "save"),
    "half_of_second_checkpoint": (resume, "save_tensors"),
    "before_second_record": (resume, "write_json"),
    "half_of_the_weights": (shards, "save_tensors"),
    "inside_the_second_step": (accelerate.Accelerator, "clip_grad_norm_"),
    "half_of_the_second_state": (resume, "save_tensors"),
    "before_the_second_seal": (resume, "write_json"),
    "before_provenance": (artifacts, "write_json"),
}

def run(project, script, point, log):
    os.chdir(project)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if point:
        wrap(*PLACES[point], globals()[point])
    sys.argv = [script, "small"]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code or 0

for line in sys.stdin:
    if (child := os.fork()) == 0:
        code = 99
        try:
            code = run(*json.loads(line))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
WEIGHED = "9000.json"  # what lillama spreads its budget by
KEPT_BLOCKS = {
    "after_first_block": 1,
    "half_of_second_checkpoint": 1,
    "before_second_record": 1,
    "half_of_the_weights": 3,
    "before_provenance": 3,
}


class Stages:
    """Runs stages of a project as processes."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self.server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, project: Path, stage: str, point: str = "") -> tuple[int, str]:
        """Run one stage and return its exit status and all it said."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        script = ROOT / f"workflow/scripts/{stage}.py"
        request = [str(project), str(script), point, str(self.log)]
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        status = int(self.server.stdout.readline())
        return status, self.log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run_stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stages]:
    stages = Stages(tmp_path_factory.mktemp("log") / "log")
    yield stages
    stages.server.communicate()


@pytest.fixture(scope="module")
def finished(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    calibration: Path,
    run_stage: Stages,
) -> Path:
    """A project in which all stages ran without a break."""
    settings = params(getattr(request, "param", "cluscomp"))
    project = tmp_path_factory.mktemp("project")
    (project / "data/models").mkdir(parents=True)
    (project / "data/calibration").mkdir()
    shutil.copytree(tiny_model_folder, project / "data/models/tiny")
    shutil.copytree(calibration, project / "data/calibration/tiny")
    task = project / "data/tasks/sums"
    with artifact_folder(task, stage="fetch_task", settings={}, inputs={}) as folder:
        items = "".join(json.dumps(item) + "\n" for item in ITEMS)
        (folder / "train.jsonl").write_text(items, encoding="utf-8")
    (project / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    for stage in OUTPUTS:
        status, said = run_stage(project, stage)
        assert status == 0, said
    return project


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path, stage: str) -> Path:
    """A copy of it in which one stage's output is missing."""
    project = tmp_path / "project"
    shutil.copytree(finished, project, ignore=shutil.ignore_patterns("finetuned", "trained"))
    if stage == "compress":
        shutil.rmtree(project / "data/compressed")
    return project


@pytest.mark.parametrize("finished", METHODS, indirect=True)
@pytest.mark.parametrize(
    ("stage", "point"),
    [(stage, point) for stage in ("compress", "finetune") for point in KEPT_BLOCKS],
)
def test_a_killed_stage_continues_with_the_same_bytes(
    unfinished: Path, finished: Path, run_stage: Stages, stage: str, point: str
) -> None:
    status, said = run_stage(unfinished, stage, point)
    assert status == -signal.SIGKILL, said
    out = unfinished / OUTPUTS[stage]
    assert not out.exists()
    assert next(p.name for p in out.parent.iterdir()).startswith(".small.writing-")
    store = next((unfinished / "scratch").glob(f"{stage}-small@*"))
    kept = {p.name: p.stat().st_mtime_ns for p in store.glob("[0-9]*.json")}
    assert sum(name != WEIGHED for name in kept) == KEPT_BLOCKS[point]

    status, said = run_stage(unfinished, stage, "before_provenance")  # killed again, at the end
    assert status == -signal.SIGKILL, said
    assert f"continues after {KEPT_BLOCKS[point]} finished blocks" in said
    now = {p.name: p.stat().st_mtime_ns for p in store.glob("[0-9]*.json")}
    assert sum(name != WEIGHED for name in now) == BLOCKS
    assert {name: now[name] for name in kept} == kept  # finished blocks were not made again

    for seal in store.glob("[0-9]*.json"):
        write_json(seal, {**read_json(seal), "seconds": 1000.0})

    status, said = run_stage(unfinished, stage)
    assert status == 0, said
    assert "continues after 3 finished blocks" in said
    assert 1000 < read_provenance(out)["seconds"] < 2000  # of all three processes
    assert content(out) == content(finished / OUTPUTS[stage])
    assert [p.name for p in out.parent.iterdir()] == ["small"]
    assert not (unfinished / "scratch").exists()


@pytest.mark.parametrize("finished", ["lillama"], indirect=True)
@pytest.mark.parametrize("stage", ["compress"])
def test_layers_are_not_weighed_twice(
    unfinished: Path, finished: Path, run_stage: Stages, stage: str
) -> None:
    status, said = run_stage(unfinished, stage, "after_weighing")
    assert status == -signal.SIGKILL, said
    store = next((unfinished / "scratch").glob("compress-small@*"))
    assert [path.name for path in store.glob("[0-9]*.json")] == [WEIGHED]
    status, said = run_stage(unfinished, stage)
    assert status == 0, said
    assert "weigh layers" not in said
    assert content(unfinished / OUTPUTS[stage]) == content(finished / OUTPUTS[stage])


@pytest.mark.parametrize("stage", ["train"])
@pytest.mark.parametrize(
    ("point", "last"),
    [
        ("inside_the_second_step", 1),
        ("half_of_the_second_state", 1),
        ("before_the_second_seal", 1),
        ("before_provenance", 2),
    ],
)
def test_a_killed_training_continues_with_the_same_bytes(
    unfinished: Path,
    finished: Path,
    run_stage: Stages,
    stage: str,
    point: str,
    last: int,
) -> None:
    status, said = run_stage(unfinished, stage, point)
    assert status == -signal.SIGKILL, said
    out = unfinished / OUTPUTS[stage]
    assert not out.exists()

    for seal in (unfinished / "scratch").glob("*/step-*.json"):
        write_json(seal, {**read_json(seal), "seconds": 1000.0})

    status, said = run_stage(unfinished, stage)
    assert status == 0, said
    assert f"continues after step {last}," in said
    assert 1000 < read_provenance(out)["seconds"] < 2000
    assert content(out) == content(finished / OUTPUTS[stage])
    assert [p.name for p in out.parent.iterdir()] == ["small"]
    assert not (unfinished / "scratch").exists()


@pytest.mark.parametrize("stage", ["compress"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("seed",), "seed 0, now 1"),
        (("runs", "small", "settings", "num_entries"), "num_entries 16, now 17"),
    ],
    ids=["seed", "settings"],
)
def test_blocks_of_other_settings_are_refused_and_named(
    unfinished: Path, run_stage: Stages, stage: str, change: tuple[str, ...], reason: str
) -> None:
    assert run_stage(unfinished, stage, "after_first_block")[0] == -signal.SIGKILL
    settings: Any = json.loads(json.dumps(params("cluscomp")))
    section = settings
    for key in change[:-1]:
        section = section[key]
    section[change[-1]] += 1
    (unfinished / "params.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    status, said = run_stage(unfinished, stage)
    assert status == 0, said
    lines = [line for line in said.splitlines() if "other work" in line]
    assert len(lines) == 1
    assert f"starts anew, as the 1 finished blocks in scratch/{stage}-small@" in lines[0]
    assert f"({reason})" in lines[0]
    assert "continues" not in said


@pytest.fixture
def locker(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that is writing an artifact and does not come to an end."""
    code = (
        "import sys, time; from pathlib import Path; from llmpress.core.artifacts import *\n"
        "with artifact_folder(Path(sys.argv[1]), stage='x', settings={}, inputs={}) as folder:\n"
        "    (folder / 'part').write_text('half'); print('ready', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def make(out: Path) -> None:
    with artifact_folder(out, stage="x", settings={}, inputs={}) as folder:
        write_json(folder / "a.json", 1)


def test_one_writes_at_a_time_and_what_a_killed_process_left_goes(
    tmp_path: Path, locker: subprocess.Popen[str]
) -> None:
    def hidden() -> list[str]:
        return sorted(p.name for p in tmp_path.iterdir() if p.name.startswith("."))

    own = tmp_path / ".out-12345678"  # somebody's own folder
    own.mkdir()
    with pytest.raises(ArtifactError, match=str(tmp_path / "out")):
        make(tmp_path / "out")
    assert len(hidden()) == 2
    locker.kill()
    locker.wait()
    make(tmp_path / "out-2")  # another artifact's business
    assert len(hidden()) == 2
    make(tmp_path / "out")
    assert hidden() == [own.name]
    assert read_json(tmp_path / "out/a.json") == 1
