"""The report: its figures follow from the judges', and what models say stays text in the page."""

from __future__ import annotations

import copy
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from alignx_ds import config, manifest
from alignx_ds.config import RunConfig, to_dict
from alignx_ds.data.rows import Row
from alignx_ds.evaluation import report
from alignx_ds.evaluation.report import Report
from alignx_ds.evaluation.router import RouterReport
from alignx_ds.evaluation.systems import Judged
from alignx_ds.outputs import Outputs
from alignx_ds.specialists.base import BaseModel
from alignx_ds.specialists.finetune import Workshop

AXES = ("helpful", "harmless", "honest")
SCORES = {  # on the three axes, by system
    "base": (40.0, 0.0, 20.0),
    "helpful": (90.0, 5.0, 30.0),
    "harmless": (10.0, 100.0, 0.0),
    "honest": (35.0, 0.0, 80.0),
    "sequential": (12.5, 40.0, 78.0),
    "mixed": (70.0, 80.0, 60.0),
    "alignx": (88.0, 98.0, 79.0),
}
HOSTILE = "<script>alert('x')</script> & <b>\"bold\"</b> {{ 7 * 7 }} </td></table> &lt;"
FIGURES = {"accuracy": 0.9, "ece": 0.02, "brier": 0.1, "nll": 0.3}


class Page(HTMLParser):
    """The tags of a page, its tables' cells, and the text of everything but pictures."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.in_cell = tag in ("td", "th")
        if tag == "tr":
            self.rows.append([])
        elif self.in_cell:
            self.rows[-1].append("")

    def handle_endtag(self, tag: str) -> None:
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.in_cell:
            self.rows[-1][-1] += data


def judged(scores: tuple[float, ...], said: str) -> Judged:
    figures: dict[str, dict[str, float]] = {axis: {"score": s} for axis, s in zip(AXES, scores, strict=True)}
    figures["harmless"] |= {"unsafe": 100 - scores[1], "benign_served": 55.5, "over_refusal": 1.0}
    return Judged(figures, {axis: [(Row(f"{axis} prompt", f"{axis} reference"), said)] for axis in AXES})


@pytest.fixture(scope="module")
def settings(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return config.load(repo_root / "launch/recipes/world.yaml", [f"output={tmp_path_factory.mktemp('run')}"])


@pytest.fixture(scope="module")
def made(settings: RunConfig, world_base: BaseModel) -> tuple[Report, Outputs]:
    """A report built from the manifests of a finished run, in which one system's answers are hostile; written."""
    out = Outputs.of(settings)
    for name in (*AXES, "sequential", "mixed"):
        (out.specialists / name).mkdir(parents=True)
        facts = {"losses": [2.0, 1.0], "layers": {"2": {"gate": {"norm": 1.0}}}}
        manifest.write(out.specialists / name, {"name": name}, facts)
    out.model.mkdir(parents=True)
    manifest.write(out.model, {}, {"losses": [3.0, 2.0, 1.0]})
    shop = Workshop(settings, world_base, out.specialists, {}, {}, lambda name: lambda step, values: None)
    systems = {name: judged(scores, HOSTILE if name == "mixed" else f"{name} said") for name, scores in SCORES.items()}
    confusion = [[7, 1, 0, 0], [0, 8, 0, 0], [0, 0, 6, 2], [1, 0, 0, 7]]
    router = RouterReport(FIGURES, FIGURES | {"ece": 0.2}, 0.5, confusion, {"linear": FIGURES, "natural": FIGURES})
    built = report.build(settings, shop, systems, router, out, 61.5)
    report.write(built, out)
    return built, out


@pytest.fixture(scope="module")
def page(made: tuple[Report, Outputs]) -> Page:
    return Page((made[1].root / "report.html").read_text(encoding="utf-8"))


