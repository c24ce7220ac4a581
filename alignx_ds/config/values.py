"""What every value of a config has to be, whatever its key means: texts fit into paths, numbers into 32 bits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from alignx_ds.errors import Problem, holds_secret

LARGEST_INT = 2**31 - 1
LARGEST_FLOAT = 3.4028234e38  # of float32, in which schedules and losses are computed
LONGEST_PATH, LONGEST_NAME = 4000, 255  # in bytes; what file systems take
PROSE = "prompt"  # the last part of the keys whose value may be of any length and have lines


def leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of everything in a nest of mappings and lists."""
    if isinstance(values, dict):
        for name, value in values.items():
            yield from leaves(value, f"{key}.{name}" if key else str(name))
    elif isinstance(values, list):
        for value in values:
            yield from leaves(value, key)
    else:
        yield key, values


def unfit_texts(values: dict[str, Any]) -> Iterator[Problem]:
    for key, text in leaves(values):
        if not isinstance(text, str):
            continue
        if holds_secret(text):  # what a config holds is written down beside every result
            yield Problem(key, "(not shown)", "no key and no password", "export it: HF_TOKEN, or OPENAI_API_KEY")
            continue
        prose = key.rpartition(".")[2] == PROSE
        if not all(c.isprintable() or (prose and c in "\n\t") for c in text):
            yield Problem(key, text, "printable characters", "remove the others")
        elif not prose and (
            len(text.encode()) > LONGEST_PATH or max(len(part.encode()) for part in text.split("/")) > LONGEST_NAME
        ):
            yield Problem(key, text, f"names of at most {LONGEST_NAME} bytes", "shorten it")


def unfit_numbers(values: dict[str, Any]) -> Iterator[Problem]:
    for key, number in leaves(values):
        if isinstance(number, int) and abs(number) > LARGEST_INT:
            yield Problem(key, number, f"at most {LARGEST_INT}", "lower it")
        if isinstance(number, float) and not (math.isfinite(number) and abs(number) <= LARGEST_FLOAT):
            yield Problem(key, number, "a finite number that float32 can hold", "correct it")
