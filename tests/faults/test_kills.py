"""kill -9 of either rank at any point: the same command continues and ends in the same bytes as an undisturbed run."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from command import SMALL, Command, results
from recording import Record

from alignx_ds.config import parse
from alignx_ds.models.base import BaseModel
from alignx_ds.plan.sizes import counts


def kill(rank: int, job: str, step: int = 0, place: str = "step", **more: Any) -> dict[str, Any]:
    return {"rank": rank, "kind": "kill", "job": job, "step": step, "place": place, **more}


def everywhere(seed: int = 0) -> list[dict[str, Any]]:
    """At least one kill at a random step of every training job, by a random rank, and one in everything between."""
    draw = random.Random(seed)

    def at_random(job: str, first: int, last: int) -> dict[str, Any]:
        return kill(draw.randrange(2), job, draw.randint(first, last), draw.choice(["step", "forward"]))

    kills = []  # in the order in which they happen: each start goes on from the checkpoint before the last kill
    for axis in ("helpful", "harmless", "honest"):
        kills += [at_random(f"stage1/{axis}", 1, 3), kill(draw.randrange(2), f"stage1/{axis}", 4, "save", sync=1)]
        kills += [at_random(f"stage1/{axis}", 5, 6), kill(draw.randrange(2), f"stage1/{axis}", place="extract")]
    kills += [kill(0, "honest", place="seal"), kill(draw.randrange(2), "", place="fit")]
    kills += [at_random("stage2", 1, 3), kill(0, "stage2", 4, "rename"), at_random("stage2", 5, 6)]
    kills += [kill(0, "stage2", 6, "prune"), kill(draw.randrange(2), "", place="calibrate")]
    kills += [kill(0, "model", place="seal")]
    kills += [at_random("stage1/sequential_2_harmless", 1, 6), at_random("stage1/mixed_3_honest", 1, 6)]
    kills += [at_random("baselines/h3fusion", 1, 4), at_random("baselines/trinityx", 1, 4)]
    kills += [kill(draw.randrange(2), "mixed", place="answer"), kill(draw.randrange(2), "alignx", place="answer")]
    return kills


def described(fault: dict[str, Any]) -> str:
    where = f"{fault['job']} " if fault["job"] else ""
    return f"rank {fault['rank']}, {where}{fault['place']}" + (f" {fault['step']}" if fault["step"] else "")


@pytest.mark.faults
@pytest.mark.timeout(2400)
def test_a_run_killed_in_every_stage_ends_as_if_nothing_had_been(
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    command, killed, slowest = Command("run", tmp_path / "run"), [], 0.0
    for fault in everywhere():
        ended = command.start(fault=fault)
        assert not ended.well, f"the fault did not happen: {described(fault)}"
        assert ended.codes[fault["rank"]] == -9, ended.console
        killed.append(described(fault))
        slowest = max(slowest, ended.survival)
    assert len(killed) >= 20, killed
    ended = command.start()
    assert ended.well, ended.console
    assert results(command.output) == results(undisturbed("run"))
    assert not (command.output / "checkpoints").exists(), "what is sealed needs none"
    assert not list(command.output.rglob("*.partial"))
    what = f"kill -9, {len(killed)} times in one run: every training job, saves, fits, extraction, evaluation"
    record("crash", what, f"same bytes in the end; the other rank ended within {slowest:.1f} s")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_kill_in_the_midst_of_a_checkpoint_leaves_the_one_before(
    tmp_path: Path,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    command = Command("align", tmp_path / "run")
    ended = command.start(fault=kill(0, "stage1/honest", 4, "save", sync=2))
    assert ended.codes[0] == -9 and ended.codes[1] not in (0, None)
    assert [p.name for p in (command.output / "checkpoints/stage1/honest").glob("step_*")] == ["step_00000002"]
    sizes = [f.stat().st_size for f in command.output.glob("checkpoints/stage1/honest/step_*/rank*.safetensors")]
    settings = parse.load(SMALL[0], [*SMALL[1:], "output=x"])
    trained = counts(settings, BaseModel(settings.model))["trained in stage 1"]
    assert sum(sizes) == pytest.approx(12 * trained, rel=0.01), "as docs/reliability.md states"
    ended = command.start(fault=kill(1, "stage2", 5))
    assert "stage1/honest: resumes after step 2" in ended.console
    assert ended.codes[1] == -9
    ended = command.start()
    assert ended.well, ended.console
    assert "stage2: resumes after step 4" in ended.console
    assert results(command.output) == results(undisturbed("align"))
    record("crash", "kill -9 while a checkpoint is written, then in stage 2", "the checkpoint before it is used")


OTHERWISE = ("axes.harmless.objective=dpo", "axes.honest.objective=kto", "train.trainable=lora", "train.lr=1e-2")


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_specialists_that_learn_from_bad_answers_are_killed(tmp_path: Path, record: Record) -> None:
    """Their reference log-probabilities are computed anew by the start that goes on, with the first weights."""
    undisturbed = Command("specialists", tmp_path / "undisturbed", OTHERWISE)
    assert (ended := undisturbed.start()).well, ended.console
    command = Command("specialists", tmp_path / "run", OTHERWISE)
    faults = [kill(1, "stage1/harmless", place="reference"), kill(0, "stage1/harmless", 3, "forward")]
    faults += [kill(1, "stage1/harmless", 4, "save", sync=1), kill(0, "harmless", place="seal")]
    faults += [kill(0, "stage1/honest", 1, "forward"), kill(1, "stage1/honest", 5)]
    for fault in faults:
        ended = command.start(fault=fault)
        assert ended.codes[fault["rank"]] == -9, f"{described(fault)}\n{ended.console}"
    ended = command.start()
    assert ended.well, ended.console
    assert "stage1/honest: resumes after step 4" in ended.console
    assert results(command.output) == results(undisturbed.output)
    record("crash", "kill -9, six times, in stages of LoRA with dpo and kto", "the same bytes in the end")
