"""What a user sees when something goes wrong: one line and an exit code, never a traceback.

A mistake or a limit of the machine becomes a line that names the thing and the remedy; a bug of
llmpress keeps its traceback.
"""

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from llmpress.core.errors import LLMPressError

DISK_ERRORS = {
    errno.ENOSPC: "no space left on the device; free some, or write to another disk",
    errno.EDQUOT: "the disk quota is used up; free some, or write to another disk",
    errno.EFBIG: "larger than files may be here (ulimit -f, or the file system)",
    errno.EACCES: "permission denied; write to a folder that is yours, or change its mode",
    errno.EPERM: "operation not permitted; write to a folder that is yours",
    errno.EROFS: "the file system is read-only; write to another folder",
    errno.ENOTDIR: "a file is where a folder is needed; choose another name",
    errno.EISDIR: "a folder is where a file is needed; choose another name",
    errno.EEXIST: "exists and is no folder; choose another name",
    errno.ENAMETOOLONG: "the name is too long for this file system",
}
OUT_OF_MEMORY = (
    "out of memory: lower windows, length or batch_size, evaluate fewer windows, or take a smaller "
    "model; `llmpress plan` says what each run needs"
)
EXTRAS = {
    **dict.fromkeys(("bitsandbytes", "peft"), "adapters"),
    **dict.fromkeys(("fastapi", "prometheus_client", "starlette", "uvicorn"), "serve"),
}
"""The extra that a package is in; all others are the workflow's."""
MEMORY_SIGNS = ("out of memory", "can't allocate memory", "Cannot allocate memory")
INTERRUPTED = 130  # 128 + SIGINT, as shells have it
SIGNALS = (signal.SIGTERM, signal.SIGHUP)
ENDED = tuple(128 + number for number in SIGNALS)


@contextmanager
def script_errors() -> Iterator[None]:
    """Turn what a user can act on into one line on stderr and exit code 1; let bugs through."""
    code = 1
    try:
        with _ended_by_signals():
            yield
    except SystemExit as end:
        if end.code not in ENDED:
            raise
        message, code = "ended by a signal; the same command continues where it stopped", end.code
    except (LLMPressError, ValueError) as error:
        message = one_line(error)
    except MemoryError:
        message = OUT_OF_MEMORY
    except RuntimeError as error:  # torch has no class of its own for a CPU without memory
        if not any(sign in str(error) for sign in MEMORY_SIGNS):
            raise
        message = OUT_OF_MEMORY
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        message = f"{error.filename or 'writing failed'}: {DISK_ERRORS[error.errno]}"
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("", "llmpress"):
            raise
        extra = EXTRAS.get(package, "workflow")
        message = f"package {package} is not installed: pip install 'llmpress[{extra}]'"
    except KeyboardInterrupt:
        message = "interrupted; the same command continues after the last finished block"
        code = INTERRUPTED
    else:
        return
    _end_bars(at_once=code != 1)
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(code)


def _end_bars(at_once: bool) -> None:
    """End the lines of progress bars, so that an error has one of its own.

    A signal may have come while a bar was made, drawn or closed: such a one cannot be closed.
    """
    if (bars := sys.modules.get("tqdm.std")) is None:
        return
    for bar in list(getattr(bars.tqdm, "_instances", ())):
        if at_once:
            bar.disable = True
        else:
            bar.close()
    if at_once:
        sys.stderr.write("\n")


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Let SIGTERM, and SIGHUP where nobody ignores it, end a process as an error does.

    What is half-written is removed then, what is kept for a rerun stays.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    ended: list[int] = []

    def end(number: int, _: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # while it cleans up
        ended.append(128 + number)
        raise SystemExit(128 + number)

    taken = [n for n in SIGNALS if signal.getsignal(n) is signal.SIG_DFL]
    for number in taken:
        signal.signal(number, end)
    try:
        yield
    except Exception:
        if ended:  # compiled code made an error of its own of it
            raise SystemExit(ended[0]) from None
        raise
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
