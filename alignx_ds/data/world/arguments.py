"""The verb `world`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_verbs(verbs: Any) -> None:
    world = verbs.add_parser(
        "world",
        help="write the embedded world's rows as files",
        description="Write the embedded world's rows as files in the published schemas.",
    )
    world.add_argument("directory", type=Path)
    world.add_argument("--rows", type=int, default=1000, help="per file (default: %(default)s)")
    world.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    world.set_defaults(work=_world)


def _world(args: argparse.Namespace) -> int:
    from alignx_ds.data.world.files import write_files

    print(*write_files(args.directory, args.rows, args.seed), sep="\n")
    return 0
