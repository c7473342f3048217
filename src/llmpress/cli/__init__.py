"""The command ``llmpress``: the library without the workflow, one file per command.

Commands import what they need when they run, so that ``llmpress --help`` answers at once.

May import from core up to report.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from llmpress.cli import (
    calibrate,
    compare,
    compress,
    delta,
    doctor,
    export,
    finetune,
    generate,
    hub,
    inspect,
    serve,
)
from llmpress.cli import methods as methods_command
from llmpress.cli import plan as plan_command
from llmpress.cli import report as report_command
from llmpress.core.failures import INTERRUPTED, script_errors

app = typer.Typer(
    name="llmpress",
    help="Compress large language models and their fine-tuning deltas, and measure what was lost.",
    epilog="Exit codes: 0 done, 1 an error that the last line explains, 2 a wrong command line, "
    "3 a plan that does not fit.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(compress.compress)
app.command()(calibrate.calibrate)
app.command()(finetune.finetune)
app.command()(inspect.inspect)
app.command()(generate.generate)
app.command()(serve.serve)
app.command()(compare.compare)
app.command()(export.export)
app.command()(plan_command.plan)
app.command()(report_command.report)
app.command()(methods_command.methods)
app.command()(doctor.doctor)
app.add_typer(delta.app, name="delta")
app.add_typer(hub.app, name="hub")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"llmpress {version('llmpress')}")
        raise typer.Exit


@app.callback()
def _main(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version and exit."
        ),
    ] = False,
) -> None:
    """Compress large language models and their fine-tuning deltas, and measure what was lost."""


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 1."""
    with script_errors():
        try:
            app()
        except SystemExit as done:
            if done.code == INTERRUPTED:  # typer has caught the interrupt, and says nothing
                raise KeyboardInterrupt from None
            raise
