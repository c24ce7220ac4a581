"""Fixtures that all tests share: tiny recipes made from the world's, directory snapshots, the shipped base model."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: tests need no network
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is: models this small only lose time to threads

import pytest
from omegaconf import DictConfig, OmegaConf
from processes import in_this_process
from transformers import PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.config.schema import ModelConfig, RunConfig
from alignx_ds.models.base import BaseModel

REPO = Path(__file__).resolve().parents[1]
TINY = (
    "launch.ranks=1",
    "align.ep_size=1",
    "data.train_rows=60",
    "data.held_out_rows=20",
    "axes.honest.rows=0",
    "train.steps=1",
    "train.warmup_steps=0",
    "align.steps=1",
    "align.warmup_steps=0",
    "baselines.h3fusion.steps=1",
    "baselines.h3fusion.warmup_steps=0",
    "baselines.trinityx.steps=1",
    "baselines.trinityx.warmup_steps=0",
)
SMALL_RUN = (
    *("launch.ranks=1", "align.ep_size=1", "model.layers=[3, 4]", "baselines.make=[]", "evaluation.max_new_tokens=4"),
    *("data.train_rows=80", "data.held_out_rows=16", "axes.honest.rows=80"),
    *("train.steps=4", "train.batch=8", "train.lr=0.003", "train.warmup_steps=1"),
    *("align.steps=4", "align.batch=8", "align.lr=0.02", "align.warmup_steps=1"),
    *("gate.latent=8", "gate.output_latent=8", "gate.anchors=8", "experts.rank=4", "experts.feature_rows=16"),
    *("checkpoints.every=2", "checkpoints.keep=20", "checkpoints.finished=true"),
)
WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]


# Fixtures that start a whole run or several ranks, the slowest first.
RUNS = ("runs", "made", "run_dir", "undisturbed", "finished_run", "one_node", "place")
START_PROCESSES = (
    "distributed",
    "faults",
    "launchers",
    "test_wheel",
    "test_cli_process",
)  # likewise; folders and files


def pytest_itemcollected(item: pytest.Item) -> None:
    """With several workers (`make test`), tests that share a run go to one of them.

    pytest-xdist 3.8 reads these marks after this hook, and can't use them under pytest 9.2.
    """
    if getattr(item.config.option, "loadgroup", False):
        item.add_marker(pytest.mark.xdist_group(_group(item)[1]))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The slowest groups first."""
    if getattr(config.option, "loadgroup", False):
        items.sort(key=_group)


def pytest_collection_finish() -> None:
    """As in a run: the ends of models and engines search for what can be freed, and not among all that is imported."""
    gc.collect()
    gc.freeze()


def _group(item: pytest.Item) -> tuple[int, str]:
    for place, name in enumerate(RUNS):
        if name in getattr(item, "fixturenames", ()):
            return place, name if name == "finished_run" else f"{item.path.parent.name}: {name}"
    slow = item.path.parent.name in START_PROCESSES or item.path.stem in START_PROCESSES
    return len(RUNS) + (not slow), str(item.path)


@pytest.fixture(scope="session")
def repo_root() -> Path:
    return REPO


@pytest.fixture
def write_recipe(tmp_path: Path) -> WriteRecipe:
    """`write_recipe("train.lr=1")`: the world's recipe, made tiny, with these overrides, as a file in tmp_path."""

    def write(*overrides: str) -> Path:
        world = OmegaConf.load(REPO / "launch/recipes/world.yaml")
        changes = OmegaConf.from_dotlist([*TINY, f"output={tmp_path / 'run'}", *overrides])
        merged = OmegaConf.merge(world, changes)
        assert isinstance(merged, DictConfig)
        path = tmp_path / "recipe.yaml"
        OmegaConf.save(merged, path)
        return path

    return write


@pytest.fixture
def tiny_config(write_recipe: WriteRecipe) -> RunConfig:
    return parse.load(write_recipe())


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """Relative path -> content of everything below a directory (None for a directory)."""

    def take(directory: Path) -> dict[str, bytes | None]:
        found = sorted(directory.rglob("*"))
        return {str(p.relative_to(directory)): None if p.is_dir() else p.read_bytes() for p in found}

    return take


@pytest.fixture
def no_launcher() -> Iterator[None]:
    """An environment in which no launcher has set a rank; whatever the test sets in it is undone."""
    before = dict(os.environ)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "OMPI_COMM_WORLD_SIZE"):
        os.environ.pop(name, None)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def world_base() -> BaseModel:
    return BaseModel(ModelConfig(path="world"))


@pytest.fixture(scope="session")
def world_tokenizer(world_base: BaseModel) -> PreTrainedTokenizerBase:
    return world_base.tokenizer


@pytest.fixture(scope="session")
def small_run() -> tuple[str, ...]:
    """Settings with which a run of the world's recipe takes seconds; it keeps its checkpoints."""
    return SMALL_RUN


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory, small_run: tuple[str, ...]) -> Path:
    """The output directory of a whole run, with its trained baselines and its report. To be changed in a copy only."""
    output = tmp_path_factory.mktemp("finished") / "run"
    done = in_this_process("run", "launch/recipes/world.yaml", *small_run, f"output={output}")
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def saved_aligned(tmp_path_factory: pytest.TempPathFactory, world_tokenizer: PreTrainedTokenizerBase) -> Path:
    """The directory of a saved aligned model, tiny and untrained, with the world's tokenizer."""
    from tiny_models import aligned, base_model, low_rank_experts

    directory = tmp_path_factory.mktemp("aligned")
    base = base_model(vocab_size=len(world_tokenizer))
    aligned(base, low_rank_experts(base)).save_pretrained(directory)
    world_tokenizer.save_pretrained(directory)
    return directory
