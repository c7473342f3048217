"""``llmpress plan``: memory, disk and time before anything runs."""

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

    Bytes are counted from the model's shapes. Times are estimates from the speed of this machine at
    this moment, with as many threads as OMP_NUM_THREADS says; expect a factor of two.

    Exit codes: 0 when everything fits, 3 when something does not, 1 for a mistake.

    Example: llmpress plan --model my-llama/config.json --method cluscomp --set bits=2.6
    """
    from llmpress.cli.options import method_settings, quiet
    from llmpress.cli.output import print_json
    from llmpress.core.errors import ConfigError
    from llmpress.core.params import read_params
    from llmpress.planning import measure_machine, plan_compression, plan_project, read_shapes

    quiet()
    shapes = None if model is None else read_shapes(model)
    if method is not None:
        if shapes is None or model is None:
            raise ConfigError("--method needs a --model: a model folder or a config.json")
        if names:
            raise ConfigError("--method plans one compression: leave the names of runs out")
        settings = method_settings(method, bits, set_)
        name = model.parent.name if model.is_file() else model.name
        made = plan_compression(shapes, name, settings, measure_machine())
    elif set_ or bits is not None:
        raise ConfigError("--set and --bits need a --method; runs have theirs in params.yaml")
    else:
        content = read_params(params)
        root = params.absolute().parent
        made = plan_project(
            content, measure_machine(root), names=names or (), model=shapes, root=root
        )
    if as_json:
        print_json(made.as_dict())
    else:
        _print_plan(made)
    if not made.fits:
        raise typer.Exit(DOES_NOT_FIT)


def _print_plan(plan: "Plan") -> None:
    from llmpress.cli.output import bytes_text, console, print_facts, print_table

    on_device = plan.machine.device != "cpu"
    columns = ["stage", "name", "memory", *(["GPU memory"] if on_device else []), "disk", "time"]
    print_table("plan", [*columns, "fits"], [_cells(row, on_device=on_device) for row in plan.rows])
    machine = plan.machine
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
        (
            "time",
            f"{duration_text(plan.seconds_low, plan.seconds_high)} one stage after another, "
            f"estimated for {machine.device}, {machine.threads} threads, as fast as now",
        ),
    ]
    if machine.device_memory_free_bytes is not None:
        facts.append(
            (
                "GPU memory",
                f"{bytes_text(plan.device_memory_bytes)} at the peak; "
                f"{bytes_text(machine.device_memory_free_bytes)} free",
            )
        )
    print_facts("total", facts)
    lines = [f"{row.stage} {row.name}: {row.unknown}" for row in plan.rows if row.unknown]
    lines += [f"{row.stage} {row.name}: {text}" for row in plan.rows for text in row.problems]
    for line in [*lines, *plan.problems]:
        console().print(line)


def _cells(row: "PlanRow", *, on_device: bool) -> list[str]:
    from llmpress.cli.output import bytes_text

    if row.unknown:
        return [row.stage, row.name, *["—"] * (3 + on_device), "unknown"]
    disk = bytes_text(row.disk_bytes)
    if row.scratch_bytes:
        disk += f" + {bytes_text(row.scratch_bytes)} scratch"
    return [
        row.stage,
        row.name,
        bytes_text(row.memory_bytes),
        *([bytes_text(row.device_memory_bytes)] if on_device else []),
        disk,
        duration_text(row.seconds_low, row.seconds_high),
        ("yes, made" if row.present else "yes") if row.fits else "NO",
    ]


def duration_text(low: float, high: float) -> str:
    """Return a range of seconds in the unit that suits its upper end, ``2-5 min``."""
    unit, size = next(
        (name, seconds)
        for name, seconds in (("days", 86400), ("h", 3600), ("min", 60), ("s", 1))
        if high >= 2 * seconds or seconds == 1
    )
    return f"{_short(low / size)}-{_short(high / size)} {unit}"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 9.5 else f"{value:.1f}".removesuffix(".0")
