"""`alignx-ds doctor`: print the findings. Exit code 0 where nothing fails, otherwise 2."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from alignx_ds.doctor.examine import examine
from alignx_ds.doctor.findings import Finding, Grade
from alignx_ds.errors import EXIT_CODE

COLOURS: dict[Grade, str] = {"ok": "green", "–": "dim", "warn": "yellow", "fail": "bold red"}


def doctor(directory: Path) -> int:
    return show(examine(directory))


def show(findings: Iterator[Finding]) -> int:
    """A table on a terminal, a line for each finding elsewhere; returns the exit code."""
    console = Console(highlight=False, emoji=False)
    rows: list[Finding] = []
    if console.is_terminal:
        with console.status("examining this machine"):
            rows += findings
        console.print(_table(rows))
    else:
        for row in findings:
            rows.append(row)
            print(row.line(), flush=True)
    failures, warnings = (sum(row.grade == grade for row in rows) for grade in ("fail", "warn"))
    print(f"{_counted(failures, 'failure')}, {_counted(warnings, 'warning')}")
    return EXIT_CODE if failures else 0


def _counted(number: int, word: str) -> str:
    return f"{number or 'no'} {word}{'s' * (number != 1)}"


def _table(rows: list[Finding]) -> Table:
    grid = Table("", "", "found", "to do", header_style="bold")
    for row in rows:
        grid.add_row(Text(row.grade, COLOURS[row.grade]), Text(row.what), Text(row.seen), Text(row.fix))
    return grid
