"""The table of the paper's claims quotes the tables below it: whoever replaces one has to replace the other."""

from __future__ import annotations

import json
import re

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
