"""Routing rows: how they are split and labelled, what is never fitted on, and how their sources weigh."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import questions, write_json, write_lines
from transformers import PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.config.bounds import violations
from alignx_ds.config.evaluation import SetConfig
from alignx_ds.config.schema import AxisConfig, RoutingSourceConfig, RunConfig
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.inputs import EncodedData, encode_splits
from alignx_ds.data.labels import source_quotas, source_repeats, source_weights
from alignx_ds.data.rows import Record
from alignx_ds.data.splits import DataSplits, read_sources, read_splits
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.plan import rows as plan
from alignx_ds.plan.accounts import accounts
from alignx_ds.plan.checks import TABLES
from alignx_ds.stages.calibrators import first_of_each_expert


@pytest.fixture
def two_axes(one_axis: RunConfig, tmp_path: Path) -> RunConfig:
    """The axes `kind` and `safe`, with 100 training rows and 5 held-out ones each."""
    one_axis.axes["safe"] = AxisConfig(prompt="", schema="plain", train="")
    for n, axis in enumerate(one_axis.axes.values()):
        axis.train = str(write_lines(tmp_path / f"train{n}.jsonl", questions(100, start=200 * n)))
        axis.held_out = str(write_lines(tmp_path / f"held{n}.jsonl", questions(5, start=200 * n + 100)))
    return one_axis


def asked(*ranges: range) -> list[Record]:
    """The prompts of `questions` with these numbers; odd ones are unsafe, by XSTest's schema."""
    return [
        {"prompt": questions(1, start=n)[0]["prompt"], "label": "unsafe" if n % 2 else "safe"}
        for numbers in ranges
        for n in numbers
    ]


def source(path: Path, records: list[Record], **settings: str) -> RoutingSourceConfig:
    return RoutingSourceConfig(source=str(write_lines(path, records)), schema="xstest", **settings)


def prompts(splits: DataSplits, owner: str) -> set[str]:
    return {row.prompt for p in splits.routing if p.owner == owner for row in (*p.train.rows, *p.held_out.rows)}


def test_routing_rows_are_split_and_nothing_judged_is_fitted_on(two_axes: RunConfig, tmp_path: Path) -> None:
    """Of 100 prompts, five are held out of the axis already, and ten are its training rows."""
    two_axes.axes["safe"].routing = [source(tmp_path / "r.jsonl", asked(range(290, 305), range(400, 485)))]
    splits = read_splits(two_axes)
    (part,) = splits.routing
    assert part.owner == "safe"
    held_out = {row.question for row in part.held_out.rows}
    fitted = {row.question for row in part.train.rows}
    judged = {row.question for row in splits.held_out["safe"].rows}
    assert len(judged) == 5 and not judged & fitted and not held_out & fitted
    assert 5 <= len(held_out) <= 30 and len(held_out | fitted) >= 85
    assert not fitted & {row.question for row in splits.train["safe"].rows}
    assert sum(part.train.reasons().values()) + len(part.train.rows) == part.train.records
    assert part.train.reasons().keys() == {"its question is a training row's", "its question is held out"}
    assert all(not row.response and row.needs == ("safe",) for row in part.train.rows)
    assert any("safe, routing, for the gate" in line for line in accounts(splits))


def test_the_safe_half_of_a_source_is_a_negative_and_the_other_an_axis_s(two_axes: RunConfig, tmp_path: Path) -> None:
    records = asked(range(400, 500))
    two_axes.axes["safe"].routing = [source(tmp_path / "r.jsonl", records, only="unsafe")]
    two_axes.routing.negatives = [source(tmp_path / "r.jsonl", records, only="safe")]
    splits = read_splits(two_axes)
    wanted = {label: {r["prompt"] for r in records if r["label"] == label} for label in ("safe", "unsafe")}
    assert prompts(splits, "safe") == wanted["unsafe"]
    assert prompts(splits, "generalist") == wanted["safe"]
    assert {row.needs for p in splits.routing if p.owner == "generalist" for row in p.train.rows} == {("generalist",)}


def test_a_prompt_that_two_axes_list_needs_both(two_axes: RunConfig, tmp_path: Path) -> None:
    """Also where one of them trains on it; what an axis has is no negative."""
    two_axes.axes["safe"].routing = [source(tmp_path / "s.jsonl", asked(range(90, 100), range(400, 440)))]
    two_axes.axes["kind"].routing = [source(tmp_path / "k.jsonl", asked(range(430, 470)))]
    two_axes.routing.negatives = [source(tmp_path / "n.jsonl", asked(range(0, 10), range(435, 520)))]
    splits = read_splits(two_axes)
    by_prompt = {row.prompt: row.needs for p in splits.routing for row in (*p.train.rows, *p.held_out.rows)}
    number = {r["prompt"]: n for n, r in zip(range(600), questions(600), strict=True)}
    for prompt, needs in by_prompt.items():
        n = number[prompt]
        both = 90 <= n < 100 or 430 <= n < 440
        assert needs == (
            ("kind", "safe") if both else ("safe",) if n < 430 else ("kind",) if n < 470 else ("generalist",)
        )
    assert all(number[prompt] >= 470 for prompt in prompts(splits, "generalist"))
    trained = {number[row.prompt]: row.needs for row in splits.train["kind"].rows}
    assert {trained[n] for n in range(90, 100)} == {("kind", "safe")} and trained[50] == ()


def test_what_the_gate_is_fitted_on_is_no_extra_set(two_axes: RunConfig, tmp_path: Path) -> None:
    given = source(tmp_path / "r.jsonl", asked(range(400, 500)))
    two_axes.axes["safe"].routing = [given]
    two_axes.evaluation.sets["own"] = SetConfig(schema="xstest", source=given.source, judge="refusal")
    splits = read_splits(two_axes)
    (part,) = splits.routing
    assert {r.prompt for r in splits.sets["own"].rows} == {r.prompt for r in part.held_out.rows}