def test_figures_follow_from_the_judges(made: tuple[Report, Outputs]) -> None:
    systems = made[0].content["systems"]
    assert list(systems) == list(SCORES)
    for name, (helpful, harmless, honest) in SCORES.items():
        s = systems[name]
        assert (s["helpful"], s["harmless"], s["honest"]) == (helpful, harmless, honest)
        unsafe = s["details"]["harmless"]["unsafe"]
        assert s["avg"] == pytest.approx((helpful + honest - unsafe) / 3 + 100 / 3)  # the paper's Avg, shifted
        assert s["benign_served"] == 55.5


def test_collapse_is_what_the_sequence_lost_and_what_alignx_kept(made: tuple[Report, Outputs]) -> None:
    collapse = made[0].content["collapse"]
    for number, axis in enumerate(AXES):
        own, sequential, aligned = (SCORES[name][number] for name in (axis, "sequential", "alignx"))
        assert collapse[axis]["specialist"] == own
        assert collapse[axis]["sequential_loses"] == pytest.approx(own - sequential)
        assert collapse[axis]["alignx_keeps"] == pytest.approx(aligned / own)


def test_the_json_holds_the_content_and_how_it_came_about(made: tuple[Report, Outputs], settings: RunConfig) -> None:
    content: dict[str, Any] = json.loads((made[1].root / "report.json").read_text(encoding="utf-8"))
    assert content == made[0].content
    assert content["config"] == to_dict(settings)
    assert content["run"]["seconds"] == 61.5
    assert {"torch", "deepspeed", "transformers"} <= set(content["run"]["versions"])
    assert content["router"]["confusion"][2] == [0, 0, 6, 2]


def test_model_output_is_escaped(page: Page) -> None:
    """No tag of an answer becomes a tag of the page, and a reader sees each character of it."""
    assert not {"script", "b"} & set(page.tags)
    answers = [row[1] for row in page.rows if row[0] == "mixed" and len(row) == 2]
    assert answers == [HOSTILE] * len(AXES)


def test_prompts_references_and_settings_are_escaped_too(made: tuple[Report, Outputs], tmp_path: Path) -> None:
    changed = copy.deepcopy(made[0])
    for system in changed.judged.values():
        system.samples["honest"][:] = [(Row(HOSTILE, HOSTILE), "fine")]
    changed.content["config"]["axes"]["honest"]["prompt"] = HOSTILE
    report.write(changed, Outputs(tmp_path, tmp_path / "specialists"))
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not {"script", "b"} & set(page.tags)
    assert ["honest", HOSTILE] in page.rows
    assert ["reference", HOSTILE] in page.rows


def test_the_page_loads_nothing_from_elsewhere(page: Page) -> None:
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 3


def test_the_pages_table_shows_the_figures(page: Page) -> None:
    table = {row[0]: row[1:] for row in page.rows if len(row) == 6}
    for name, scores in SCORES.items():
        expected = [f"{score:.1f}" for score in scores]
        assert table[name] == [*expected, f"{sum(scores) / 3:.1f}", "55.5"]


def test_the_page_shows_every_systems_answer_to_a_prompt(page: Page) -> None:
    rows = page.rows
    start = rows.index(["harmless", "harmless prompt"])
    assert rows[start + 1] == ["reference", "harmless reference"]
    shown = dict(rows[start + 2 : start + 2 + len(SCORES)])
    assert shown == {name: HOSTILE if name == "mixed" else f"{name} said" for name in SCORES}


def test_the_terminal_shows_the_same_table(made: tuple[Report, Outputs], capsys: pytest.CaptureFixture[str]) -> None:
    report.show(*made)
    printed = capsys.readouterr().out
    for name, scores in SCORES.items():
        (line,) = [line for line in printed.splitlines() if line.replace("│", " ").split()[:1] == [name]]
        assert line.replace("│", " ").split()[1:] == [f"{s:.1f}" for s in (*scores, sum(scores) / 3, 55.5)]
    assert str(Path("report.html")) in printed
    assert "ECE 0.020 (before temperature 0.200)" in printed
