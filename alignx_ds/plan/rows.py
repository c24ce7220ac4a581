"""Problems of what a config reads: rows of the axes and of the generalist, sets of questions, texts, judges' files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from alignx_ds.config.bounds import violations
from alignx_ds.config.schema import (
    FUSIONS,
    IMITATING,
    JUDGED,
    MERGES,
    NO_OUTPUT_CALIBRATION,
    PAIRED,
    REGULARISED,
    RESTORED,
    AxisConfig,
    GeneralistConfig,
    RunConfig,
)
from alignx_ds.config.sources import routing_sources, training_sources
from alignx_ds.data.schemas import LABELS_HARM, QUESTIONS_ONLY, SCHEMAS, schema_problem
from alignx_ds.data.sources import WORLD, names_a_source
from alignx_ds.data.world.rows import SOURCES
from alignx_ds.errors import Problem
from alignx_ds.evaluation.endpoint import ANSWERS, address_problems
from alignx_ds.evaluation.endpoint import problems as endpoint_problems
from alignx_ds.evaluation.judges.registry import JUDGES

ENDPOINT_JUDGES = frozenset({"alpaca_eval", "honeset"})
COMPARING_JUDGES = frozenset({"alpaca_eval", "offline_pairwise"})  # with reference outputs
OTHERS = ("base", "generalist", "sequential", "mixed", "alignx", REGULARISED, RESTORED, NO_OUTPUT_CALIBRATION)
RESERVED = frozenset({*OTHERS, *MERGES, *FUSIONS})


def problems(c: RunConfig) -> Iterator[Problem]:
    yield from _axes(c)
    yield from _generalist(c)
    yield from _routing(c)
    yield from _sets(c)
    yield from _texts(c)
    yield from _judges(c)


def _axes(c: RunConfig) -> Iterator[Problem]:
    if not c.axes:
        yield Problem("axes", {}, "at least one axis", "add an entry, e.g. axes.helpful in launch/recipes/world.yaml")
    for name, axis in c.axes.items():
        key = f"axes.{name}"
        if name in RESERVED or not name.isidentifier():
            yield Problem(key, name, f"a plain word other than {', '.join(sorted(RESERVED))}", "rename the axis")
        yield from _trained_on(key, axis, c)
        yield from _objective(key, axis)
        if not all(text.strip() for text in axis.refusals):
            yield Problem(f"{key}.refusals", axis.refusals, "texts", "remove the empty ones")
        if axis.refusals and LABELS_HARM.isdisjoint(s.schema for s in training_sources(axis)):
            fix = "remove it, or train on a source whose rows say which prompts ask for harm"
            yield Problem(
                f"{key}.refusals", axis.refusals, "nothing without rows of beavertails or xstest_answers", fix
            )


def _objective(key: str, axis: AxisConfig) -> Iterator[Problem]:
    """Of an objective whose rows the axis doesn't have, or that would not be used."""
    if axis.objective != "sft" and axis.adapter:
        fix = "remove one of the two: with an adapter nothing is trained"
        yield Problem(f"{key}.objective", axis.objective, "sft beside an adapter", fix)
    if axis.noise_layers and (axis.objective != "sft" or axis.adapter):
        expected = "an empty list with another objective than sft, or with an adapter"
        yield Problem(f"{key}.noise_layers", axis.noise_layers, expected, "remove one of the two")
    if axis.objective in (*PAIRED, *JUDGED):
        schemas = {s.schema for s in training_sources(axis) if s.schema in SCHEMAS}
        alone = sorted(name for name in schemas if not SCHEMAS[name].has_bad_answers)
        if alone and len(alone) == len(schemas):
            feeding = ", ".join(name for name, schema in SCHEMAS.items() if schema.has_bad_answers)
            fix = f"rows of the {alone[0]} schema have no bad answers; those of {feeding} have"
            yield Problem(f"{key}.objective", axis.objective, f"one of {', '.join(IMITATING)}", fix)
        elif alone and axis.objective in PAIRED and not axis.imitates():
            fix = f"with it, rows of the {alone[0]} schema, which have no bad answers, are imitated; or remove them"
            yield Problem(f"{key}.sft_weight", axis.sft_weight, "above 0", fix)
        if axis.join.share:
            fix = "set it to 0, or use sft: joined rows have no bad answers"
            yield Problem(f"{key}.join.share", axis.join.share, f"0 with the objective {axis.objective}", fix)


