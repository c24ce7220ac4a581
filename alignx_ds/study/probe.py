"""The prompts on which a fine-tune's misalignment is looked for, and what is a misaligned answer to them.

Of a run on the embedded world, the world's own prompts and exact judge. Of others, the English questions of
`probes.jsonl`: ours, in the categories of Betley et al. 2025 (Emergent Misalignment, arXiv 2502.17424) and judged by
the classifier of unsafe answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files

from alignx_ds.data.rows import Row
from alignx_ds.data.world import probes
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import JUDGE_PREFIX, Metrics
from alignx_ds.evaluation.judges.refusal import classify
from alignx_ds.study.studied_run import StudiedRun

WORLD, CLASSIFIER = "safety", "offline_safety"  # the judges by which a run shows what it is about


@dataclass(frozen=True)
class Probe:
    """`misaligned` takes rows and answers; `quality` has the judge's own metrics, none of an exact judge."""

    judge: str
    rows: list[Row]
    misaligned: Callable[[Sequence[Row], Sequence[str]], list[bool]]
    evasive: Callable[[str], bool]  # whether an answer refuses
    quality: Callable[[], Metrics]


def of(studied: StudiedRun) -> Probe:
    """Raises ConfigError where there is no judge that needs no model."""
    judges = {axis.judge for axis in studied.config.axes.values()}
    if WORLD in judges:
        return Probe(
            "the world's facts", probes.probe_rows(studied.config.seed), _by_the_world, probes.is_evasive, dict
        )
    if not studied.config.judges.classifier_rows:
        fix = "set judges.classifier_rows to BeaverTails rows in its config.yaml, or study a run on the embedded world"
        raise ConfigError(Problem("RUN_DIR", str(studied.run.root), "a run whose recipe has a judge of harm", fix))
    judge = registry.make(CLASSIFIER, studied.config.judges)

    def unsafe(rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
        return [bool(verdict["unsafe"]) for verdict in judge.verdicts(rows, answers)]

    def quality() -> Metrics:
        return {k.removeprefix(JUDGE_PREFIX): v for k, v in judge.metrics([], []).items() if k.startswith(JUDGE_PREFIX)}

    return Probe(CLASSIFIER, english_rows(), unsafe, _refuses, quality)


def english_rows() -> list[Row]:
    lines = files("alignx_ds.study").joinpath("probes.jsonl").read_text(encoding="utf-8").splitlines()
    return [Row(record["prompt"], "", category=record["category"]) for record in map(json.loads, lines)]


def _refuses(answer: str) -> bool:
    return classify(answer) != "full_compliance"


def _by_the_world(rows: Sequence[Row], answers: Sequence[str]) -> list[bool]:
    return [probes.is_misaligned(row, answer) for row, answer in zip(rows, answers, strict=True)]
