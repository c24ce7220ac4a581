"""The verbs `generate` and `route`."""

from __future__ import annotations

import argparse
from typing import Any

from alignx_ds.data.schemas import SCHEMAS

ROUTE_HELP = """\
Print one JSON line per prompt of a file:
  expert, confidence       the expert that is most likely right, and how likely
  distance                 from the nearest expert's own training prompts; about 1 is typical of them, 2 is far
  probabilities, gates     of every expert; the gates are its weights in the answer
  needs                    of every axis, for a gate of needs (gate.kind: needs)

With --labels, accuracy, ECE, Brier score and NLL follow on stderr, and where the prompts of each expert go.
"""


def add_verbs(verbs: Any) -> None:
    generate = verbs.add_parser(
        "generate", help="answer prompts with an aligned model", description="Print a greedy answer to each prompt."
    )
    generate.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    generate.set_defaults(work=_generate)
    route = verbs.add_parser(
        "route",
        help="how an aligned model routes the prompts of a file",
        description=ROUTE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    route.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    route.add_argument("prompts", metavar="FILE", help="a data file, a directory of files, or a data set of the hub")
    route.add_argument(
        "--schema", default="prompts", choices=tuple(SCHEMAS), help="how its rows are written (default: %(default)s)"
    )
    route.add_argument("--labels", default="", metavar="COLUMN", help="the column with the expert that is right")
    route.add_argument("--batch", type=int, default=64, help="prompts read together (default: %(default)s)")
    route.set_defaults(work=_route)


def _generate(args: argparse.Namespace) -> int:
    from alignx_ds.serve.generate import answer

    print(*answer(args.model, args.prompts, args.max_new_tokens), sep="\n")
    return 0


def _route(args: argparse.Namespace) -> int:
    from alignx_ds.serve.route import route

    route(args.model, args.prompts, args.schema, args.labels, args.batch)
    return 0