def _generalist(c: RunConfig) -> Iterator[Problem]:
    g = c.generalist
    if g.train:
        yield from _trained_on("generalist", g, c)
    elif g.held_out:
        fix = "set generalist.train too, or remove generalist.held_out"
        yield Problem("generalist.held_out", g.held_out, "nothing without generalist.train", fix)


def _trained_on(key: str, settings: AxisConfig | GeneralistConfig, c: RunConfig) -> Iterator[Problem]:
    sources = training_sources(settings)
    if not sources:
        yield Problem(f"{key}.train", settings.train, "a source", "name a file, a data set or 'world'")
    for number, s in enumerate(sources):
        listed = isinstance(settings.train, list)
        place = f"{key}.train.{number}" if listed else key
        yield from violations(s, {"schemas": SCHEMAS}, f"{place}.") if listed else ()
        if s.schema in QUESTIONS_ONLY:
            fix = "list it under evaluation.sets, and train on another source"
            yield Problem(f"{place}.schema", s.schema, "a schema with answers to imitate", fix)
        yield from _source(place, "source" if listed else "train", s.source, s.schema, s.columns)
        yield from _needs(f"{place}.needs", s.needs, c)
    if len({bool(s.weight) for s in sources}) > 1:
        weights = [s.weight for s in sources]
        yield Problem(f"{key}.train", weights, "a weight for every source, or for none", "add the others, e.g. 1")
    if len({(s.source, s.schema) for s in sources}) < len(sources):
        yield Problem(f"{key}.train", [s.source for s in sources], "different sources", "remove one of the two")
    yield from _held_out(key, settings)


def _routing(c: RunConfig) -> Iterator[Problem]:
    known: set[tuple[str, str, str, str]] = set()
    for given in routing_sources(c):
        key, s = given.key, given.settings
        negative = given.owner == "generalist"
        if not s.schema and negative:
            yield Problem(f"{key}.schema", "", "a schema", f"say how {s.source} is written; any schema has prompts")
        yield from _only(f"{key}.only", s.only, s.schema)
        if negative and s.schema in LABELS_HARM and s.only != "safe":
            fix = "add only: safe; prompts that ask for harm are no negatives"
            yield Problem(f"{key}.only", s.only, "safe", fix)
        yield from _source(key, "source", s.source, s.schema, s.columns)
        if (what := (given.owner, s.source, s.schema, s.only)) in known:
            yield Problem(f"{key}.source", s.source, "different sources", "remove one of the two")
        known.add(what)


def _only(key: str, only: str, schema: str) -> Iterator[Problem]:
    if only and schema in SCHEMAS and schema not in LABELS_HARM:
        fix = f"remove it: rows of the {schema} schema do not say whether their prompts ask for harm"
        yield Problem(key, only, "nothing", fix)


def _held_out(key: str, settings: AxisConfig | GeneralistConfig) -> Iterator[Problem]:
    if settings.held_out:
        yield from _source(key, "held_out", settings.held_out, *settings.judged_as())
    elif any(s.source == WORLD for s in training_sources(settings)):
        yield Problem(f"{key}.held_out", "", WORLD, "set it to 'world': the world generates its held-out rows")


