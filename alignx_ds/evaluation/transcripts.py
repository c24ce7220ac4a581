"""Answers and verdicts as JSON lines, written as they come: whoever stops in between goes on where the file ends."""

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
class Answers:
    """A file of answers to these rows. `circumstances` (model hash, seed, settings) are part of every line."""

    path: Path
    rows: Sequence[Row]
    circumstances: dict[str, Any]

    def kept(self) -> list[str]:
        """The answers that are there already, from the first row on; what follows a foreign or torn line is cut off."""
        outputs: list[str] = []
        for row, line in zip(self.rows, _lines(self.path), strict=False):
            expected = self._line(row, str(line.get("output", "")))
            if line != json.loads(json.dumps(expected)):
                break
            outputs.append(expected["output"])
        whole = _text(self._line(row, output) for row, output in zip(self.rows, outputs, strict=False))
        if not self.path.is_file() or self.path.read_bytes() != whole.encode():
            manifest.write_text(self.path, whole)
        return outputs

    def is_whole(self) -> bool:
        return len(self.kept()) == len(self.rows)

    def append(self, start: int, outputs: Sequence[str]) -> None:
        """The answers to the rows from `start` on."""
        rows = self.rows[start : start + len(outputs)]
        _append(self.path, [self._line(row, output) for row, output in zip(rows, outputs, strict=True)])

    def _line(self, row: Row, output: str) -> dict[str, Any]:
        known = {k: v for k, v in row.content().items() if k != "prompt"}
        return {"prompt": row.prompt, "output": output, **self.circumstances, "row": known}


def check_ours(path: Path) -> None:
    """Raises DataError when the file is there and holds something else than answers: that is not ours to cut."""
    content = path.read_bytes() if path.is_file() else b""
    try:
        first = json.loads(content.partition(b"\n")[0]) if content else {"prompt": "", "output": "", "row": {}}
        ours = isinstance(first, dict) and {"prompt", "output", "row"} <= set(first)
    except ValueError:
        ours = b"\n" not in content and content.startswith(b'{"prompt": ')  # a first answer that a stop has torn
    if not ours:
        raise DataError(f"{path}: is there already, and holds something else than answers; choose another --out")


def read(path: Path) -> tuple[list[Row], list[str]]:
    """(rows, answers) of a finished file. Raises DataError naming file and row."""
    rows, outputs = [], []
    for place, line in read_records(path):
        try:
            known: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in line["row"].items()}
            rows.append(Row(prompt=line["prompt"], place=place, **known))
            outputs.append(str(line["output"]))
        except (KeyError, TypeError, AttributeError) as error:
            what = "is no line that `alignx-ds answer` or a run wrote"
            raise DataError(f"{place}: {what} ({type(error).__name__}: {error})") from error
    if not rows:
        raise DataError(f"{path}: holds no answers; run `alignx-ds answer` first")
    return rows, outputs


def verdicts(path: Path, judge: Judge, rows: Sequence[Row], outputs: Sequence[str]) -> list[Verdict]:
    """The judge's verdict on every answer; those that are in the file already are not asked for again."""
    by = manifest.fingerprint(judge.identity)
    keys = [_answer_key(row, output) for row, output in zip(rows, outputs, strict=True)]
    kept: list[Verdict] = []
    for key, line in zip(keys, _lines(path), strict=False):
        if (line.get("answer"), line.get("judge")) != (key, by) or "verdict" not in line:
            break
        kept.append(line["verdict"])
    known = [{"answer": k, "judge": by, "verdict": v} for k, v in zip(keys, kept, strict=False)]
    manifest.write_text(path, _text(known))
    for verdict in judge.verdicts(rows[len(kept) :], outputs[len(kept) :]):
        _append(path, [{"answer": keys[len(kept)], "judge": by, "verdict": verdict}])
        kept.append(verdict)
    return kept


def verdicts_of_another(path: Path, rows: Sequence[Row], outputs: Sequence[str]) -> list[Verdict] | None:
    """What the file's judge, whoever it is, has said of just these answers; None when it has not judged them all."""
    keys = [_answer_key(row, output) for row, output in zip(rows, outputs, strict=True)]
    lines = [line for line in _lines(path) if "verdict" in line]
    return [line["verdict"] for line in lines] if [line.get("answer") for line in lines] == keys else None


def _answer_key(row: Row, output: str) -> str:
    return hashlib.sha256(json.dumps([row.content(), output], sort_keys=True).encode()).hexdigest()[:16]


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of ours; a line that a stop has torn ends them."""
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
