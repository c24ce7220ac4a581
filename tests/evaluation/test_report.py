"""The report: its scores follow from the judges' metrics, and the answers of models stay text in the page."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from reports import AXES, HOSTILE, PERPLEXITY, SCORES, Page, finish, inputs

from alignx_ds.config.parse import load as load_config
from alignx_ds.config.parse import to_dict
from alignx_ds.data.inputs import JoinedRows
from alignx_ds.data.routing import RoutingRows
from alignx_ds.data.rows import Dropped, Row
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.evaluation import report
from alignx_ds.evaluation.judges.protocol import label
from alignx_ds.evaluation.report import Report, judge_quality
from alignx_ds.routing.by_source import Kind, SourceMetrics
from alignx_ds.runs.outputs import Outputs

Made = tuple[Report, Outputs]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return finish(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def page(made: Made) -> Page:
    return Page.of(made[1])


def test_scores_follow_from_the_judges(made: Made) -> None:
    systems = made[0].content["systems"]
    assert list(systems) == list(SCORES)
    for name, (helpful, harmless, honest) in SCORES.items():
        s = systems[name]
        assert (s["helpful"], s["harmless"], s["honest"]) == (helpful, harmless, honest)
        unsafe = s["details"]["harmless"]["unsafe"]
        assert s["avg"] == pytest.approx((helpful + honest - unsafe) / 3 + 100 / 3)  # the paper's Avg, shifted
        assert s["benign_served"] == 55.5


def test_collapse_is_what_the_sequence_lost_and_what_alignx_kept(made: Made) -> None:
    collapse = made[0].content["collapse"]
    for number, axis in enumerate(AXES):
        own, sequential, aligned = (SCORES[name][number] for name in (axis, "sequential", "alignx"))
        assert collapse[axis]["specialist"] == own
        assert collapse[axis]["sequential_loses"] == pytest.approx(own - sequential)
        assert collapse[axis]["alignx_keeps"] == pytest.approx(aligned / own)


def test_losses_are_of_this_run_alone(made: Made) -> None:
    """A shared directory of specialists holds those of other runs too."""
    assert (made[1].specialists / "of_another_run").is_dir()
    fine_tunes = [*sorted(AXES), "mixed_3_honest", "sequential_2_harmless", "sequential_3_honest"]
    assert list(made[0].losses) == [*fine_tunes, "h3fusion", "trinityx", "alignx"]


def test_the_json_holds_the_content_and_its_provenance(made: Made) -> None:
    content: dict[str, Any] = json.loads((made[1].root / "report.json").read_text(encoding="utf-8"))
    assert content == made[0].content
    own = to_dict(load_config("launch/recipes/world.yaml", [f"output={made[1].root}"]))
    assert content["config"] == own | {"output": made[1].root.name}, "without the path of this machine"
    assert (content["run"]["seconds"], content["run"]["ranks"], content["run"]["seed"]) == (61.5, 2, 0)
    assert content["scored"] == content["axes"] == list(AXES)
    assert content["judges"] == {"helpful": "task", "harmless": "safety", "honest": "truth"}
    assert content["router"]["surface"]["accuracy"] == 0.7
    assert {"torch", "deepspeed", "transformers"} <= set(content["run"]["versions"])
    assert content["router"]["confusion"][2] == [0, 0, 6, 2]


def test_model_output_is_escaped(page: Page) -> None:
    """No tag of an answer becomes a tag of the page, and a reader sees each character of it."""
    assert not {"script", "b"} & set(page.tags)
    answers = [row[1] for row in page.rows if row[0] == "mixed" and len(row) == 2]
    assert answers == [HOSTILE] * len(AXES)


def test_prompts_references_and_settings_are_escaped_too(made: Made, tmp_path: Path) -> None:
    changed = copy.deepcopy(made[0])
    for system in changed.results.values():
        system.samples["honest"][:] = [(Row(HOSTILE, HOSTILE), "fine")]
    changed.content["config"]["axes"]["honest"]["prompt"] = HOSTILE
    report.write(changed, Outputs(tmp_path, tmp_path / "specialists"))
    page = Page.of(Outputs(tmp_path, tmp_path / "specialists"))
    assert not {"script", "b"} & set(page.tags)
    assert HOSTILE in page.texts["summary"]
    assert ["reference", HOSTILE] in page.rows


def test_the_page_loads_nothing_from_elsewhere(page: Page) -> None:
    assert not {"script", "link", "img", "iframe"} & set(page.tags)
    assert page.tags.count("svg") == 4


def test_the_contents_lead_to_every_section(page: Page) -> None:
    assert len(page.links) == len(page.texts["h2"]) - 1, "one link for each heading but that of the contents"
    assert {link.removeprefix("#") for link in page.links} <= page.ids
    listed = page.texts["li"][: len(page.links)]
    assert [text.strip() for text in listed] == page.texts["h2"][1:]


def test_nothing_is_wider_than_a_phone(page: Page) -> None:
    """Tables, plots and preformatted text scroll inside containers of their own; other text may break anywhere.

    No browser takes part. In Chromium, at 400 px, the page that these rules make is 400 px wide.
    """
    assert {"table", "svg", "pre"} <= set(page.tags) and page.cut_off == []
    css = page.texts["style"][0].partition("@media")[0]  # plots have style elements too
    rules = {selector.strip(): rule for selector, rule in re.findall(r"([^{}]+)\{([^{}]*)\}", css)}
    assert "overflow-x: auto" in rules[".scroll"] and "max-width: 100%" in rules[".scroll"]
    assert "overflow-wrap: anywhere" in rules["body"]
    fixed = re.findall(r"([^{}]+)\{[^{}]*(?<![-\w])(?:min-)?width: [\d.]+(?:rem|px)", css)
    assert [selector.strip() for selector in fixed] == ["figure.wide svg"], "which is inside a container that scrolls"


def test_the_pages_table_shows_the_scores(page: Page) -> None:
    table = page.table(["system", *AXES, "avg", "benign served"])
    for name, scores in SCORES.items():
        expected = [f"{score:.1f}" for score in scores]
        assert table[name] == [*expected, f"{sum(scores) / 3:.1f}", "55.5"]


def test_the_page_shows_every_systems_answer_to_a_prompt(page: Page) -> None:
    assert "harmless prompt" in page.texts["summary"]
    start = page.rows.index(["reference", "harmless reference"])
    shown = dict(page.rows[start + 1 : start + 1 + len(SCORES)])
    assert shown == {name: HOSTILE if name == "mixed" else f"{name} said" for name in SCORES}


def test_the_page_shows_perplexities_beside_those_of_the_axis_s_specialist(page: Page) -> None:
    table = page.table(["system", *(cell for axis in AXES for cell in (axis, "÷ own"))])
    for name, values in PERPLEXITY.items():
        own = [PERPLEXITY[axis][n] for n, axis in enumerate(AXES)]
        assert table[name][::2] == [f"{value:.2f}" for value in values]
        assert table[name][1::2] == [f"{value / base:.3f}" for value, base in zip(values, own, strict=True)]


def test_every_record_is_accounted_for(made: Made, page: Page) -> None:
    account = made[0].content["rows"]["honest"]
    assert (account["train"], account["imitated"], account["held_out"]) == (3, 2, 1)
    assert account["not_trained_on"] == {"empty output": 2, HOSTILE: 1}
    assert account["not_judged"] == {"more than 20 rows": 3}
    assert ["honest", "3", "2", "1", f"2 × empty output; 1 × {HOSTILE}"] in page.rows


def test_the_page_says_where_a_job_ended_and_which_weights_it_kept(tmp_path: Path, page: Page) -> None:
    found = {"losses": [[2, 1.5], [4, 1.25], [6, None]], "best": 4, "lowest": 1.25, "kept": 4, "stopped": 6}
    built, out = finish(tmp_path, evaluation=found)
    shown = Page((out.root / "report.html").read_text()).rows
    assert ["helpful", "6 (early)", "4", "1.250", "4"] in shown and [
        "mixed_3_honest",
        "6 (early)",
        "4",
        "1.250",
        "4",
    ] in shown
    assert built.content["evaluations"]["honest"] == found
    assert not any("best evaluation" in " ".join(row) for row in page.rows)


def lines_of(printed: str, name: str) -> list[list[str]]:
    """The cells of this system's line in every printed table."""
    cells = [line.replace("│", " ").split() for line in printed.splitlines()]
    return [row[1:] for row in cells if row[:1] == [name]]


