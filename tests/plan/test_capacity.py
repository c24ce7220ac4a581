"""A base model that a rank's memory does not hold is refused, unless every stage of the run shards it."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import ConfigError
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import capacity
from alignx_ds.runtime import memory

WriteRecipe = Callable[..., Path]
ZERO3 = ["align.deepspeed=ds_configs/stage1_zero3.json", "align.ep_size=0"]


def problems(config: RunConfig, world_size: int = 2, until: str = "run") -> dict[str, str]:
    try:
        capacity.check(config, BaseModel(config.model), world_size, until)
    except ConfigError as error:
        return {p.key: str(p) for p in error.problems}
    return {}


@pytest.fixture
def little_memory(monkeypatch: pytest.MonkeyPatch, world_base: BaseModel) -> None:
    monkeypatch.setattr(memory, "available", lambda here=None: int(1.2 * world_base.size))


def test_a_model_that_fits_is_never_refused(tiny_config: RunConfig) -> None:
    assert problems(tiny_config) == {}


@pytest.mark.usefixtures("little_memory")
def test_each_stage_that_keeps_it_whole_is_named(write_recipe: WriteRecipe) -> None:
    found = problems(parse.load(write_recipe(), ["baselines.make=[ties,h3fusion]"]))
    assert found.keys() == {"align.deepspeed", "baselines.h3fusion.deepspeed"}
    assert (
        "align.ep_size=0" in found["align.deepspeed"] and "leave h3fusion out" in found["baselines.h3fusion.deepspeed"]
    )


@pytest.mark.usefixtures("little_memory")
def test_stages_under_zero3_are_not_refused(write_recipe: WriteRecipe) -> None:
    config = parse.load(write_recipe(), [*ZERO3, "baselines.make=[ties]"])
    assert problems(config) == {}
    assert problems(parse.load(write_recipe(), ["baselines.make=[ties]"]), until="specialists") == {}
    config.align.ep_size = 1
    assert problems(config).keys() == {"align.deepspeed"}


@pytest.mark.usefixtures("little_memory")
def test_one_rank_has_nobody_to_share_it_with(write_recipe: WriteRecipe) -> None:
    assert problems(parse.load(write_recipe(), ZERO3), world_size=1).keys() == {"launch.ranks"}


@pytest.mark.usefixtures("little_memory", "no_launcher")
@pytest.mark.parametrize("verb", ["run", "specialists"])
def test_a_dry_run_says_what_this_machine_would_refuse(
    verb: str, write_recipe: WriteRecipe, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [verb, str(write_recipe("launch.ranks=2", "baselines.make=[ties]")), "--dry-run"]
    assert cli.main(command) == 0, "another machine may train it"
    printed = capsys.readouterr().out
    refused = printed.split("refused on this machine\n")[1].split("\n\n")[0] if "refused" in printed else ""
    assert refused.strip().startswith("align.deepspeed") == (verb == "run")
    assert cli.main([*command, "--gpu-memory", "80GiB"]) == 0
    assert "refused" not in capsys.readouterr().out


def test_a_limit_on_address_space_is_what_it_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    before, room = memory.available(), 2**30
    used = int(memory.psutil.Process().memory_info().vms)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (used + room, used + room))
    assert before > memory.available() > 0
    assert memory.available() == pytest.approx(room, rel=0.2)


def test_ranks_of_one_machine_share_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = memory.available()
    assert memory.available(here=4) == pytest.approx(whole / 4, rel=0.01)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.available(here=2) == pytest.approx(whole / 4, rel=0.01)
