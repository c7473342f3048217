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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_artifacts import content, without_times

import llmpress
from llmpress.core.artifacts import verify

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
from llmpress.cli import main

class Writes:
    def __init__(self, folder, failing):
        self.folder, self.failing, self.count = os.path.join(folder, "made"), failing, 0
    def one(self, path):
        if str(path).startswith((self.folder, "made/")):
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


@pytest.fixture(scope="module")
def evaluation(world: World) -> list[str]:
    """A project with one run, and the arguments that evaluate it."""
    data = world.folder / "data"
    shutil.copytree(world.folder / "model", data / "models/tiny")
    shutil.copytree(world.folder / "packed", data / "compressed/small")
    settings = {"windows": 2, "length": 64, "dtype": "float32"}
    llmpress.make_reference(
        data / "models/tiny", text=[world.folder / "text.txt"], out=data / "references/tiny",
        **settings,
    )  # fmt: skip
    evaluation = {"models": ["tiny"], "corpora": ["text"], "sample_tokens": 4, **settings}
    evaluation |= {"task_dtype": "float32", "split": "test"}
    run = {"model": "tiny", "method": "cluscomp", "settings": {}}
    params = {"runs": {"small": run}, "evaluation": {**evaluation, "tasks": {}}}
    (world.folder / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
    return [str(Path(__file__).parents[1] / "workflow/scripts/evaluate.py"), "small"]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=["kill", "term"])
def test_an_evaluation_ended_anywhere_leaves_whole_numbers(
    world: World, evaluation: list[str], number: signal.Signals
) -> None:
    results = world.folder / "results"

    def found() -> dict[str, Any]:
        files = [path for path in results.rglob("*") if path.is_file()]
        read = {path.parent.name: json.loads(path.read_text(encoding="utf-8")) for path in files}
        assert len(read) == len(files)
        return {name: without_times(record) for name, record in read.items()}

    status, said, seconds = world(evaluation)
    assert status == 0, said
    whole = found()
    assert whole.keys() == {"metrics", "details"}
    draw = random.Random(f"{number}")
    for trial in range(TRIALS):
        if trial % 2:
            shutil.rmtree(results)
        status, said, _ = world(evaluation, signal=number, seconds=draw.uniform(0, seconds))
        if number == signal.SIGTERM and status not in (0, -number):
            assert status == 128 + number, said
            assert one_error(said), said
        left = found()
        assert left.items() <= whole.items()
        status, said, _ = world(evaluation)
        assert status == 0, said
        assert found() == whole
