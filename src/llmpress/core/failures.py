"""What a user sees when something goes wrong: one line and an exit code, never a traceback.

A mistake or a limit of the machine becomes a line that names the thing and the remedy; a bug of
llmpress keeps its traceback.
"""

import errno
import sys
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
MEMORY_SIGNS = ("out of memory", "can't allocate memory", "Cannot allocate memory")
INTERRUPTED = 130  # 128 + SIGINT, as shells have it


@contextmanager
def script_errors() -> Iterator[None]:
    """Turn what a user can act on into one line on stderr and exit code 1; let bugs through."""
    code = 1
    try:
        yield
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
        extra = "adapters" if package in ("bitsandbytes", "peft") else "workflow"
        message = f"package {package} is not installed: pip install 'llmpress[{extra}]'"
    except KeyboardInterrupt:
        message = "interrupted; the same command continues after the last finished block"
        code = INTERRUPTED
    else:
        return
    sys.stderr.write(f"error: {message}\n")
    raise SystemExit(code)


def one_line(error: BaseException) -> str:
    """Return an error's message without line breaks."""
    return " ".join(str(error).split()) or type(error).__name__
