"""Lets Snakemake take stages, inputs, outputs and staleness from dvc.yaml, where all of them stand.

DVC alone decides what is out of date, by content; Snakemake compares times. When the main process
reads the Snakefile, the bridge asks DVC and writes the answer as one *token* file per stage, which
is an input of that stage's job:

- up to date: the token is dated 1970 and every other input is marked ``ancient``, so that no time
  of any file can start the job;
- out of date, itself or something before it: the token is new, in time and in content (Snakemake
  compares checksums of small inputs), and the other inputs are plain.

The jobs call DVC for their one stage (``workflow/scripts/dvc_stage.py``). This file uses internals
of DVC, which is why its version is pinned; tests/workflow/test_agreement.py shows that the two
engines agree.
"""

import contextlib
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo
from dvc.stage import Stage
from snakemake.exceptions import WorkflowError
from snakemake.io import ancient
from snakemake.iocontainers import Wildcards

from progress import note_start

TOKENS = Path(".snakemake") / "dvc"
SNAKEMAKE_LOCKS = Path(".snakemake") / "locks"
# One text for all rules, without anything that varies: a changed text counts as changed code.
COMMAND = "OMP_NUM_THREADS={threads} python workflow/scripts/dvc_stage.py {params.stage:q} {log:q}"


class Bridge:
    """The stages of one project's dvc.yaml, as Snakemake rules want them.

    A stage *group* is a key below ``stages`` in dvc.yaml: a plain stage, or a ``foreach`` over a
    dictionary or a list, whose rule has the one wildcard ``name``.

    Args:
        check_staleness: Ask DVC what is out of date and write the tokens; for the main process
            only, as the jobs of one run must all see the same answer.

    Raises:
        WorkflowError: dvc.yaml, dvc.lock or params.yaml cannot be read.
    """

    def __init__(self, *, check_staleness: bool) -> None:
        self.root = Path.cwd()
        self._stale: set[str] = set()
        try:
            self._repo = Repo(str(self.root), _wait_for_lock=True)
            self._stages: dict[str, Stage] = {s.name: s for s in self._repo.index.stages}
            if check_staleness:
                self._stale = self._find_stale()
        except DvcException as error:
            raise WorkflowError(f"DVC cannot read the pipeline: {error}") from None
        content = yaml.safe_load((self.root / "dvc.yaml").read_text(encoding="utf-8"))
        self._groups: dict[str, dict[str, Any]] = content["stages"]
        if check_staleness:
            self._remove_lock_of_killed_run()
            self._write_tokens()
            note_start(self._stale, self._methods())

    @property
    def groups(self) -> list[str]:
        """The names of all groups, in dvc.yaml's order."""
        return list(self._groups)

    def label(self, group: str) -> str:
        """Return where the group's logs lie below ``logs/``, with ``{name}`` and without suffix."""
        return f"{group}/{{name}}" if "foreach" in self._group(group) else group

    def names(self, group: str) -> str:
        """Return the wildcard constraint of a ``foreach`` group: a regular expression."""
        names = [n.partition("@")[2] for n in self._stages if n.startswith(f"{group}@")]
        return "|".join(map(re.escape, names)) or "(?!)"  # an empty group: nothing matches

    def stage(self, group: str) -> Callable[[Wildcards], str]:
        """Return the function that names a job's stage, such as ``compress@rtn-4bit``."""
        foreach = "foreach" in self._group(group)
        return lambda wildcards: f"{group}@{wildcards.name}" if foreach else group

    def outputs(self, group: str) -> list[str]:
        """Return the paths that a stage of the group makes, with Snakemake's ``{name}`` in them.

        What DVC does not cache lies in Git and is left out: before a job Snakemake removes its
        outputs, and DVC, which restores the others, could not bring such a file back.

        Raises:
            ValueError: The path of an output is not given by its stage's key or item alone.
        """
        definition = self._group(group)
        template = definition.get("do", definition)
        paths = []
        for kind in ("outs", "metrics", "plots"):
            for entry in template.get(kind, []):
                path, flags = next(iter(entry.items())) if isinstance(entry, dict) else (entry, {})
                if flags.get("cache") is False:
                    continue
                paths.append(re.sub(r"\$\{(key|item)\}", "{name}", path))
                if "${" in paths[-1]:
                    raise ValueError(
                        f"dvc.yaml, {group}: output {path!r} must be named by ${{key}}, or in a "
                        "foreach over a list by ${item}"
                    )
        return paths

    def inputs(self, group: str) -> Callable[[Wildcards], list[str]]:
        """Return the input function of the group's rule: what the stage depends on, and its token.

        A dependency on a folder in which other stages put their outputs means all of these.
        """
        stage_name = self.stage(group)

        def paths(wildcards: Wildcards) -> list[str]:
            name = stage_name(wildcards)
            found: list[str] = []
            for dependency in self._stages[name].deps:
                if dependency.protocol == "local" and not _is_params(dependency):
                    found += self._outputs_below(dependency) or [self._relative(dependency)]
            marked = found if name in self._stale else [ancient(path) for path in found]
            return [*marked, str(TOKENS / name)]

        return paths

    def _group(self, group: str) -> dict[str, Any]:
        if group not in self._groups:
            raise ValueError(f"dvc.yaml has no stage {group!r}, only {', '.join(self._groups)}")
        return self._groups[group]

    def _relative(self, output: Output) -> str:
        return os.path.relpath(output.fs_path, self.root)

    def _outputs_below(self, folder: Output) -> list[str]:
        outs = (out for stage in self._stages.values() for out in stage.outs)
        return [self._relative(o) for o in outs if o.fs_path.startswith(folder.fs_path + os.sep)]

    def _find_stale(self) -> set[str]:
        """Return the names of the stages that are out of date, and of all that come after them."""
        graph = self._repo.index.graph  # from each stage to those it depends on
        todo = [stage for stage in self._stages.values() if _is_stale(stage)]
        found: set[str] = set()
        while todo:
            stage = todo.pop()
            if stage.name not in found:
                found.add(stage.name)
                todo += graph.predecessors(stage)
        return found

    def _write_tokens(self) -> None:
        for name in self._stages:
            token = TOKENS / name
            token.write_text(str(time.time_ns()) if name in self._stale else "", encoding="ascii")
            if name not in self._stale:
                os.utime(token, (1, 1))

    def _methods(self) -> dict[str, str]:
        """Return the method of every stage that has one."""
        params = yaml.safe_load((self.root / "params.yaml").read_text(encoding="utf-8"))
        entries = (params.get(section) or {} for section in ("runs", "delta_runs", "finetunes"))
        methods = {key: entry.get("method", "") for part in entries for key, entry in part.items()}
        return {name: methods.get(name.partition("@")[2], "") for name in self._stages}

    def _remove_lock_of_killed_run(self) -> None:
        """Spare the user ``snakemake --unlock`` after a run that was killed or lost its power.

        Every main process shares a file lock, which the kernel releases however the process ends.
        Whoever gets it exclusively is alone: a lock of Snakemake's found then belongs to nobody.
        """
        TOKENS.mkdir(parents=True, exist_ok=True)
        self._alive = (TOKENS / ".alive").open("w", encoding="ascii")  # open until the process ends
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(self._alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for lock in SNAKEMAKE_LOCKS.glob("*.lock"):
                lock.unlink()
        fcntl.flock(self._alive, fcntl.LOCK_SH)


def check_params() -> None:
    """Check params.yaml as every stage does.

    Raises:
        WorkflowError: A mistake, in one line.
    """
    from llmpress.core.errors import ConfigError
    from llmpress.core.params import read_params
    from llmpress.pipeline.params import check_params

    try:
        check_params(read_params(Path("params.yaml")))
    except ConfigError as error:
        raise WorkflowError(str(error)) from None


def _is_params(dependency: Output) -> bool:
    return hasattr(dependency, "params")


def _is_stale(stage: Stage) -> bool:
    """Tell whether DVC would run the stage again or restore an output that was changed.

    Data merely absent because it was never pulled is not stale. ``Stage.changed`` would say so, and
    it takes DVC's locks, which would make reading the Snakefile fail while another run is going on.
    """
    if stage.frozen:
        return False
    if stage.changed_stage() or stage.is_callback or stage.always_changed:
        return True
    for out in stage.outs:
        status = out.workspace_status().get(str(out))
        in_git = not out.use_cache
        if status in ("modified", "new") or (
            status == "deleted" and (in_git or not out.changed_cache())
        ):
            return True
    return any(
        status != "deleted" or _is_params(dependency)
        for dependency in stage.deps
        for status in _leaves(dependency.status())
    )


def _leaves(status: Mapping[str, Any]) -> Iterator[Any]:
    for value in status.values():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            yield value
