"""Everything about a config that can be known to be wrong before a process group starts, reported at once."""

from __future__ import annotations

from alignx_ds.config.bounds import violations
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.judges.registry import JUDGES
from alignx_ds.evaluation.likelihood import MEASURES
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import model, prompts, rows, trackers, training
from alignx_ds.runtime import launched

TABLES = {"schemas": tuple(SCHEMAS), "judges": (*JUDGES, *MEASURES)}


def check(config: RunConfig, world_size: int, *, weights: bool = True) -> BaseModel:
    """The base model, when nothing is wrong; raises ConfigError with every problem found.

    Without `weights`, as in a dry run, a model on an unreachable hub is known by its shape where that is shipped.
    """
    problems = [
        *launched.problems(),
        *violations(config, TABLES),
        *_output(config),
        *rows.problems(config),
        *model.settings_problems(config),
        *training.problems(config, world_size),
        *trackers.problems(config),
    ]
    base: BaseModel | None = None
    if config.from_scratch and any(p.key.startswith("scratch.") for p in problems):
        raise ConfigError(*_one_each(problems))  # no model of this shape can be built to check against
    try:
        base = model.base_model(config, weights)
        problems += model.problems(config, base, weights)
        problems += prompts.problems(config, base)
    except ConfigError as error:
        problems += error.problems
    if problems or base is None:
        raise ConfigError(*_one_each(problems))
    return base


def _output(c: RunConfig) -> list[Problem]:
    fix = "name a directory that the run may make, e.g. runs/mine"
    return [] if c.output.strip() else [Problem("output", c.output, "a directory", fix)]


def _one_each(problems: list[Problem]) -> list[Problem]:
    """The first problem of each value: one number may break several rules."""
    return list({(p.key, repr(p.given)): p for p in reversed(problems)}.values())[::-1]
