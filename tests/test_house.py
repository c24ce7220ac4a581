"""The order of the package's rooms: every import goes down this list, and no two files or rooms import each other."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "alignx_ds"
AT_THE_ROOT = {"__init__", "__main__", "cli", "errors", "pipeline"}
# From the top to the bottom; rooms on one line may not import each other either.
ORDER: tuple[tuple[str, ...], ...] = (
    ("__main__",),
    ("cli",),
    ("pipeline",),
    ("study",),
    ("export", "serve"),
    ("plan",),
    ("evaluation",),
    ("stages",),
    ("baselines",),
    ("routing",),
    ("training",),
    ("experts",),
    ("data",),
    ("models",),
    ("runs",),
    ("doctor",),
    ("config",),
    ("runtime",),
    ("mocae",),
    ("errors",),
)
LEVEL = {room: level for level, rooms in enumerate(ORDER) for room in rooms}


def modules() -> dict[str, Path]:
    """Dotted name below the package -> file; of a folder's __init__, the folder's name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"] = path
    return found


def imported(path: Path, known: set[str]) -> Iterator[str]:
    """The package's modules that a file imports anywhere in it, also within functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] != "alignx_ds":
                continue
            below = name.removeprefix("alignx_ds").lstrip(".")
            yield below if below in known else below.rpartition(".")[0] or "__init__"


def arrows() -> dict[str, set[str]]:
    files = modules()
    return {name: set(imported(path, set(files))) - {name} for name, path in files.items()}


def test_no_other_file_stands_at_the_root() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == AT_THE_ROOT


def test_every_room_has_its_place_in_the_order() -> None:
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and list(path.rglob("*.py"))}
    assert rooms | AT_THE_ROOT - {"__init__"} == set(LEVEL)


def test_every_import_goes_down() -> None:
    upward = []
    for name, targets in arrows().items():
        room = name.split(".")[0]
        if room == "__init__":
            continue  # what the package offers to those who import it
        for target in targets:
            other = target.split(".")[0]
            if other != room and (other == "__init__" or LEVEL[other] <= LEVEL[room]):
                upward.append(f"{name} -> {target}")
    assert not upward


def test_no_files_import_each_other_in_a_circle() -> None:
    try:
        TopologicalSorter(arrows()).prepare()
    except CycleError as error:
        raise AssertionError(" -> ".join(error.args[1])) from error


def test_no_two_test_files_have_the_same_name() -> None:
    """pytest imports them by their names alone."""
    names = [path.name for path in Path(__file__).parent.rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_tests_that_share_a_run_go_to_one_worker(request: pytest.FixtureRequest) -> None:
    """pytest-xdist writes the group behind the test's name; under a pytest it does not support, runs are repeated."""
    if not getattr(request.config.option, "loadgroup", False):
        pytest.skip("one process runs all tests")
    assert request.node.nodeid.endswith(f"@{Path(__file__)}")
