"""The verbs `explain`, `compare` and `study`. What they need is imported when one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_verbs(verbs: Any) -> None:
    explain = verbs.add_parser(
        "explain",
        help="which expert a prompt goes to, why, and what every expert would answer",
        description="Print and plot how the gates route each prompt, and the answer of every expert to it.",
    )
    explain.add_argument("run", type=Path, metavar="RUN_DIR", help="directory of a finished run, e.g. runs/world")
    explain.add_argument("prompts", nargs="+", metavar="PROMPT")
    explain.add_argument("--out", type=Path, metavar="DIR", help="directory of the plots (default: RUN_DIR/explain)")
    explain.add_argument("--json", action="store_true", help="print JSON")
    explain.set_defaults(work=_explain)
    compare = verbs.add_parser(
        "compare",
        help="mean and spread over finished runs",
        description="Print mean and spread of every system's scores over finished runs.",
    )
    compare.add_argument(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUN_DIR",
        help="finished runs of one recipe, e.g. with several seeds",
    )
    compare.add_argument("--out", type=Path, metavar="FILE", help="write all figures to this file too, as JSON")
    compare.set_defaults(work=_compare)
    study = verbs.add_parser(
        "study",
        help="measure and plot drift, forgetting, contributions or calibration of a finished run",
        description="Measure and plot one aspect of Axis Collapse on a finished run. Trains nothing.",
    )
    study.add_argument("what", choices=("drift", "forgetting", "contributions", "calibration"), metavar="WHAT")
    study.add_argument("run", type=Path, metavar="RUN_DIR", help="directory of a finished run, e.g. runs/world")
    study.add_argument("--out", type=Path, help="directory of WHAT.json, .png and .pdf (default: RUN_DIR/study)")
    study.set_defaults(work=_study)


def _explain(args: argparse.Namespace) -> int:
    from alignx_ds.study.explain import command

    command.show(args.run, args.prompts, args.out, as_json=args.json)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from alignx_ds.study import compare

    compare.show(args.runs, args.out)
    return 0


def _study(args: argparse.Namespace) -> int:
    from alignx_ds.study import command

    command.study(args.what, args.run, args.out)
    return 0
