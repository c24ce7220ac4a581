"""Data files of every type and schema, spoiled in every way: read with each record accounted for, or refused by place.

ALIGNX_FUZZ=10 tries ten times as many.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig
from alignx_ds.data.files import READERS
from alignx_ds.data.rows import Record
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.data.splits import read_splits
from alignx_ds.errors import DataError

FUZZ = int(os.environ.get("ALIGNX_FUZZ", "1"))
fuzz = settings(
    max_examples=200 * FUZZ,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.function_scoped_fixture],
)

MC = {"right": 1, "wrong": 0}
GOOD: dict[str, Record] = {
    "alpaca": {"instruction": "do", "input": "", "output": "done"},
    "beavertails": {"prompt": "p", "response": "r", "category": {"harm": True}, "is_safe": False},
    "truthfulqa": {"Question": "q", "Best Answer": "a", "Correct Answers": "a; b", "Incorrect Answers": ["c"]},
    "plain": {"prompt": "p", "response": "r"},
    "truthfulqa_mc": {"question": "q", "mc1_targets": MC, "mc2_targets": {"choices": ["a", "b"], "labels": [1, 0]}},
    "preference": {"instruction": "do", "input": "x", "output": ["better", "worse"]},
    "alpaca_eval": {"instruction": "do", "output": "done", "dataset": "d"},
    "honeset": {"instruction": "do", "category": "c"},
    "xstest": {"prompt": "p", "label": "safe"},
    "xstest_answers": {"prompt": "p", "type": "homonyms", "completion": "r"},
    "prompts": {"prompt": "p", "category": "c"},
    "messages": {"messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}]},
    "labelled": {
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "r"}],
        "needs": ["harmless"],
        "category": "c",
        "harmful": True,
    },
    "sharegpt": {"conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "r"}], "system": "s"},
    "dpo": {"prompt": "p", "chosen": [{"role": "assistant", "content": "r"}], "rejected": "w"},
    "hh_rlhf": {"chosen": "\n\nHuman: p\n\nAssistant: r", "rejected": "Human: p\n\nAssistant: w"},
}
FLAT = [name for name, record in GOOD.items() if all(isinstance(value, str) for value in record.values())]  # CSV's
TEXT = st.one_of(
    st.sampled_from(
        ["", " ", "\0", "\ud800", "\ufeff", "a\r\nb", "\x1b[31m", "<nooutput>", "[bold]", "\u2028", '"', ";;"]
    ),
    st.text(st.characters(), max_size=8),
)
SCALAR = st.one_of(TEXT, st.none(), st.booleans(), st.integers(), st.floats())
VALUE = st.recursive(
    SCALAR, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)


@st.composite
def spoiled(draw: st.DrawFn, schema: str) -> list[Record]:
    """A few records; now and then a column has another value, is missing, or is unknown."""
    records = [copy.deepcopy(GOOD[schema]) for _ in range(draw(st.integers(0, 4)))]
    for record in records:
        if record and draw(st.booleans()):
            column = draw(st.sampled_from([*record, "another"]))
            record[column] = draw(VALUE)
        if record and draw(st.integers(0, 9)) == 0:
            del record[draw(st.sampled_from(list(record)))]
    return records


def account(path: Path, schema: str) -> str:
    """Every record is used or dropped with a reason (""), or the message that refuses the file."""
    try:
        records = Source(str(path), schema, {}).records(held_out=False, count=1, seed=0)
        for parse in (SCHEMAS[schema].parse, SCHEMAS[schema].held_out):
            made = parse(records)
            places = [row.place for row in made.rows] + [dropped.place for dropped in made.dropped]
            assert sorted(places) == sorted(place for place, _ in records)
        assert all(isinstance(SCHEMAS[schema].question(record), str) for _, record in records)
        SCHEMAS[schema].texts(records)
    except DataError as error:
        message = str(error)
        assert message.startswith(str(path))
        assert message.isprintable()
        return message.removeprefix(str(path))
    return ""


def as_json(records: list[Record]) -> bytes:
    return json.dumps(records).encode()


def as_lines(records: list[Record]) -> bytes:
    return "".join(json.dumps(record) + "\r\n" for record in records).encode()


def as_csv(records: list[Record]) -> bytes:
    file = io.StringIO()
    writer = csv.DictWriter(file, list(dict.fromkeys(name for record in records for name in record)))
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue().encode("utf-8", "surrogatepass")


def as_parquet(records: list[Record]) -> bytes:
    file = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist(records), file)
    return file.getvalue()


WRITERS: dict[str, Callable[[list[Record]], bytes]] = {
    ".json": as_json, ".jsonl": as_lines, ".csv": as_csv, ".parquet": as_parquet
}  # fmt: skip


@pytest.mark.parametrize("suffix", READERS)
@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_good_record_is_read_from_every_type_that_can_hold_it(tmp_path: Path, schema: str, suffix: str) -> None:
    path = tmp_path / f"r{suffix}"
    mixed = schema == "truthfulqa" and suffix == ".csv"
    record = GOOD[schema] | ({"Incorrect Answers": "c"} if mixed else {})
    path.write_bytes(WRITERS[suffix]([record]))
    assert account(path, schema) == "" or (suffix == ".csv" and schema not in FLAT)


@pytest.mark.tried(
    "input", "wrong types in any column of every schema", "a line that names file, row and column, or a counted drop"
)
@fuzz
@given(data=st.data(), schema=st.sampled_from(sorted(SCHEMAS)), suffix=st.sampled_from([".json", ".jsonl", ".csv"]))
def test_wrong_values_in_any_column(
    data: st.DataObject, schema: str, suffix: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    records = data.draw(spoiled(schema))
    path = tmp_path_factory.getbasetemp() / f"values{suffix}"
    path.write_bytes(WRITERS[suffix](records))
    message = account(path, schema)
    if message and suffix != ".csv":
        assert message.startswith(", row ")
        assert "column" in message or "expected an object" in message


@fuzz
@given(data=st.data(), schema=st.sampled_from(sorted(SCHEMAS)))
def test_columns_of_the_wrong_type_in_parquet(
    data: st.DataObject, schema: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A column has one type there, so that all of it is spoiled at once."""
    column = data.draw(st.sampled_from([*GOOD[schema], "another"]))
    values = data.draw(st.lists(VALUE, min_size=1, max_size=3))
    path = tmp_path_factory.getbasetemp() / "columns.parquet"
    try:
        path.write_bytes(as_parquet([GOOD[schema] | {column: value} for value in values]))
    except (arrow.ArrowException, OverflowError, UnicodeEncodeError):
        return  # Arrow has no such column
    message = account(path, schema)
    assert not message or message.startswith(", row ") or ": not Parquet" in message


