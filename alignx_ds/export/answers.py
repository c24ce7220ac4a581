"""`alignx-ds export answers RUN_DIR OUT.json`: a run's answers as the file of model outputs that alpaca_eval reads."""

from __future__ import annotations

from pathlib import Path

from alignx_ds.config import parse
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation import alpaca_eval, transcripts
from alignx_ds.evaluation.alpaca_eval import Output
from alignx_ds.evaluation.compared import system_names
from alignx_ds.runtime import console


def export(root: Path, out: Path, system: str, name: str, reference: Path | None, own: Path | None) -> None:
    """Write the file; with `reference`, under that file's instructions. Write the rows' own references to `own`.

    Raises ConfigError or DataError.
    """
    answered = _own(root)
    path = root / "answers" / f"{system}.{name}.jsonl"
    if path not in answered:
        known = ", ".join(p.stem for p in answered) or "none yet"
        fix = f"choose a system and a set that the run has answers of ({known})"
        raise ConfigError(Problem("--system, --set", f"{system}.{name}", "answers of the run", fix))
    for key, target in (("OUT", out), ("--own-references", own)):
        if target is not None and (target.suffix != ".json" or target.exists()):
            raise ConfigError(Problem(key, str(target), "a new .json file", "choose another; nothing was touched"))
    rows, outputs = transcripts.read(path)
    if reference is not None:
        records = alpaca_eval.model_outputs(rows, outputs, alpaca_eval.read_reference(reference), system)
    else:
        records = [Output(row.category, row.asked, o, system) for row, o in zip(rows, outputs, strict=True)]
    references = [alpaca_eval.reference_of(row, {}) for row in rows] if own is not None else []
    alpaca_eval.write(out, records)
    console.say(f"{len(records)} answers of {system}: {out}")
    if own is not None:
        alpaca_eval.write(own, references)
        console.say(f"the rows' own references: {own}")


def _own(root: Path) -> list[Path]:
    """The files of answers of the systems and sets of the run's config; others are left from another recipe."""
    there, config = sorted((root / "answers").glob("*.jsonl")), root / "config.yaml"
    if not config.is_file():
        return there
    c = parse.load(config)
    named = {f"{system}.{questions}" for system in system_names(c) for questions in (*c.axes, *c.evaluation.sets)}
    return [path for path in there if path.stem in named]
