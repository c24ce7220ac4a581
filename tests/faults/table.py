"""`table.py RECORD PAGE`: put the recorded faults, by area, between the page's two marks."""

from __future__ import annotations

import json
import os
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

START, END = "<!-- made by `make faults` -->", "<!-- end -->"


def table(lines: list[dict[str, str]]) -> str:
    """One line per kind of fault, in the order of the areas' first mention; repeats of a line are dropped."""
    areas = list(dict.fromkeys(line["area"] for line in lines))
    rows = [
        f"| {d['area']} | {d['fault']} | {d['seen']} | {d['lost']} |" for a in areas for d in lines if d["area"] == a
    ]
    head = ["| | fault | what was seen | lost |", "|---|---|---|---|"]
    where = f"{os.cpu_count()} cores, no GPU, torch {version('torch')}, deepspeed {version('deepspeed')}"
    return "\n".join([f"{date.today()}, {where}; 2 ranks unless it says otherwise.", "", *head, *dict.fromkeys(rows)])


def main(record: Path, page: Path) -> None:
    lines = [json.loads(line) for line in record.read_text(encoding="utf-8").splitlines()]
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(START)
    after = rest.split(END)[1]
    page.write_text(f"{before}{START}\n{table(lines)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
