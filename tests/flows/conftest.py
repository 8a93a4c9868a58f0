from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from toy import openrft, write_toy


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, subprocess.CompletedProcess[str]]:
    """(job folder, home, the finished `openrft run --json`), shared by all tests that only look."""
    base = tmp_path_factory.mktemp("toy")
    folder, home = write_toy(base / "job"), base / "home"
    return folder, home, openrft("run", str(folder), "--json", home=home)
