"""The runs of `alignx-ds study scaling-axes`: which there are, what they share, and how they are made.

All runs of a seed are of one recipe. They differ in the number of its axes, in the rows of its smallest axis, or in the
experts' rank.
"""

from __future__ import annotations

import copy
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

from alignx_ds.config import parse
from alignx_ds.config.schema import MERGES, RunConfig
from alignx_ds.data.inputs import read_inputs
from alignx_ds.errors import EXIT_INTERRUPTED, EXIT_STOPPED, ConfigError, Problem, Stopped, UserError
from alignx_ds.plan import checks
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import console, signals
from alignx_ds.study.studied_run import FREE_JUDGES, StudiedRun

Scores = dict[str, dict[str, float]]  # by system, by axis: 0–100
OWN = "own specialist"  # each axis by its own specialist: a system of several models
ALIGNED = "alignx"


@dataclass(frozen=True)
class Curves:
    """What is varied, each by itself; the rows and the rank with all axes."""

    axes: tuple[int, ...]
    rows: tuple[int, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Variant:
    """One run: its name, its config, and whether its baselines are made too."""

    name: str
    config: RunConfig
    baselines: bool = True

    @property
    def directory(self) -> Path:
        return Path(self.config.output)

    @property
    def recipe(self) -> Path:
        """Its config as a recipe, beside its directory."""
        return self.directory.with_suffix(".yaml")


def smallest_axis(config: RunConfig) -> str:
    return min(config.axes, key=lambda name: rows_of(config, name))


def rows_of(config: RunConfig, axis: str) -> int:
    return config.axes[axis].rows or config.data.train_rows


def check(config: RunConfig, curves: Curves) -> None:
    """Raises ConfigError for a number of axes that the recipe does not have, or that leaves out its smallest axis.

    Also for an axis whose answers a study can't judge.
    """
    for name, axis in config.axes.items():
        if axis.judge not in FREE_JUDGES:
            wanted = ", ".join(FREE_JUDGES)
            raise ConfigError(Problem(f"axes.{name}.judge", axis.judge, f"one of {wanted}", "a study calls no model"))
    needed = list(config.axes).index(smallest_axis(config)) + 1
    if min(curves.axes) < needed or max(curves.axes) > len(config.axes):
        fix = f"the smallest axis, {smallest_axis(config)}, is number {needed}; give numbers that have it"
        raise ConfigError(Problem("--axes", list(curves.axes), f"{needed} to {len(config.axes)} axes", fix))


def variants(config: RunConfig, curves: Curves, seed: int, root: Path) -> Iterator[Variant]:
    """The runs of a seed, the one with all axes first: the others share its specialists.

    The fusions, whose training takes longest, are made in that one alone. For another rank nothing but AlignX is made.
    """
    place, count, small = root / f"seed-{seed}", max(curves.axes), smallest_axis(config)

    def made(name: str, axes: int, specialists: str, make: Sequence[str]) -> RunConfig:
        c = copy.deepcopy(config)
        c.output, c.seed, c.specialists = str(place / name), seed, specialists and str(place / specialists)
        c.axes = dict(list(c.axes.items())[:axes])
        c.baselines.make = list(make)
        return c

    merges = [name for name in config.baselines.make if name in MERGES]
    for axes in sorted(curves.axes, reverse=True):
        make = config.baselines.make if axes == count else merges
        yield Variant(f"axes-{axes}", made(f"axes-{axes}", axes, "specialists", make))
    for rows in curves.rows:
        if rows != rows_of(config, small):
            c = made(f"rows-{rows}", count, f"specialists-rows-{rows}", merges)
            c.axes[small] = replace(c.axes[small], rows=rows)
            yield Variant(f"rows-{rows}", c)
    for rank in curves.ranks:
        if rank != config.experts.rank:
            c = made(f"rank-{rank}", count, "", ())
            c.experts = replace(c.experts, rank=rank)
            yield Variant(f"rank-{rank}", c, baselines=False)


def make(variant: Variant, small: str) -> Scores:
    """Every system's scores on every axis; the run is made, or goes on, unless it is finished. Raises Stopped."""
    if not _is_finished(variant):
        variant.directory.parent.mkdir(parents=True, exist_ok=True)
        manifest.write_text(variant.recipe, parse.to_yaml(variant.config))
        if variant.config.specialists and variant.name.startswith("rows-"):
            others = [axis for axis in variant.config.axes if axis != small]
            _share_specialists(variant.directory.parent / "specialists", Path(variant.config.specialists), others)
        console.heading(f"{variant.directory}")
        _start("run" if variant.baselines else "align", variant.recipe)
    run = FinishedRun.open(variant.directory)
    if not variant.baselines:
        inputs = read_inputs(run.config, checks.check(run.config, max(1, run.config.align.ep_size)))
        studied = StudiedRun(run, inputs.base, inputs.data, {})
        return {ALIGNED: studied.scores(studied.aligned())}
    assert run.report is not None, f"{variant.directory} has no report of its model"
    systems, axes = run.report["systems"], run.report["scored"]
    scores = {name: {axis: found[axis] for axis in axes} for name, found in systems.items() if name not in axes}
    return scores | {OWN: {axis: systems[axis][axis] for axis in axes}}


def _is_finished(variant: Variant) -> bool:
    """Whether the directory has what this config makes."""
    out = Outputs.of(variant.config)
    if not (out.model / manifest.NAME).is_file() or not out.config.is_file():
        return False
    same = out.config.read_text(encoding="utf-8") == parse.to_yaml(variant.config)
    return same and (not variant.baselines or FinishedRun.open(variant.directory).report is not None)


def _share_specialists(source: Path, target: Path, axes: Sequence[str]) -> None:
    """Copy the finished specialists of these axes, unless they are there."""
    for axis in axes:
        if not (target / axis / manifest.NAME).is_file():
            shutil.copytree(source / axis, target / axis, dirs_exist_ok=True)


def _start(verb: str, recipe: Path) -> None:
    """`alignx-ds VERB RECIPE` as a process of its own, which gets this one's signals. Raises Stopped and UserError."""
    process = subprocess.Popen([sys.executable, "-m", "alignx_ds", verb, str(recipe)])

    def forward(number: int, frame: FrameType | None) -> None:
        process.send_signal(number)

    with signals.signal_handler(forward):
        code = process.wait()
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        raise Stopped(f"the run of {recipe}", code)
    if code:
        raise UserError(f"{recipe}: its run ended with code {code}, for the reason above")
