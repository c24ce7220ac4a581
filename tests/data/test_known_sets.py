"""Extra sets on which the gate is measured: whose needs are known, by their rows or by the recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
from reading import questions, set_rows, write_json, write_lines
from transformers import PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.config.bounds import violations
from alignx_ds.config.evaluation import SetConfig
from alignx_ds.config.schema import AxisConfig, JoinConfig, RunConfig
from alignx_ds.data.encode import encode_prompts
from alignx_ds.data.encodings import Encodings
from alignx_ds.data.inputs import EncodedData, encode_splits
from alignx_ds.data.rows import Record
from alignx_ds.data.splits import read_sources
from alignx_ds.errors import ConfigError
from alignx_ds.plan import rows as plan
from alignx_ds.plan.accounts import accounts, notes
from alignx_ds.plan.checks import TABLES

XSTEST = [{"prompt": r["prompt"], "label": "unsafe" if n % 3 else "safe"} for n, r in enumerate(questions(9, 500))]


def labelled(prompt: str, *needs: str) -> Record:
    return {"messages": [{"role": "user", "content": prompt}], "needs": list(needs)}


@pytest.fixture
def config(one_axis: RunConfig, tmp_path: Path) -> RunConfig:
    """The axes `kind` and `safe`; sets with labels of their own, with the recipe's, and without any."""
    set_rows(one_axis, tmp_path, questions(60), questions(5, start=100))
    more = str(write_lines(tmp_path / "safe.jsonl", questions(60, start=200)))
    one_axis.axes["safe"] = AxisConfig(prompt="", schema="plain", train=more)
    xs = str(write_json(tmp_path / "xs.json", XSTEST))
    both = [labelled("cat", "safe", "kind"), labelled("dog", "generalist"), labelled("give", "rude"), labelled("the")]
    own = str(write_json(tmp_path / "both.json", both))
    one_axis.evaluation.sets = {
        "unsafe": SetConfig("xstest", xs, "refusal", only="unsafe", needs=["safe"]),
        "safe_ones": SetConfig("xstest", xs, "refusal", only="safe", needs=["generalist"]),
        "own": SetConfig("labelled", own, "refusal"),
        "unknown": SetConfig("xstest", xs, "refusal"),
    }
    return one_axis


@pytest.fixture
def data(config: RunConfig, world_tokenizer: PreTrainedTokenizerBase) -> EncodedData:
    return encode_splits(config, read_sources(config), Encodings(world_tokenizer))


def test_the_needs_of_a_set_are_its_rows_own_or_the_recipe_s(
    config: RunConfig, data: EncodedData, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    assert {name: rows.needs for name, rows in data.sets.items()} == {
        "unsafe": [(2,)] * 6, "safe_ones": [(0,)] * 3, "own": [(1, 2), (0,)],
    }  # fmt: skip
    asked = [r["prompt"] for r in XSTEST if r["label"] == "unsafe"]
    assert [list(e.ids) for e in data.sets["unsafe"].examples] == encode_prompts(asked, world_tokenizer)
    assert data.splits.sets["unsafe"].reasons() == {"its prompt is safe": 3}
    (said,) = [line for line in notes(config, data) if "set " in line]
    assert "set own: the gate is measured on 2 of its 4 prompts" in said and "generalist, kind, safe" in said


def test_labels_of_the_recipe_are_for_rows_without_their_own(
    config: RunConfig, world_tokenizer: PreTrainedTokenizerBase
) -> None:
    config.evaluation.sets["own"].needs = ["kind"]
    data = encode_splits(config, read_sources(config), Encodings(world_tokenizer))
    assert data.sets["own"].needs == [(1, 2), (0,), (1,)]


def test_joined_rows_are_accounted_for(config: RunConfig, world_tokenizer: PreTrainedTokenizerBase) -> None:
    config.axes["kind"].join = JoinConfig(share=1.0)
    config.model.max_length = 26
    data = encode_splits(config, read_sources(config), Encodings(world_tokenizer))
    made = data.joined["kind"]
    assert list(data.joined) == ["kind"] and made.rows and made.dropped
    answered = [row for row in data.splits.train["kind"].rows if row.response]
    assert len(made.rows) + len(made.dropped) == len(answered)
    lines = accounts(data.splits, data.joined)
    start = next(n for n, line in enumerate(lines) if line.split()[:2] == ["kind,", "joined"])
    numbers = lines[start].split()
    assert (int(numbers[2]), int(numbers[6])) == (len(made.train), len(made.calibration))
    assert f"-{len(made.dropped)} longer than model.max_length=26 tokens, e.g. " in lines[start + 1]
    assert len(data.injected["kind"]) == len(answered) + len(made.rows)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{schema: prompts, only: safe}", "evaluation.sets.s.only: got 'safe', expected nothing"),
        ("{schema: xstest, only: harmful}", "evaluation.sets.s.only: got 'harmful', expected one of"),
        ("{schema: xstest, needs: [kind]}", "evaluation.sets.s.needs: got 'kind', expected one of generalist, helpful"),
        ("{schema: xstest, needs: [generalist, honest]}", "expected axes, or generalist alone"),
        ("{schema: xstest}", "evaluation.sets.s.judge: got '', expected a judge"),
    ],
)
def test_what_is_wrong_with_a_set_is_one_line(entry: str, said: str, tmp_path: Path) -> None:
    file = write_json(tmp_path / "file.json", XSTEST)
    value = entry.replace("}", f", source: {file}}}")
    with pytest.raises(ConfigError) as caught:  # noqa: PT012
        config = parse.load("world", [f"evaluation.sets.s={value}"])
        raise ConfigError(*[*plan.problems(config), *violations(config, TABLES)])
    assert said in str(caught.value)
