"""Sources with `needs`: rows that teach a specialist what to leave as it is, and whose prompts need another expert."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from reading import questions, write_lines
from transformers import PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.config.schema import AxisConfig, RunConfig
from alignx_ds.data.encode import Example
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.inputs import LENT, encode_splits
from alignx_ds.data.splits import read_sources
from alignx_ds.errors import DataError
from alignx_ds.plan import rows as plan

BENIGN, REFUSAL = "i know it .", "i do not know ."


def kind(example: Example, tokenizer: PreTrainedTokenizerBase) -> str:
    answer = tokenizer.decode(example.ids[example.prompt_length :], skip_special_tokens=True).strip()
    return {BENIGN: "benign", REFUSAL: "unsafe"}.get(answer, "own")


@pytest.mark.parametrize("needs", [["kind"], ["generalist"], ["kind", "safe"]])
def test_lent_rows_teach_their_axis_in_stage_1_and_another_expert_in_stage_2(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase, needs: list[str]
) -> None:
    asked = [
        {"prompt": question["prompt"], "type": "contrast_x" if n % 2 else "x", "completion": BENIGN}
        for n, question in enumerate(questions(80, start=600))
    ]
    answers = {"source": str(write_lines(tmp_path / "x.jsonl", asked)), "schema": "xstest_answers", "needs": needs}
    sources = [{"source": str(write_lines(tmp_path / "own.jsonl", questions(40)))}, answers]
    one_axis.axes["kind"].train = str(write_lines(tmp_path / "kind.jsonl", questions(40, start=200)))
    one_axis.axes["kind"].held_out = str(write_lines(tmp_path / "held.jsonl", questions(5, start=300)))
    one_axis.axes["safe"] = AxisConfig(prompt="", schema="plain", train=sources, refusals=[REFUSAL])
    data = encode_splits(one_axis, read_sources(one_axis), Encodings(world_tokenizer))

    judged = data.splits.held_out["safe"].rows
    assert judged and all(not row.needs or "safe" in row.needs for row in judged)
    assert bool([d for d in data.splits.held_out["safe"].dropped if "another" in d.reason]) is ("safe" not in needs)
    taught = Counter(row.response for row in data.splits.train["safe"].rows)
    assert min(taught[BENIGN], taught[REFUSAL]) > 20, "the specialist is taught all of them"
    assert Counter(kind(e, world_tokenizer) for e in data.injected["safe"]) == {
        "own": sum(taught.values()) - taught[BENIGN] - taught[REFUSAL],
        "unsafe": taught[REFUSAL],
        "benign": taught[BENIGN],
    }
    named = tuple(sorted(one_axis.expert_names.index(name) for name in needs))
    lent = "safe" not in needs
    for fitted in (data.train, data.calibration_rows):
        rows = [*zip(fitted.examples, fitted.experts, fitted.needs, fitted.sources, strict=True)]
        found = {
            name: {(owner, sets, source >= LENT) for e, owner, sets, source in rows if kind(e, world_tokenizer) == name}
            for name in ("unsafe", "benign")
        }
        assert found["unsafe"] == {(2, (2,), False)}
        assert found["benign"] == {(one_axis.expert_names.index(needs[0]) if lent else 2, named, lent)}


def test_an_axis_that_lends_all_its_rows_is_refused(
    one_axis: RunConfig, tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    source = {"source": str(write_lines(tmp_path / "q.jsonl", questions(40))), "needs": ["generalist"]}
    one_axis.axes["kind"].train = [source]
    one_axis.axes["kind"].held_out = str(write_lines(tmp_path / "held.jsonl", questions(5, start=300)))
    with pytest.raises(DataError, match="no row is left to train on"):
        encode_splits(one_axis, read_sources(one_axis), Encodings(world_tokenizer))


@pytest.mark.parametrize(
    ("needs", "problem"),
    [("[kind]", "got 'kind', expected one of generalist, helpful"), ("[generalist, honest]", "axes, or generalist")],
)
def test_needs_name_experts(needs: str, problem: str) -> None:
    config = parse.load("world", [f"axes.harmless.train=[world, {{source: o/n, needs: {needs}}}]"])
    (found,) = [str(p) for p in plan.problems(config)]
    assert "axes.harmless.train.1.needs" in found and problem in found
