"""Globs on the paths of files inside a source."""

import re
from collections.abc import Sequence


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether a file's path (with forward slashes) matches one of the globs."""
    return any(_glob_regex(pattern).fullmatch(name) for pattern in patterns)


def _glob_regex(pattern: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", pattern)
    meaning = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(meaning.get(part, re.escape(part)) for part in parts))
