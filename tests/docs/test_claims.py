"""The table of the paper's claims quotes the tables below it: whoever replaces one has to replace the other."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import pytest
from pages import ROOT, read, text

QUOTED = re.compile(r"three seeds, (\w+): ([^|;.\n]*\d\.\d(?:, [^|;.\n]*\d\.\d)*)")


def three_seeds() -> dict[str, dict[str, str]]:
    """By column and system, the mean over the seeds, as it is printed."""
    section = text("docs/results.md", "The embedded world, three seeds")
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line]
    head, _, *body = rows
    return {name: {row[0]: row[n].split(" ")[0] for row in body} for n, name in enumerate(head) if n}


@pytest.mark.parametrize(("page", "least"), [("docs/results.md", 10), ("README.md", 9)])
def test_the_claims_quote_the_three_seeds(page: str, least: int) -> None:
    known, found = three_seeds(), 0
    for axis, quoted in QUOTED.findall(read(page)):
        for pair in quoted.split(", "):
            system, value = pair.rsplit(" ", 1)
            assert known[axis][system] == value, f"{page}: {axis}, {system}"
            found += 1
    assert found >= least


def test_the_claims_quote_the_real_rows() -> None:
    systems = json.loads((ROOT / "benchmarks/results/small-real.json").read_text())["systems"]
    (row,) = [line for line in read("docs/results.md").splitlines() if "| % unsafe: " in line]
    quoted = re.findall(r"([A-Za-z]+)(?: specialist)? (\d+\.\d)", row.replace("*", "").split("|")[2])
    assert len(quoted) == 5
    for system, value in quoted:
        assert float(value) == pytest.approx(100 - systems[system.lower()]["harmless"], abs=0.051), system
    assert f"{dict(quoted)['AlignX']} % unsafe" in read("README.md")


def test_the_readme_quotes_the_seeds_of_several_needs() -> None:
    figures = json.loads((ROOT / "benchmarks/results/world-needs-seeds.json").read_text())
    tables = [(figures["systems"], "avg"), *((figures["sets"][name], "score") for name in ("composites", "dialogues"))]
    said = read("README.md").partition("**Several needs at once.**")[2].partition("\n\n")[0]
    quoted = re.findall(r"\d+\.\d", said)
    means = [f"{table[system][key]['mean']:.1f}" for system in ("alignx", "mixed", "h3fusion") for table, key in tables]
    assert quoted == means
    for table, key in tables:
        assert max(figures["systems"], key=lambda system: table[system][key]["mean"]) == "alignx"
    assert len(figures["systems"]) == 12 and "the best of twelve systems" in said


def test_the_claims_quote_the_real_model() -> None:
    """The rows of the claims, the two tables of the section, and the README."""
    systems = json.loads((ROOT / "benchmarks/results/smollm2-h200.json").read_text())["systems"]
    page, readme = read("docs/results.md"), read("README.md")
    (row,) = [line for line in page.splitlines() if "| BeaverTails-Evaluation, % unsafe: " in line]
    quoted = {system.lower(): value for system, value in re.findall(r"([A-Za-z]+) (\d+\.\d)", row.split("|")[2])}
    unsafe = {name: s["metrics"]["beavertails_evaluation"]["unsafe"] for name, s in systems.items()}
    assert len(quoted) == 4 and {name: f"{unsafe[name]:.1f}" for name in quoted} == quoted
    assert f"base {quoted['base']} % unsafe, mixed {quoted['mixed']}, AlignX {quoted['alignx']}" in readme
    mc = {name: "/".join(f"{s['metrics']['honest'][k]:.1f}" for k in ("mc1", "mc2")) for name, s in systems.items()}
    assert f"base {mc['base']}, sequential {mc['sequential']}, mixed {mc['mixed']}, AlignX {mc['alignx']}" in page
    for name, label in (("sequential", "sequential"), ("mixed", "mixed"), ("ties", "ties"), ("alignx", "**AlignX**")):
        cells = shares(systems, name)
        assert f"| {label} | {' | '.join(cells)} |" in page, name
        if name in ("mixed", "alignx"):
            assert f"{cells[0]}, {cells[1]} and {cells[2]}" in readme


def shares(systems: dict[str, Any], name: str) -> list[str]:
    """Percent of the gains of the helpful, harmless and honest specialists that a system has, and the least of them."""
    gained = {
        "helpful": lambda s: -math.log(s["perplexity"]["helpful"]),
        "harmless": lambda s: s["metrics"]["beavertails_evaluation"]["score"],
        "honest": lambda s: s["metrics"]["honest"]["mc2"],
    }
    found = []
    for axis, measure in gained.items():
        base, own, reached = (measure(systems[system]) for system in ("base", axis, name))
        found.append(round(100 * (reached - base) / (own - base)))
    return [f"{share}".replace("-", "−") for share in (*found, min(found))]


def test_the_newer_recipe_s_tables_are_its_results() -> None:
    systems = json.loads((ROOT / "benchmarks/results/smollm2-cpu.json").read_text())["systems"]
    page, readme = text("docs/results.md", "The recipe without system prompts"), read("README.md")
    labels = {"h3fusion": "H3Fusion", "trinityx": "TrinityX", "task_arithmetic": "task arithmetic"}
    labels |= {axis: f"{axis} specialist" for axis in ("helpful", "harmless", "honest")}
    labels |= {"alignx": "**AlignX, choice**", "alignx, needs, whole": "**AlignX, needs**"}
    for name, system in systems.items():
        metrics, label = system["metrics"], labels.get(name, name)
        expected = [
            f"{system['perplexity']['helpful']:.2f}",
            f"{metrics['beavertails_evaluation']['unsafe']:.1f}",
            f"{metrics['xstest']['refused_harmful']:.1f}",
            f"{100 - metrics['xstest']['over_refusal']:.1f}",
            f"{metrics['honest']['mc1']:.1f}, {metrics['honest']['mc2']:.1f}",
            f"{system['perplexity']['honest']:.2f}",
        ]
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {label} | {expected[0]} |")]
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        assert [cells[0], *cells[4:9]] == expected, name
        if name not in ("base", "helpful", "harmless", "honest"):
            assert f"| {label} | {' | '.join(shares(systems, name))} |" in page, name
    sentences = {"alignx": "AlignX has {}, {} and {} %", "mixed": "mixed {}, {} and {}"}
    sentences["alignx, needs, whole"] = "with a gate of needs its shares are {}, {} and {} %"
    needs = shares(systems, "alignx, needs, whole")
    for name, said in sentences.items():
        assert said.format(*shares(systems, name)) in readme
    three = [systems[name]["metrics"]["xstest"] for name in ("alignx", "mixed", "alignx, needs, whole")]
    rates = [round(value) for x in three for value in (x["refused_harmful"], 100 - x["over_refusal"])]
    choice = "refuses {} % of XSTest's unsafe prompts and serves {} % of its safe ones, mixed {} and {}"
    assert choice.format(*rates) in readme
    beside = f"{sentences['alignx, needs, whole'].format(*needs)}, and XSTest's rates {rates[4]} and {rates[5]} ("
    assert beside in readme
