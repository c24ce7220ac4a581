"""One set of end tokens, for decoding, for what is saved, and for the answers that exports are compared on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from model_directories import model_directory
from stage_contexts import stage_context
from tiny_models import aligned, base_model, low_rank_experts
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds import cli
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import encode_prompts
from alignx_ds.evaluation.generate import answers
from alignx_ds.export.fidelity import answered
from alignx_ds.models import finished
from alignx_ds.models.base import BaseModel
from alignx_ds.models.ends import ends_of, set_ends
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages import align
from alignx_ds.training.job import TrainingJob

PROMPT, LIMIT = "reverse the words .\ndog cat red", 12


@pytest.fixture
def model(world_base: BaseModel) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(world_base.path)
    return found


def said(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of the greedy answer, by transformers' own decoding under the model's generation config."""
    ids = torch.tensor(encode_prompts([PROMPT], tokenizer))
    made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=LIMIT)
    return [int(token) for token in made[0, ids.shape[1] :]]


@pytest.mark.parametrize("named", [None, 3, [3, 9], [-1, 9999]])
def test_decoding_stops_at_every_end_token(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, named: Any
) -> None:
    """The tokenizer's, which the generation config need not name, and those that it names."""
    eos = world_tokenizer.eos_token_id
    whole = said(model, world_tokenizer)
    assert whole[-1] == eos and len(whole) < LIMIT
    model.generation_config = GenerationConfig(eos_token_id=named, pad_token_id=0)
    (text,) = answers(model, world_tokenizer, [PROMPT], batch=1, max_new_tokens=LIMIT)
    assert text == world_tokenizer.decode(whole[:-1])
    model.generation_config.eos_token_id = [whole[1]]
    (text,) = answers(model, world_tokenizer, [PROMPT], batch=1, max_new_tokens=LIMIT)
    assert text == world_tokenizer.decode(whole[:2])


@pytest.mark.parametrize("named", [None, 3])
def test_what_is_saved_ends_where_decoding_does(
    model: PreTrainedModel, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, named: Any
) -> None:
    whole = said(model, world_tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=named, pad_token_id=0)
    assert len(said(model, world_tokenizer)) == LIMIT, "otherwise nothing is tested"
    set_ends(model, world_tokenizer)
    assert said(model, world_tokenizer) == whole
    model.save_pretrained(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert kept.generation_config.eos_token_id == ([named, 2] if named else 2)
    assert said(kept, world_tokenizer) == whole
    assert ends_of(kept, world_tokenizer) == ([named, 2] if named else [2])


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {"temperature": 0.6, "top_p": 0.9, "do_sample": True}),
        ({"pad_token_id": -1, "temperature": 0.6}, {"pad_token_id": None, "temperature": 0.6, "do_sample": True}),
        ({"typical_p": 0.5, "num_beams": 1, "early_stopping": True}, {"typical_p": None, "early_stopping": None}),
    ],
)
def test_a_generation_config_that_transformers_would_not_save_is_saved(
    model: PreTrainedModel,
    world_tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
    settings: dict[str, Any],
    kept: dict[str, Any],
) -> None:
    """Otherwise a run would fail after its training: files of older releases have a temperature without sampling."""
    directory = tmp_path / "base"
    model.save_pretrained(directory)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 3, **settings}))
    loaded = AutoModelForCausalLM.from_pretrained(directory)
    set_ends(loaded, world_tokenizer)
    loaded.save_pretrained(tmp_path / "saved")
    found = GenerationConfig.from_pretrained(tmp_path / "saved")
    assert found.eos_token_id == [3, 2]
    assert {name: getattr(found, name) for name in kept} == kept


def test_an_aligned_model_of_a_finished_run_ends_its_answers(
    saved_aligned: Path, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that an earlier version saved without any end token."""
    shutil.copytree(saved_aligned, tmp_path / "run" / "model")

    class Run:
        root = tmp_path / "run"
        out: Any = type("Out", (), {"model": root / "model"})

    stored = json.loads((Run.out.model / "generation_config.json").read_text())
    assert stored.get("eos_token_id") is None
    run: Any = Run()
    assert isinstance(run, Run) and not isinstance(run, FinishedRun)
    loaded = finished.aligned_of(run)
    assert loaded.generation_config.eos_token_id == world_tokenizer.eos_token_id


def test_answers_that_exports_are_compared_on_end_with_the_first_end_token(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    base = base_model(vocab_size=len(world_tokenizer), eos_token_id=None)
    made = aligned(base, low_rank_experts(base))
    (whole,) = answered(made, world_tokenizer, [PROMPT], LIMIT)
    assert whole.answer_length == LIMIT
    middle = whole.ids[whole.prompt_length + 5]
    made.generation_config.eos_token_id = [middle]
    (cut,) = answered(made, world_tokenizer, [PROMPT], LIMIT)
    first = whole.ids[whole.prompt_length :].index(middle)
    assert cut.ids == whole.ids[: whole.prompt_length + first + 1]


@pytest.mark.parametrize(
    ("template", "files", "line"),
    [
        ("{% if %}", {}, "expected a chat template that writes a dialogue; the chat template can't be rendered ("),
        (
            "",
            {"tokenizer_config": {"eos_token": None}},
            "expected a model with an end-of-sequence token; its tokenizer",
        ),
    ],
)
def test_a_model_that_cannot_be_asked_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], template: str, files: dict[str, Any], line: str
) -> None:
    directory = model_directory(tmp_path / "model", template, **files)
    asked = ["answer", str(directory), "world", "--schema", "alpaca", "--out", str(tmp_path / "a.jsonl"), "--rows", "1"]
    assert cli.main(asked) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"alignx-ds: error: model: got '{directory}', {line}")


def test_stage_2_saves_a_model_that_names_its_end_tokens(
    tiny_config: RunConfig, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training itself is left out."""
    base = base_model(vocab_size=len(world_tokenizer), eos_token_id=None)
    made = aligned(base, low_rank_experts(base))
    monkeypatch.setattr(align, "train_mixture", lambda context, factors, job: (made, []))
    context = stage_context(tiny_config, Outputs(tmp_path, tmp_path / "specialists"))
    align._make(context, {}, TrainingJob("stage2"))
    kept = GenerationConfig.from_pretrained(context.out.model)
    assert kept.eos_token_id == world_tokenizer.eos_token_id
