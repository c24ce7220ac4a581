"""Hundreds of spoiled model directories: each is refused in one line that names the key, or trains as a whole one does.

A directory goes through what `alignx-ds run` calls before it trains: the checks, the rows, the weights, a first step.
ALIGNX_FUZZ=10 spoils ten times as many.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import save_file
from spoiled_models import ADAPTERS, ALIGNED, KINDS, Spoil
from tiny_models import base_model, low_rank_experts, table_of
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.data.inputs import read_inputs
from alignx_ds.errors import ConfigError, UserError
from alignx_ds.evaluation.generate import answers
from alignx_ds.experts.adapters import CONFIG, WEIGHTS, Adapter
from alignx_ds.export.adapters import config_of, tensors_of
from alignx_ds.models.backbone import load_backbone
from alignx_ds.plan.checks import check
from alignx_ds.serve.generate import answer

FUZZ = int(os.environ.get("ALIGNX_FUZZ", "1"))
LONGEST = 1000  # characters of a line
SETTINGS = (
    *("model.layers=[1, 2]", "gate.latent=8", "gate.output_latent=8", "data.train_rows=12", "data.held_out_rows=4"),
    *("axes.honest.rows=0", "launch.ranks=1", "align.ep_size=1", "baselines.make=[]"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, world_tokenizer: PreTrainedTokenizerBase) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    model = base_model(vocab_size=len(world_tokenizer), max_position_embeddings=256, bos_token_id=1, eos_token_id=2)
    model.save_pretrained(directory)
    world_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapter(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("adapter")
    base = AutoModelForCausalLM.from_pretrained(whole)
    factors = {layer: by_expert[0] for layer, by_expert in low_rank_experts(base).items()}
    save_file(tensors_of(factors, table_of(base)), directory / WEIGHTS)
    (directory / CONFIG).write_text(json.dumps(config_of(factors, table_of(base), str(whole))))
    return directory


@pytest.fixture(scope="module")
def recipe(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("recipe")
    merged = OmegaConf.merge(
        OmegaConf.load(repo_root / "launch/recipes/world.yaml"),
        OmegaConf.from_dotlist([*SETTINGS, f"output={directory / 'run'}"]),
    )
    OmegaConf.save(merged, directory / "r.yaml")
    return directory / "r.yaml"


def trained(recipe: Path, directory: Path) -> None:
    """What a run does with its base model before it trains, a forward pass, and the base model's own answers."""
    loaded = parse.load(recipe, [f"model.path={directory}"])
    inputs = read_inputs(loaded, check(loaded, 1))
    ids = inputs.data.injected["helpful"][0].ids
    model = load_backbone(inputs.base)
    rows = torch.tensor([ids])
    model.train()(input_ids=rows, labels=rows).loss.backward()
    answers(model.eval(), inputs.base.tokenizer, ["hello"], batch=1, max_new_tokens=2)


def hosted(recipe: Path, base: Path, adapter: Path) -> None:
    """What a run does with an adapter that is an axis's expert."""
    loaded = parse.load(recipe, [f"model.path={base}", f"axes.helpful.adapter={adapter}"])
    factors = Adapter(str(adapter), "axes.helpful.adapter").factors(check(loaded, 1))
    assert all(torch.isfinite(up).all() for layer in factors.values() for up in layer.up.values())


def refusal(work: Callable[[], object]) -> UserError | None:
    """What the work raises of our own errors; any other propagates."""
    try:
        work()
    except UserError as error:
        return error
    return None


def tell(kind: tuple[Spoil, int, int], name: str, whole: Path, target: Path, work: Callable[[Path], object]) -> None:
    """Every spoiled directory works, or is refused in a line for each problem; enough of them are refused."""
    (spoil, count, least), refused, untold = kind, 0, []
    for number in range(count * FUZZ):
        directory = Path(shutil.copytree(whole, target / f"{number}"))
        what = spoil(random.Random(f"{name} {number}"), directory)
        try:
            error = refusal(lambda directory=directory: work(directory))
        except Exception as crash:  # noqa: BLE001 - the very thing that is looked for: all of them are shown at once
            untold.append(f"{number}: {what}: {crash!r}")
            continue
        refused += error is not None
        lines = str(error).splitlines() if error else []
        expected = len(error.problems) if isinstance(error, ConfigError) else min(len(lines), 1)
        if len(lines) != expected or not all(line.isprintable() and len(line) < LONGEST for line in lines):
            untold.append(f"{number}: {what}: {error}")
        shutil.rmtree(directory)
    assert not untold, "\n".join(untold)
    assert refused >= least * FUZZ


def test_the_directories_that_are_spoiled_work(whole: Path, recipe: Path, saved_aligned: Path, adapter: Path) -> None:
    assert refusal(lambda: trained(recipe, whole)) is None
    assert refusal(lambda: answer(str(saved_aligned), ["hello"], 2)) is None
    assert refusal(lambda: hosted(recipe, whole, adapter)) is None


SEEN = "they work, or code 2 with one line that says what is wrong"


@pytest.mark.tried("input", "model directories with a spoiled header, config, tokenizer or template", SEEN)
@pytest.mark.parametrize("kind", KINDS)
def test_a_spoiled_base_model_is_refused_in_one_line_or_works(
    kind: str, whole: Path, recipe: Path, tmp_path: Path
) -> None:
    tell(KINDS[kind], kind, whole, tmp_path, lambda directory: trained(recipe, directory))


@pytest.mark.tried("input", "aligned models with a spoiled file", SEEN)
@pytest.mark.parametrize("kind", ALIGNED)
def test_a_spoiled_aligned_model_is_refused_in_one_line_or_works(
    kind: str, saved_aligned: Path, tmp_path: Path
) -> None:
    tell(ALIGNED[kind], kind, saved_aligned, tmp_path, lambda directory: answer(str(directory), ["hello"], 2))


@pytest.mark.tried("input", "LoRA adapters with a spoiled file", SEEN)
@pytest.mark.parametrize("kind", ADAPTERS)
def test_a_spoiled_adapter_is_refused_in_one_line_or_works(
    kind: str, whole: Path, adapter: Path, recipe: Path, tmp_path: Path
) -> None:
    tell(ADAPTERS[kind], kind, adapter, tmp_path, lambda directory: hosted(recipe, whole, directory))
