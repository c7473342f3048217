"""Commands that are killed, ended or run out of disk anywhere: nothing lost, and one line at most.

Every trial starts with an older artifact in the place of the new one. Whatever happens, one of both
is there and whole, and the same command again gives the bytes of an undisturbed run.
"""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_artifacts import content, without_times

import llmpress
from llmpress.core.artifacts import verify
from llmpress.evaluation.metrics import Speed

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow
TRIALS = int(os.environ.get("LLMPRESS_TRIALS", "4"))
EVERY = TRIALS > 4
EACH = ("calibrate", "extract")
"""Commands of which each write fails, however few trials there are."""
TEXT = ["--text", "text.txt", "--windows", "4", "--length", "32"]
STEPS = ["--set", "check_every=1", "--set", "held_out=2", "--batch-size", "2", "--length", "32"]
COMMANDS: dict[str, list[str]] = {  # of the second of two settings the older artifact is made
    "calibrate": ["calibrate", "model", *TEXT, "--seed", "{0|1}"],
    "compress": ["compress", "model", "-m", "rtn", "--bits", "{4|3}", "-s", "group_size=16"],
    "compress with text": [
        *("compress", "model", "-m", "cluscomp", "--bits", "{3|2.6}", "-s", "iterations=2", *TEXT),
    ],
    "extract": ["delta", "extract", "model", "{finetuned|model}"],
    "compress delta": ["delta", "compress", "delta", "-m", "svd", "-s", "rank={4|8}"],
    "apply": ["delta", "apply", "model", "small", "--dtype", "{float32|float16}"],
    "export": ["export", "packed", "--dense", "--dtype", "{float32|float16}"],
    "adapters": [
        *("finetune", "model", "--trains", "lora", "--text", "text.txt", *STEPS),
        *("--steps", "{3|1}", "--lr", "1e-3"),
    ],
    "finetune": [
        *("finetune", "packed", "--original", "model", "--text", "text.txt", *STEPS),
        *("--steps", "{3|1}", "--lr", "1e-3"),
    ],
}

# Imports everything once; for each line it is sent it runs a command in a process of its own, with
# an accident: a signal after some seconds, a limit of files' sizes, or an n-th write that fails.
SERVER = """
import errno, json, os, resource, runpy, signal, sys, time, traceback
import accelerate, torch, faiss, transformers.models.llama.modeling_llama, safetensors.torch
import llmpress.methods.cluscomp, llmpress.training.stage, llmpress.export.dense
import llmpress.compression.stage, llmpress.deltas.compression, llmpress.core.artifacts
import llmpress.evaluation.stage, llmpress.evaluation.tasks, peft
import llmpress.evaluation.speed, llmpress.training.full, llmpress.report.html
import llmpress.data.sources.pretrained, llmpress.data.tasks.arithmetic
from llmpress.cli import main

class Writes:
    def __init__(self, folder, failing):
        names = ("made", "data", "results", "scratch")
        self.places = (*(os.path.join(folder, n) for n in names), *(f"{n}/" for n in names))
        self.failing, self.count = failing, 0
    def one(self, path):
        if str(path).startswith(self.places):
            self.count += 1
            if self.count == self.failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    def hook(self, event, values):
        if event == "os.rename" or (event == "os.mkdir" and not os.path.isdir(values[0])):
            self.one(values[0])
        elif event == "open" and isinstance(values[0], (str, bytes, os.PathLike)):
            if values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self.one(os.fsdecode(values[0]))

def run(folder, arguments, log, failing, limit):
    os.chdir(folder)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    writes = Writes(folder, failing)
    if failing is not None:
        save = llmpress.core.artifacts.save_file
        def counted(tensors, path, **more):
            writes.one(path)
            save(tensors, path, **more)
        llmpress.core.artifacts.save_file = counted
        sys.addaudithook(writes.hook)
    if limit is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    script = arguments[0].endswith(".py")
    sys.argv = arguments if script else ["llmpress", *arguments]
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__") if script else main()
    except SystemExit as end:
        code = end.code or 0
    if failing is not None and writes.count < failing:
        code = 77  # there was no such write
    return code

for line in sys.stdin:
    job = json.loads(line)
    started = time.perf_counter()
    if (child := os.fork()) == 0:
        code = 99
        try:
            code = run(*(job[k] for k in ("folder", "arguments", "log", "failing", "limit")))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
        if job["signal"] and time.perf_counter() - started > job["seconds"]:
            os.kill(child, job["signal"])
            job["signal"] = 0
        time.sleep(0.002)
    status = os.waitstatus_to_exitcode(done[1])
    print(json.dumps([status, time.perf_counter() - started]), flush=True)
"""


