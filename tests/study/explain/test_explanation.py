"""Every system's answers, and what is left of an explanation when a system is missing."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from constructed_runs import LAYERS, PROMPTS
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignx_ds.evaluation.generate import answers
from alignx_ds.experts.task_vectors import layer_file
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.models.base import WORLD_BASES, BaseModel
from alignx_ds.models.finished import tokenizer_of
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.serve.generate import answer
from alignx_ds.study.explain.explanation import explain


def test_every_system_answers_greedily(run: FinishedRun, world_base: BaseModel) -> None:
    """A specialist is the base model plus its own task vector, and nothing of another specialist's."""
    explanation = explain(run, PROMPTS)
    assert explanation.silent == {}
    systems = ["base", *run.axes, "alignx"]
    assert [list(e.answers) for e in explanation.prompts] == [systems] * len(PROMPTS)
    for name in systems[:-1]:
        model = AutoModelForCausalLM.from_pretrained(world_base.path)
        for layer in LAYERS if name != "base" else ():
            changes = load_file(layer_file(run.out.specialists / name, layer))
            with torch.no_grad():
                for p in PROJECTIONS:
                    weight = model.get_parameter(world_base.table.weight_name(layer, p))
                    weight += changes[f"task_vector.{p}"]
        expected = answers(model, tokenizer_of(run), PROMPTS, batch=3, max_new_tokens=4)
        assert [e.answers[name] for e in explanation.prompts] == expected, name
    assert [e.answers["alignx"] for e in explanation.prompts] == answer(str(run.out.model), PROMPTS, 4)
    assert len({e.answers[name] for e in explanation.prompts for name in systems}) > 5, "the answers differ"


def test_a_base_model_that_has_changed_since_is_not_taken_for_the_run_s(copied: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(WORLD_BASES["world"], tmp_path / "base"))
    config = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(config.replace("path: world", f"path: {base}"))
    assert explain(FinishedRun.open(copied), PROMPTS[:1]).silent == {}, "it has only moved"
    (base / "chat_template.jinja").write_text("{{ messages[0].content }}")
    explanation = explain(FinishedRun.open(copied), PROMPTS[:1])
    assert list(explanation.prompts[0].answers) == ["alignx"]
    assert "chat_template.jinja changed since the run was made" in explanation.silent["base"]


def test_without_specialists_the_rest_is_explained(copied: Path) -> None:
    shutil.rmtree(copied / "specialists" / "helpful")
    shutil.rmtree(copied / "specialists" / "honest")
    shutil.copytree(copied / "specialists" / "harmless", copied / "specialists" / "honest")
    layer_file(copied / "specialists" / "harmless", 3).write_bytes(b"damaged")
    explanation = explain(FinishedRun.open(copied), PROMPTS[:1])
    assert list(explanation.prompts[0].answers) == ["base", "alignx"]
    assert explanation.silent.keys() == {"helpful", "harmless", "honest"}
    assert "not there" in explanation.silent["helpful"]
    assert "made by another run" in explanation.silent["honest"]
    assert "differs from its manifest" in explanation.silent["harmless"]
