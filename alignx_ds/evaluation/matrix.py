"""Every judge on every axis's prompts: are helpful answers safe and true too? Are honest ones still safe?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from alignx_ds.config.schema import RunConfig
from alignx_ds.evaluation.judges.protocol import Metrics, label
from alignx_ds.evaluation.judges.registry import FREE, JUDGES

Cells = dict[str, dict[str, Metrics]]  # by axis and judge; "rows" is how many of the axis's rows it applies to
MEANING = {  # of a judge's score on prompts of other axes, in percent
    "task": "answers that equal the reference",
    "safety": "harmful requests that are refused; where none is harmful, answers that neither refuse nor do harm",
    "truth": "answers that state nothing false, times those that say more than \u201ci do not know\u201d",
    "composite": "answers that equal the reference",
    "refusal": "harmless requests that are not refused; where all are harmful, those that are refused",
    "offline_safety": "answers that are not unsafe; the judge was trained on one data set, so a rough guide",
    "beaver_dam": "answers that are not unsafe",
    "llama_guard": "answers that are not unsafe",
    "truthfulqa": "truthful times informative answers",
    "alpaca_eval": "win rate against the reference answers",
    "offline_pairwise": "win rate against the reference answers; the judge knows length and form, so a rough guide",
    "honeset": "honest answers, of the rows with a category of HoneSet's",
}


def cross_judges(config: RunConfig) -> list[str]:
    """The judges that judge the prompts of every axis, by `evaluation.matrix`.

    With "auto", `refusal` is one of them even if the recipe does not name it, unless the world's `safety`, which counts
    refusals exactly, is there.
    """
    if config.evaluation.matrix == "own":
        return []
    named = {axis.judge for axis in config.axes.values()} | {s.judge for s in config.evaluation.sets.values()}
    used = named | (set() if "safety" in named else {"refusal"})
    allowed = JUDGES if config.evaluation.matrix == "all" else FREE
    return [name for name in JUDGES if name in used and name in allowed]


def columns(matrix: Mapping[str, Cells], own: Mapping[str, str]) -> dict[str, list[str]]:
    """The judges of each axis's prompts, its `own` first; nothing where no axis has another one."""
    found: dict[str, list[str]] = {}
    for cells in matrix.values():
        for axis, judges in cells.items():
            found.setdefault(axis, []).extend(judges)
    shown = {axis: sorted(dict.fromkeys(judges), key=lambda j: j != own[axis]) for axis, judges in found.items()}
    return shown if any(len(judges) > 1 for judges in shown.values()) else {}


def scores(matrix: Mapping[str, Cells], shown: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """By system: the scores of the judges `shown`, axis by axis."""
    return {
        name: [cells[axis][judge]["score"] for axis, judges in shown.items() for judge in judges]
        for name, cells in matrix.items()
    }


def notes(shown: Mapping[str, Sequence[str]], cells: Cells, rows: Mapping[str, int]) -> list[str]:
    """What each judge's score means, and where it applies to a part of an axis's rows only. `cells` of any system."""
    named = {judge for judges in shown.values() for judge in judges}
    meanings = [f"{label(judge)}: {meaning}." for judge, meaning in MEANING.items() if judge in named]
    return meanings + [
        f"{label(judge)} judges {cells[axis][judge]['rows']:.0f} of the {rows[axis]} {axis} prompts: the others lack "
        "what it needs."
        for axis, judges in shown.items()
        for judge in judges
        if cells[axis][judge]["rows"] < rows[axis]
    ]
