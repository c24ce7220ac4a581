"""Answers and verdicts as JSON lines, written as they come: a run that was stopped goes on where the file ends."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from alignx_ds.data.files import read_records
from alignx_ds.data.rows import Row
from alignx_ds.errors import DataError
from alignx_ds.evaluation.judges.protocol import Judge, Verdict
from alignx_ds.runs import manifest


@dataclass(frozen=True)
class AnswerFile:
    """A file with one answer per row. Every line holds the `provenance`: hash of the model, seed, settings."""

    path: Path
    rows: Sequence[Row]
    provenance: dict[str, Any]

    def load(self) -> list[str]:
        """The valid answers, from the first row on.

        The file is truncated at the first line that is incomplete, or that has another row or provenance.
        """
        outputs: list[str] = []
        for row, line in zip(self.rows, _lines(self.path), strict=False):
            expected = self._line(row, str(line.get("output", "")))
            if line != json.loads(json.dumps(expected)):
                break
            outputs.append(expected["output"])
        valid = _text(self._line(row, output) for row, output in zip(self.rows, outputs, strict=False))
        if not self.path.is_file() or self.path.read_bytes() != valid.encode():
            manifest.write_text(self.path, valid)
        return outputs

    def is_complete(self) -> bool:
        return len(self.load()) == len(self.rows)

    def append(self, start: int, outputs: Sequence[str]) -> None:
        """Write the answers to the rows from `start` on."""
        rows = self.rows[start : start + len(outputs)]
        _append(self.path, [self._line(row, output) for row, output in zip(rows, outputs, strict=True)])

    def _line(self, row: Row, output: str) -> dict[str, Any]:
        known = {k: v for k, v in row.content().items() if k != "prompt"}
        return {"prompt": row.prompt, "output": output, **self.provenance, "row": known}


def check_replaceable(path: Path) -> None:
    """Raises DataError if the file exists and is no file of answers: it must not be truncated."""
    content = path.read_bytes() if path.is_file() else b""
    try:
        first = json.loads(content.partition(b"\n")[0]) if content else {"prompt": "", "output": "", "row": {}}
        replaceable = isinstance(first, dict) and {"prompt", "output", "row"} <= set(first)
    except ValueError:
        # a first line that was interrupted while it was written
        replaceable = b"\n" not in content and content.startswith(b'{"prompt": ')
    if not replaceable:
        raise DataError(f"{path}: exists and is no file of answers; choose another --out")


def read(path: Path) -> tuple[list[Row], list[str]]:
    """(rows, answers) of a finished file. Raises DataError naming file and row."""
    rows, outputs = [], []
    for place, line in read_records(path):
        try:
            rows.append(Row.from_content({"prompt": line["prompt"], **line["row"]}, place))
            outputs.append(str(line["output"]))
        except (KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DataError(f"{place}: not written by `alignx-ds answer` or by a run ({reason})") from error
    if not rows:
        raise DataError(f"{path}: no answers in this file; run `alignx-ds answer` first")
    return rows, outputs


def verdicts(path: Path, judge: Judge, rows: Sequence[Row], outputs: Sequence[str]) -> list[Verdict]:
    """The judge's verdict on every answer. Verdicts in the file that this judge gave on these answers are reused."""
    judge_id = manifest.fingerprint(judge.identity)
    keys = [_answer_key(row, output) for row, output in zip(rows, outputs, strict=True)]
    found = given(path, judge, rows, outputs)
    valid = [{"answer": k, "judge": judge_id, "verdict": v} for k, v in zip(keys, found, strict=False)]
    manifest.write_text(path, _text(valid))
    for verdict in judge.verdicts(rows[len(found) :], outputs[len(found) :]):
        _append(path, [{"answer": keys[len(found)], "judge": judge_id, "verdict": verdict}])
        found.append(verdict)
    return found


def given(path: Path, judge: Judge, rows: Sequence[Row], outputs: Sequence[str]) -> list[Verdict]:
    """The verdicts in the file that this judge gave on these answers, from the first answer on."""
    judge_id, found = manifest.fingerprint(judge.identity), list[Verdict]()
    for row, output, line in zip(rows, outputs, _lines(path), strict=False):
        if (line.get("answer"), line.get("judge")) != (_answer_key(row, output), judge_id) or "verdict" not in line:
            break
        found.append(line["verdict"])
    return found


def lines(path: Path) -> int:
    """How many answers or verdicts the file has."""
    return len(_lines(path))


def stored_verdicts(path: Path, rows: Sequence[Row], outputs: Sequence[str]) -> list[Verdict] | None:
    """The file's verdicts, of any judge; None unless they are on exactly these answers."""
    keys = [_answer_key(row, output) for row, output in zip(rows, outputs, strict=True)]
    lines = [line for line in _lines(path) if "verdict" in line]
    return [line["verdict"] for line in lines] if [line.get("answer") for line in lines] == keys else None


def _answer_key(row: Row, output: str) -> str:
    return hashlib.sha256(json.dumps([row.content(), output], sort_keys=True).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file, up to the first line that is none: an interrupted write leaves half a line."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def _text(lines: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


def _append(path: Path, lines: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(_text(lines))