@pytest.mark.tried(
    "input",
    "data files cut off, with flipped bytes, NUL bytes, invalid UTF-8",
    "read and accounted for, or a line that names file and row",
)
@fuzz
@given(
    schema=st.sampled_from(sorted(FLAT)),
    suffix=st.sampled_from(sorted(READERS)),
    at=st.floats(0, 1, exclude_max=True),
    cut=st.booleans(),
    put=st.binary(max_size=6),
)
@example(schema="plain", suffix=".csv", at=0.0, cut=False, put=b"\xef\xbb\xbf")
@example(schema="plain", suffix=".jsonl", at=0.5, cut=False, put=b"\0")
@example(schema="plain", suffix=".parquet", at=0.5, cut=True, put=b"")
def test_files_that_are_cut_off_or_damaged(
    schema: str, suffix: str, at: float, cut: bool, put: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Bytes are put in the place of as many, or of all that follow."""
    whole = WRITERS[suffix]([GOOD[schema]] * 3)
    place = int(at * len(whole))
    path = tmp_path_factory.getbasetemp() / f"damaged{suffix}"
    path.write_bytes(whole[:place] + put + (b"" if cut else whole[place + len(put) :]))
    account(path, schema)


ROW = '{"prompt": "p", "response": "r"}'
HUGE = "word " * 800_000  # 4 MB
CASES: dict[str, tuple[str, bytes, str]] = {  # suffix, content, part of the message ("": none)
    "an empty list": (".json", b"[]", ""),
    "no lines": (".jsonl", b"", ""),
    "blank lines": (".jsonl", b" \r\n\n\r\n", ""),
    "no table": (".csv", b"", ""),
    "a header alone": (".csv", b"prompt,response\n", ""),
    "an empty JSON file": (".json", b"", "not JSON at line 1"),
    "a byte order mark": (".json", b"\xef\xbb\xbf[" + ROW.encode() + b"]", ""),
    "a byte order mark in between": (".jsonl", (ROW + "\n\ufeff" + ROW).encode(), ", row 2: not JSON"),
    "UTF-16": (".jsonl", ROW.encode("utf-16"), "not UTF-8 at byte 0"),
    "Latin-1": (".csv", b"prompt,response\n\xe9,b\n", "not UTF-8 at byte 16"),
    "mixed line endings": (".jsonl", f"{ROW}\r\n{ROW}\n\n{ROW}\r{ROW}".encode(), ""),
    "mixed line endings of CSV": (".csv", b"prompt,response\r\na,b\nc,d\re,f", ""),
    "a key twice": (".jsonl", b'{"prompt": "a", "prompt": "b", "response": "r"}', ", row 1: column 'prompt' occurs"),
    "a key twice in the second row": (".json", f'[{ROW}, {{"prompt": "a", "response": "b", "response": "c"}}]'.encode(),
                                      ", row 2: column 'response' occurs twice"),
    "a key twice within": (".json", b'[{"prompt": "a", "x": [{"y": 1, "y": 2}]}]', "column 'y' occurs"),
    "a column twice": (".csv", b"prompt,prompt,response\na,b,c\n", ": 2 columns are called 'prompt'"),
    "empty columns": (".csv", b"prompt,response,,\na,b,,\n", ""),
    "too few cells": (".csv", b"prompt,response\na\n", ", row 1: column 'response' has no value"),
    "too many cells": (".csv", b"prompt,response\na,b,c\n", ", row 1: more cells than columns"),
    "semicolons": (".csv", b"prompt;response\na;b\n", ", row 1: no column 'prompt'"),
    "an unclosed quote": (".csv", b'prompt,response\na,"b\n', ", row 1: not CSV"),
    "columns that steer terminals": (".jsonl", b'{"a\\nb": 1, "\\u001b[31m": 2}', ", row 1: no column 'prompt'"),
    "columns that don't encode": (".jsonl", b'{"\\ud800": 1}', ", row 1: no column 'prompt'"),
    "a lone surrogate": (".jsonl", b'{"prompt": "a\\ud800", "response": "r"}', ", row 1: column 'prompt' is no valid"),
    "NUL as text": (".jsonl", b'{"prompt": "a\\u0000b", "response": "r"}', ""),
    "a NUL byte": (".jsonl", ROW.encode() + b"\n\0", ", row 2: not JSON"),
    "NaN in a column": (".jsonl", b'{"prompt": NaN, "response": "r"}', ", row 1: column 'prompt' is float"),
    "Infinity elsewhere": (".jsonl", b'{"prompt": "p", "response": "r", "score": -Infinity}', ""),
    "too many digits": (".json", b'[{"prompt": "p", "response": "r", "n": ' + b"9" * 5000 + b"}]", "too many digits"),
    "too many digits in a line": (".jsonl", b'{"n": ' + b"9" * 5000 + b"}", ", row 1: not JSON that can be read"),
    "nested too deep": (".json", b"[" * 50_000, "nested too deep"),
    "nested too deep in a line": (".jsonl", b'{"a": ' + b"[" * 50_000, ", row 1: not JSON that can be read"),
    "deep enough": (".jsonl", b'{"prompt": "p", "response": "r", "x": ' + b"[" * 200 + b"]" * 200 + b"}", ""),
    "a scalar": (".json", b"3", "expected a JSON list"),
    "rows that are no objects": (".json", b"[[1]]", ", row 1: expected an object"),
    "two rows on a line": (".jsonl", (ROW + ROW).encode(), ", row 1: not JSON"),
    "a row on two lines": (".jsonl", ROW.replace(",", ",\n").encode(), ", row 1: not JSON"),
    "a huge cell of JSON": (".json", json.dumps([{"prompt": HUGE, "response": "r"}]).encode(), ""),
    "a huge cell of lines": (".jsonl", json.dumps({"prompt": HUGE, "response": "r"}).encode(), ""),
    "a huge cell of CSV": (".csv", f"prompt,response\n{HUGE},r\n".encode(), ""),
    "a huge cell of Parquet": (".parquet", as_parquet([{"prompt": HUGE, "response": "r"}]), ""),
    "no Parquet": (".parquet", b"PAR1", "not Parquet"),
}  # fmt: skip


@pytest.mark.tried(
    "input",
    "duplicate keys, deep nesting, huge numbers, missing columns, mixed line ends …",
    "each read or refused as the table of the test states, never a traceback",
)
@pytest.mark.parametrize(("suffix", "content", "expected"), CASES.values(), ids=CASES)
def test_one_odd_file(tmp_path: Path, suffix: str, content: bytes, expected: str) -> None:
    (tmp_path / f"r{suffix}").write_bytes(content)
    message = account(tmp_path / f"r{suffix}", "plain")
    assert expected in message and bool(expected) == bool(message), message


def not_utf8() -> Any:
    """A text column that Parquet holds and nobody can read."""
    offsets, text = arrow.py_buffer((0).to_bytes(4, "little") + (2).to_bytes(4, "little")), arrow.py_buffer(b"\xff\xfe")
    return arrow.Array.from_buffers(arrow.string(), 1, [None, offsets, text])


FIELDS = arrow.StructArray.from_arrays([arrow.array([1]), arrow.array([2])], names=["x", "x"])
COLUMNS: dict[str, tuple[Any, str]] = {
    "text that is no UTF-8": (not_utf8(), ", row 1: column 'x' can't be read"),
    "a date after the year 9999": (arrow.array([2**30], arrow.date32()), ", row 1: column 'x' can't be read"),
    "a time after the year 9999": (arrow.array([2**60], arrow.timestamp("us")), ", row 1: column 'x' can't be read"),
    "two fields of one name": (FIELDS, ", row 1: column 'x' can't be read"),
    "bytes that nobody asks for": (arrow.array([b"\xff"]), ""),
}


@pytest.mark.parametrize(("column", "expected"), COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_parquet_that_python_has_no_form_for(tmp_path: Path, column: Any, expected: str) -> None:
    table = arrow.table({"prompt": ["p"], "response": ["r"], "x": column})
    parquet.write_table(table, tmp_path / "r.parquet")
    message = account(tmp_path / "r.parquet", "plain")
    assert expected in message and bool(expected) == bool(message), message


def test_two_columns_of_parquet_with_one_name(tmp_path: Path) -> None:
    columns = [arrow.array([text]) for text in "abc"]
    parquet.write_table(
        arrow.Table.from_arrays(columns, names=["prompt", "prompt", "response"]), tmp_path / "r.parquet"
    )
    assert account(tmp_path / "r.parquet", "plain") == ": 2 columns are called 'prompt'; rename all but one"


@pytest.mark.parametrize("flag", ["yes", 1, ["x"], {"y": True}])
def test_a_flag_of_beavertails_is_true_or_false(tmp_path: Path, flag: object) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(as_json([GOOD["beavertails"] | {"category": {"harm": flag}}]))
    assert account(path, "beavertails").startswith(", row 1: column 'category' has ")


@pytest.mark.parametrize("targets", [{"a": 1, " a": 0}, {"choices": ["a", "a"], "labels": [1, 0]}])
def test_an_answer_is_not_right_and_wrong_at_once(tmp_path: Path, targets: object) -> None:
    path = tmp_path / "r.json"
    path.write_bytes(as_json([GOOD["truthfulqa_mc"] | {"mc2_targets": targets}]))
    assert account(path, "truthfulqa_mc").startswith(", row 1: column 'mc2_targets' has 'a' as right and as wrong")


@fuzz
@given(copies=st.lists(st.integers(0, 9), min_size=30, max_size=60))
def test_duplicate_rows_are_all_accounted_for(
    tiny_config: RunConfig, tmp_path_factory: pytest.TempPathFactory, copies: list[int]
) -> None:
    """From the file to both sides of the split."""
    path = tmp_path_factory.getbasetemp() / "duplicates.jsonl"
    path.write_bytes(as_lines([{"prompt": f"p{n}", "response": "r"} for n in [*range(40), *copies]]))
    tiny_config.generalist = GeneralistConfig()
    tiny_config.axes = {"kind": AxisConfig(prompt="be kind", schema="plain", train=str(path))}
    rows = read_splits(tiny_config)
    used = [rows.train["kind"], rows.held_out["kind"]]
    assert sum(len(side.rows) + len(side.dropped) for side in used) == 40 + len(copies)
