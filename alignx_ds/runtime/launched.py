"""The environment variables that a launcher sets: the rank of this process, and the number of ranks.

An earlier job or a container's image may have left some of them. Those that say no more than "one rank" are ignored;
others that no launcher sets alone are problems.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

from alignx_ds.errors import Problem

OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # of a process that is the only rank
HIGHEST_PORT = 65535
FIX = "unset it, or start the ranks with a launcher"


@dataclass(frozen=True)
class Launched:
    """This process's place among the ranks that a launcher has started."""

    rank: int
    world_size: int
    local_rank: int


def launched() -> Launched | None:
    """None when no launcher has started this process, or when its variables are wrong: see `problems`."""
    given = _given()
    if not {"RANK", "WORLD_SIZE"} <= given.keys() or any(problems()):
        return None
    return Launched(*(int(given.get(name, alone)) for name, alone in ALONE.items()))


def problems() -> Iterator[Problem]:
    """Of the variables, as far as they are not just left over."""
    given = _given()
    both = {"RANK", "WORLD_SIZE"} & given.keys()
    if len(both) == 1:
        (name,) = both
        if given[name] != ALONE[name]:
            (missing,) = {"RANK", "WORLD_SIZE"} - both
            yield Problem(name, given[name], f"{missing} beside it", FIX)
    if len(both) < 2:
        return
    numbers = {name: int(text) for name, text in given.items() if text.isdecimal()}
    for name in given.keys() - numbers.keys():
        yield Problem(name, given[name], "a whole number", FIX)
    if numbers.keys() == given.keys() and not numbers["RANK"] < numbers["WORLD_SIZE"]:
        yield Problem("RANK", given["RANK"], f"a number below WORLD_SIZE={given['WORLD_SIZE']}", FIX)
    port = os.environ.get("MASTER_PORT", "0").strip()
    if given["WORLD_SIZE"] != "1" and not (port.isdecimal() and int(port) <= HIGHEST_PORT):
        yield Problem("MASTER_PORT", port, "a port number", "correct it: every rank needs the same one")


def _given() -> dict[str, str]:
    found = {name: os.environ.get(name) or os.environ.get(other, "") for name, other in OPENMPI.items()}
    return {name: text.strip() for name, text in found.items() if text.strip()}
