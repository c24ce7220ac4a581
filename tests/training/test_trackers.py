"""Trackers beside TensorBoard: the real packages without a server, where they are installed, and refused where not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import DataError
from alignx_ds.plan import trackers as plan
from alignx_ds.runtime import distributed
from alignx_ds.training.job import TrainingJob
from alignx_ds.training.trackers import tracked

Logged = list[tuple[int, dict[str, float]]]


def follow(root: Path, names: list[str], steps: range, logged: Logged | None = None) -> None:
    """A start of a job that logs these steps, and TensorBoard's log beside its trackers."""
    own: Logged = [] if logged is None else logged
    job = TrainingJob("stage1/helpful", log=lambda step, values: own.append((step, values)))
    with tracked(names, job, "made of this", root) as followed:
        for step in steps:
            followed.log(step, {"loss": 1 / step, "speed/step_seconds": 2.0})


def test_without_trackers_a_job_logs_as_before(tmp_path: Path) -> None:
    logged: Logged = []
    follow(tmp_path / "run", [], range(1, 3), logged)
    assert [step for step, _ in logged] == [1, 2] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_other_ranks_than_the_first_send_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not even import the package."""
    monkeypatch.setattr(distributed, "is_main", lambda: False)
    follow(tmp_path / "run", [name], range(1, 3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_package_that_is_not_installed_is_refused_in_one_line(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignx_ds.plan.trackers.importlib.util.find_spec", lambda module: None)
    (problem,) = plan.problems(RunConfig(trackers=[name]))
    assert problem.key == "trackers" and f"pip install 'alignx-ds[{name}]'" in str(problem)


def test_a_tracker_twice_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignx_ds.plan.trackers.importlib.util.find_spec", lambda module: True)
    (problem,) = plan.problems(RunConfig(trackers=["mlflow", "mlflow"]))
    assert "distinct names" in str(problem)
    assert list(plan.problems(RunConfig(trackers=["mlflow"]))) == []


@pytest.fixture
def wandb() -> Iterator[None]:
    """It reads its variables once a process."""
    package = pytest.importorskip("wandb")
    yield
    package.teardown()


@pytest.mark.usefixtures("wandb")
def test_wandb_without_a_login_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would ask for one in the middle of the run."""
    for variable in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (problem,) = plan.problems(RunConfig(trackers=["wandb"]))
    assert "WANDB_MODE=offline" in str(problem)
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert list(plan.problems(RunConfig(trackers=["wandb"]))) == []


@pytest.mark.usefixtures("wandb")
def test_wandb_has_the_metrics_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("OPENAI_API_KEY", "sk-not-to-be-seen")
    follow(tmp_path / "run", ["wandb"], range(1, 4))
    follow(tmp_path / "run", ["wandb"], range(3, 5))
    files = sorted((tmp_path / "run").rglob("*.wandb"))
    assert len({file.name for file in files}) == 1, "two starts of one run, which may lie in one second's directory"
    for file in files:
        written = file.read_bytes()
        assert b"speed/step_seconds" in written and b"stage1/helpful" in written
        assert b"not-to-be-seen" not in written and b"pytest" not in written, "nor the command"


def test_mlflow_has_the_metrics_of_all_starts_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    from mlflow import MlflowClient

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    follow(tmp_path / "run", ["mlflow"], range(1, 4))
    follow(tmp_path / "run", ["mlflow"], range(3, 5))
    client = MlflowClient(f"sqlite:///{tmp_path / 'run/mlflow.db'}")
    experiment = client.get_experiment_by_name("alignx-ds")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("run/stage1/helpful", "FINISHED")
    history = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, "loss")}
    assert history == {step: pytest.approx(1 / step) for step in range(1, 5)}
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing beside the output directory"


def test_a_tracker_that_can_not_start_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nothing://here")
    with pytest.raises(DataError, match=r"^trackers: mlflow can't start: .*MLFLOW_TRACKING_URI") as error:
        follow(tmp_path / "run", ["mlflow"], range(1, 2))
    assert len(str(error.value).splitlines()) == 1
