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

LOG_SECONDS = 60.0  # between two lines about the same work, where there is no terminal
WIDE = 100  # characters; a line of this length has room for more than the essentials


class _RaisingConsole(Console):
    def on_broken_pipe(self) -> None:
        """Raise the BrokenPipeError, which `cli.main` handles. Console itself would exit at once."""
        raise  # called where the error is caught


_console = _RaisingConsole(highlight=False, emoji=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)


@dataclass
class Progress:
    """A handle that advances what shows how far some work is; this one shows nothing."""

    summary: str = ""  # added to the line that is printed at the end where there is no terminal

    def advance(self, note: str = "", by: int = 1) -> None:
        """So much more is done."""

    def end_at(self, total: int) -> None:
        """There is less to do than was expected."""


@dataclass
class _Shown(Progress):
    """A bar on a terminal."""

    bar: Bar | None = None

    def advance(self, note: str = "", by: int = 1) -> None:
        assert self.bar is not None
        self.bar.update(self.bar.task_ids[0], advance=by, note=note)

    def end_at(self, total: int) -> None:
        assert self.bar is not None
        self.bar.update(self.bar.task_ids[0], total=total)


@dataclass
class _Logged(Progress):
    """A line a minute, for the log file of a job that nobody watches."""

    title: str = ""
    total: int = 0
    done: int = 0

    def __post_init__(self) -> None:
        self._started = self._printed = time.monotonic()

    def advance(self, note: str = "", by: int = 1) -> None:
        self.done += by
        now = time.monotonic()
        if now - self._printed >= LOG_SECONDS and self.done < self.total:
            self._printed = now
            say(f"{self.title}: {self.done} of {self.total} after {self._seconds(now)}{f' ({note})' if note else ''}")

    def end_at(self, total: int) -> None:
        self.total = total

    def end(self) -> None:
        summary = f" ({self.summary})" if self.summary else ""
        say(f"{self.title}: {self.total} done in {self._seconds(time.monotonic())}{summary}")

    def _seconds(self, now: float) -> str:
        return f"{now - self._started:.0f} s"


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
    """Show a progress bar on a terminal; elsewhere print a line a minute, and one at the end."""
    if not distributed.is_main():
        yield Progress()
        return
    if not _console.is_terminal:
        logged = _Logged(title=title, total=total)
        yield logged
        logged.end()
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Bar(*columns, TextColumn("{task.fields[note]}", markup=False), console=_console) as bar:
        bar.add_task(title, total=total, note="")
        yield _Shown(bar=bar)


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
