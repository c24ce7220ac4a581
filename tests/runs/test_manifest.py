"""Directories that describe themselves: what counts as current, as unfinished, and as damaged."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_ds.errors import DataError
from alignx_ds.runs import manifest

INPUTS: dict[str, Any] = {"seed": 0, "train": {"lr": 1e-3, "steps": 5}, "rows": ["a", 3]}
NAMES = st.sampled_from(["lr", "steps", "rows", "é", ""])
TREE = st.dictionaries(NAMES, st.integers() | st.dictionaries(NAMES, st.integers() | st.text(max_size=3), max_size=3))


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "specialist"
    directory.mkdir()
    (directory / "weights.bin").write_bytes(bytes(range(256)))
    (directory / "notes.txt").write_text("made of clay")
    manifest.write(directory, INPUTS, {"losses": [2.0, 1.0]})
    return directory


def test_a_sealed_directory_is_current_for_its_inputs_alone(sealed: Path) -> None:
    assert manifest.is_current(sealed, INPUTS)
    assert not manifest.is_current(sealed, INPUTS | {"seed": 1})
    assert not manifest.is_current(sealed, {key: INPUTS[key] for key in ("seed", "train")})
    assert not manifest.is_current(sealed, INPUTS | {"train": {"lr": 1e-3, "steps": 6}})


def test_the_manifest_holds_hashes_inputs_and_facts(sealed: Path) -> None:
    content = manifest.read(sealed)
    expected = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sealed.iterdir() if p.suffix != ".json"}
    assert content["files"] == expected
    assert content["inputs"] == INPUTS
    assert content["losses"] == [2.0, 1.0]


def test_sealing_again_leaves_out_the_manifest_itself(sealed: Path) -> None:
    manifest.write(sealed, INPUTS, {})
    assert manifest.is_current(sealed, INPUTS)
    assert set(manifest.read(sealed)["files"]) == {"weights.bin", "notes.txt"}


def test_without_a_manifest_it_is_unfinished_work(sealed: Path, tmp_path: Path) -> None:
    (sealed / manifest.NAME).unlink()
    assert not manifest.is_current(sealed, INPUTS)
    assert not manifest.is_current(tmp_path / "nowhere", INPUTS)


@pytest.mark.parametrize("damage", ["flip a byte", "truncate", "remove"])
def test_a_damaged_file_is_named(sealed: Path, damage: str) -> None:
    weights = sealed / "weights.bin"
    whole = weights.read_bytes()
    if damage == "remove":
        weights.unlink()
    else:
        weights.write_bytes(whole[:-1] if damage == "truncate" else b"\x01" + whole[1:])
    with pytest.raises(DataError, match=r"weights\.bin: differs from its manifest; remove .*specialist"):
        manifest.is_current(sealed, INPUTS)


def verdict(directory: Path) -> str:
    try:
        return "current" if manifest.is_current(directory, INPUTS) else "outdated"
    except DataError as error:
        return f"refused: {error}"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("", "refused"),
        ('{"fingerprint": "', "refused"),
        ("[]", "refused"),
        ("3", "refused"),
        ("{}", "refused"),
        (manifest.sealed({}), "outdated"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_named_or_outdated(sealed: Path, content: str, expected: str) -> None:
    """Never taken for current, and never the end of the program."""
    assert verdict(sealed) == "current"
    (sealed / manifest.NAME).write_text(content)
    found = verdict(sealed)
    assert found.startswith(expected)
    assert expected == "outdated" or str(sealed / manifest.NAME) in found


def test_a_manifest_of_which_a_digit_has_changed_is_refused(sealed: Path) -> None:
    path = sealed / manifest.NAME
    path.write_text(path.read_text().replace("2.0", "2.5"))
    assert verdict(sealed).startswith("refused") and "its own digest" in verdict(sealed)


def test_a_manifest_that_points_elsewhere_is_refused(sealed: Path) -> None:
    outside = sealed.parent / "secret.txt"
    outside.write_text("private")
    content = manifest.read(sealed)
    content["files"]["../secret.txt"] = manifest.file_hash(outside)
    (sealed / manifest.NAME).write_text(manifest.sealed(content))
    with pytest.raises(DataError, match="leaves the directory"):
        manifest.is_current(sealed, INPUTS)


@settings(max_examples=40, deadline=None)
@given(TREE)
def test_the_fingerprint_does_not_depend_on_the_order_of_keys(inputs: dict[str, Any]) -> None:
    def turned(node: Any) -> Any:
        return {k: turned(node[k]) for k in reversed(node)} if isinstance(node, dict) else node

    assert manifest.fingerprint(inputs) == manifest.fingerprint(turned(inputs))
    assert manifest.fingerprint(inputs) != manifest.fingerprint(inputs | {"one more": 1})


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "new directory" / "report.json"
    manifest.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        manifest.write_text(path, "new, with a lone surrogate: \ud800")
    assert path.read_text() == "old"
    manifest.write_text(path, "newer")
    assert path.read_text() == "newer"
    assert list(path.parent.iterdir()) == [path]
