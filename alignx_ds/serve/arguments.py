"""The verb `generate`."""

from __future__ import annotations

import argparse
from typing import Any


def add_verbs(verbs: Any) -> None:
    generate = verbs.add_parser(
        "generate", help="answer prompts with an aligned model", description="Print a greedy answer to each prompt."
    )
    generate.add_argument("model", help="directory of an aligned model, e.g. runs/world/model")
    generate.add_argument("prompts", nargs="+", metavar="PROMPT")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="(default: %(default)s)")
    generate.set_defaults(work=_generate)


def _generate(args: argparse.Namespace) -> int:
    from alignx_ds.serve.generate import answer

    print(*answer(args.model, args.prompts, args.max_new_tokens), sep="\n")
    return 0
