"""The verb `data preview`, and the arguments of every verb that reads a recipe."""

from __future__ import annotations

import argparse
import re
from typing import Any

UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def add_verbs(verbs: Any) -> None:
    data = verbs.add_parser("data", help="look at the rows of a recipe", description="Look at the rows of a recipe.")
    preview = data.add_subparsers(dest="what", required=True, metavar="WHAT").add_parser(
        "preview",
        help="print tokenized and masked rows, counts, lengths, and which rows are dropped and why",
        description="Print the rows as training reads them. Writes nothing.",
    )
    add_recipe(preview)
    preview.add_argument("--rows", type=int, default=2, help="rows printed of each axis (default: %(default)s)")
    preview.set_defaults(work=_preview)


def add_recipe(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("recipe", help="a YAML file, or a shipped recipe: see `alignx-ds recipes`")
    verb.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the recipe's")


def memory_size(text: str) -> float:
    """Bytes of a size such as 80GiB, for argparse."""
    found = re.fullmatch(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})", text)
    if found is None or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write e.g. 80GiB")
    return float(found[1]) * UNITS[found[2]]


def _preview(args: argparse.Namespace) -> int:
    from alignx_ds.plan.preview import preview

    preview(args.recipe, args.overrides, args.rows)
    return 0
