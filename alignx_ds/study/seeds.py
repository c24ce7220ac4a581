"""A study of several runs that differ in their seed: every number is their mean and has a standard deviation."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean, stdev
from typing import Any

from alignx_ds.errors import DataError

OF_ONE_RUN = ("axis_of", "harmful", "pca", "tsne")  # prompts in a plane, which have no mean: the first run's


class Averaged(float):
    """The mean of a number of several runs; formatted, it is followed by the sample standard deviation.

    Arithmetic gives a plain float; `mean` below keeps the runs apart.
    """

    by_run: tuple[float, ...]

    def __new__(cls, by_run: Sequence[float]) -> Averaged:
        made = super().__new__(cls, fmean(by_run))
        made.by_run = tuple(by_run)
        return made

    @property
    def deviation(self) -> float:
        return stdev(self.by_run)

    def __format__(self, spec: str) -> str:
        return f"{float(self):{spec}} ± {self.deviation:{spec}}"


def mean(numbers: Iterable[float]) -> float:
    """Of plain numbers, or of averaged ones, run by run; a number among these that is alike in all runs is plain."""
    given = list(numbers)
    runs = next((len(number.by_run) for number in given if isinstance(number, Averaged)), 0)
    if not runs:
        return fmean(given)
    by_run = zip(*(n.by_run if isinstance(n, Averaged) else (n,) * runs for n in given), strict=True)
    return Averaged([fmean(of_one) for of_one in by_run])


def averaged(contents: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The contents of one study of two or more runs, number by number. Raises DataError where they do not match."""
    same = {key: contents[0][key] for key in OF_ONE_RUN if key in contents[0]}
    found = _averaged([{k: v for k, v in c.items() if k not in same} for c in contents], "")
    assert isinstance(found, dict)
    return found | same


def _averaged(values: list[Any], where: str) -> Any:
    first = values[0]
    if all(value == first and isinstance(value, bool) == isinstance(first, bool) for value in values):
        return first
    if any(value is None for value in values):
        return None  # some run has no such number, e.g. refusals lost where nothing was refused
    if all(isinstance(value, dict) for value in values) and all(value.keys() == first.keys() for value in values):
        return {key: _averaged([value[key] for value in values], f"{where}.{key}") for key in first}
    if all(isinstance(value, list) for value in values) and all(len(value) == len(first) for value in values):
        return [_averaged(list(items), f"{where}[{n}]") for n, items in enumerate(zip(*values, strict=True))]
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return Averaged(values)
    fix = "give finished runs of one recipe that differ in their seed alone"
    raise DataError(f"the studies of the runs differ in {where.lstrip('.')}: {fix}")


def deviations(content: Any) -> Any:
    """The standard deviations in what `averaged` returned, with its keys. Numbers alike in all runs are left out."""
    if isinstance(content, Averaged):
        return content.deviation
    if isinstance(content, dict):
        found = {key: deviations(value) for key, value in content.items()}
        return {key: value for key, value in found.items() if value is not None} or None
    if isinstance(content, list):
        listed = [deviations(value) for value in content]
        return listed if any(value is not None for value in listed) else None
    return None
