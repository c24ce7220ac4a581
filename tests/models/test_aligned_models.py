"""An aligned model that another version wrote, or that is damaged: one line from every command that reads it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignx_ds import cli
from alignx_ds.errors import ConfigError
from alignx_ds.models.backbone import load_aligned
from alignx_ds.runs import manifest

pytestmark = pytest.mark.usefixtures("no_launcher")
WEIGHTS = "model.safetensors"


@pytest.fixture
def model(saved_aligned: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_aligned, tmp_path / "model"))


def set_gate(directory: Path, **values: Any) -> None:
    content = json.loads((directory / "config.json").read_text())
    content["gate"] |= values
    (directory / "config.json").write_text(json.dumps(content))


def spoil(directory: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


NORM = "backbone.model.norm.weight"
SPOILED: dict[str, tuple[Callable[[Path], None], str]] = {
    "an outdated setting": (lambda d: set_gate(d, mixing="soft"), "unexpected keyword argument 'mixing'"),
    "a setting of another type": (lambda d: set_gate(d, natural={}), "gate.natural is {}"),
    "a setting out of bounds": (lambda d: set_gate(d, scope="nowhere"), "gate.scope: got 'nowhere'"),
    "another size": (lambda d: set_gate(d, latent=7), "as its config.json says, like"),
    "a weight missing": (lambda d: spoil(d, lambda w: w.pop(NORM)), f"it lacks {NORM}"),
    "a weight too many": (lambda d: spoil(d, lambda w: w.update(x=torch.ones(1))), "it holds x"),
    "not a number": (lambda d: spoil(d, lambda w: w[NORM].fill_(float("nan"))), f"{NORM} holds NaN"),
    "a pointer": (
        lambda d: (d / WEIGHTS).write_text("version https://git-lfs.github.com/spec/v1\n"),
        "Git LFS pointer",
    ),
}


@pytest.mark.parametrize("kind", SPOILED)
def test_it_is_refused_in_one_line(model: Path, kind: str) -> None:
    change, said = SPOILED[kind]
    change(model)
    with pytest.raises(ConfigError) as refused:
        load_aligned(model)
    assert said in str(refused.value) and str(refused.value).isprintable()
    if kind != "a pointer":
        assert "run `alignx-ds align` again" in str(refused.value)


def test_every_command_that_reads_it_says_so(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Path(shutil.copytree(finished_run, tmp_path / "run"))
    set_gate(run / "model", mixing="soft")
    content = json.loads((run / "model" / manifest.NAME).read_text())
    content["files"]["config.json"] = manifest.file_hash(run / "model" / "config.json")
    (run / "model" / manifest.NAME).write_text(manifest.sealed({k: v for k, v in content.items() if k != "digest"}))
    commands = (
        ["generate", str(run / "model"), "hello"],
        ["answer", str(run / "model"), "world", "--schema", "plain", "--out", str(tmp_path / "a.jsonl"), "--rows", "1"],
        ["export", "hf", str(run), str(tmp_path / "out")],
        ["explain", str(run), "hello"],
    )
    for command in commands:
        assert cli.main(command) == 2, command
        (line,) = capsys.readouterr().err.splitlines()
        assert "unexpected keyword argument 'mixing'" in line and "run `alignx-ds align` again" in line
