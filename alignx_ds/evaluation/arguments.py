"""The verbs `answer`, `judge` and `win-rate`. What they need is imported when one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.evaluation.judges.registry import JUDGES


def add_verbs(verbs: Any) -> None:
    answer = verbs.add_parser(
        "answer",
        help="write a model's answers to a set of questions, to be judged later",
        description="Write a model's greedy answers to a set of questions as JSON lines. Continues a file that exists.",
    )
    model = "directory or hub id of a causal language model, aligned or not; with --endpoint, the server's name of it"
    answer.add_argument("model", help=model)
    answer.add_argument("source", help="a file, or the id of a data set (owner/name, owner/name:config:split)")
    answer.add_argument("--schema", required=True, choices=tuple(SCHEMAS), help="how the source's rows are written")
    answer.add_argument("--out", required=True, type=Path, help="file of answers (.jsonl)")
    answer.add_argument("--rows", type=int, default=0, help="number of questions at most; 0: all (default)")
    answer.add_argument("--batch", type=int, default=16, help="prompts answered together (default: %(default)s)")
    answer.add_argument("--max-new-tokens", type=int, default=256, help="(default: %(default)s)")
    server = "let this OpenAI-compatible server answer, --batch requests at a time; its key is read from OPENAI_API_KEY"
    answer.add_argument("--endpoint", default="", metavar="URL", help=server)
    answer.set_defaults(work=_answer)
    judge = verbs.add_parser(
        "judge",
        help="judge a file of answers",
        description="Judge a file of answers. Verdicts are saved in a file beside it and reused.",
        epilog="settings are keys of a recipe's `judges`: endpoint=http://localhost:8000/v1 endpoint_model=NAME",
    )
    judge.add_argument("answers", type=Path, help="a .jsonl file that `alignx-ds answer` or a run has written")
    judge.add_argument("judge", choices=JUDGES)
    judge.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="what the judge needs")
    judge.set_defaults(work=_judge)
    win_rate = verbs.add_parser(
        "win-rate",
        help="AlpacaEval's win rate and standard error from a file of annotations",
        description="Win rate ± standard error of annotations (1 or 2, or weighted), by AlpacaEval's formula.",
    )
    win_rate.add_argument("annotations", type=Path, help="as alpaca_eval or `alignx-ds judge` wrote it (.json)")
    win_rate.set_defaults(work=_win_rate)


def _answer(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation import standalone

    limits = (args.rows, args.batch, args.max_new_tokens)
    print(standalone.answer(args.model, args.source, args.schema, args.out, *limits, args.endpoint))
    return 0


def _judge(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation import standalone

    standalone.judge(args.answers, args.judge, args.settings)
    return 0


def _win_rate(args: argparse.Namespace) -> int:
    from alignx_ds.evaluation.alpaca_eval import read_annotations, win_rate

    found = win_rate([annotation.preference for annotation in read_annotations(args.annotations)])
    print(f"{found.win_rate:.6f} ± {found.standard_error:.6f} (n = {found.n}, {found.dropped} dropped)")
    return 0
