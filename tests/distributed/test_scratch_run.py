"""The main job from nothing: two real ranks train a base model from scratch, split a file per axis, judge offline."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import in_this_process

from alignx_ds.data.world.files import write_files
from alignx_ds.runs import manifest

STAGE = {"batch": 8, "steps": 2, "warmup_steps": 0}


def recipe(root: Path) -> Path:
    """No generalist; held-out rows are split off by question; one axis has no judge."""
    write_files(root / "rows", 120, seed=3)
    files = {path.stem: str(path) for path in (root / "rows").iterdir()}
    axes = {
        axis: {"prompt": f"you are {axis} .", "schema": schema, "train": files[f"{schema}_train"]}
        for axis, schema in (("helpful", "alpaca"), ("harmless", "beavertails"), ("honest", "truthfulqa"))
    }
    axes["harmless"]["judge"], axes["honest"]["judge"] = "offline_safety", "mc"
    content = {
        "output": str(root / "run"),
        "launch": {"ranks": 2},
        "model": {"path": "scratch", "layers": [1], "max_length": 128},
        "data": {"train_rows": 80, "held_out_rows": 12},
        "scratch": {
            "vocabulary": 400,
            "hidden": 32,
            "layers": 2,
            "heads": 2,
            "ffn": 48,
            "texts": {axis: {"schema": a["schema"], "source": a["train"]} for axis, a in axes.items()},
            "train": STAGE,
        },
        "axes": axes,
        "train": STAGE,
        "experts": {"rank": 4, "feature_rows": 16},
        "gate": {"latent": 8, "output_latent": 8, "anchors": 8},
        "align": {**STAGE, "ep_size": 2},
        "evaluation": {
            "batch": 8,
            "max_new_tokens": 4,
            "sets": {
                "over_refusal": {
                    "schema": "plain",
                    "source": files["plain_held_out"],
                    "judge": "refusal",
                    "rows": 6,
                },
            },
        },
        "judges": {"classifier_rows": files["beavertails_train"]},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.mark.timeout(300)
def test_a_run_from_scratch(tmp_path: Path) -> None:
    done = in_this_process("run", str(recipe(tmp_path)))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "run"
    report: dict[str, Any] = json.loads((run / "report.json").read_text())

    base = manifest.read(run / "base")
    assert len(base["losses"]) == 2 and base["losses"][1] < base["losses"][0]
    assert set(report["perplexity"]["alignx"]) == {"helpful", "harmless", "honest"}
    assert all(1 < value < 10_000 for by_axis in report["perplexity"].values() for value in by_axis.values())
    assert report["scored"] == ["harmless", "honest"] and "avg" not in report["systems"]["base"]
    assert "judge_accuracy" in report["systems"]["alignx"]["details"]["harmless"]
    assert set(report["systems"]["alignx"]["details"]["honest"]) >= {"mc1", "mc2"}
    assert set(report["sets"]["over_refusal"]) == set(report["systems"])
    assert all(row[0] == 0 for row in report["router"]["confusion"]), "nothing goes to a generalist without rows"
    assert "itself measured on held-out rows" in done.stdout

    lost = sum(report["rows"]["honest"]["not_trained_on"].values())
    account = report["rows"]["honest"]
    assert account["train"] + account["held_out"] + lost + sum(account["not_judged"].values()) == 120
