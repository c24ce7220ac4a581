"""The matrix of systems, axes and judges: which judges are in it, and how the report shows it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from reports import AXES, SCORES, Page, finish

from alignx_ds.config import parse
from alignx_ds.evaluation import matrix, report
from alignx_ds.evaluation.evaluate import Result
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Metrics
from alignx_ds.evaluation.report import MATRIX
from alignx_ds.runs.outputs import Outputs

RECIPES = Path(__file__).parents[2] / "launch/recipes"
OWN = {"helpful": "task", "harmless": "safety", "honest": "truth"}


@pytest.mark.parametrize(
    ("recipe", "setting", "judges"),
    [
        ("world", "auto", ["task", "safety", "truth"]),
        ("world", "own", []),
        ("llama2-7b", "auto", ["refusal"]),
        ("llama2-7b", "all", ["alpaca_eval", "beaver_dam", "truthfulqa", "refusal"]),
        ("small-real", "auto", ["offline_safety", "refusal"]),
    ],
)
def test_judges_with_a_model_or_a_server_judge_other_axes_only_where_that_is_asked(
    recipe: str, setting: str, judges: list[str]
) -> None:
    config = parse.load(RECIPES / f"{recipe}.yaml", [f"evaluation.matrix={setting}"])
    assert matrix.cross_judges(config) == [name for name in registry.JUDGES if name in judges]


def results(without: str = "") -> dict[str, Result]:
    """A system's number, axis and judge can be read off each score; no judge in `without` is on another axis."""
    return {
        name: Result({}, {}, {}, {axis: _cells(number, axis, without) for axis in AXES})
        for number, name in enumerate(SCORES)
    }


def _cells(number: int, axis: str, without: str) -> dict[str, Metrics]:
    judges = [judge for judge in OWN.values() if judge == OWN[axis] or judge not in without]
    return {
        judge: {
            "score": 10.0 * number + AXES.index(axis) + list(OWN.values()).index(judge) / 10,
            "rows": 1 + (judge == "x"),
        }
        for judge in judges
    }


def test_the_report_has_every_judge_of_every_axis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built, out = finish(tmp_path)
    cells = {name: r.matrix for name, r in results().items()}
    cells["base"]["honest"]["task"]["rows"] = 0.0
    report.write(replace(built, content=built.content | {"matrix": cells}), out)
    page = Page.of(out)
    assert MATRIX in page.texts["h2"]
    heading = [
        "judged by",
        "task (own)",
        "safety",
        "truth",
        "safety (own)",
        "task",
        "truth",
        "truth (own)",
        "task",
        "safety",
    ]
    table = page.table(heading)
    assert table["helpful"] == ["10.0", "10.1", "10.2", "11.1", "11.0", "11.2", "12.2", "12.0", "12.1"]
    assert ["prompts of", *AXES] in page.rows
    assert "task judges 0 of the 1 honest prompts: the others lack what it needs." in page.texts["li"]
    capsys.readouterr()
    report.show(replace(built, content=built.content | {"matrix": cells}), out)
    printed = [line.replace("│", " ").split() for line in capsys.readouterr().out.splitlines()]
    assert ["helpful", "10.1", "10.2", "11.0", "11.2", "12.0", "12.1"] in printed


def test_a_matrix_of_own_judges_alone_is_not_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built, _ = finish(tmp_path)
    alone = {name: r.matrix for name, r in results(without="task safety truth").items()}
    out = Outputs(tmp_path, tmp_path / "specialists")
    report.write(replace(built, content=built.content | {"matrix": alone}), out)
    assert MATRIX not in Page.of(out).texts["h2"]
    report.show(replace(built, content=built.content | {"matrix": alone}), out)
    assert "judges of the others" not in capsys.readouterr().out
