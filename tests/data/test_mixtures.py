"""Several sources for one axis: their shares of the rows, their order, and what is wrong with a list of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from reading import assert_splits_add_up, questions, write_lines

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.config.sources import training_sources
from alignx_ds.data.rows import Record
from alignx_ds.data.splits import DataSplits, read_splits
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.plan import rows as plan
from alignx_ds.plan.accounts import accounts

WriteRecipe = Callable[..., Path]


@pytest.fixture
def split(one_axis: RunConfig, tmp_path: Path) -> Callable[..., DataSplits]:
    """Splits of sources with so many rows, and with weights if there are any."""

    def read(sizes: list[int], weights: list[float], rows: int = 0) -> DataSplits:
        paths = [write_lines(tmp_path / f"{n}.jsonl", questions(size, start=1000 * n)) for n, size in enumerate(sizes)]
        one_axis.axes["kind"].train = [
            {"source": str(path), "weight": weight}
            for path, weight in zip(paths, weights or [0.0] * len(sizes), strict=True)
        ]
        one_axis.axes["kind"].held_out = str(write_lines(tmp_path / "h.jsonl", questions(9, start=3500)))
        one_axis.axes["kind"].rows = rows
        splits = read_splits(one_axis)
        assert_splits_add_up(splits)
        return splits

    return read


def counts(splits: DataSplits) -> list[int]:
    found = splits.train["kind"]
    by_file = Counter(row.place.split(",")[0] for row in found.rows)
    assert [by_file[name] for name, _ in found.by_source] == [count for _, count in found.by_source]
    return [count for _, count in found.by_source]


@pytest.mark.parametrize(
    ("sizes", "weights", "limit", "expected"),
    [
        ([40, 20], [], 0, [40, 20]),
        ([40, 20], [], 30, [20, 10]),
        ([40, 20], [1, 1], 0, [20, 20]),
        ([40, 20], [3, 1], 0, [40, 13]),
        ([40, 20, 60], [1, 1, 2], 40, [10, 10, 20]),
        ([40, 20], [0.9, 0.1], 20, [18, 2]),
    ],
)
def test_sources_share_the_rows_by_weight_or_by_size(
    split: Callable[..., DataSplits], sizes: list[int], weights: list[float], limit: int, expected: list[int]
) -> None:
    splits = split(sizes, weights, limit)
    assert counts(splits) == expected
    dropped = splits.train["kind"].reasons()
    assert sum(dropped.values()) == sum(sizes) - sum(expected)
    reason = f"more than {limit} rows" if limit else "more than its source's weight allows"
    assert set(dropped) <= {reason, "more than its source's weight allows"} and (reason in dropped) == (
        sum(sizes) > sum(expected)
    )
    first = splits.train["kind"].rows[: sum(expected) // 2]
    shares = Counter(row.place.split(",")[0] for row in first)
    for (name, _), count in zip(splits.train["kind"].by_source, expected, strict=True):
        assert abs(shares[name] - count / 2) <= 1, "every beginning of the rows has the shares of all"
        assert any(line.split() == [f"{count}", "of", "them", "from", *name.split()] for line in accounts(splits))


def test_sources_may_have_schemas_and_columns_of_their_own(one_axis: RunConfig, tmp_path: Path) -> None:
    """Without a held-out source, a share of the questions of each is held out."""
    plain = [{"ask": r["prompt"], "say": r["response"]} for r in questions(60)]
    other: list[Record] = [{"instruction": r["prompt"], "output": "hello"} for r in questions(60, start=1000)]
    axis = one_axis.axes["kind"]
    axis.columns = {"prompt": "ask", "response": "say"}
    axis.train = [
        {"source": str(write_lines(tmp_path / "a.jsonl", plain))},
        {"source": str(write_lines(tmp_path / "b.jsonl", other)), "schema": "alpaca"},
    ]
    assert list(plan._trained_on("axes.kind", axis, one_axis)) == []
    splits = read_splits(one_axis)
    train, held_out = splits.train["kind"], splits.held_out["kind"]
    assert len(train.rows) + len(held_out.rows) == 120
    assert [count > 0 for _, count in (*train.by_source, *held_out.by_source)] == [True] * 4
    axis.train[1]["source"] = str(write_lines(tmp_path / "c.jsonl", [{"instruction": "", "output": "a"}] * 9))
    with pytest.raises(DataError, match=r"c\.jsonl \(kind\): no usable row to train on of 9 records \(9 × empty instr"):
        read_splits(one_axis)


def test_a_source_too_small_to_be_held_out_is_trained_on_alone(one_axis: RunConfig, tmp_path: Path) -> None:
    """If no question of any source falls into the share, that is said."""
    paths = [write_lines(tmp_path / f"{n}.jsonl", questions(n)) for n in (1, 60)]
    one_axis.axes["kind"].train = [{"source": str(path)} for path in paths]
    held_out = read_splits(one_axis).held_out["kind"]
    assert held_out.source == str(paths[1]) and held_out.rows
    one_axis.axes["kind"].train = str(paths[0])
    with pytest.raises(
        DataError, match=r"held out: none of its 1 questions falls into the held-out share of 0\.15; give"
    ):
        read_splits(one_axis)


def problems(write_recipe: WriteRecipe, train: Any) -> list[str]:
    path = write_recipe()
    values = yaml.safe_load(path.read_text())
    values["axes"]["helpful"] |= {"train": train, "held_out": "world"}
    path.write_text(yaml.safe_dump(values))
    try:
        return [str(problem) for problem in plan.problems(parse.load(path))]
    except ConfigError as error:
        return [str(problem) for problem in error.problems]


def test_a_list_of_sources_is_read_from_a_recipe_and_from_the_command_line(write_recipe: WriteRecipe) -> None:
    assert problems(write_recipe, ["world", {"source": "owner/name", "weight": 0}]) == []
    (a, b) = training_sources(parse.load(write_recipe(), ["axes.helpful.train=[world, x.jsonl]"]).axes["helpful"])
    assert (a.source, a.schema, a.weight, b.source) == ("world", "alpaca", 0.0, "x.jsonl")
    config = parse.load(write_recipe(), ["axes.helpful.train=[{source: world, weight: 2}, {source: o/n, weight: 1}]"])
    again = write_recipe()
    again.write_text(parse.to_yaml(config))
    assert parse.load(again) == config
    assert training_sources(parse.load(write_recipe(), ["generalist.train=''"]).generalist) == []


@pytest.mark.parametrize(
    ("train", "named"),
    [
        (["world", {"source": "o/n", "weigth": 1}], "axes.helpful.train.1.weigth: got 1, expected a known key"),
        (["world", {"source": "o/n", "weight": -1}], "axes.helpful.train.1.weight: got -1"),
        (["world", {"source": "o/n", "weight": "much"}], "axes.helpful.train.1.weight: got 'much'"),
        (["world", {"source": "o/n", "weight": 1}], "axes.helpful.train: got [0.0, 1.0], expected a weight for every"),
        (["world", {"source": "o/n", "schema": "alpacka"}], "axes.helpful.train.1.schema: got 'alpacka'"),
        (["world", {"source": "o/n", "schema": "xstest"}], "axes.helpful.train.1.schema: got 'xstest', expected a sch"),
        (["world", {"source": "o/n", "columns": {"a": "b"}}], "axes.helpful.train.1.columns: got"),
        (["world", "nowhere.jsonl"], "axes.helpful.train.1.source: got 'nowhere.jsonl'"),
        (["world", "world"], "axes.helpful.train: got ['world', 'world'], expected different sources"),
        (["world", {"weight": 1}], "axes.helpful.train.1.source: got None, expected a source"),
        (["world", ["o/n"]], "axes.helpful.train.1: got ['o/n'], expected a mapping"),
        (["world", "http://user:secret@host/x.jsonl"], "axes.helpful.train.1.source: got '(not shown)'"),
        ([], "axes.helpful.train: got [], expected a source, or a list of sources"),
        ({"source": "world"}, "axes.helpful.train: got {'source': 'world'}, expected a source, or a list of sources"),
        (3, "axes.helpful.train: got 3, expected a source, or a list of sources"),
    ],
)
def test_what_is_wrong_with_a_list_of_sources_is_named(write_recipe: WriteRecipe, train: Any, named: str) -> None:
    assert any(problem.startswith(named) for problem in problems(write_recipe, train)), problems(write_recipe, train)


@pytest.mark.parametrize(
    ("axis", "named"),
    [
        ("harmless", "axes.harmless.refusals: got ['No.', ' '], expected texts"),
        ("helpful", "axes.helpful.refusals: got ['No.', ' '], expected nothing without rows of beavertails"),
    ],
)
def test_refusals_that_teach_nothing_are_named(axis: str, named: str) -> None:
    config = parse.load("world", [f"axes.{axis}.refusals=['No.', ' ']"])
    assert any(str(problem).startswith(named) for problem in plan.problems(config))
