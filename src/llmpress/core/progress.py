"""Progress bars of long computations."""

from typing import Any

from tqdm.auto import tqdm


def progress(items: Any, what: str, total: int | None = None) -> Any:
    """Wrap an iterable in a progress bar on stderr."""
    return tqdm(items, desc=what, total=total, dynamic_ncols=True, mininterval=1.0)
