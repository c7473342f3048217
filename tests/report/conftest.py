from pathlib import Path

import pytest
from report_project import Project, make_project


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """Results of a whole project, every run present."""
    return make_project(tmp_path / "results")
