"""The prompts on which an exported model is compared with the aligned model: the run's held-out ones, or a file's."""

from __future__ import annotations

from pathlib import Path

from alignx_ds.data.chats import Prompt
from alignx_ds.errors import DataError
from alignx_ds.evaluation import transcripts
from alignx_ds.runs.finished import FinishedRun

GIVEN = "given"


def prompts_of(run: FinishedRun, given: Path | None, count: int) -> dict[str, list[Prompt]]:
    """By axis and set, at most `count` of each; empty when no file is given and the run has no answers.

    Raises DataError when the file can't be read.
    """
    if given is not None:
        return {GIVEN: list(_lines(given)[:count])}
    found: dict[str, list[Prompt]] = {}
    for name in (*run.axes, *run.config.evaluation.sets):
        path = run.out.answers / f"alignx.{name}.jsonl"
        if path.is_file():
            rows, _ = transcripts.read(path)
            found[name] = [row.chat for row in rows[:count]]
    return found


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: can't be read as text ({error}); give a file with one prompt per line") from error
    if not lines:
        raise DataError(f"{path}: has no prompts in it; write one per line")
    return lines
