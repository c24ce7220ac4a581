"""The benchmarks' shared parts: targets, ratios, interleaving, and the systems under test."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import torch
from suite import timing
from suite.record import Target
from suite.shapes import NAMES, config_of
from suite.systems import KINDS, Setting, systems
from suite.timing import WARM_UP, Times, Work, interleaved, milliseconds

from alignx_ds.baselines.fusion import fusion_layers
from alignx_ds.evaluation.decode import Decoder
from alignx_ds.mocae.layer import alignx_layers

TINY = Setting(config_of("tiny", layers=2), "cpu", torch.float32, rank=4, latent=8, output_latent=4)


def test_a_target_is_met_or_not() -> None:
    assert [Target("", seen, 1.1).row()[-1] for seen in (1.1, 1.11)] == ["met", "NOT MET"]
    assert [Target("", seen, 0.85, at_least=True).row()[-1] for seen in (0.85, 0.84)] == ["met", "NOT MET"]


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    """Not the ratio of medians: what slowed a whole round down cancels."""
    assert Times([10.0, 200.0, 33.0]).over(Times([10.0, 100.0, 30.0])) == pytest.approx(1.1)


def test_what_work_prepares_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    monkeypatch.setattr(timing.time, "perf_counter", lambda: order.append("clock") or len(order))
    milliseconds(Work(lambda: order.append("run"), lambda: order.append("prepare")), "cpu")
    assert order == ["prepare", "clock", "run", "clock"]


def test_every_system_runs_in_every_round_and_none_is_always_first() -> None:
    order: list[str] = []
    times = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, 4, "cpu")
    rounds = [order[i : i + 3] for i in range(0, len(order), 3)]
    assert len(rounds) == WARM_UP + 4 and all(sorted(r) == ["a", "b", "c"] for r in rounds)
    assert {r[0] for r in rounds} == {"a", "b", "c"}
    assert [len(t.rounds) for t in times.values()] == [4, 4, 4]


@pytest.mark.parametrize("name", NAMES)
def test_every_shape_has_a_config(name: str) -> None:
    cut = config_of(name, layers=2, vocabulary=100)
    assert (cut.num_hidden_layers, cut.vocab_size) == (2, 100)


def test_every_system_answers_a_prompt() -> None:
    ids = torch.randint(3, 100, (3, 7))
    for system in systems(TINY, list(KINDS)):
        system.prepare()
        for model in system.models:
            assert Decoder(model).greedy(ids, torch.ones_like(ids), 2, [], 0).shape == (3, 2)


def test_what_shares_a_model_is_set_apart_before_each_turn() -> None:
    made = {s.name: s for s in systems(TINY, list(KINDS))}
    assert made["AlignX"].models is made["AlignX, all experts"].models
    for name, k in (("AlignX, all experts", 4), ("AlignX", 1), ("AlignX, 2 experts", 2)):
        made[name].prepare()
        assert [layer.settings.top_k for layer in alignx_layers(made[name].models[0])] == [k, k]
    for name, k, scaled in (("TrinityX", 3, True), ("TrinityX, top-1", 1, True), ("H3Fusion, loop", 2, False)):
        made[name].prepare()
        found = [(block.top_k, block.gamma is not None) for block in fusion_layers(made[name].models[0])]
        assert found == [(k, scaled)] * 2
    assert len({id(m) for m in made["ensemble of 3"].models}) == 3


def test_the_memory_benchmark_counts_what_the_models_hold(tmp_path: Path, repo_root: Path) -> None:
    command = [sys.executable, "benchmarks/memory.py", "--shape", "tiny", "--dtype", "float32", "--out", str(tmp_path)]
    subprocess.run(command, cwd=repo_root, check=True, capture_output=True)
    record = json.loads((tmp_path / "memory-tiny-cpu.json").read_text())
    setting = Setting(config_of("tiny"), "cpu", torch.float32, rank=64)
    for kind, name in (("dense", "dense base"), ("alignx", "AlignX"), ("h3fusion", "H3Fusion, loop")):
        (model,) = systems(setting, [name])[0].models
        tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
        held = sum(t.numel() * t.element_size() for t in tensors.values()) / 2**30
        assert record["systems_gib"][kind]["weights"] == pytest.approx(held)
    assert {"date", "command", "commit", "hardware", "versions", "targets"} <= record.keys()


@pytest.mark.parametrize(
    ("script", "options", "shown"),
    [
        ("breakdown", "--batches 1 --length 8 --passes 1", ["dense base", "AlignX"]),
        ("calibrator", "--batch 2 --length 8 --repeats 2", ["AlignX"]),
        ("latency", "--batches 1 --lengths 8 --repeats 2", ["dense base", "AlignX", "H3Fusion, loop"]),
        (
            "serving",
            "--clients 2 --requests 1 --prompt 8 --tokens 3 --repeats 1 --fusion",
            ["dense base", "AlignX", "H3Fusion"],
        ),
        ("proxy", "--prompts 8 --clients 2 --requests 1 --repeats 1", ["no model, ms", "router, ms", "dense base, ms"]),
    ],
)
def test_a_benchmark_runs(
    script: str,
    options: str,
    shown: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = f"{script}.py --shape tiny --layers 2 --device cpu --rank 4 {options}"
    monkeypatch.setattr(sys, "argv", [*command.split(), "--out", str(tmp_path)])
    import_module(script).main()
    record = json.loads((tmp_path / f"{script}-tiny-cpu.json").read_text())
    assert record["command"] == f"python benchmarks/{command}"
    printed = capsys.readouterr().out
    assert [what for what in shown if what not in printed] == []
