"""The sources that an axis, or the generalist, is trained on, and those that the gate alone learns from."""

from __future__ import annotations

from dataclasses import dataclass, replace

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RoutingSourceConfig, RunConfig, SourceConfig


def training_sources(settings: AxisConfig | GeneralistConfig) -> list[SourceConfig]:
    """Those of its key `train`, each with its own schema and columns; none if the key is empty."""
    given = settings.train if isinstance(settings.train, list) else [{"source": settings.train}]
    found = []
    for source in (SourceConfig(**entry) for entry in given if entry["source"]):
        same = source.schema in ("", settings.schema)
        columns = source.columns or (settings.columns if same else {})
        found.append(replace(source, schema=source.schema or settings.schema, columns=dict(columns)))
    return found


@dataclass(frozen=True)
class RoutingSource:
    """A source of routing rows with its schema and columns, the expert that owns it, and its key in the recipe."""

    owner: str
    key: str
    settings: RoutingSourceConfig


def routing_sources(config: RunConfig) -> list[RoutingSource]:
    """All of a run: the negatives, which the generalist owns, and then those of each axis."""
    found = [RoutingSource("generalist", f"routing.negatives.{n}", s) for n, s in enumerate(config.routing.negatives)]
    for name, axis in config.axes.items():
        for n, given in enumerate(axis.routing):
            schema = given.schema or axis.schema
            columns = given.columns or (axis.columns if schema == axis.schema else {})
            settings = replace(given, schema=schema, columns=dict(columns))
            found.append(RoutingSource(name, f"axes.{name}.routing.{n}", settings))
    return found
