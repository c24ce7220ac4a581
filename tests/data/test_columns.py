"""Records under their schema's column names: each column found and of its type, or named with file and row."""

from __future__ import annotations

from typing import Any

import pytest
from reading import GOOD

from alignx_ds.data.rows import Dropped, Record
from alignx_ds.data.schemas import SCHEMAS, canonical, schema_problem
from alignx_ds.errors import DataError


def named(record: Record, schema: str, renamed: dict[str, str] | None = None) -> Record:
    """The record under the schema's column names."""
    ((_, found),) = canonical([("rows.json, row 2", record)], schema, renamed or {}).usable
    return found


@pytest.mark.parametrize("schema", SCHEMAS)
def test_good_records_pass_and_other_columns_are_left_out(schema: str) -> None:
    columns = SCHEMAS[schema].columns
    assert {name for name, column in columns.items() if not column.optional} <= set(GOOD[schema]) <= set(columns)
    assert named(GOOD[schema] | {"something else": 1}, schema) == dict.fromkeys(columns) | GOOD[schema]


def test_a_missing_column_is_named() -> None:
    for schema, record in GOOD.items():
        for column in (c for c in record if not SCHEMAS[schema].columns[c].optional):
            broken = {key: value for key, value in record.items() if key != column}
            with pytest.raises(DataError, match=rf"^rows\.json, row 2: no column '{column}'"):
                named(broken, schema)


@pytest.mark.parametrize("value", [3, [1], [None]])
def test_a_column_of_the_wrong_type_is_named(value: Any) -> None:
    for schema, record in GOOD.items():
        for column in record:
            with pytest.raises(DataError, match=rf"^rows\.json, row 2: column '{column}'"):
                named(record | {column: value}, schema)


def test_a_record_without_a_value_is_dropped_and_one_without_an_optional_value_is_not() -> None:
    """Whether the value is null or the column is absent in this record."""
    for schema, record in GOOD.items():
        for column in record:
            for spoiled in (record | {column: None}, {k: v for k, v in record.items() if k != column}):
                found = canonical([("row 1", record), ("row 2", spoiled), ("row 3", record)], schema, {})
                optional = SCHEMAS[schema].columns[column].optional
                assert [place for place, _ in found.usable] == ["row 1", *(["row 2"] if optional else []), "row 3"]
                assert found.dropped == ([] if optional else [Dropped("row 2", f"no value in column '{column}'")])


def test_a_mapping_with_values_of_the_wrong_type_is_named() -> None:
    with pytest.raises(
        DataError, match=r"row 2: column 'category' has int at 'theft', the beavertails schema needs bool"
    ):
        named(GOOD["beavertails"] | {"category": {"theft": 1}}, "beavertails")


@pytest.mark.parametrize(
    ("schema", "column", "value"),
    [
        ("plain", "response", "\ud800"),
        ("preference", "output", ["a", "\ud800"]),
        ("truthfulqa_mc", "mc1_targets", {"\ud800": 1}),
    ],
)
def test_text_that_is_no_unicode_is_named(schema: str, column: str, value: Any) -> None:
    with pytest.raises(DataError, match=rf"^rows\.json, row 2: column '{column}' is no valid Unicode"):
        named(GOOD[schema] | {column: value}, schema)


@pytest.mark.parametrize("record", [["a", "b"], None])
def test_a_record_without_columns_is_named(record: Any) -> None:
    with pytest.raises(DataError, match=r"^rows\.json, row 2: expected an object with columns"):
        named(record, "plain")


@pytest.mark.parametrize("schema", ["plain", "truthfulqa"])  # without and with aliases
def test_a_mapping_reads_columns_of_any_name(schema: str) -> None:
    renamed = {name: f"my {name}" for name in GOOD[schema]}
    record: Record = {renamed[name]: value for name, value in GOOD[schema].items()}
    assert named(record, schema, renamed) == dict.fromkeys(SCHEMAS[schema].columns) | GOOD[schema]
    missing = next(iter(renamed))
    with pytest.raises(DataError, match=f"row 2: no column 'my {missing}', which the {schema} schema needs"):
        named(GOOD[schema], schema, renamed)


def test_a_mapping_may_swap_columns() -> None:
    swapped = {"prompt": "response", "response": "prompt"}
    assert named(GOOD["plain"], "plain", swapped) == {"prompt": "Hi", "response": "Hello"}


def test_a_mapping_of_a_column_that_the_schema_does_not_have_is_named() -> None:
    assert schema_problem("plain", {"prompt": "anything", "response": "anything"}) == ""
    problem = schema_problem("plain", {"completion": "text"})
    assert problem == "the plain schema has no column completion; it has prompt, response"
