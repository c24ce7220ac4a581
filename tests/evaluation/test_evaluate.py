"""Evaluation of systems: nothing is computed twice, and nothing stale is reused."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel

from alignx_ds.config.evaluation import SetConfig
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, encode_prompts
from alignx_ds.data.inputs import read_inputs
from alignx_ds.data.rows import Row
from alignx_ds.evaluation.evaluate import SAMPLES, Evaluation, System, question_sets
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Metrics, Verdict
from alignx_ds.evaluation.judges.world import Task, Truth
from alignx_ds.evaluation.likelihood import Likelihood
from alignx_ds.models.base import BaseModel
from alignx_ds.runs.outputs import Outputs

Loaded = list[str]
ROWS = 4


@pytest.fixture
def evaluation(tiny_config: RunConfig, world_base: BaseModel) -> Evaluation:
    """Three judged axes of the world, and an extra set that needs likelihoods alone; no judge has other axes' rows."""
    tiny_config.data.train_rows, tiny_config.data.held_out_rows = 8, ROWS
    tiny_config.evaluation.max_new_tokens, tiny_config.evaluation.matrix = 3, "own"
    tiny_config.evaluation.sets = {"choices": SetConfig("truthfulqa", "world", "mc", rows=2)}
    inputs = read_inputs(tiny_config, world_base)
    return Evaluation(tiny_config, inputs.base, inputs.data, Outputs.of(tiny_config))


@pytest.fixture
def loaded() -> Loaded:
    return []


@pytest.fixture
def system(evaluation: Evaluation, loaded: Loaded) -> Callable[..., System]:
    def make(name: str = "base", **provenance: Any) -> System:
        def load() -> PreTrainedModel:
            loaded.append(name)
            return AutoModelForCausalLM.from_pretrained(evaluation.base.path)

        return System(name, provenance, load)

    return make


def test_a_model_is_loaded_once_and_not_again_for_what_is_stored(
    evaluation: Evaluation, system: Callable[..., System], loaded: Loaded
) -> None:
    systems = [system("base", weights=1), system("other", weights=2)]
    evaluation.evaluate_all(systems)
    assert loaded == ["base", "other"]
    evaluation.evaluate_all(systems)
    assert loaded == ["base", "other"]
    evaluation.evaluate_all([system("base", weights=3), systems[1]])
    assert loaded == ["base", "other", "base"], "other weights are another model"
    for number, content in enumerate((None, "[1", "1"), start=4):
        path = evaluation.out.likelihoods / "other.json"
        path.unlink() if content is None else path.write_text(content)
        evaluation.evaluate_all([systems[1]])
        assert loaded[3:] == ["other"] * (number - 3)


def test_likelihoods_are_stale_when_their_rows_change(
    evaluation: Evaluation, system: Callable[..., System], loaded: Loaded
) -> None:
    base = system(weights=1)
    evaluation.evaluate_all([base])
    rows = evaluation.data.splits.sets["choices"].rows
    rows[0] = replace(rows[0], response="another best answer")
    evaluation.evaluate_all([base])
    assert loaded == ["base", "base"]


