"""The study that makes its own runs: which it plans, what they share, and its figures."""

from __future__ import annotations

import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import Stopped, UserError
from alignx_ds.study import scaling_runs
from alignx_ds.study.scaling_axes import summarise
from alignx_ds.study.scaling_runs import Curves, variants


@pytest.fixture
def recipe() -> RunConfig:
    return parse.load("world-opposites")


def test_each_run_differs_from_the_whole_one_in_one_thing(recipe: RunConfig, tmp_path: Path) -> None:
    made = {v.name: v for v in variants(recipe, Curves((2, 4, 8), (50, 200, 800), (4, 16, 32)), 5, tmp_path)}
    assert list(made) == ["axes-8", "axes-4", "axes-2", "rows-200", "rows-800", "rank-4", "rank-16"]
    shared = str(tmp_path / "seed-5" / "specialists")
    for name, variant in made.items():
        c = variant.config
        assert (c.seed, c.output) == (5, str(tmp_path / "seed-5" / name))
        axes = int(name.removeprefix("axes-")) if name.startswith("axes") else 8
        assert list(c.axes) == list(recipe.axes)[:axes]
        assert c.axes["refuse"].rows == (int(name.removeprefix("rows-")) if name.startswith("rows") else 50)
        assert c.experts.rank == (int(name.removeprefix("rank-")) if name.startswith("rank") else 32)
        assert (c.specialists == shared) == name.startswith("axes")
    assert "h3fusion" in made["axes-8"].config.baselines.make and "h3fusion" not in made["axes-4"].config.baselines.make
    assert [v.baselines for v in made.values()] == [True] * 5 + [False] * 2


def test_a_pair_is_never_cut(recipe: RunConfig) -> None:
    axes = list(recipe.axes)
    pairs = [{"refuse", "serve"}, {"brief", "thorough"}, {"formal", "plain"}, {"answer", "admit"}]
    assert [set(axes[i : i + 2]) for i in range(0, 8, 2)] == pairs


@pytest.mark.parametrize("numbers", [["1"], ["2", "9"]])
def test_numbers_of_axes_that_can_t_be_are_refused(numbers: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["world-opposites", "axes.refuse.rows=0", "axes.serve.rows=50"]
    assert cli.main(["study", "scaling-axes", *recipe, "--axes", *numbers]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignx-ds: error: --axes: got ") and "serve, is number 2" in line


def test_an_axis_without_a_judge_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "scaling-axes", "world-opposites", "axes.brief.judge=beaver_dam"]) == 2
    assert "axes.brief.judge: got 'beaver_dam'" in capsys.readouterr().err


def test_settings_of_a_study_that_trains_nothing_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "drift", "runs/world", "train.lr=1"]) == 2
    assert "train.lr=1: only scaling-axes has settings" in capsys.readouterr().err


def seed(aligned: list[float], mixed: list[float]) -> dict[str, dict[str, float]]:
    return {
        "mixed": dict(zip(("a", "b"), mixed, strict=True)),
        "own specialist": {"a": 100.0, "b": 100.0},
        "alignx": dict(zip(("a", "b"), aligned, strict=True)),
    }


def test_the_worst_axis_is_found_for_each_seed_before_it_is_averaged() -> None:
    whole = [seed([90.0, 80.0], [10.0, 60.0]), seed([70.0, 95.0], [50.0, 30.0])]
    small = [seed([100.0, 99.0], [98.0, 97.0])] * 2
    ranked = [{"alignx": {"a": 40.0, "b": 30.0}}] * 2
    scores = {"axes-2": whole, "rows-9": small, "rank-1": ranked}
    curves = summarise(scores, Curves((2,), (5, 9), (1, 8)), rows=5, rank=8)
    mixed = curves["axes"]["2"]["mixed"]
    assert mixed["worst"] == {"mean": 20.0, "deviation": pytest.approx(np.std([10, 30], ddof=1))}
    assert mixed["mean"]["mean"] == (35 + 40) / 2
    assert mixed["worst_axes"] == {"a": 1, "b": 1}
    gaps = [80 - 10, 70 - 30]
    assert mixed["behind"] == {"mean": 55.0, "error": pytest.approx(np.std(gaps, ddof=1) / 2**0.5)}
    assert "behind" not in curves["axes"]["2"]["own specialist"]
    assert curves["rows"]["5"] == curves["axes"]["2"] and curves["rows"]["9"]["alignx"]["worst"]["mean"] == 99.0
    assert list(curves["rank"]["8"]) == list(curves["rank"]["1"]) == ["alignx"]


def test_a_study_shares_specialists_and_makes_nothing_twice(
    finished_run: Path, small_run: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Instead of a process that makes the run with all axes, a copy of a finished one; the next one is stopped."""
    started: list[str] = []
    place = tmp_path / "runs" / "seed-0"

    def start(verb: str, recipe: Path) -> None:
        started.append(f"{verb} {recipe.stem}")
        if recipe.stem != "axes-3":
            raise Stopped("a test")
        shutil.copytree(finished_run, place / "axes-3", ignore=shutil.ignore_patterns("specialists", "checkpoints"))
        shutil.copytree(finished_run / "specialists", place / "specialists")
        shutil.copy(recipe, place / "axes-3" / "config.yaml")

    def study(rows: str) -> int:
        numbers = ["--axes", "3", "--rows", "80", rows, "--ranks", "4", "--seeds", "0"]
        settings = [*small_run, f"output={tmp_path / 'runs'}"]
        return cli.main(["study", "scaling-axes", "launch/recipes/world.yaml", *settings, *numbers])

    monkeypatch.setattr(scaling_runs, "_start", start)
    assert study("90") == 75
    assert started == ["run axes-3", "run rows-90"]
    shared = place / "specialists-rows-90"
    assert sorted(path.name for path in shared.iterdir()) == ["harmless", "honest"], "all but the smallest, helpful"
    assert (shared / "honest/manifest.json").read_bytes() == (place / "specialists/honest/manifest.json").read_bytes()
    assert study("80") == 0
    assert len(started) == 2, "a finished run is not made again"
    content: dict[str, Any] = json.loads((tmp_path / "runs/study/scaling-axes.json").read_text())
    report = json.loads((finished_run / "report.json").read_text())
    scores = report["systems"]["mixed"]
    numbers = "--axes 3 --rows 80 80 --ranks 4 --seeds 0"
    assert content["command"].startswith("alignx-ds study scaling-axes launch/recipes/world.yaml ")
    assert content["command"].endswith(f" {numbers}") and "output=" not in content["command"]
    assert all(shlex.quote(setting) in content["command"] for setting in small_run)
    found = content["curves"]["axes"]["3"]
    assert found["mixed"]["worst"]["mean"] == min(scores[axis] for axis in report["axes"])
    assert found["own specialist"]["mean"]["mean"] == np.mean([report["systems"][a][a] for a in report["axes"]])
    assert content["curves"]["rows"]["80"] == found and list(content["curves"]["rank"]["4"]) == ["alignx"]
    assert content["overlap"]["axes"] == report["axes"]
    assert (tmp_path / "runs/study/scaling-axes.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("code", "error"), [(75, Stopped), (130, Stopped), (2, UserError)])
def test_a_run_that_stops_or_fails_ends_the_study(
    code: int, error: type[Exception], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nexit {code}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(error, match=r"r\.yaml"):
        scaling_runs._start("run", tmp_path / "r.yaml")
