"""The verbs `recipes` and `completion`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

SHELLS = ("bash", "zsh", "fish")


def add_verbs(verbs: Any) -> None:
    text = "list the shipped recipes, or copy one with its DeepSpeed JSONs"
    recipes = verbs.add_parser(
        "recipes", help=text, description=f"{text[:1].upper()}{text[1:]}. `alignx-ds run` takes their names too."
    )
    recipes.set_defaults(work=_list)
    copy = recipes.add_subparsers(dest="what", metavar="WHAT").add_parser(
        "copy", help="copy a recipe, to change it", description="Copy a recipe and the DeepSpeed JSONs it refers to."
    )
    copy.add_argument("name", metavar="NAME", help="as listed by `alignx-ds recipes`")
    copy.add_argument("directory", type=Path, nargs="?", default=Path(), metavar="DEST", help="(default: here)")
    copy.set_defaults(work=_copy)
    text = "print the code that makes a shell complete this command's verbs, options, recipes and keys"
    completion = verbs.add_parser("completion", help=text, description=f"{text[:1].upper()}{text[1:]}.")
    completion.add_argument("shell", choices=SHELLS)
    completion.set_defaults(work=_completion)


def _list(args: argparse.Namespace) -> int:
    from alignx_ds.config import shipped
    from alignx_ds.runtime import console

    found = shipped.recipes()
    width = max(map(len, found))
    for name, path in found.items():
        console.say(f"{name:{width}}  {shipped.summary(path)}")
    return 0


def _copy(args: argparse.Namespace) -> int:
    from alignx_ds.config import parse, shipped
    from alignx_ds.errors import ConfigError, Problem
    from alignx_ds.runtime import console

    known = shipped.recipes()
    if args.name not in known:
        raise ConfigError(Problem("NAME", args.name, f"one of {', '.join(known)}", "correct the name"))
    for path in shipped.copy(args.name, parse.load(known[args.name]), args.directory):
        console.say(str(path))
    return 0


def _completion(args: argparse.Namespace) -> int:
    import argcomplete

    print(argcomplete.shellcode(["alignx-ds"], shell=args.shell))
    return 0