def test_results_hold_every_set_and_verdicts_are_asked_for_once(
    evaluation: Evaluation, system: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    class Length:
        """Judges answers by their length."""

        identity: dict[str, Any] = {"judge": "length"}  # noqa: RUF012

        def applies(self, row: Row) -> bool:
            return True

        def verdicts(self, rows: Sequence[Row], answers: Sequence[str]) -> Iterator[Verdict]:
            for row, answer in zip(rows, answers, strict=True):
                asked.append(row.prompt)
                yield {"length": len(answer)}

        def metrics(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Metrics:
            return {"score": float(sum(v["length"] for v in verdicts))}

    monkeypatch.setattr(registry, "make", lambda name, settings: Length())
    base = system(weights=1)
    evaluation.evaluate_all([base])
    result = evaluation.judge_all([base])["base"]
    axes = list(evaluation.config.axes)
    assert list(result.metrics) == [*axes, "choices"]
    assert set(result.metrics["choices"]) == {"score", "mc1", "mc2", "questions"}
    assert list(result.perplexity) == axes
    shown = {name: [row.prompt for row, _ in samples] for name, samples in result.samples.items()}
    assert list(shown) == axes and sum(map(len, shown.values())) >= min(SAMPLES, ROWS * len(axes))
    for axis in axes:
        lines = (evaluation.out.answers / f"base.{axis}.jsonl").read_text().splitlines()
        outputs = [json.loads(line)["output"] for line in lines]
        assert len(outputs) == ROWS and result.metrics[axis]["score"] == sum(map(len, outputs))
    assert len(asked) == ROWS * len(axes)
    assert evaluation.judge_all([base])["base"] == result
    assert len(asked) == ROWS * len(axes)


def test_every_judge_judges_the_rows_that_have_what_it_needs(
    evaluation: Evaluation, system: Callable[..., System], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On other axes; the own judge judges all rows, and its metrics are the same with and without the matrix."""
    base = system(weights=1)
    evaluation.evaluate_all([base])
    alone = evaluation.judge_all([base])["base"]
    assert {axis: list(cells) for axis, cells in alone.matrix.items()} == {
        "helpful": ["task"],
        "harmless": ["safety"],
        "honest": ["truth"],
    }
    honest = [row.prompt for row in evaluation.data.held_out["honest"]]
    monkeypatch.setattr(Task, "applies", lambda self, row: row.prompt == honest[1])
    monkeypatch.setattr(Truth, "applies", lambda self, row: False)
    evaluation.config.evaluation.matrix = "auto"
    result = evaluation.judge_all([base])["base"]
    assert result.metrics == alone.metrics
    assert {axis: {judge: m["rows"] for judge, m in cells.items()} for axis, cells in result.matrix.items()} == {
        "helpful": {"task": ROWS, "safety": ROWS},
        "harmless": {"safety": ROWS},
        "honest": {"truth": ROWS, "task": 1, "safety": ROWS},
    }
    assert result.matrix["helpful"]["task"] == result.metrics["helpful"] | {"rows": ROWS}
    output = evaluation.answer_file(question_sets(evaluation.config, evaluation.data)[2], base).load()[1]
    (line,) = (evaluation.out.verdicts / "base.honest.task.jsonl").read_text().splitlines()
    (expected,) = Task().verdicts([evaluation.data.held_out["honest"][1]], [output])
    assert json.loads(line)["verdict"] == expected


def test_what_is_not_evaluated_is_not_judged(evaluation: Evaluation, system: Callable[..., System]) -> None:
    with pytest.raises(AssertionError, match="before it is evaluated"):
        evaluation.judge_all([system(weights=1)])


def test_what_is_not_used_any_more_is_said(
    evaluation: Evaluation, system: Callable[..., System], loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    """Answers of another length are given again, and other settings of the evaluation leave them as they are."""
    base = system(weights=1)
    evaluation.evaluate_all([base])
    evaluation.judge_all([base])
    evaluation.config.evaluation.batch, evaluation.config.judges.batch = 3, 1
    evaluation.evaluate_all([base])
    assert loaded == ["base"] and "not used" not in capsys.readouterr().out
    evaluation.config.evaluation.max_new_tokens = 1
    evaluation.evaluate_all([base])
    assert loaded == ["base", "base"]
    assert capsys.readouterr().out.count("12 of 12 answers are of another model, server or length") == 1
    evaluation.judge_all([base])
    assert "of 12 verdicts are of another judge, or on other answers, and not used" in capsys.readouterr().out


def test_a_dialogue_is_answered_and_measured_with_its_earlier_turns(
    tiny_config: RunConfig,
    world_base: BaseModel,
    system: Callable[..., System],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    turns = [("user", "hello"), ("assistant", "hi ."), ("user", "how are you ?"), ("assistant", "i am well .")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    (tmp_path / "r.json").write_text(json.dumps([record]))
    pair = {"chosen": record["messages"], "rejected": [*record["messages"][:3], {"role": "gpt", "content": "no ."}]}
    (tmp_path / "p.json").write_text(json.dumps([pair]))
    tiny_config.evaluation.sets = {
        "chats": SetConfig("messages", str(tmp_path / "r.json"), "refusal"),
        "pairs": SetConfig("dpo", str(tmp_path / "p.json"), "preference"),
    }
    inputs = read_inputs(tiny_config, world_base)
    asked: list[Any] = []
    monkeypatch.setattr("alignx_ds.evaluation.evaluate.answers", lambda m, t, prompts, **rest: asked.extend(prompts))
    measured: list[Example] = []

    def likelihoods(model: Any, examples: list[Example], *rest: Any) -> list[Likelihood]:
        measured.extend(examples)
        return [Likelihood(-1.0, e.answer_length) for e in examples]

    monkeypatch.setattr("alignx_ds.evaluation.likelihood.likelihoods", likelihoods)
    Evaluation(tiny_config, inputs.base, inputs.data, Outputs.of(tiny_config)).evaluate_all([system("base", w=1)])
    (row,) = inputs.data.splits.sets["chats"].rows
    assert asked[-1] == row.chat and len(row.chat) == 3
    chosen, rejected = measured[:2]
    assert chosen.ids[: chosen.prompt_length] == rejected.ids[: rejected.prompt_length]
    assert list(chosen.ids[: chosen.prompt_length]) == encode_prompts([row.chat], world_base.tokenizer)[0]
    assert chosen.earlier == () and chosen.answer_length == 5


def test_the_report_shows_answers_from_all_over_a_set(evaluation: Evaluation) -> None:
    """Files are often sorted by kind of prompt, so the first ones would be of one kind."""
    answered = [(Row(str(n), ""), str(n)) for n in range(200)]
    shown = [int(answer) for _, answer in evaluation._sample(answered)]
    sets = sum(q.needs_answers for q in question_sets(evaluation.config, evaluation.data))
    assert SAMPLES / sets <= len(shown) <= SAMPLES / sets + 1
    assert max(shown) >= 200 - 200 / len(shown) and len({b - a for a, b in itertools.pairwise(shown)}) == 1