@dataclass
class World:
    """A folder with inputs, and what runs commands in it."""

    folder: Path
    server: "subprocess.Popen[str]"

    def __call__(self, arguments: list[str], **accident: Any) -> tuple[int, str, float]:
        """Run a command; return its status, all it said, and the seconds it took."""
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        log = self.folder.parent / "log"
        job = {"folder": str(self.folder), "arguments": arguments, "log": str(log), "signal": 0}
        job |= {"seconds": 0.0, "failing": None, "limit": None, **accident}
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        status, seconds = json.loads(self.server.stdout.readline())
        return status, log.read_text(encoding="utf-8", errors="replace"), seconds


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model_folder: Path,
    tiny_finetuned_folder: Path,
    tiny_delta: Path,
    compressed_delta: Path,
    compressed: Any,
) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("interrupted") / "work"
    given = {
        "model": tiny_model_folder,
        "finetuned": tiny_finetuned_folder,
        "delta": tiny_delta,
        "small": compressed_delta,
        "packed": compressed("cluscomp"),
    }
    for name, source in given.items():
        shutil.copytree(source, folder / name)
    (folder / "text.txt").write_text("".join(f"def f{i}(x): return x + {i}\n" for i in range(2000)))
    (folder / "made").mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        yield World(folder, server)
        assert server.stdin is not None
        server.stdin.close()


@dataclass
class Case:
    """A command with what it makes, and the older artifact that is in its place."""

    name: str
    world: World
    arguments: list[str]
    out: Path
    older: Path
    new: dict[str, Any]
    seconds: float

    def is_older(self) -> bool:
        """Whether the older artifact is there, to the byte, and nothing half-written beside it."""
        now, then = (
            {path.relative_to(top): path.read_bytes() for path in top.rglob("*") if path.is_file()}
            for top in (self.out, self.older)
        )
        names = {path.name for path in self.out.parent.iterdir()}
        return now == then and names <= {"out", ".out.unfinished"}

    def again(self) -> None:
        """Put the older artifact where the new one is to go, and nothing beside it."""
        for path in self.out.parent.iterdir():
            shutil.rmtree(path)
        shutil.copytree(self.older, self.out)

    def check(self) -> None:
        """One of both is there, whole; the same command makes the new one, and leaves nothing."""
        if self.out.exists():  # or killed between two renames: the next run puts one back
            verify(self.out)
            assert content(self.out) in (content(self.older), self.new)
        status, said, _ = self.world(self.arguments)
        assert status == 0, said
        assert content(self.out) == self.new
        assert [path.name for path in self.out.parent.iterdir()] == [self.out.name]


@pytest.fixture(scope="module", params=COMMANDS)
def case(request: pytest.FixtureRequest, world: World) -> Case:
    def filled(which: int, out: Path) -> list[str]:
        found = []
        for word in COMMANDS[request.param]:
            start, _, rest = word.partition("{")
            choice, _, end = rest.partition("}")
            found.append(start + (choice.split("|")[which] if choice else "") + end)
        return [*found, "--out", str(out.relative_to(world.folder)), "--force"]

    name = request.param.replace(" ", "-")
    out, older = world.folder / "made" / name / "out", world.folder / "older" / name / "out"
    for place, which in ((older, 1), (out, 0), (out, 0)):
        status, said, seconds = world(filled(which, place))
        assert status == 0, said
    assert content(out) != content(older)
    return Case(request.param, world, filled(0, out), out, older, content(out), seconds)