def _sets(c: RunConfig) -> Iterator[Problem]:
    for name, s in c.evaluation.sets.items():
        if name in RESERVED or name in c.axes or not name.isidentifier():
            fix = "rename the set; an axis or a system may have this name already"
            yield Problem(f"evaluation.sets.{name}", name, "a plain word of its own", fix)
        yield from _source(f"evaluation.sets.{name}", "source", s.source, s.schema, s.columns)
        yield from _only(f"evaluation.sets.{name}.only", s.only, s.schema)
        yield from _needs(f"evaluation.sets.{name}.needs", s.needs, c)
        if not (s.judge or s.needs or s.schema == "labelled"):
            fix = "name a judge of the answers, or say what the prompts need, so that the gate is measured"
            yield Problem(f"evaluation.sets.{name}.judge", "", "a judge", fix)


def _needs(key: str, needs: list[str], c: RunConfig) -> Iterator[Problem]:
    for need in needs:
        if need not in c.expert_names:
            yield Problem(key, need, f"one of {', '.join(c.expert_names)}", "name axes, or generalist for none")
    if "generalist" in needs and len(needs) > 1:
        yield Problem(key, needs, "axes, or generalist alone", "generalist means that no axis is needed; remove one")


def _texts(c: RunConfig) -> Iterator[Problem]:
    if not c.from_scratch:
        return
    if not c.scratch.texts:
        yield Problem("scratch.texts", {}, "at least one source", "name what the base model is trained on")
    for name, text in c.scratch.texts.items():
        yield from _source(f"scratch.texts.{name}", "source", text.source, text.schema, text.columns)


def _source(key: str, name: str, source: str, schema: str, columns: dict[str, str]) -> Iterator[Problem]:
    if schema not in SCHEMAS:
        return
    if schema not in SOURCES.get(source, (schema,)):
        yield Problem(f"{key}.{name}", source, "a file", f"{source} has no rows in the {schema} schema")
    if not names_a_source(source):
        fix = "no such file; check the path"
        yield Problem(f"{key}.{name}", source, f"a file, a data set's id, or '{WORLD}'", fix)
    if problem := schema_problem(schema, columns):
        yield Problem(f"{key}.columns", columns, "columns of the schema", problem)


def _judges(c: RunConfig) -> Iterator[Problem]:
    """Of the server that answers, and of the judges that this config names; the settings of the others are not used."""
    if c.evaluation.endpoint:
        yield from address_problems(c.evaluation.endpoint, ANSWERS.address)
    if c.evaluation.best_of and not any(axis.judge in JUDGES for axis in c.axes.values()):
        fix = "give an axis such a judge, or leave best_of at 0"
        yield Problem("evaluation.best_of", c.evaluation.best_of, "an axis with a judge of answers", fix)
    named = {axis.judge for axis in c.axes.values()} | {s.judge for s in c.evaluation.sets.values()}
    if named & ENDPOINT_JUDGES:
        yield from endpoint_problems(c.judges)
    if "offline_safety" in named:
        yield from _classifier(c)
    if "offline_pairwise" in named and not Path(c.judges.preferences).is_file():
        fix = "set it to AlpacaEval's annotations, with both outputs"
        yield Problem("judges.preferences", c.judges.preferences, "a file of preferences", fix)
    if named & COMPARING_JUDGES and c.judges.reference and not Path(c.judges.reference).is_file():
        fix = "no such file; leave it empty if the rows have their own references"
        yield Problem("judges.reference", c.judges.reference, "a file", fix)


def _classifier(c: RunConfig) -> Iterator[Problem]:
    rows = c.judges.classifier_rows
    if rows in ("", WORLD) or not names_a_source(rows):
        fix = "set it to BeaverTails rows that the judge may learn from"
        yield Problem("judges.classifier_rows", rows, "a file, or a data set's id", fix)
    if c.judges.classifier_held_out < c.data.held_out_share:
        fix = "raise it, or the judge learns from questions that the axis is judged on"
        allowed = f"at least data.held_out_share={c.data.held_out_share}"
        yield Problem("judges.classifier_held_out", c.judges.classifier_held_out, allowed, fix)
