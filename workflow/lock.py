"""Write the installed versions into requirements.lock and requirements-dev.lock.

The first has what the pipeline needs, llmpress with its extra `workflow`, the second what tests,
checks and the documentation need beside it. A local version such as torch's +cpu belongs to one
machine's index and is cut off.
"""

import re
from importlib.metadata import distributions, requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
NOT_LOCKED = {"pip", "llmpress"}
HEADER = "# {}: from 'make lock'. To change: .venv/bin/pip install NAME==VERSION && make lock\n"


def needed(*roots: str) -> set[str]:
    """Return the canonical names of all installed packages that requirements lead to."""
    todo = [Requirement(root) for root in roots]
    seen: set[tuple[str, str]] = set()
    installed = {canonicalize_name(d.metadata["Name"]) for d in distributions()}
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if name in installed and (name, extra) not in seen:
                seen.add((name, extra))
                found = map(Requirement, requires(name) or ())
                todo += [r for r in found if not r.marker or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in seen}


def locks() -> dict[str, str]:
    """Return the text of both files by name."""
    pipeline = needed("llmpress[workflow]", "setuptools")
    text = {
        "requirements.lock": HEADER.format("What the pipeline needs"),
        "requirements-dev.lock": HEADER.format(
            "What tests, checks and documentation need beside it"
        ),
    }
    pins = {canonicalize_name(d.metadata["Name"]): d for d in distributions()}
    for name, found in sorted(pins.items(), key=lambda pin: pin[1].metadata["Name"].upper()):
        if name not in NOT_LOCKED:
            file = "requirements.lock" if name in pipeline else "requirements-dev.lock"
            version = re.sub(r"\+.*", "", found.version)
            text[file] += f"{found.metadata['Name']}=={version}\n"
    return text


if __name__ == "__main__":
    for name, text in locks().items():
        (ROOT / name).write_text(text, encoding="utf-8")