def one_error(said: str) -> bool:
    """Whether a command said what was wrong in a line, and nothing else looks like an error."""
    last = said.rstrip("\n").rpartition("\n")[2].rpartition("\r")[2]
    return "Traceback" not in said and said.count("error: ") == 1 and last.startswith("error: ")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_killed_anywhere(case: Case, number: signal.Signals) -> None:
    draw = random.Random(f"{case.arguments}{number}")
    for _ in range(TRIALS):
        case.again()
        seconds = draw.uniform(0, case.seconds)
        status, said, _ = case.world(case.arguments, signal=number, seconds=seconds)
        if number == signal.SIGTERM and status not in (0, -number):  # before it could listen
            assert status == 128 + number, said
            assert one_error(said), said
            names = {path.name for path in case.out.parent.iterdir()}
            assert names <= {"out", ".out.unfinished"}
        case.check()


def test_no_space_at_each_write(case: Case) -> None:
    """Each write fails in turn: an error, and the older artifact as it was.

    The last one only removes that, and its failure is none. Where trials are few, of most commands
    some writes are drawn; after a few of all the command is run again.
    """
    draw = random.Random(f"{case.arguments}")
    drawn = [draw.randint(1, 60) for _ in range(TRIALS)]
    each = EVERY or case.name in EACH
    for failing in itertools.count(1) if each else sorted({*range(1, TRIALS + 1), *drawn}):
        case.again()
        status, said, _ = case.world(case.arguments, failing=failing)
        if status == 77:  # there was no such write
            break
        if status == 0:
            assert content(case.out) == case.new, said
            assert case.world(case.arguments, failing=failing + 1)[0] == 77
        else:
            assert status == 1, f"write {failing}: {said}"
            assert one_error(said), f"write {failing}: {said}"
            assert case.is_older(), f"write {failing}: {said}"
        if failing in drawn or status == 0:
            case.check()
    assert failing > TRIALS


@pytest.mark.parametrize("limit", [1_000, 5_000, 60_000])
def test_no_file_may_be_larger(case: Case, limit: int) -> None:
    case.again()
    status, said, _ = case.world(case.arguments, limit=limit)
    assert status in (0, 1), said
    assert status == 0 or one_error(said), said
    assert {path.name for path in case.out.parent.iterdir()} <= {"out", ".out.unfinished"}
    case.check()


STAGES = {  # what its script is told, and what it writes, in the order of running
    "fetch_model": ("tiny", ["data/models/tiny"]),
    "fetch_corpus": ("text", ["data/corpora/text"]),
    "fetch_task": ("sums", ["data/tasks/sums"]),
    "train_task": ("tuned", ["data/models/tuned"]),
    "reference": ("tiny", ["data/references/tiny"]),
    "evaluate": ("small", ["results/metrics/small.json", "results/details/small.json"]),
    "speed": ("", ["results/speed.json"]),
    "report": (f"--pipeline {ROOT}/dvc.yaml", ["results/report.html", "results/report.csv"]),
}
SETTINGS: dict[str, Any] = {"windows": 2, "length": 64, "dtype": "float32"}
PROJECT = {
    "seed": 0,
    "models": {"tiny": {"path": "model", "license": "any"}},
    "corpora": {"text": {"path": "texts", "license": "any"}},
    "tasks": {
        "sums": {
            "generator": "arithmetic", "train_items": 8, "test_items": 4, "license": "any",
        },
    },
    "finetuned_models": {
        "tuned": {"base": "tiny", "task": "sums", "steps": 3, "precision": "float32"}
    },
    "runs": {"small": {"model": "tiny", "method": "rtn", "settings": {"bits": 4}}},
    "evaluation": {
        **SETTINGS, "models": ["tiny"], "corpora": ["text"], "sample_tokens": 4, "tasks": {},
        "task_dtype": "float32", "split": "test",
    },
    "speed": {"runs": ["small"], "prefill_tokens": 8, "decode_tokens": 2, "rounds": 1},
}  # fmt: skip


