"""Where a job's curve goes beside TensorBoard: Weights & Biases and MLflow, from rank 0 alone.

A tracker is sent the name of the output directory, the job's name and its metrics: no config, no rows, no code. Which
server it is and with which login, its own variables say: WANDB_API_KEY, WANDB_MODE, MLFLOW_TRACKING_URI …
"""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignx_ds.errors import DataError
from alignx_ds.runtime import console, distributed
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.metrics import ScalarLogger

PROJECT = "alignx-ds"  # unless WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME says otherwise


@dataclass(frozen=True)
class Tracked:
    """A job as trackers know it. A job that resumes goes on in the same run of theirs."""

    root: Path  # the output directory
    job: str
    fingerprint: str  # of what the job is made from

    @property
    def identity(self) -> str:
        return hashlib.sha256(f"{self.root.resolve()} {self.job} {self.fingerprint}".encode()).hexdigest()[:16]


@contextmanager
def tracked(names: list[str], job: TrainingJob, fingerprint: str, root: Path) -> Iterator[TrainingJob]:
    """The job, which logs to these trackers too until the block ends. Raises DataError where one can't start."""
    with ExitStack() as stack:
        own = names if distributed.is_main() else []
        logs = [job.log, *(stack.enter_context(TRACKERS[name](Tracked(root, job.name, fingerprint))) for name in own)]

        def log(step: int, values: dict[str, float]) -> None:
            for one in logs:
                one(step, values)

        yield replace(job, log=log)


@contextmanager
def _wandb(of: Tracked) -> Iterator[ScalarLogger]:
    import wandb

    settings = wandb.Settings(
        silent=True,
        console="off",
        save_code=False,
        disable_git=True,
        disable_code=True,
        x_disable_meta=True,
        x_save_requirements=False,
    )
    of.root.mkdir(parents=True, exist_ok=True)
    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            group=of.root.name,
            name=of.job,
            id=of.identity,
            resume="allow",
            dir=str(of.root),
            settings=settings,
        )
    except wandb.errors.Error as error:
        raise _no_start("wandb", error, "correct WANDB_API_KEY, or export WANDB_MODE=offline") from error
    run.define_metric("*", step_metric="step")  # W&B's own count may not go back, as a job that resumes does

    def log(step: int, values: dict[str, float]) -> None:
        run.log({"step": step, **values})

    with run:
        yield log


@contextmanager
def _mlflow(of: Tracked) -> Iterator[ScalarLogger]:
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.exceptions import MlflowException

    for chatty in ("mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    of.root.mkdir(parents=True, exist_ok=True)
    local = f"sqlite:///{of.root.resolve() / 'mlflow.db'}"
    try:
        client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI", local))
        run = _mlflow_run(client, of)
    except MlflowException as error:
        raise _no_start("mlflow", error, "correct MLFLOW_TRACKING_URI") from error
    lost: list[str] = []

    def log(step: int, values: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        if lost:
            return
        try:
            client.log_batch(run, metrics=[Metric(name, value, now, step) for name, value in values.items()])
        except MlflowException as error:  # no reason to end a training
            lost.append(str(error))
            console.warn(f"trackers: mlflow takes no more metrics of {of.job}: {_short(error)}")

    ended = "FAILED"
    try:
        yield log
        ended = "FINISHED"
    finally:
        if not lost:
            client.set_terminated(run, ended)


def _mlflow_run(client: Any, of: Tracked) -> str:
    """The id of the job's run, which an earlier start may have made."""
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
    found = client.get_experiment_by_name(name)
    experiment = client.create_experiment(name) if found is None else found.experiment_id
    for run in client.search_runs([experiment], f"tags.alignx_job = '{of.identity}'"):
        client.update_run(run.info.run_id, status="RUNNING")
        return str(run.info.run_id)
    tags = {"alignx_job": of.identity}
    return str(client.create_run(experiment, tags=tags, run_name=f"{of.root.name}/{of.job}").info.run_id)


def _no_start(name: str, error: Exception, fix: str) -> DataError:
    return DataError(f"trackers: {name} can't start: {_short(error)}; {fix}, or leave it out")


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


TRACKERS: dict[str, Callable[[Tracked], AbstractContextManager[ScalarLogger]]] = {"wandb": _wandb, "mlflow": _mlflow}
