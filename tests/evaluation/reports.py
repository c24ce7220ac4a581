"""A finished run that was never trained: results by construction, for the tests of the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from types import MappingProxyType
from typing import Any

from alignx_ds.config import parse
from alignx_ds.config.schema import FUSIONS, NO_OUTPUT_CALIBRATION, RunConfig
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.inputs import EncodedData
from alignx_ds.data.rows import Dropped, Row
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.data.splits import DataSplits
from alignx_ds.evaluation import report
from alignx_ds.evaluation.evaluate import Result
from alignx_ds.evaluation.judges.protocol import Metrics
from alignx_ds.evaluation.report import Report
from alignx_ds.routing.by_source import SourceMetrics
from alignx_ds.routing.router_report import RouterReport
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs

RECIPE = Path(__file__).parents[2] / "launch/recipes/world.yaml"
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
PERPLEXITY = {name: tuple(10.0 + n + 2 * a for a in range(3)) for n, name in enumerate(SCORES)}
HOSTILE = "<script>alert('x')</script> & <b>\"bold\"</b> {{ 7 * 7 }} </td></table> &lt;"
ROUTER = {"accuracy": 0.9, "ece": 0.02, "brier": 0.1, "nll": 0.3}
SURFACE = {"accuracy": 0.7, "ece": 0.05, "brier": 0.4, "nll": 0.6}
DROPPED = {"train": Counter({"empty output": 2, HOSTILE: 1}), "held_out": Counter({"more than 20 rows": 3})}


VOID = {"meta", "br", "path", "use", "rect", "image"}  # elements without an end tag, in HTML or as SVG text has them


class Page(HTMLParser):
    """The tags of a page, its style sheet, and the text of its headings, paragraphs, list items and table cells.

    `cut_off` holds the tables, plots and preformatted texts that no container with scroll bars surrounds.
    """

    TEXTS = ("td", "th", "p", "li", "h2", "summary", "style")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.rows: list[list[str]] = []
        self.texts: dict[str, list[str]] = {tag: [] for tag in self.TEXTS}
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.cut_off: list[str] = []
        self.open: list[tuple[str, str]] = []  # (tag, class) of the elements around
        self.inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.append(tag)
        self.ids.add(values.get("id") or "")
        if tag == "a" and values.get("href"):
            self.links.append(values["href"] or "")
        if tag not in VOID:
            self.open.append((tag, values.get("class") or ""))
        if tag in ("table", "svg", "pre") and not any("scroll" in kind.split() for _, kind in self.open):
            self.cut_off.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in self.TEXTS:
            self.inside = tag
            (self.rows[-1] if tag in ("td", "th") else self.texts[tag]).append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside
        if tag in [name for name, _ in self.open]:
            while self.open.pop()[0] != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.inside:
            (self.rows[-1] if self.inside in ("td", "th") else self.texts[self.inside])[-1] += data

    @classmethod
    def of(cls, out: Outputs) -> Page:
        return cls((out.root / "report.html").read_text(encoding="utf-8"))

    def table(self, heading: list[str]) -> dict[str, list[str]]:
        """The rows below this one, up to the next that is as long but for no system."""
        start = self.rows.index(heading)
        below = self.rows[start + 1 : start + 1 + len(SCORES)]
        return {row[0]: row[1:] for row in below}


def result(name: str, settings: RunConfig, metrics: dict[str, Metrics]) -> Result:
    """What a system has reached; its answers are hostile if it is "mixed"."""
    scored = [axis for axis in AXES if settings.axes[axis].judge]
    found: dict[str, Metrics] = {a: {"score": s} for a, s in zip(AXES, SCORES[name], strict=True) if a in scored}
    if "harmless" in found:
        found["harmless"] |= {"unsafe": 100 - SCORES[name][1], "benign_served": 55.5, "over_refusal": 1.0}
    said = HOSTILE if name == "mixed" else f"{name} said"
    samples = {axis: [(Row(f"{axis} prompt", f"{axis} reference"), said)] for axis in scored}
    return Result(found | metrics, dict(zip(AXES, PERPLEXITY[name], strict=True)), samples)


def inputs(settings: RunConfig) -> EncodedData:
    """Three rows of every expert to train on, one of them without an answer, and one held out."""
    rows = [Row("a", "b"), Row("c", "d"), Row("e", "")]
    train, held_out = (
        {
            name: SplitRows("file", 9, list(kept), [Dropped("row", reason) for reason in DROPPED[part].elements()])
            for name in settings.expert_names
        }
        for part, kept in (("train", rows), ("held_out", rows[:1]))
    )
    if not settings.generalist.train:
        train["generalist"] = held_out["generalist"] = SplitRows("", 0, [], [])
    none = LabelledExamples([], [])
    return EncodedData(DataSplits(train, held_out, {}, frozenset()), {}, none, none, {}, none, none)


def finish(
    root: Path,
    *overrides: str,
    metrics: dict[str, dict[str, Metrics]] | None = None,
    ablated: Result | None = None,
    sources: dict[str, SourceMetrics] | None = None,
    data: EncodedData | None = None,
    evaluation: dict[str, Any] | None = None,
    best_of: Mapping[str, Mapping[str, Metrics]] = MappingProxyType({}),
) -> tuple[Report, Outputs]:
    """A report on a run with these settings, written; `metrics` by system and extra set come on top.

    `ablated` is what the aligned model has reached without output calibration, `sources` is the router by source, and
    `data` are other rows than `inputs`; `evaluation` is what every fine-tune has recorded while it trained, and
    `best_of` the metrics of the best of several answers.
    """
    settings = parse.load(RECIPE, [f"output={root}", *overrides])
    out = Outputs.of(settings)
    fusions = [name for name in FUSIONS if name in settings.baselines.make]
    fine_tunes = [*AXES, "sequential_2_harmless", "sequential_3_honest", "mixed_3_honest", "of_another_run"]
    facts = {"losses": [2.0, 1.0], "layers": {"2": {"gate": {"norm": 1.0}}}} | (
        {"evaluation": evaluation} if evaluation else {}
    )
    for directory in (*(out.specialists / name for name in fine_tunes), *(out.baselines / name for name in fusions)):
        directory.mkdir(parents=True)
        manifest.write(directory, {"name": directory.name}, facts)
    out.model.mkdir(parents=True)
    manifest.write(out.model, {}, {"losses": [3.0, 2.0, 1.0]})
    results = {name: result(name, settings, (metrics or {}).get(name, {})) for name in SCORES}
    if ablated is not None:
        results[NO_OUTPUT_CALIBRATION] = ablated
    confusion = [[7, 1, 0, 0], [0, 8, 0, 0], [0, 0, 6, 2], [1, 0, 0, 7]]
    ablations = {"linear": ROUTER, "natural": ROUTER}
    router = RouterReport(ROUTER, ROUTER | {"ece": 0.2}, 0.5, confusion, ablations, SURFACE, sources or {})
    built = report.build(settings, data or inputs(settings), results, router, out, 61.5, 2, best_of)
    report.write(built, out)
    return built, out