def test_the_terminal_shows_the_same_tables(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    report.show(*made)
    printed = capsys.readouterr().out
    for name, scores in SCORES.items():
        judged, perplexities = lines_of(printed, name)
        assert judged == [f"{s:.1f}" for s in (*scores, sum(scores) / 3, 55.5)]
        assert perplexities == [f"{p:.2f}" for p in PERPLEXITY[name]]
    assert str(Path("report.html")) in printed
    assert "ECE 0.020 (before temperature 0.200)" in printed
    assert "TF-IDF + logistic regression on the same prompts: accuracy 0.700, ECE 0.050" in printed


NOBODY = tuple(f"axes.{axis}.judge=''" for axis in AXES)


def test_without_judges_perplexity_is_what_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built, out = finish(tmp_path, *NOBODY)
    content, page = built.content, Page.of(out)
    assert (content["scored"], content["collapse"], content["judges"]) == ([], {}, {})
    assert all(scores == {"details": {}} for scores in content["systems"].values())
    assert page.texts["h2"] == ["Contents", "Perplexity", "Router", "Training", "Data", "Settings"]
    assert page.tags.count("svg") == 3
    report.show(built, out)
    printed = capsys.readouterr().out
    assert all(len(lines_of(printed, name)) == 1 for name in SCORES)


def test_an_average_is_of_all_axes_or_of_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    built, out = finish(tmp_path, "axes.helpful.judge=''")
    assert built.content["scored"] == ["harmless", "honest"]
    assert all("avg" not in scores and "helpful" not in scores for scores in built.content["systems"].values())
    assert list(built.content["collapse"]) == ["harmless", "honest"]
    table = Page.of(out).table(["system", "harmless", "honest", "benign served"])
    assert table["alignx"] == ["98.0", "79.0", "55.5"]
    report.show(built, out)
    assert lines_of(capsys.readouterr().out, "alignx")[0] == ["98.0", "79.0", "55.5"]


SETS = (
    "evaluation.sets={xs: {schema: xstest, source: x.jsonl, judge: refusal},"
    " hone: {schema: honeset, source: h.jsonl, judge: honeset}}",
)
EXTRA = {
    name: {"xs": {"score": 10.0 + n, "over_refusal": 90.0 - n}, "hone": {"score": 5.0}} for n, name in enumerate(SCORES)
}
EXTRA["alignx"]["hone"] = {"score": 7.0, "identity": 66.6}  # with a metric more


def test_extra_sets_have_tables_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also where a judge has a figure for some systems only."""
    built, out = finish(tmp_path, *SETS, metrics=EXTRA)
    page = Page.of(out)
    assert built.content["sets"]["xs"]["honest"] == EXTRA["honest"]["xs"]
    assert built.content["judges"]["xs"] == "refusal"
    assert {"xs", "hone"} <= set(page.texts["h2"])
    assert "xs" not in built.content["scored"]
    refusals, honesty = page.table(["system", "score", "over refusal"]), page.table(["system", "score", "identity"])
    for n, name in enumerate(SCORES):
        assert refusals[name] == [f"{10.0 + n:.1f}", f"{90.0 - n:.1f}"]
        assert honesty[name] == (["7.0", "66.6"] if name == "alignx" else ["5.0", "–"])
    report.show(built, out)
    printed = capsys.readouterr().out
    assert lines_of(printed, "base")[2:] == [["10.0", "90.0"], ["5.0", "–"]]
    assert "xs, judged by refusal" in printed


def test_a_win_rate_has_the_length_controlled_one_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = {name: {"helpful": {"score": 60.0, "length_controlled": 51.25}} for name in SCORES}
    built, out = finish(tmp_path, "axes.helpful.judge=offline_pairwise", metrics=metrics)
    columns = ["system", "helpful", "harmless", "honest", "avg", "benign served", "length controlled"]
    assert Page.of(out).table(columns)["alignx"][-1] == "51.2"
    report.show(built, out)
    assert "length" in capsys.readouterr().out


def test_the_quality_of_a_judge_is_shown_beside_its_scores(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of an axis and of an extra set; the metrics are those of the judge, not of any system."""
    quality = {"judge_accuracy": 0.87654, "judge_auroc": 0.95}
    metrics = {name: {"harmless": {"score": 50.0} | quality, "xs": {"score": 1.0} | quality} for name in SCORES}
    one_set = "evaluation.sets={xs: {schema: xstest, source: x.jsonl, judge: refusal}}"
    built, out = finish(tmp_path, one_set, "axes.harmless.judge=offline_safety", metrics=metrics)
    said = "itself measured on held-out rows: accuracy 0.877, auroc 0.95"
    page = Page.of(out)
    assert f"harmless: judged by offline_safety, {said}." in page.texts["li"]
    assert f"An extra question set, judged by refusal, {said}." in page.texts["p"]
    assert "helpful: judged by task." in page.texts["li"], "an exact judge has no metrics of its own"
    assert page.table(["system", "score"])["base"] == ["1.0"]
    report.show(built, out)
    printed = capsys.readouterr().out.replace("\n", "")
    assert f"harmless is judged by offline_safety, {said}" in printed
    assert f"xs is judged by refusal, {said}" in printed
    assert "helpful is judged" not in printed


def test_the_router_by_source_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On the page all sources, on the terminal those other than the axes' own."""
    axes = {axis: {"ece": 0.01 * n, "brier": 0.1 * n} for n, axis in enumerate(AXES)}
    metrics = {"accuracy": 0.75, "ece": 0.125, "brier": 0.25, "nll": 1.0}
    kinds: dict[str, Kind] = {"honest": "own", "x.csv, safe (generalist)": "routing", "far": "set"}
    sources = {name: SourceMetrics(kind, 4, 0.875, metrics, axes) for name, kind in kinds.items()}
    built, out = finish(tmp_path, sources=sources)
    assert built.content["router"]["sources"]["far"] == sources["far"].content()
    gate, by_axis = ["0.750", "0.875", "0.125", "0.250"], ["0.000", "0.000", "0.010", "0.100", "0.020", "0.200"]
    shown = Page.of(out).table(["source", "kind", "prompts", *"accuracy confidence".split(), *["ECE", "Brier"] * 4])
    said = {"honest": "own prompts", "x.csv, safe (generalist)": "routing rows", "far": "extra set"}
    assert {name: shown[name] for name in said} == {name: [kind, "4", *gate, *by_axis] for name, kind in said.items()}
    report.show(built, out)
    printed = capsys.readouterr().out
    assert lines_of(printed, "far") == [["4", *gate]]
    assert all(cells[0] != "4" for cells in lines_of(printed, "honest"))


def test_joined_and_routing_rows_are_accounted_for(tmp_path: Path) -> None:
    given = inputs(load_config("launch/recipes/world.yaml", [f"output={tmp_path}"]))
    row = Row("a", "b")
    fitted = SplitRows("x.csv", 4, [row, row, row], [Dropped("row", "its question is held out")])
    part = RoutingRows("harmless", "x.csv (harmless)", fitted, SplitRows("x.csv", 1, [row], []))
    joined = {"honest": JoinedRows([row] * 4, [row], [Dropped("row", "longer than model.max_length=9 tokens")])}
    data = replace(given, splits=replace(given.splits, routing=(part,)), joined=joined)
    built, out = finish(tmp_path, data=data)
    assert built.content["rows"]["honest"]["joined"] == 5 and built.content["rows"]["helpful"]["joined"] == 0
    assert built.content["routing_rows"]["x.csv (harmless)"]["train"] == 3
    rows = Page.of(out).rows
    (honest,) = [row for row in rows if row[:4] == ["honest", "3", "2", "5"]]
    assert honest[5].endswith("; joined: 1 × longer than model.max_length=9 tokens")
    routing = ["routing rows: x.csv (harmless)", "3", "0", "0", "1", "1 × its question is held out"]
    assert routing in rows


def test_labels_are_for_readers() -> None:
    assert label("benign_served") == "benign served"
    assert label("category/drug_abuse,weapons") == "category: drug abuse, weapons"


def test_a_judge_without_measured_quality_has_no_text() -> None:
    assert judge_quality({"score": 1.0, "unsafe": 2.0}) == ""


def test_an_expert_without_rows_has_no_account(tmp_path: Path) -> None:
    built, _ = finish(tmp_path, "generalist.train=''", "generalist.held_out=''")
    assert list(built.content["rows"]) == list(AXES)
    assert built.content["experts"] == ["generalist", *AXES]


def test_an_axis_without_references_has_no_perplexity(made: Made, tmp_path: Path) -> None:
    """And the others keep theirs."""
    changed = copy.deepcopy(made[0])
    for values in changed.content["perplexity"].values():
        del values["harmless"]
    out = Outputs(tmp_path, tmp_path / "specialists")
    report.write(changed, out)
    measured = [axis for axis in AXES if axis != "harmless"]
    table = Page.of(out).table(["system", *(cell for axis in measured for cell in (axis, "÷ own"))])
    assert table["base"][0] == f"{PERPLEXITY['base'][0]:.2f}"