@dataclass
class Stage:
    """A stage of a project whose stages all ran, and what it wrote."""

    world: World
    arguments: list[str]
    outputs: list[Path]
    whole: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def run(self) -> None:
        """Run it undisturbed: from now on this is what it makes, and how long that takes."""
        status, said, self.seconds = self.world(self.arguments)
        assert status == 0, said
        self.whole = self.found()
        assert len(self.whole) == len(self.outputs)

    def found(self) -> dict[str, Any]:
        """What is there, without what differs between two runs; each output has to be whole."""
        return {str(path): self.read(path) for path in self.outputs if path.exists()}

    def read(self, path: Path) -> Any:
        """An output, without what differs between two runs."""
        if path.is_dir():
            verify(path)
            return content(path)
        if path.name == "speed.json":
            return set(Speed.model_validate_json(path.read_text(encoding="utf-8")).runs)
        text = path.read_text(encoding="utf-8")
        return without_times(json.loads(text)) if path.suffix == ".json" else text

    def remove(self) -> None:
        """Leave nothing of what it wrote."""
        for path in self.outputs:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

    def check(self) -> None:
        """What is there is whole; the same stage again makes all of it, and leaves nothing else."""
        assert self.found().items() <= self.whole.items()
        status, said, _ = self.world(self.arguments)
        assert status == 0, said
        assert self.found() == self.whole
        for parent in {path.parent for path in self.outputs}:
            assert not [path for path in parent.iterdir() if path.name.startswith(".")]
        assert not (self.world.folder / "scratch").exists()


@pytest.fixture(scope="module")
def project(world: World) -> dict[str, Stage]:
    """All stages of a project, each run once."""
    texts = world.folder / "texts"
    texts.mkdir()
    for number in range(20):
        (texts / f"{number}.txt").write_text(f"def f{number}(x): return x + {number}\n" * 100)
    (world.folder / "params.yaml").write_text(yaml.safe_dump(PROJECT), encoding="utf-8")
    stages = {}
    for name, (told, outputs) in STAGES.items():
        script = ROOT / f"workflow/scripts/{name}.py"
        paths = [world.folder / output for output in outputs]
        stages[name] = Stage(world, [str(script), *told.split()], paths)
        stages[name].run()
        if name == "fetch_model":
            out = world.folder / "data/compressed/small"
            llmpress.compress_model(paths[0], method="rtn", bits=4, out=out, device="cpu")
    return stages


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_ended_anywhere_leaves_what_is_whole(project: dict[str, Stage], name: str) -> None:
    stage, draw = project[name], random.Random(name)
    stage.run()
    for trial in range(max(2, TRIALS // 2)):
        if trial % 4 < 2:
            stage.remove()
        number = (signal.SIGKILL, signal.SIGTERM)[trial % 2]
        seconds = draw.uniform(0, stage.seconds)
        status, said, _ = stage.world(stage.arguments, signal=number, seconds=seconds)
        if number == signal.SIGTERM and status not in (0, -number):  # before it could listen
            assert status == 128 + number, said
            assert one_error(said), said
        stage.check()


@pytest.mark.parametrize("name", STAGES)
def test_no_space_at_each_write_of_a_stage(project: dict[str, Stage], name: str) -> None:
    stage, draw = project[name], random.Random(name)
    stage.run()
    drawn = [1, *(draw.randint(1, 20) for _ in range(TRIALS // 4))]
    for failing in itertools.count(1) if EVERY else sorted(drawn):
        stage.remove()
        status, said, _ = stage.world(stage.arguments, failing=failing)
        if status == 77:
            break
        assert status == 1, f"write {failing}: {said}"
        assert one_error(said), f"write {failing}: {said}"
        assert stage.found().items() < stage.whole.items()
    stage.check()
