"""The verbs `explain`, `compare` and `study`. What they need is imported when one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alignx_ds.errors import UserError

SCALING, SENSITIVITY, PROMPTS = "scaling-axes", "sensitivity", "prompts"
OF_A_RUN = (
    "drift",
    "forgetting",
    "misalignment",
    "contributions",
    "calibration",
    "overlap",
    "steering",
    "robustness",
    "best-of",
    "ensembles",
    "guided",
    PROMPTS,
    SENSITIVITY,
)
STUDY_HELP = """\
Of a finished run (RUN_DIR, e.g. runs/world); nothing is trained. Of several runs of one recipe that differ in their
seed, every number is the mean, with its standard deviation, and --out is needed; each run's own results go into its
RUN_DIR/study too:
  drift          how fine-tuning changes the features of each axis's prompts
  forgetting     what each stage of sequential fine-tuning does to the axes before it
  misalignment   the share of misaligned answers of every fine-tune to questions that it was not taught; minutes
  contributions  what each part of the gate contributes, and which expert answers what
  calibration    how well calibrated the router and the answers are
  overlap        how far the axes' task vectors conflict: their cosines, and the directions that they share
  steering       the base model with a vector added at one layer, for each axis, beside AlignX; minutes
  robustness     refusals and the NLL of each system's answers under noise on one layer, also along gradients; minutes
  best-of        the score against the number of answers of which the judges choose one, of the base model and AlignX
  ensembles      the specialists' logits averaged, their majority, and one answer written from theirs: scores and costs
  guided         judges look ahead of every token of the base model's answers and AlignX's: scores and costs; minutes
  prompts        the base model with system prompts, guidelines or rewritten requests, beside mixed and AlignX
  sensitivity    AlignX's scores against what a finished model can change: top-k, temperature, λ of the gate, γ; minutes

Of several finished runs, for a setting that needs training:
  sensitivity    every system's scores against a key of the recipe in which alone the runs differ, seeds aside
    alignx-ds study sensitivity runs/steps-40 runs/steps-80 runs/steps-160 --by align.steps

Of a recipe with conflicting axes, for which it makes the runs:
  scaling-axes   every system's worst axis against the number of axes, the rows of the smallest one, and the rank
    alignx-ds study scaling-axes world-opposites
The runs lie in OUTPUT/seed-N, where OUTPUT is the recipe's; those of a seed share their specialists. A finished run is
not made again, and after a stop the same command goes on.
"""


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
    _add_study(verbs)


def _add_study(verbs: Any) -> None:
    study = verbs.add_parser(
        "study",
        help="measure and plot an aspect of Axis Collapse: drift, forgetting, conflicting task vectors …",
        description="Measure and plot one aspect of Axis Collapse.",
        epilog=STUDY_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    whats = (*OF_A_RUN, SCALING)
    study.add_argument("what", choices=whats, metavar="WHAT")
    study.add_argument("run", metavar="RUN_DIR", help="directory of a finished run; of scaling-axes, a recipe")
    more = f"further runs, for the mean over their seeds; {SCALING}: settings of all its runs, KEY=VALUE"
    study.add_argument("more", nargs="*", metavar="MORE", help=more)
    study.add_argument("--by", metavar="KEY", help=f"{SENSITIVITY}: compare the runs by this key of their recipe")
    study.add_argument(
        "--guidelines",
        type=Path,
        metavar="FILE",
        help=f'{PROMPTS}: JSON lines of "axis", "guideline" (default: ours)',
    )
    study.add_argument(
        "--rewrite",
        default="",
        metavar="WHO",
        help=f"{PROMPTS}: rewrites requests: module:function, or a server's URL",
    )
    study.add_argument(
        "--out", type=Path, help="directory of WHAT.json, .png and .pdf (default, of one run: RUN_DIR/study)"
    )
    for name, default, what in (
        ("axes", [2, 4, 8], "numbers of axes, the recipe's first ones"),
        ("rows", [50, 200, 800], "numbers of rows of the recipe's smallest axis"),
        ("ranks", [4, 16, 32], "ranks of the experts"),
        ("seeds", [0, 1, 2], "seeds"),
    ):
        shown = " ".join(map(str, default))
        study.add_argument(
            f"--{name}", type=int, nargs="+", default=default, metavar="N", help=f"{SCALING}: {what} (default: {shown})"
        )
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
    if args.by and args.what != SENSITIVITY:
        raise UserError(f"--by: only {SENSITIVITY} compares runs by a key; leave it out")
    if (args.guidelines or args.rewrite) and args.what != PROMPTS:
        raise UserError(f"--guidelines, --rewrite: only {PROMPTS} changes prompts; leave them out")
    if args.what == SCALING:
        from alignx_ds.study import scaling_axes
        from alignx_ds.study.scaling_runs import Curves

        curves = Curves(tuple(args.axes), tuple(args.rows), tuple(args.ranks))
        scaling_axes.study(args.run, args.more, curves, args.seeds, args.out)
        return 0
    if args.by:
        from alignx_ds.study import sensitivity_runs

        sensitivity_runs.study([Path(args.run), *map(Path, args.more)], args.by, args.out)
        return 0
    from alignx_ds.study import command, prompts

    if settings := [given for given in args.more if "=" in given and not Path(given).exists()]:
        raise UserError(f"{' '.join(settings)}: only {SCALING} has settings, because nothing else here is trained")
    if args.more and args.out is None:
        by = "; to compare runs by a setting, give --by" if args.what == SENSITIVITY else ""
        raise UserError(f"--out: give a directory for the mean over the runs, e.g. --out runs/study{by}")
    options = prompts.Options(args.guidelines, args.rewrite)
    command.study(args.what, [Path(args.run), *map(Path, args.more)], args.out, options)
    return 0
