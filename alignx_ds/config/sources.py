"""The sources that an axis, or the generalist, is trained on."""

from __future__ import annotations

from dataclasses import replace

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, SourceConfig


def training_sources(settings: AxisConfig | GeneralistConfig) -> list[SourceConfig]:
    """Those of its key `train`, each with its own schema and columns; none if the key is empty."""
    given = settings.train if isinstance(settings.train, list) else [{"source": settings.train}]
    found = []
    for source in (SourceConfig(**entry) for entry in given if entry["source"]):
        same = source.schema in ("", settings.schema)
        columns = source.columns or (settings.columns if same else {})
        found.append(replace(source, schema=source.schema or settings.schema, columns=dict(columns)))
    return found
