"""The verbs `data preview`, `data select` and `config-schema`, and the arguments of every verb that reads a recipe."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

UNITS = {"GiB": 2**30, "GB": 10**9, "MiB": 2**20, "MB": 10**6}


def add_verbs(verbs: Any) -> None:
    data = verbs.add_parser("data", help="look at the rows of a recipe", description="Look at the rows of a recipe.")
    kinds = data.add_subparsers(dest="what", required=True, metavar="WHAT")
    preview = kinds.add_parser(
        "preview",
        help="print tokenized and masked rows, counts, lengths, and which rows are dropped and why",
        description="Print the rows as training reads them. Writes nothing.",
    )
    add_recipe(preview)
    preview.add_argument("--rows", type=int, default=2, help="rows printed of each axis (default: %(default)s)")
    preview.set_defaults(work=_preview)
    _add_select(kinds)
    text = "print the JSON schema of a recipe, by which editors complete and check YAML"
    schema = verbs.add_parser("config-schema", help=text, description=f"{text[:1].upper()}{text[1:]}.")
    schema.set_defaults(work=_config_schema)


SELECT = """\
Show which training rows say the same as others, or are not among the best, and leave them out of a copy.

Questions are taken by their score, the best first, and one is left out if its cosine with one that was taken before is
at least --similar (DEITA, arXiv 2312.15685). Rows that are judged, or like those, are no candidates.
"""


def _add_select(kinds: Any) -> None:
    text = "show which training rows say the same as others, or are not among the best; write the rest"
    form = argparse.RawDescriptionHelpFormatter
    select = kinds.add_parser("select", help=text, description=SELECT, formatter_class=form)
    add_recipe(select)
    select.add_argument("--out", type=Path, metavar="DIR", help="write the sources without those rows (default: none)")
    select.add_argument("--axes", default="", metavar="A,B", help="whose rows (default: every axis's)")
    select.add_argument(
        "--similar", type=float, default=0.9, metavar="COSINE", help="from which two are alike (default: %(default)s)"
    )
    select.add_argument("--most", type=int, default=0, help="questions kept of an axis (default: any number)")
    select.add_argument(
        "--encoder", default="", metavar="MODEL", help="sentence encoder: hub id or directory (default: TF-IDF)"
    )
    select.add_argument(
        "--scorer",
        action="append",
        default=[],
        metavar="MODULE:FUNCTION",
        help="takes a list of rows (prompt, response …), returns a number for each; of several the product counts",
    )
    select.add_argument("--rows", type=int, default=5, help="of each axis, printed (default: %(default)s)")
    select.set_defaults(work=_select)


def add_recipe(verb: argparse.ArgumentParser) -> None:
    recipe = verb.add_argument("recipe", help="a YAML file, or a shipped recipe: see `alignx-ds recipes`")
    overrides = verb.add_argument(
        "overrides", nargs="*", metavar="KEY=VALUE", help="settings that override the recipe's"
    )
    recipe.completer = _recipes  # type: ignore[attr-defined]
    overrides.completer = _settings  # type: ignore[attr-defined]


def _recipes(prefix: str, **rest: Any) -> list[str]:
    from alignx_ds.config import completion

    return completion.recipes(prefix, **rest)


def _settings(prefix: str, **rest: Any) -> list[str]:
    from alignx_ds.config import completion

    return completion.settings(prefix, **rest)


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


def _select(args: argparse.Namespace) -> int:
    from alignx_ds.plan.select import Settings, select

    axes = [axis for axis in args.axes.split(",") if axis]
    settings = Settings(axes, args.similar, args.most, args.encoder, args.scorer, args.out, args.rows)
    select(args.recipe, args.overrides, settings)
    return 0


def _config_schema(args: argparse.Namespace) -> int:
    import json

    from alignx_ds.config import json_schema
    from alignx_ds.plan.checks import TABLES

    print(json.dumps(json_schema.of_recipes(TABLES), indent=2, ensure_ascii=False))
    return 0
