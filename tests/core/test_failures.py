"""What stands on the terminal when something goes wrong."""

import contextlib
import errno
import gc
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Never

import pytest
import torch

from llmpress.core.errors import SourceError
from llmpress.core.failures import script_errors
from llmpress.core.progress import progress


def raising(error: BaseException) -> Callable[[], Never]:
    def action() -> Never:
        raise error

    return action


def ended() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def ended_in_compiled_code() -> None:
    try:
        ended()
    except SystemExit:
        raise ValueError("no shape") from None  # as safetensors does


def too_much() -> None:
    torch.empty(10**15)  # torch's own error for a CPU without memory, whatever it is today


def no_package() -> None:
    import a_package_that_nobody_has  # noqa: F401


CASES: dict[str, tuple[Callable[[], None], str, int]] = {
    "signal": (ended, "error: ended by a signal", 143),
    "signal somewhere": (ended_in_compiled_code, "error: ended by a signal", 143),
    "domain": (raising(SourceError("no such\n  model")), "error: no such model\n", 1),
    "value": (raising(ValueError("rank must be positive")), "error: rank must be positive\n", 1),
    "python's memory": (raising(MemoryError()), "error: out of memory: lower windows, length", 1),
    "torch's memory": (too_much, "error: out of memory: lower windows, length or batch_size", 1),
    "gpu memory": (
        raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")),
        "error: out of memory: lower windows, length or batch_size",
        1,
    ),
    "disk": (
        raising(OSError(errno.ENOSPC, "full", "data/x")),
        "error: data/x: no space left on the device; free some",
        1,
    ),
    "permission": (
        raising(PermissionError(errno.EACCES, "no", "data/y")),
        "error: data/y: permission denied; write to a folder that is yours",
        1,
    ),
    "package": (
        no_package,
        "error: package a_package_that_nobody_has is not installed: pip install 'llmpress[work",
        1,
    ),
    "interrupt": (raising(KeyboardInterrupt()), "error: interrupted; the same command", 130),
}


@pytest.mark.parametrize("case", CASES)
def test_a_line_and_an_exit_code(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    action, line, code = CASES[case]
    with pytest.raises(SystemExit) as caught, script_errors():
        action()
    assert caught.value.code == code
    captured = capsys.readouterr()
    said = captured.err.removeprefix("\n")  # the end of a bar's line, where there may be one
    assert said.startswith(line)
    assert said.count("\n") == 1
    assert captured.out == ""


BUGS = [
    KeyError("bug"),
    FileNotFoundError(errno.ENOENT, "gone"),
    RuntimeError("shapes do not match"),
    ModuleNotFoundError("No module named 'llmpress.gone'", name="llmpress.gone"),
]


@pytest.mark.parametrize("error", BUGS, ids=lambda error: type(error).__name__)
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), script_errors():
        raise error


def test_success_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with script_errors():
        pass
    assert capsys.readouterr() == ("", "")


def test_ended_at_any_line_of_a_progress_bar() -> None:
    """A bar that is made, drawn or closed just then does not share its line with the error."""
    for last in range(1, 2000):
        said = io.StringIO()
        lines = 0

        def trace(frame: FrameType, event: str, _: object, last: int = last) -> Any:
            nonlocal lines
            if frame.f_code.co_name == "__del__":  # Python drops what is raised in one
                sys.settrace(None)
            if "tqdm" not in frame.f_code.co_filename:
                return None
            lines += event == "line"
            if event == "line" and lines == last:
                sys.settrace(None)
                ended()
            return trace

        before = sys.gettrace()
        try:
            with contextlib.redirect_stderr(said), script_errors():
                sys.settrace(trace)
                for _ in progress(range(3), "steps"):
                    pass
            break
        except SystemExit:
            pass
        finally:
            sys.settrace(before)
        gc.collect(0)
        assert "Traceback" not in said.getvalue()
        assert said.getvalue().splitlines()[-1].startswith("error: "), (last, said.getvalue())
    assert last > 100
