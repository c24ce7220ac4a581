"""launch/fetch_smollm2.py where it can't do its work: one line that says why, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[2] / "launch/fetch_smollm2.py"


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fetch_smollm2", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_directory_with_something_in_it_is_left_alone(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").write_text("mine")
    assert script.main([str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("alignx-ds: error: OUT:") and said.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_what_pip_says_is_the_error(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[list[str]] = []

    def refused(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "a retry\nERROR: the hashes do not match\nand how to go on\n"
        )

    monkeypatch.setattr(subprocess, "run", refused)
    assert script.main([str(tmp_path / "new")]) == 2
    said = capsys.readouterr().err
    assert "ERROR: the hashes do not match" in said and said.count("\n") == 1
    assert {"--no-deps", "--require-hashes"} <= set(asked[0])
    assert not list(tmp_path.iterdir())
