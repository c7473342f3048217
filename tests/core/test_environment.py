"""What a computation ran on."""

from pathlib import Path

import pytest

from llmpress.core.environment import available_memory_bytes


def test_a_container_limits_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmpress.core.environment.CGROUP", tmp_path)
    (tmp_path / "memory.current").write_text("300\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory_bytes() > 10**6

    (tmp_path / "memory.max").write_text("1000\n")
    assert available_memory_bytes() == 700
