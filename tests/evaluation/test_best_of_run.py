"""`evaluation.best_of`: the best answers of a run, and where the report has them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from processes import in_this_process
from reports import AXES, SCORES, Page, finish

from alignx_ds.config import parse
from alignx_ds.evaluation import report, transcripts
from alignx_ds.evaluation.best_of import best, rewards
from alignx_ds.evaluation.judges.world import Safety, Task, Truth
from alignx_ds.plan import rows

JUDGES = {"helpful": Task(), "harmless": Safety(), "honest": Truth()}
BEST = {
    f"{name}+best-of-4": {axis: {"score": score} for axis, score in zip(AXES, scores, strict=True)}
    for name, scores in (("base", (60.0, 10.0, 50.0)), ("alignx", (96.0, 100.0, 98.0)))
}


def test_a_run_chooses_with_the_judges_of_its_axes_and_reports_them(
    finished_run: Path, small_run: tuple[str, ...], tmp_path: Path
) -> None:
    """The finished run goes on: only what the setting adds is made."""
    place = tmp_path / "run"
    shutil.copytree(finished_run, place, ignore=shutil.ignore_patterns("checkpoints"))
    command = ("run", "launch/recipes/world.yaml", *small_run, f"output={place}", "evaluation.best_of=3")
    done = in_this_process(*command)
    assert done.returncode == 0, done.stderr
    assert "chosen by the judges that score them (task, safety, truth): an upper baseline" in " ".join(
        done.stdout.split()
    )
    best_of = json.loads((place / "report.json").read_text())["best_of"]
    assert list(best_of) == ["base+best-of-3", "alignx+best-of-3"]
    for axis, judge in JUDGES.items():
        name = f"base+best-of-3.{axis}"
        asked, kept = transcripts.read(place / f"answers/{name}.jsonl")
        _, said = transcripts.read(place / f"answers/{name}.drawn.jsonl")
        chosen = [best(rated, dict.fromkeys(JUDGES, 1.0)) for rated in rewards(JUDGES, asked, said)]
        assert kept == [said[3 * i + number] for i, number in enumerate(chosen)]
        score = judge.metrics(asked, list(judge.verdicts(asked, kept)))["score"]
        assert best_of["base+best-of-3"][axis] == pytest.approx(score)
    before = {path: path.read_bytes() for path in place.glob("answers/*best-of*")}
    assert len(before) == 12
    again = in_this_process(*command)
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in place.glob("answers/*best-of*")} == before
    assert json.loads((place / "report.json").read_text())["best_of"] == best_of


def test_the_report_has_the_rows_in_a_table_of_their_own_and_says_who_chooses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built, out = finish(tmp_path, "evaluation.best_of=4", best_of=BEST)
    content = json.loads((out.root / "report.json").read_text())
    assert list(content["systems"]) == list(SCORES)
    assert content["best_of"]["base+best-of-4"] == {"helpful": 60, "harmless": 10, "honest": 50, "avg": 40}
    page = Page.of(out)
    assert "Best of several answers" in page.texts["h2"]
    start = page.rows.index(["system", *AXES, "avg"])
    assert page.rows[start + 1 : start + 5] == [
        ["base", "40.0", "0.0", "20.0", "20.0"],
        ["base+best-of-4", "60.0", "10.0", "50.0", "40.0"],
        ["alignx", "88.0", "98.0", "79.0", "88.3"],
        ["alignx+best-of-4", "96.0", "100.0", "98.0", "98.0"],
    ]
    (said,) = (text for text in page.texts["p"] if "an upper baseline" in text)
    assert "task, safety, truth" in said and "The judges that choose are those that score" in said
    capsys.readouterr()
    report.show(built, out)
    assert "alignx+best-of-4" in capsys.readouterr().out


def test_a_report_without_them_has_no_such_section(tmp_path: Path) -> None:
    built, out = finish(tmp_path)
    assert built.content["best_of"] == {}
    assert "Best of several answers" not in Page.of(out).texts["h2"]


def test_it_needs_an_axis_whose_answers_are_judged(tmp_path: Path) -> None:
    unjudged = [f"axes.{axis}.judge={judge}" for axis, judge in zip(AXES, ("", "", "mc"), strict=True)]
    given = [f"output={tmp_path / 'run'}", "evaluation.best_of=2", *unjudged]
    keys = [problem.key for problem in rows.problems(parse.load("launch/recipes/world.yaml", given))]
    assert "evaluation.best_of" in keys
    keys = [problem.key for problem in rows.problems(parse.load("launch/recipes/world.yaml", given[:2]))]
    assert "evaluation.best_of" not in keys
