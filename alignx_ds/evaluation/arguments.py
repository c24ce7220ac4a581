"""The verbs `answer`, `judge` and `win-rate`. What they need is imported when one of them runs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.evaluation.judges.registry import JUDGES

BEST_OF_HELP = f"""\
Best of N: every scorer rates the N answers to a question. Its ratings become the share of these answers that each is
better than, so that scorers can be added up, and the answer with the largest sum is kept.
  --best-of 4 --scorer refusal
  --best-of 4 --scorer truth=1,safety=2
  --best-of 4 --scorer task=helpful,safety=harmless   of an aligned model: its gate's probabilities are the weights
  --best-of 4 --scorer offline_safety classifier_rows=30k_train.jsonl
Scorers: {", ".join(JUDGES)}.
The settings are keys of a recipe's `judges`, as of `alignx-ds judge`. The drawn answers and the verdicts on them are
kept beside the file of answers. A judge that has chosen answers is no neutral judge of them.
"""


def add_verbs(verbs: Any) -> None:
    answer = verbs.add_parser(
        "answer",
        help="write a model's answers to a set of questions, to be judged later",
        description="Write a model's greedy answers to a set of questions as JSON lines, or with --best-of the best of "
        "several sampled ones. Continues a file that exists.",
        epilog=BEST_OF_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
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
    answer.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="what the scorers need")
    best = answer.add_argument_group("best of several answers")
    best.add_argument("--best-of", type=int, metavar="N", help="draw N answers to every question and keep the best one")
    scorer = "judges that choose, with commas between them, each with a weight (default 1) if you like"
    best.add_argument("--scorer", metavar="NAME[=WEIGHT]", help=scorer)
    cold = "of the drawn answers: 1, the default, is the model itself, 0 its greedy answer"
    best.add_argument("--temperature", type=float, metavar="T", help=cold)
    best.add_argument("--seed", type=int, help="of the drawn answers (default: 0)")
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
    from alignx_ds.evaluation.best_of_answers import BestOf

    limits = (args.rows, args.batch, args.max_new_tokens)
    best_of = BestOf.of_options(args.best_of, args.scorer, args.temperature, args.seed, args.settings)
    print(standalone.answer(args.model, args.source, args.schema, args.out, *limits, args.endpoint, best_of))
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
