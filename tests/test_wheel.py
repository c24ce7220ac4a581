"""The wheel, installed where nothing of the checkout can be imported, has all that a run needs."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from processes import environment

SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "alignx_ds", "launch", "ds_configs")
# A command, and then what was imported for it from where. The other packages come from this environment's folder, whose
# own .pth files, such as the one that leads to a checkout, are not read there.
COMMAND = """
import sys
from alignx_ds import cli
code = cli.main(sys.argv[1:])
print()
print(*(module.__file__ for name, module in sys.modules.items() if name.split(".")[0] == "alignx_ds"))
print(*sys.path)
sys.exit(code)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> Path:
    """Built from a copy, as a build writes into its sources."""
    place = tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        source = repo_root / name
        if source.is_dir():
            shutil.copytree(source, place / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, place / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "."]
    subprocess.run(build, cwd=place, check=True, timeout=120)
    (made,) = place.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment with the wheel and what it depends on, but without the checkout."""
    root = tmp_path_factory.mktemp("environment")
    venv.create(root, symlinks=True)
    python = root / "bin/python"
    install = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True, timeout=120)
    (packages,) = root.glob("lib/python*/site-packages")
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return root / "bin"


def run(command: list[str | Path], place: Path) -> subprocess.CompletedProcess[str]:
    outside = environment()
    del outside["PYTHONPATH"]
    return subprocess.run(command, cwd=place, env=outside, capture_output=True, text=True, timeout=280, check=False)


def test_every_file_of_the_package_is_in_it(wheel: Path, repo_root: Path) -> None:
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    files = {
        path for path in (repo_root / "alignx_ds").rglob("*") if path.is_file() and "__pycache__" not in path.parts
    }
    wanted = {str(path.relative_to(repo_root)) for path in files}
    wanted |= {f"alignx_ds/recipes/{path.name}" for path in repo_root.glob("launch/recipes/*")}
    wanted |= {f"alignx_ds/{path.relative_to(repo_root)}" for path in repo_root.glob("ds_configs/*")}
    assert packed == wanted


def test_a_run_from_an_empty_directory(
    installed: Path, small_run: tuple[str, ...], tmp_path: Path, repo_root: Path
) -> None:
    """By a shipped recipe's name, on two ranks, with nothing imported from the checkout."""
    done = run([installed / "alignx-ds", "--version"], tmp_path)
    assert done.returncode == 0, done.stderr
    fewer = ("launch.ranks=2", "train.steps=1", "train.warmup_steps=0", "align.steps=1", "align.warmup_steps=0")
    done = run([installed / "python", "-c", COMMAND, "run", "world", *small_run, *fewer], tmp_path)
    assert done.returncode == 0, done.stderr
    files, path = map(str.split, done.stdout.splitlines()[-2:])
    assert len(files) > 50 and all(Path(file).is_relative_to(installed.parent) for file in files)
    assert str(repo_root) not in path
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    assert (tmp_path / "runs/world/report.html").is_file()
