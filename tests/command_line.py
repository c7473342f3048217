"""Run the command line inside the test's process."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from typing import Any
from unittest import mock

from llmpress.cli import main


@dataclass(frozen=True)
class Done:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """Standard output, which has to be JSON and nothing else."""
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line that a failed command ends with; nothing else may look like an error."""
        assert self.code == 1, (self.code, self.out, self.err)
        assert "Traceback" not in self.err
        assert self.err.count("error: ") == 1, self.err
        last = self.err.rstrip("\n").rpartition("\n")[2]
        assert last.startswith("error: "), self.err
        return last


def llmpress(*arguments: object, stdin: str = "") -> Done:
    """Run ``llmpress ARGUMENTS``."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["llmpress", *(str(argument) for argument in arguments)]
    code = 0
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", argv),
        mock.patch.object(sys, "stdin", io.StringIO(stdin)),
    ):
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return Done(code, out.getvalue(), err.getvalue())
