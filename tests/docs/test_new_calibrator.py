"""docs/extending.md, "A new calibrator": the page's command, run on a copy of the package with the page's code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pages import ROOT, SMALL, code, command_with
from transformers import AutoModelForCausalLM

from alignx_ds import cli
from alignx_ds.errors import ConfigError
from alignx_ds.mocae import gate as gates
from alignx_ds.mocae.gate import Calibrator
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.settings import GateSettings

PAGE, TITLE = "docs/extending.md", "A new calibrator"
TABLE = "CALIBRATORS: dict[str, Calibrator] = {}"


@pytest.fixture(scope="module")
def place(workplace: Callable[[], Path], shell: Callable[..., str]) -> Path:
    """The directory of the run, made by a copy of the package with the page's code as its only change."""
    made = workplace()
    (made / "alignx_ds").unlink()
    shutil.copytree(ROOT / "alignx_ds", made / "alignx_ds", ignore=shutil.ignore_patterns("__pycache__"))
    file = made / "alignx_ds/mocae/gate.py"
    (line,) = [line for line in file.read_text().splitlines(keepends=True) if line.startswith(TABLE)]
    file.write_text(file.read_text().replace(line, code(PAGE, TITLE)[0]))
    shell(command_with(PAGE, "gate.more.nearest"), made, *SMALL)
    return made


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> Calibrator:
    """The page's function, registered here."""
    names = dict(vars(gates))
    exec(code(PAGE, TITLE)[0], names)
    found: Calibrator = names["nearest"]
    monkeypatch.setitem(gates.CALIBRATORS, "nearest", found)
    return found


@torch.no_grad()
def test_it_is_a_term_of_the_saved_model_s_gate(place: Path, nearest: Calibrator) -> None:
    model = AutoModelForCausalLM.from_pretrained(place / "runs/nearest/model").eval()
    (gate,) = gates_of(model).values()
    assert gate.settings.more == {"nearest": 0.5}
    model(torch.tensor([[1, 9, 30, 31, 32], [1, 50, 51, 52, 53]]), use_cache=False)
    query, decision = next(iter(model.routing.queries.values())), next(iter(model.routing.decisions.values()))
    parts, g = gate.parts(query), gate.geometry
    assert list(parts) == ["linear", "fractal", "natural", "lexical", "nearest"]
    z = (query.features.double() - g.centre) @ g.projection.double().T
    for row in range(2):
        distances = torch.tensor([min((z[row, :4] - a).norm() for a in own.double()) for own in g.anchors])
        torch.testing.assert_close(parts["nearest"][row], 0.5 * (distances.mean() - distances).float())
    assert parts["nearest"].std() > 0.01
    torch.testing.assert_close(decision.logits * gate.calibration_temperature, sum(parts.values()))


def test_the_report_s_ablations_have_it(place: Path) -> None:
    ablations = json.loads((place / "runs/nearest/report.json").read_text())["router"]["ablations"]
    assert 0.2 < ablations["nearest"]["accuracy"] <= 1.0
    assert ablations["all"] != ablations["fractal + natural + lexical"]


def test_the_loss_s_prior_has_it(nearest: Calibrator) -> None:
    """The KL term is taken against the gates of all calibrators."""
    from tiny_models import query_geometry

    from alignx_ds.training.losses import gating_terms

    geometry = query_geometry(6, seed=1)
    query = gates.Query(torch.randn(5, len(geometry.centre)), torch.randn(5, 4))
    kept = []
    for more in ({}, {"nearest": 3.0}):
        gate = gates.CalibratedGate(geometry, GateSettings(more=more))
        assert gate.router.weight.abs().sum() == 0
        kept.append(gating_terms(gate, query, gate.train()(query), torch.eye(4)[[0] * 5]))
        assert abs(float(kept[-1][2])) < 1e-5, "an untrained router leaves the calibrators' own gates"
    assert float((kept[0][0] - kept[1][0]).abs()) > 1e-3


def test_a_name_that_is_not_in_the_table_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str], no_launcher: None
) -> None:
    assert cli.main(["run", str(ROOT / "launch/recipes/world.yaml"), "gate.more.nearest=0.5", "--dry-run"]) == 2
    assert "gate.more.nearest: got 0.5, expected a calibrator of CALIBRATORS" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"gate\.more: got 'nearest'.*CALIBRATORS in alignx_ds/mocae/gate\.py"):
        AutoModelForCausalLM.from_pretrained(place / "runs/nearest/model")
