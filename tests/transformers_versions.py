"""`make compat`: tests of decoding, likelihoods, noise, saved and exported models on other versions of transformers.

They are the lowest that pyproject.toml allows, and the newest on the package index.

Each version is installed once, below .venv, and shadows the environment's own. Both are tested at once, in a process
each, which costs less than two workers for one and then for the other: most of a short run is imports.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    *("tests/mocae/test_decoding.py", "tests/mocae/test_saved_models.py", "tests/models/test_registration.py"),
    *("tests/evaluation/test_decode.py", "tests/evaluation/test_generate.py", "tests/evaluation/test_likelihood.py"),
    *("tests/export/test_hugging_face.py", "tests/export/test_remote_code.py", "tests/training/test_latent_noise.py"),
)
CHOSEN = "not transformers.models.auto"  # tests of the order of imports, which start a process each
NO_INDEX = ("NewConnectionError", "NameResolutionError", "ConnectTimeoutError", "ProxyError")


class UnreachableIndexError(Exception):
    """The package index does not answer."""


def pip(*arguments: str) -> str:
    """The output of `pip install`. Raises UnreachableIndexError."""
    install = ("install", "--quiet", "--no-deps", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", *install, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode and any(sign in done.stderr for sign in NO_INDEX):
        raise UnreachableIndexError
    if done.returncode:
        sys.exit(done.stderr)
    return done.stdout


def supported() -> Requirement:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return next(r for r in map(Requirement, project["dependencies"]) if r.name == "transformers")


def newest(requirement: Requirement) -> str:
    report = json.loads(pip("--dry-run", "--ignore-installed", "--report", "-", str(requirement)))
    return str(report["install"][0]["metadata"]["version"])


def installed(version: str) -> Path:
    place = Path(sys.prefix) / "transformers" / version
    if not place.is_dir():
        partial = place.with_name(f".{version}.{os.getpid()}")
        try:
            pip("--no-compile", "--target", str(partial), f"transformers=={version}")
            partial.rename(place)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return place


def tested(find: Callable[[], str]) -> tuple[bool, str]:
    """Whether the tests pass on the version that `find` names, and what they print."""
    try:
        version = find()
        place = installed(version)
    except UnreachableIndexError:
        return True, "skipped: the package index can't be reached\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(place), str(ROOT)])}
    check = f"import transformers; assert transformers.__version__ == {version!r}, transformers.__file__"
    printed = f"transformers {version}\n"
    for command in (["-c", check], ["-m", "pytest", "-p", "no:cacheprovider", "-k", CHOSEN, *TESTS]):
        done = subprocess.run(
            [sys.executable, *command], cwd=ROOT, env=environment, stdout=PIPE, stderr=STDOUT, text=True, check=False
        )
        printed += done.stdout
        if done.returncode:
            return False, printed
    return True, printed


def main() -> int:
    requirement = supported()
    (lowest,) = [clause.version for clause in requirement.specifier if clause.operator == ">="]
    lowest += ".0" * (2 - lowest.count("."))
    versions = {"lowest": lambda: lowest, "newest": lambda: newest(requirement)}
    passed = []
    with ThreadPoolExecutor() as pool:
        for which, (passes, printed) in zip(versions, pool.map(tested, versions.values()), strict=True):
            print(f"the {which} supported: {printed}", end="", flush=True)
            passed.append(passes)
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