@pytest.fixture
def data(two_axes: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase) -> EncodedData:
    two_axes.axes["safe"].routing = [source(tmp_path / "r.jsonl", asked(range(400, 425)))]
    two_axes.routing.negatives = [source(tmp_path / "n.jsonl", asked(range(500, 560)))]
    return encode_splits(two_axes, read_sources(two_axes), Encodings(world_tokenizer))


def test_the_gate_gets_routing_rows_and_no_specialist_does(data: EncodedData) -> None:
    fitted = [data.train, data.calibration_rows]
    assert sum(len(rows.examples) for rows in fitted) == 200 + sum(len(p.train.rows) for p in data.splits.routing)
    assert {len(examples) for examples in data.injected.values()} == {100}
    for rows in (*fitted, *data.routing.values()):
        for example, owner, needs, number in zip(rows.examples, rows.experts, rows.needs, rows.sources, strict=True):
            assert needs == (owner,)
            if owner == 0 or number == 1:
                assert not example.answer_length
    assert set(data.train.experts) == {0, 1, 2} == set(data.calibration_rows.experts), "negatives are the generalist's"
    negative, safe = data.routing
    assert negative.endswith("n.jsonl (generalist)") and safe.endswith("r.jsonl (safe)")
    weights = data.train.weights()
    assert weights is not None
    by_source = {
        number: [
            w
            for w, e, s in zip(weights.tolist(), data.train.experts, data.train.sources, strict=True)
            if e == 2 and s == number
        ]
        for number in (0, 1)
    }
    sums = [sum(by_source[number]) for number in (0, 1)]
    assert sums[0] / sums[1] == pytest.approx((len(by_source[0]) / len(by_source[1])) ** 0.5)
    assert sum(sums) == pytest.approx(len(by_source[0]) + len(by_source[1]))


def test_sources_weigh_as_the_roots_of_their_sizes() -> None:
    owners, sources = [1] * 120 + [2] * 7, [0] * 100 + [3] * 20 + [0] * 7
    weights = source_weights(owners, sources)
    assert weights is not None and float(weights.mean()) == pytest.approx(1)
    assert float(weights[:100].sum() / weights[100:120].sum()) == pytest.approx(5**0.5)
    assert weights[120:].tolist() == [1.0] * 7, "its only source"
    assert source_weights([1, 1, 2], [0, 0, 4]) is None
    assert source_repeats(owners, sources) == [1] * 100 + [2] * 20 + [1] * 7
    assert source_quotas([400, 100, 4], 90) == [57, 29, 4]  # the roots are 20 and 10, and 4 can't give 6
    assert source_quotas([30], 20) == [20] and source_quotas([5, 5], 20) == [5, 5]


def test_a_geometry_sees_every_source() -> None:
    rows = LabelledExamples(
        [Example((n,), 1) for n in range(506)], [1] * 500 + [2] * 6, [], [0] * 400 + [1] * 100 + [0] * 6
    )
    chosen = first_of_each_expert(rows, 30)
    assert [e.ids[0] for e in chosen.examples] == [*range(20), *range(400, 410), *range(500, 506)]
    assert chosen.sources == [0] * 20 + [1] * 10 + [0] * 6
    one = LabelledExamples(rows.examples, rows.experts)
    assert [e.ids[0] for e in first_of_each_expert(one, 30).examples] == [*range(30), *range(500, 506)]


def test_a_source_without_a_row_for_the_gate_is_an_error(two_axes: RunConfig, tmp_path: Path) -> None:
    two_axes.axes["safe"].routing = [source(tmp_path / "r.jsonl", asked(range(200, 220)))]
    with pytest.raises(
        DataError, match=r"r\.jsonl \(safe\): no usable row to route of \d+ records \(\d+ × its question is a tr"
    ):
        read_splits(two_axes)


@pytest.mark.parametrize(
    ("key", "entry", "said"),
    [
        ("routing.negatives", "{source: FILE, schema: xstest}", "routing.negatives.0.only: got '', expected safe"),
        ("routing.negatives", "{source: FILE}", "routing.negatives.0.schema: got '', expected a schema"),
        ("axes.honest.routing", "{source: no.jsonl, schema: prompts}", "axes.honest.routing.0.source: got 'no.jsonl'"),
        ("axes.honest.routing", "{source: world, schema: prompts}", "world has no rows in the prompts schema"),
        (
            "axes.honest.routing",
            "{source: FILE, schema: prompts, only: safe}",
            "axes.honest.routing.0.only: got 'safe'",
        ),
        ("axes.honest.routing", "{source: FILE, schema: promts}", "axes.honest.routing.0.schema: got 'promts'"),
        ("axes.honest.routing", "{source: FILE, schema: xstest, columns: {promt: a}}", "axes.honest.routing.0.columns"),
        ("axes.honest.routing", "{schema: xstest}", "axes.honest.routing.0.source: got None"),
        ("axes.honest.routing", "{sorce: a}", "axes.honest.routing.0.sorce: got 'a', expected a known key"),
    ],
)
def test_what_is_wrong_with_routing_rows_is_one_line(key: str, entry: str, said: str, tmp_path: Path) -> None:
    file = write_json(tmp_path / "file.json", asked(range(4)))
    value = f"[{entry}]"
    with pytest.raises(ConfigError) as caught:  # noqa: PT012
        config = parse.load("world", [f"{key}={value.replace('FILE', str(file))}"])
        raise ConfigError(*[*plan.problems(config), *violations(config, TABLES)])
    assert said in str(caught.value)
