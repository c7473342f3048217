"""Why a name in params.yaml has no result: which stage has not finished, and what its log says.

The stages, their inputs and outputs are taken from dvc.yaml, the logs are where the Snakemake rules
put them. All of it is looked at for missing results only, so complete results give the same report
whatever else lies around; without dvc.yaml or logs less is said.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmpress.pipeline.jobs import Job, read_jobs
from llmpress.report.grid import Grid

MAX_ERROR = 400  # characters
ERROR_LINES = (  # the first pattern that the log holds; of several such lines the last
    r"error: .+",
    r"(?:[\w.]*(?:Error|Exception|Interrupt)|Killed)\b.*",
    r"ERROR: .+",
)


def find_gaps(
    missing: Mapping[str, str],
    params: Mapping[str, Any],
    pipeline: Path | None = None,
    logs: Path | None = None,
) -> Grid:
    """Return a row for each unfinished stage that a missing result waits for: name, stage, why.

    Args:
        missing: Name -> that there is no metrics file.
        params: Content of params.yaml.
        pipeline: dvc.yaml; its folder is where artifacts are looked for.
        logs: Folder of ``<stage>/<name>.log``.
    """
    jobs = read_jobs(pipeline, params) if pipeline and missing else []
    root = pipeline.parent if pipeline else Path()
    rows: list[tuple[str, str, str]] = []
    for name, reason in missing.items():
        waits = [
            culprit
            for job in jobs
            if any(Path(output).name == f"{name}.json" for output in job.outputs)
            for culprit in _culprits(job, jobs, root)
        ]
        why = [(name, str(job), _why(job, root, logs)) for job in dict.fromkeys(waits)]
        rows += why or [(name, "unknown", reason)]
    caption = "Names in params.yaml without a result, and the stages they wait for"
    return Grid("No result", caption, ["Name", "Unfinished stage", "Why"], rows)


def last_error(text: str) -> str:
    """Return the last line of a log that tells an error; empty when none does."""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text)]  # progress bars return
    for pattern in ERROR_LINES:
        for line in reversed(lines):
            if re.fullmatch(pattern, line):
                return line if len(line) <= MAX_ERROR else f"{line[:MAX_ERROR]}…"
    return ""


def _culprits(job: Job, jobs: Sequence[Job], root: Path) -> list[Job]:
    """Return the first unfinished stages among those that the job needs, else the job itself."""
    found = [
        culprit
        for other in jobs
        if job.reads(other) and _absent(other, root)
        for culprit in _culprits(other, jobs, root)
    ]
    return found or [job]


def _absent(job: Job, root: Path) -> list[str]:
    return [output for output in job.outputs if not (root / output).exists()]


def _why(job: Job, root: Path, logs: Path | None) -> str:
    """Return which outputs of a stage are missing, and what its log says."""
    missing = f"Missing: {', '.join(_absent(job, root) or job.outputs)}."
    if logs is None:
        return missing
    path = logs / job.stage / f"{job.key}.log"
    if not path.is_file():
        return (
            f"{missing} There is no {path}: the stage has not started, or ran outside of Snakemake."
        )
    error = last_error(path.read_text(encoding="utf-8", errors="replace"))
    if not error:
        return f"{missing} {path} holds no error: the stage is running or was stopped."
    return f"{missing} {path} ends with this error: {error}"
