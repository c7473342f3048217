"""``llmpress plan``: memory, disk and time before anything runs."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmpress.cli.options import AsJson, Bits, Set

if TYPE_CHECKING:
    from llmpress.planning import Plan, PlanRow

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
        help="A model folder or a config.json: stands for every model of params.yaml, or is what "
        "--method compresses. Weights are not needed."
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

    Bytes are counted from the model's shapes. Times are those of finished stages, scaled by work:
    this project's, or the records that llmpress comes with. The last column says whose they are.

    Exit codes: 0 when everything fits, 3 when something does not, 1 for a mistake.

    Example: llmpress plan --model my-llama/config.json --method cluscomp --set bits=2.6
    """
    from llmpress.cli.options import chosen_method, quiet
    from llmpress.cli.output import print_json
    from llmpress.core.errors import ConfigError
    from llmpress.core.params import read_params
    from llmpress.planning import measure_machine, plan_project, read_shapes

    quiet()
    shapes = None if model is None else read_shapes(model)
    if method is not None:
        if shapes is None or model is None:
            raise ConfigError("--method needs a --model: a model folder or a config.json")
        if names:
            raise ConfigError("--method plans one compression: leave the names of runs out")
        name = model.parent.name if model.is_file() else model.name
        settings = asdict(chosen_method(method, bits, set_))
        run = {"model": name, "method": method, "settings": settings}
        made = plan_project({"runs": {name: run}}, measure_machine(), model=shapes)
    elif set_ or bits is not None:
        raise ConfigError("--set and --bits need a --method; runs have theirs in params.yaml")
    else:
        content = read_params(params)
        root = params.absolute().parent
        made = plan_project(
            content, measure_machine(root), names=names or (), model=shapes, root=root
        )
    if as_json:
        print_json(asdict(made))
    else:
        _print_plan(made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _print_plan(plan: "Plan") -> None:
    from llmpress.cli.output import bytes_text, console, print_facts, print_table

    machine = plan.machine
    columns = ["stage", "name", "memory", *(["GPU memory"] if machine.gpu else []), "disk"]
    rows = [_cells(row, on_gpu=bool(machine.gpu)) for row in plan.rows]
    print_table("plan", [*columns, "fits", "time", "by records"], rows)
    facts = [
        (
            "memory",
            f"{bytes_text(plan.memory_bytes)} at the peak of one stage; "
            f"{bytes_text(machine.memory_available_bytes)} available",
        ),
        (
            "disk",
            f"{bytes_text(plan.disk_bytes)} in all, {bytes_text(plan.disk_missing_bytes)} "
            f"still to be written; {bytes_text(machine.disk_free_bytes)} free",
        ),
        ("time", f"{duration_text(plan.seconds)} one stage after another, {_basis(plan)}"),
    ]
    if machine.gpu:
        facts.append(
            (
                "GPU memory",
                f"{bytes_text(plan.device_memory_bytes)} at the peak; "
                f"{bytes_text(machine.device_memory_free_bytes)} free",
            )
        )
    print_facts("total", facts)
    lines = [f"{row.stage} {row.name}: {text}" for row in plan.rows for text in row.problems]
    for line in [*lines, *plan.problems]:
        console().print(line)


def _cells(row: "PlanRow", *, on_gpu: bool) -> list[str]:
    from llmpress.cli.output import bytes_text

    if row.need is None:
        return [row.stage, row.name, *["—"] * (2 + on_gpu), "unknown", "—", ""]
    time = row.time
    return [
        row.stage,
        row.name,
        bytes_text(row.need.host_bytes),
        *([bytes_text(row.need.device_bytes)] if on_gpu else []),
        bytes_text(row.need.artifact.num_bytes),
        "NO" if row.problems else "yes, made" if row.present else "yes",
        duration_text(time.seconds, time.low, time.high) if time else "—",
        time.basis if time else "no record",
    ]


def _basis(plan: "Plan") -> str:
    """Return what the total rests on."""
    rows = [row for row in plan.rows if row.need]
    counts = Counter(row.time.machine for row in rows if row.time)
    text = ", ".join(f"{count} by records of {name}" for name, count in counts.items())
    untimed = sum(not row.time for row in rows)
    return text + (f"; without {untimed} that have no record" if untimed else "")


def duration_text(seconds: float, low: float | None = None, high: float | None = None) -> str:
    """Return seconds in the unit that suits them, and their range: ``3 min (2-5)``."""
    unit, size = next(
        (name, size)
        for name, size in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
        if seconds >= 2 * size or size == 1
    )
    value, *ends = (_short(x / size) for x in (seconds, low, high) if x is not None)
    return f"{value} {unit}" + (f" ({'-'.join(ends)})" if len(set(ends)) > 1 else "")


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}".removesuffix(".0")
