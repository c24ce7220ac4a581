"""The aligned model without output calibration: how it is made, and where the report has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from reports import AXES, SCORES, Page, finish
from tiny_models import padded, random_rows
from transformers import AutoModelForCausalLM

from alignx_ds.config import parse
from alignx_ds.config.schema import ModelConfig, RunConfig
from alignx_ds.evaluation import report
from alignx_ds.evaluation.compared import ablated_systems
from alignx_ds.evaluation.evaluate import Result
from alignx_ds.export.fidelity import without_calibration
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import rows
from alignx_ds.runs import manifest

ABLATED = Result({axis: {"score": 70.0 + n} for n, axis in enumerate(AXES)}, dict.fromkeys(AXES, 1.25), {})


@torch.no_grad()
def test_it_is_the_same_model_with_r_at_zero(saved_aligned: Path, tiny_config: RunConfig) -> None:
    if not (saved_aligned / manifest.NAME).is_file():
        manifest.write(saved_aligned, {}, {})
    (system,) = ablated_systems(tiny_config, BaseModel(ModelConfig(path="world")), saved_aligned)
    ids, mask = padded(random_rows([6, 9]))
    found = system.load()(ids, mask).logits
    model = AutoModelForCausalLM.from_pretrained(saved_aligned).eval()
    with without_calibration(model):
        assert torch.equal(found, model(ids, mask).logits)
    assert not torch.equal(found, model(ids, mask).logits)


def test_a_model_without_it_has_no_such_ablation(saved_aligned: Path, tiny_config: RunConfig) -> None:
    tiny_config.gate.output_latent = 0
    assert ablated_systems(tiny_config, BaseModel(ModelConfig(path="world")), saved_aligned) == []


def test_the_report_has_it_beside_the_whole_model_and_in_no_other_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built, out = finish(tmp_path, ablated=ABLATED)
    content = json.loads((out.root / "report.json").read_text())
    assert list(content["systems"]) == list(content["perplexity"]) == list(content["matrix"]) == list(SCORES)
    found = content["ablations"]["no_output_calibration"]
    assert [found["scores"][axis] for axis in AXES] == [70.0, 71.0, 72.0] and found["scores"]["avg"] == 71.0
    assert found["perplexity"] == dict.fromkeys(AXES, 1.25)
    page = Page.of(out)
    assert "Ablations" in page.texts["h2"]
    rows = [row for row in page.rows if row[:1] == ["alignx, R = 0"]]
    assert rows == [["alignx, R = 0", "70.0", "71.0", "72.0", "71.0", "–", "1.2500", "1.2500", "1.2500"]]
    capsys.readouterr()
    report.show(built, out)
    assert "alignx, R = 0" in capsys.readouterr().out


def test_extra_sets_that_have_a_score_are_in_its_table(tmp_path: Path) -> None:
    sets = "evaluation.sets={xs: {schema: xstest, source: x.jsonl, judge: refusal}}"
    ablated = Result(ABLATED.metrics | {"xs": {"score": 61.5}}, ABLATED.perplexity, {})
    built, out = finish(tmp_path, sets, metrics={name: {"xs": {"score": 64.5}} for name in SCORES}, ablated=ablated)
    assert built.content["ablations"]["no_output_calibration"]["sets"] == {"xs": {"score": 61.5}}
    rows = [row for row in Page.of(out).rows if row[:1] == ["alignx, R = 0"]]
    assert rows == [["alignx, R = 0", "70.0", "71.0", "72.0", "71.0", "–", "61.5", "1.2500", "1.2500", "1.2500"]]


def test_no_axis_may_have_its_name(tmp_path: Path) -> None:
    axis = "{prompt: p, schema: plain, train: world, held_out: world}"
    config = parse.load("launch/recipes/world.yaml", [f"axes.no_output_calibration={axis}", f"output={tmp_path}"])
    assert "axes.no_output_calibration" in [problem.key for problem in rows.problems(config)]
