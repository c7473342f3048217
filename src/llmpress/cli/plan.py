"""``llmpress plan``: memory, disk and time before anything runs."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmpress.cli.options import AsJson, Bits, Set

if TYPE_CHECKING:
    from llmpress.planning.plan import Plan, PlanRow

DOES_NOT_FIT = 3

Names = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[RUN]...",
        help="Runs, delta runs, finetunes or models of params.yaml; all of them by default.",
    ),
]
Params = Annotated[Path, typer.Option(help="The file of settings.")]
PlannedModel = Annotated[
    Path | None,
    typer.Option(
        help="What --method compresses: a model folder or a config.json, weights are not needed."
    ),
]
PlannedMethod = Annotated[
    str | None,
    typer.Option("--method", "-m", help="Plan one compression of --model, without params.yaml."),
]


def plan(
    names: Names = None,
    params: Params = Path("params.yaml"),
    model: PlannedModel = None,
    method: PlannedMethod = None,
    bits: Bits = None,
    set_: Set = None,
    as_json: AsJson = False,
) -> None:
    """Say what each stage will need in memory, disk and time, and whether it fits this machine.

    Bytes are counted from the model's shapes. Times are those of the records that llmpress comes
    with, scaled by work. The last column says on which machine, and how many times the work.

    Exit codes: 0 when everything fits, 3 when something does not, 1 for a mistake.

    Example: llmpress plan --model my-llama/config.json --method cluscomp --set bits=2.6
    """
    from llmpress.cli.options import chosen_method, quiet
    from llmpress.cli.output import print_json
    from llmpress.core.errors import ConfigError
    from llmpress.core.params import read_params
    from llmpress.planning import measure_machine, plan_compression, plan_project, read_shapes

    quiet()
    if method is not None:
        if model is None:
            raise ConfigError("--method needs a --model: a model folder or a config.json")
        if names:
            raise ConfigError("--method plans one compression: leave the names of runs out")
        name, shapes = model.parent.name if model.is_file() else model.name, read_shapes(model)
        made = plan_compression(name, chosen_method(method, bits, set_), shapes, measure_machine())
    elif set_ or bits is not None or model is not None:
        raise ConfigError("--model, --set and --bits need a --method; runs have theirs")
    else:
        content, beside = read_params(params), params.absolute().parent
        root = beside if (beside / "dvc.yaml").is_file() else Path()
        made = plan_project(content, measure_machine(root), names=names or (), root=root)
    if as_json:
        print_json(asdict(made))
    else:
        _print_plan(made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _print_plan(plan: "Plan") -> None:
    from llmpress.cli.output import bytes_text as size
    from llmpress.cli.output import console, print_facts, print_table

    machine, rows = plan.machine, [_cells(row) for row in plan.rows]
    if not machine.gpu:
        rows = [{name: cell for name, cell in row.items() if name != "GPU memory"} for row in rows]
    print_table("plan", list(rows[0]), [list(row.values()) for row in rows])
    known = [row for row in plan.rows if row.need]
    basis = Counter(row.time.machine if row.time else "" for row in known)
    without = basis.pop("", 0)
    rests = [f"{count} by records of {name}" for name, count in basis.items()]
    rests += [f"{without} without a record"] if without else []
    peak, available = size(plan.memory_bytes), size(machine.memory_available_bytes)
    missing, free = size(plan.disk_missing_bytes), size(machine.disk_free_bytes)
    gpu, gpu_free = size(plan.device_memory_bytes), size(machine.device_memory_free_bytes)
    facts = [
        ("memory", f"{peak} at the peak of one stage; {available} available"),
        ("disk", f"{size(plan.disk_bytes)} in all, {missing} still to be written; {free} free"),
        ("time", f"{duration_text(plan.seconds)} one stage after another; {', '.join(rests)}"),
        ("GPU memory", f"{gpu} at the peak; {gpu_free} free"),
    ]
    print_facts("total", facts if machine.gpu else facts[:-1])
    lines = [f"{row.stage} {row.name}: {text}" for row in plan.rows for text in row.problems]
    for line in [*lines, *plan.problems]:
        console().print(line)


def _cells(row: "PlanRow") -> dict[str, str]:
    from llmpress.cli.output import bytes_text

    need, time = row.need, row.time
    by = "no record" if need else ""
    if time:
        by = f"{time.machine}, ×{time.factor:.{0 if time.factor > 10 else 1}f}"
    fits = "NO" if row.problems else "yes, made" if row.present else "yes"
    return {
        "stage": row.stage,
        "name": row.name,
        "memory": bytes_text(need.host_bytes) if need else "—",
        "GPU memory": bytes_text(need.device_bytes) if need else "—",
        "disk": bytes_text(need.artifact_bytes) if need else "—",
        "fits": fits if need else "unknown",
        "time": duration_text(time.seconds) if time else "—",
        "by the record of": by,
    }


def duration_text(seconds: float) -> str:
    """Return seconds in the unit that suits them: ``3 min``."""
    units = {"days": 86400, "h": 3600, "min": 60, "s": 1}
    unit = next((name for name, size in units.items() if seconds >= 2 * size), "s")
    value = seconds / units[unit]
    return f"{value:.0f} {unit}" if value >= 9.5 else f"{value:.2g} {unit}"
