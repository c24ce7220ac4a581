"""The stages' skeleton: when a result is reused, made again or refused, and what is left of its checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from stage_contexts import stage_context

from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import ConfigError, DataError, Stopped
from alignx_ds.runs import manifest
from alignx_ds.runs.lock import Lock
from alignx_ds.runs.outputs import Outputs
from alignx_ds.stages.stage import Stage, StageContext, ensure, training_job
from alignx_ds.training.job import TrainingJob


@dataclass
class Maker:
    """Writes a stage's result, and counts how often."""

    directory: Path
    jobs: list[TrainingJob] = field(default_factory=list)

    def __call__(self, job: TrainingJob) -> dict[str, Any]:
        self.jobs.append(job)
        assert not list(self.directory.iterdir()), "it starts with an empty directory"
        (self.directory / "weights").write_text(str(len(self.jobs)))
        return {"losses": [1.0]}


@pytest.fixture
def context(tiny_config: RunConfig) -> StageContext:
    return stage_context(tiny_config, Outputs.of(tiny_config))


@pytest.fixture
def stage(context: StageContext) -> Stage:
    return Stage("helpful", "stage1/helpful", context.out.specialists / "helpful", {"lr": 0.1})


@pytest.fixture
def make(stage: Stage) -> Maker:
    return Maker(stage.directory)


def test_a_result_is_made_once_and_described(context: StageContext, stage: Stage, make: Maker) -> None:
    assert ensure(stage, context, make) == stage.directory
    assert manifest.is_current(stage.directory, stage.inputs)
    assert manifest.read(stage.directory)["losses"] == [1.0]
    assert ensure(stage, context, make) == stage.directory
    assert len(make.jobs) == 1


def test_other_inputs_make_it_again(
    context: StageContext, stage: Stage, make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure(stage, context, make)
    changed = replace(stage, inputs={"lr": 0.2})
    ensure(changed, context, make)
    assert "helpful: its inputs have changed" in capsys.readouterr().out
    assert (stage.directory / "weights").read_text() == "2"
    assert manifest.is_current(stage.directory, changed.inputs) and not manifest.is_current(
        stage.directory, stage.inputs
    )


def test_an_unfinished_result_is_made_again(
    context: StageContext, stage: Stage, make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    stage.directory.mkdir(parents=True)
    (stage.directory / "half of the weights").touch()
    ensure(stage, context, make)
    assert [path.name for path in sorted(stage.directory.iterdir())] == ["manifest.json", "weights"]
    assert "changed" not in capsys.readouterr().out


def test_a_damaged_result_is_refused(context: StageContext, stage: Stage, make: Maker) -> None:
    ensure(stage, context, make)
    (stage.directory / "weights").write_text("another")
    with pytest.raises(DataError, match="differs from its manifest"):
        ensure(stage, context, make)
    assert len(make.jobs) == 1


def test_what_other_runs_may_use_is_never_replaced(context: StageContext, stage: Stage, make: Maker) -> None:
    shared = replace(stage, shared=True)
    ensure(shared, context, make)
    ensure(shared, context, make)
    with pytest.raises(ConfigError, match="made from other inputs"):
        ensure(replace(shared, inputs={"lr": 0.2}), context, make)
    assert (stage.directory / "weights").read_text() == "1" and len(make.jobs) == 1


def test_a_stopped_stage_leaves_no_result_but_its_checkpoints(context: StageContext, stage: Stage, make: Maker) -> None:
    def stop(job: TrainingJob) -> dict[str, Any]:
        assert job.checkpoints
        job.checkpoints.directory.mkdir(parents=True)
        raise Stopped("step 3")

    with pytest.raises(Stopped):
        ensure(stage, context, stop)
    left = context.out.checkpoints / "stage1/helpful"
    assert left.is_dir() and not (stage.directory / manifest.NAME).exists()
    ensure(stage, context, make)
    assert not context.out.checkpoints.exists(), "a finished stage needs none"


def test_checkpoints_stay_when_the_recipe_asks_for_it(context: StageContext, stage: Stage, make: Maker) -> None:
    context.config.checkpoints.finished = True
    left = context.out.checkpoints / "stage1/helpful"
    left.mkdir(parents=True)
    ensure(stage, context, make)
    assert left.is_dir()


def test_a_stage_s_job_follows_the_recipe(context: StageContext, stage: Stage) -> None:
    context.config.checkpoints.every, context.config.nonfinite = 7, "skip"
    job = training_job(stage, context)
    assert job.checkpoints is not None
    assert (job.name, job.checkpoints.inputs, job.checkpoints.settings.every) == ("stage1/helpful", {"lr": 0.1}, 7)
    assert "nonfinite: skip" in job.checkpoints.config()
    assert job.nonfinite.skip and job.nonfinite.directory == context.out.nonfinite / "stage1/helpful"
    token = context.base.tokenizer("dog")["input_ids"][-1]
    assert job.nonfinite.decode([token]).strip() == "dog"


def test_a_result_of_other_versions_is_reused_and_this_is_said(
    context: StageContext, stage: Stage, make: Maker, capsys: pytest.CaptureFixture[str]
) -> None:
    ensure(stage, context, make)
    content = manifest.read(stage.directory)
    assert set(content["versions"]) == {"alignx-ds", "torch", "deepspeed", "transformers"}
    content["versions"]["transformers"] = "4.0"
    (stage.directory / manifest.NAME).write_text(manifest.sealed(content))
    ensure(stage, context, make)
    assert "helpful (made with transformers 4.0)" in capsys.readouterr().out and len(make.jobs) == 1


def test_a_shared_result_that_another_run_is_making_is_left_to_it(
    context: StageContext, stage: Stage, make: Maker
) -> None:
    shared = replace(stage, shared=True)
    with Lock(stage.directory.with_name("helpful.alignx.lock"), "specialists", "shared") as held:
        held.take()
        with pytest.raises(ConfigError, match=r"specialists: .*another run holds it"):
            ensure(shared, context, make)
    assert not make.jobs and not stage.directory.exists()
    ensure(shared, context, make)
    assert [path.name for path in stage.directory.parent.iterdir()] == ["helpful"]
    with Lock(stage.directory.with_name("helpful.alignx.lock"), "specialists", "shared") as held:
        held.take()
        ensure(shared, context, make)  # to reuse it needs no lock
    assert len(make.jobs) == 1
