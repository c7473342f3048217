"""What a job says on the terminal: a line when it starts, one a minute, one when it ends.

All else that it prints stands in its log. The time left is that of the jobs finished so far, scaled
by how long the others take in comparison: as their last run here did, or as the records do that
come with llmpress, or as long as the jobs that are known on the average.
"""

import csv
import json
import re
import resource
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

START = Path(".snakemake") / "dvc" / ".started.json"
FINISHED = START.with_name(".finished")
BENCHMARKS = Path("logs") / "benchmarks"
RECORDS = Path(__file__).parents[1] / "src/llmpress/planning/records.csv"
EVERY = 60.0  # seconds between two lines of a job


def note_start(stages: Iterable[str], methods: Mapping[str, str]) -> None:
    """Note when a run of the workflow starts, and how long its jobs take in comparison.

    Args:
        stages: Names of all stages that are out of date.
        methods: The method of those that have one.
    """
    recorded = _recorded()
    known = {name: _last(name) or recorded(name, methods.get(name, "")) for name in stages}
    usual = statistics.fmean(found) if (found := [s for s in known.values() if s]) else 1.0
    weights = {name: seconds or usual for name, seconds in known.items()}
    START.write_text(json.dumps({"at": time.time(), "weights": weights}), encoding="utf-8")
    FINISHED.unlink(missing_ok=True)


@dataclass
class Job:
    """A job that runs: its exit status."""

    status: int = 1


@contextmanager
def told(stage: str, log: Path, terminal: TextIO) -> Iterator[Job]:
    """Tell of a job while it runs, and of one that failed the last lines of its log.

    Args:
        stage: Its name in DVC.
        log: What it prints.
        terminal: Where to say how far it is.
    """

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')}  {stage}: {text}", file=terminal, flush=True)

    def watch() -> None:
        while not over.wait(EVERY):
            said = last_lines(log, 1)
            say("; ".join([duration(time.time() - started), *said]))

    job, started, over = Job(), time.time(), threading.Event()
    say("starts")
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield job
    finally:
        over.set()
        watcher.join()
    seconds = duration(time.time() - started)
    if job.status:
        say("\n    ".join([f"failed after {seconds}; its log, {log}, ends:", *last_lines(log, 12)]))
    else:
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu = f"{used.ru_utime + used.ru_stime:.0f} s of a processor"
        say(f"done in {seconds}, {cpu}{_left(stage)}")


def duration(seconds: float) -> str:
    """Return a time in words."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def last_lines(log: Path, count: int) -> list[str]:
    """Return the last lines of a log; of each progress bar the last state, without the bar."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 16384))
        text = file.read().decode(errors="replace")
    lines = [line.rstrip("\r").rpartition("\r")[2].strip() for line in text.split("\n")]
    return [re.sub(r"\|.*?\| ", "", line)[:200] for line in lines if line][-count:]


def _left(stage: str) -> str:
    """Note that a job is done, and say how long the others take; nothing if nobody knows."""
    try:
        start = json.loads(START.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    with FINISHED.open("a", encoding="utf-8") as file:
        file.write(f"{stage}\n")
    finished = set(FINISHED.read_text(encoding="utf-8").split())
    weights: dict[str, float] = start["weights"]
    done = sum(seconds for name, seconds in weights.items() if name in finished)
    rest = sum(seconds for name, seconds in weights.items() if name not in finished)
    if not done or not rest:
        return ""
    elapsed = time.time() - start["at"]
    todo = len(weights.keys() - finished)
    return f"; {todo} of {len(weights)} jobs left, some {duration(elapsed * rest / done)}"


def _last(stage: str) -> float | None:
    """Return the seconds of a stage's last run here."""
    file = BENCHMARKS / f"{stage.replace('@', '/')}.tsv"
    try:
        return float(file.read_text(encoding="utf-8").splitlines()[1].split()[0])
    except (OSError, LookupError, ValueError):
        return None


def _recorded() -> Callable[[str, str], float | None]:
    """Return the function that looks up seconds by stage and method."""
    seconds: dict[tuple[str, ...], list[float]] = {}
    if RECORDS.is_file():
        with RECORDS.open(encoding="utf-8", newline="") as lines:
            for row in csv.DictReader(lines):
                for key in ((row["stage"], row["method"]), (row["stage"],)):
                    seconds.setdefault(key, []).append(float(row["seconds"]))

    def look(name: str, method: str) -> float | None:
        verb = re.split("[@_]", name)[0]  # evaluate of evaluate_delta@x
        found = seconds.get((verb, method)) or seconds.get((verb,))
        return statistics.median(found) if found else None

    return look
