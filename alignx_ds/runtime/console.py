"""Terminal output of rank 0: headings, progress bars, tables and warnings. The other ranks print nothing."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Table
from rich.text import Text

from alignx_ds.errors import visible
from alignx_ds.runtime import distributed

WIDE = 100  # characters; a line of this length has room for more than the essentials


class _RaisingConsole(Console):
    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError, which `cli.main` handles. Console itself would exit at once."""
        raise  # called where the error is caught


_console = _RaisingConsole(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


@dataclass
class Progress:
    """A handle that advances the bar; without a bar it does nothing."""

    bar: Bar | None = None
    task: int = 0
    summary: str = ""  # added to the line that is printed at the end where there is no terminal

    def advance(self, note: str = "", by: int = 1) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[self.task], advance=by, note=note)


def say(text: str | Text) -> None:
    """Print to stdout. A plain string may hold data: brackets are no markup, control characters are escaped."""
    if distributed.is_main():
        _console.print(plain(text) if isinstance(text, str) else text)


def plain(text: str, style: str = "") -> Text:
    return Text(visible(text, kept="\n\t"), style)


def note(text: str) -> None:
    """Print to stderr, so that it is seen where stdout is redirected."""
    if distributed.is_main():
        print(f"alignx-ds: {text}", file=sys.stderr, flush=True)


def warn(text: str) -> None:
    note(f"warning: {text}")


def heading(text: str) -> None:
    say(plain(f"\n{text}", "bold"))


@contextmanager
def progress(title: str, total: int) -> Iterator[Progress]:
    """Show a progress bar on a terminal; elsewhere print one line at the end."""
    if not distributed.is_main():
        yield Progress()
        return
    if not _console.is_terminal:
        started, silent = time.monotonic(), Progress()
        yield silent
        summary = f" ({silent.summary})" if silent.summary else ""
        say(f"{title}: {total} done in {time.monotonic() - started:.0f} s{summary}")
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[note]}", markup=False), console=_console) as bar:
        bar.add_task(title, total=total, note="")
        yield Progress(bar)


def is_wide() -> bool:
    return _console.width >= WIDE


def table(
    title: str, columns: list[str], rows: list[list[str]], *, texts: tuple[int, ...] = (0,), light: bool = False
) -> None:
    """Print a table. `texts`: which columns are left-aligned, by index. `light`: no frame, long cells folded."""
    grid = Table(title=plain(title, "italic") if title else None, title_justify="left", header_style="bold")
    if light:
        grid.box, grid.pad_edge = box.SIMPLE_HEAD if _console.is_terminal and is_wide() else None, False
    for number, column in enumerate(columns):
        grid.add_column(plain(column), justify="left" if number in texts else "right", overflow="fold")
    for row in rows:
        grid.add_row(*map(plain, row))
    if distributed.is_main():
        _console.print(grid, soft_wrap=not light)
