"""`alignx-ds explain`: what it prints and writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from constructed_runs import LAYERS, PROMPTS
from processes import alignx_ds
from safetensors.torch import load_file, save_file

from alignx_ds import cli
from alignx_ds.models.finished import aligned_of, tokenizer_of
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.study.explain import plot, text
from alignx_ds.study.explain.choices import choices

HOSTILE = "what [bold]colour[/bold] $x_$ <b> \x1b[31m"
Snapshot = Callable[[Path], dict[str, bytes | None]]


def test_it_is_printed_and_plotted(
    copied: Path, capsys: pytest.CaptureFixture[str], snapshot: Callable[[Path], dict[str, bytes | None]]
) -> None:
    before = snapshot(copied)
    assert cli.main(["explain", str(copied), PROMPTS[0], HOSTILE]) == 0
    printed = capsys.readouterr().out
    assert "Gate of layer 3, used by layers 3 and 4 (gate.scope=shared):" in printed
    assert r"“what [bold]colour[/bold] $x_$ <b> \x1b[31m”" in printed
    assert "\x1b" not in printed
    opened = FinishedRun.open(copied)
    choice = choices(aligned_of(opened), tokenizer_of(opened), PROMPTS[0])[0]
    for candidate in choice.candidates:
        cells = [*candidate.parts.values(), sum(candidate.parts.values()), candidate.logit]
        row = [*map(text.signed, cells), *text.percent(candidate.confidence).split()]
        assert any(
            line.split()[: len(row) + 2][-len(row) :] == row for line in printed.splitlines() if candidate.name in line
        )
    new = snapshot(copied).keys() - before.keys()
    assert new == {"explain", "explain/decision.svg", "explain/decision.png"}
    assert all(str(copied / name) in printed for name in new)
    root = ElementTree.fromstring((copied / "explain/decision.svg").read_text())
    texts = [element.text or "" for element in root.iter()]
    assert any(PROMPTS[0] in text for text in texts)
    assert any(r"$x_$ <b> \x1b[31m" in text for text in texts)
    assert (copied / "explain/decision.png").read_bytes().startswith(b"\x89PNG")


def test_each_gate_is_printed_and_plotted(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot, "PAGE", 2)
    prompts = [f"what colour is the dog {n} ?" for n in range(3)]
    assert cli.main(["explain", str(made["per_layer"]), "--out", str(tmp_path / "new/pictures"), *prompts]) == 0
    printed = capsys.readouterr().out
    for layer in LAYERS:
        assert printed.count(f"Gate of layer {layer}, used by that layer (gate.scope=per_layer):") == len(prompts)
    assert "The expert generalist has no training rows, so the gate never chooses it." in printed
    names = {
        f"decision.layer{layer}{page}.{kind}" for layer in LAYERS for page in ("", ".3") for kind in ("svg", "png")
    }
    assert {path.name for path in (tmp_path / "new/pictures").iterdir()} == names
    assert not (made["per_layer"] / "explain").exists()


def test_json_holds_everything_and_nothing_else_is_printed(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a process of its own, where every library is imported anew and might print something."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    ended = alignx_ds("explain", str(made["shared"]), "--json", "--out", str(tmp_path), *PROMPTS)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    assert [entry["prompt"] for entry in found["prompts"]] == PROMPTS
    assert found["scope"] == "shared" and found["silent"] == {}
    assert [Path(path).is_file() for path in found["pictures"]] == [True, True]
    (choice,) = found["prompts"][0]["choices"]
    assert choice["chosen"] == choice["candidates"][0]["name"]
    assert choice["runner_up"] == choice["candidates"][1]["name"]
    margin = (choice["candidates"][0]["logit"] - choice["candidates"][1]["logit"]) * choice["temperature"]
    assert sum(choice["margins"].values()) == pytest.approx(margin, rel=1e-4)
    assert found["prompts"][0]["answers"].keys() == {"base", "helpful", "harmless", "honest", "alignx"}


def test_without_the_base_model_the_aligned_model_still_answers(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("path: world", "path: /moved/away"))
    assert cli.main(["explain", str(copied), PROMPTS[0]]) == 0
    printed = capsys.readouterr().out
    for name in ("base", "helpful", "harmless", "honest"):
        assert f"no answer from {name}: the base model '/moved/away' can't be loaded" in printed
    assert "alignx " in printed


def reseal(model: Path, name: str) -> None:
    """Record a changed file of the model in its manifest."""
    content = manifest.read(model)
    content["files"][name] = manifest.file_hash(model / name)
    (model / manifest.NAME).write_text(manifest.sealed(content))


def without_bias(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    del tensors["lexicon.bias"]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    reseal(model, "model.safetensors")


def of_another_shape(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["gate"]["latent"] = 5
    (model / "config.json").write_text(json.dumps(config))
    reseal(model, "config.json")


def with_code(model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "code.Config"}}))
    reseal(model, "config.json")


@pytest.mark.parametrize(
    ("damage", "named"),
    [(without_bias, "lexicon.bias"), (of_another_shape, "as its config.json says"), (with_code, "auto_map")],
)
def test_a_model_that_can_not_be_loaded_is_refused_in_one_line(
    copied: Path, damage: Callable[[Path], None], named: str, capsys: pytest.CaptureFixture[str], snapshot: Snapshot
) -> None:
    damage(copied / "model")
    before = snapshot(copied)
    assert cli.main(["explain", str(copied), PROMPTS[0]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert named in line and str(copied) in line
    assert snapshot(copied) == before


def test_plots_that_cannot_be_written_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(copied), PROMPTS[0], "--out", str(copied / "config.yaml")]) == 2
    assert "--out: got" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(copied), "fine", "not \udcff"]) == 2
    assert "prompt: got" in capsys.readouterr().err
