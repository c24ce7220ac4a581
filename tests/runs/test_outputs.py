"""A run's directory belongs to that run: what it accepts, what it refuses, and that a refusal touches nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import ConfigError
from alignx_ds.runs import outputs

WriteRecipe = Callable[..., Path]
Snapshot = Callable[[Path], dict[str, bytes | None]]


def refusal(settings: RunConfig) -> str:
    with pytest.raises(ConfigError) as error:
        outputs.check_owner(settings)
    (problem,) = error.value.problems
    assert problem.key in ("output", "specialists")
    return str(problem)


def test_a_new_directory_is_accepted_and_not_made(tiny_config: RunConfig) -> None:
    outputs.check_owner(tiny_config)
    assert not Path(tiny_config.output).exists()
    Path(tiny_config.output).mkdir()
    outputs.check_owner(tiny_config)
    assert list(Path(tiny_config.output).iterdir()) == []


def test_a_claimed_directory_describes_its_run(tiny_config: RunConfig) -> None:
    out = outputs.claim(tiny_config)
    assert parse.load(out.config) == tiny_config
    outputs.check_owner(tiny_config)
    (out.root / "report.html").write_text("done")
    outputs.check_owner(tiny_config)


def test_where_it_lies_and_how_many_ranks_make_it_is_no_other_run(tiny_config: RunConfig) -> None:
    out = outputs.claim(tiny_config)
    moved = out.root.with_name("moved")
    out.root.rename(moved)
    tiny_config.output, tiny_config.launch.ranks = str(moved), 2
    outputs.check_owner(tiny_config)
    assert outputs.changed_keys(tiny_config) == ["launch.ranks", "output"]


@pytest.mark.parametrize("name", ["thesis.tex", ".hidden", "model", "config.yaml.bak"])
def test_a_directory_with_foreign_files_is_refused(tiny_config: RunConfig, name: str) -> None:
    root = Path(tiny_config.output)
    root.mkdir()
    (root / name).write_text("mine")
    assert "nothing in it was touched" in refusal(tiny_config)
    assert (root / name).read_text() == "mine"


@pytest.mark.parametrize("content", [b"\xff\xfe", b"a: [", b"- a list", b"", b"just words", b"colour: blue"])
def test_a_directory_with_somebody_elses_config_is_refused(tiny_config: RunConfig, content: bytes) -> None:
    root = Path(tiny_config.output)
    root.mkdir()
    (root / "config.yaml").write_bytes(content)
    message = refusal(tiny_config)
    assert "another ;" not in message, "the message says what is wrong"


def test_a_file_in_the_way_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    tiny_config.output = str(tmp_path / "file")
    assert "a file has that name" in refusal(tiny_config)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_below_a_file_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    """Before anything starts, not when the ranks are up."""
    (tmp_path / "file").write_text("mine")
    tiny_config.output = str(tmp_path / "file" / "run")
    refusal(tiny_config)


def test_claiming_a_directory_that_cannot_be_made_says_so(tiny_config: RunConfig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    tiny_config.output = str(tmp_path / "file" / "run")
    with pytest.raises(ConfigError, match="can't be written"):
        outputs.claim(tiny_config)


def test_specialists_lie_inside_the_output_or_where_the_config_says(tiny_config: RunConfig, tmp_path: Path) -> None:
    assert outputs.Outputs.of(tiny_config).specialists == Path(tiny_config.output) / "specialists"
    tiny_config.specialists = str(tmp_path / "shared")
    assert outputs.Outputs.of(tiny_config).specialists == tmp_path / "shared"


def test_a_specialists_directory_with_foreign_files_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    """A directory that is named as an axis, but is none of ours, would be removed as unfinished work."""
    (tmp_path / "mine" / "helpful").mkdir(parents=True)
    (tmp_path / "mine" / "helpful" / "thesis.tex").write_text("years of work")
    tiny_config.specialists = str(tmp_path / "mine")
    assert "helpful" in refusal(tiny_config)


def test_a_disk_without_room_is_refused(tiny_config: RunConfig, tmp_path: Path) -> None:
    outputs.check_room(tiny_config, 0.001)
    with pytest.raises(ConfigError, match=r"room for about 100000000.00 GiB.*lower checkpoints.keep"):
        outputs.check_room(tiny_config, 1e8)


def test_what_the_run_has_written_already_counts_as_room(tiny_config: RunConfig, tmp_path: Path) -> None:
    free = shutil.disk_usage(tmp_path).free / 2**30
    with pytest.raises(ConfigError, match="room for"):
        outputs.check_room(tiny_config, free + 0.5)
    written = Path(tiny_config.output) / "specialists" / "weights"
    written.parent.mkdir(parents=True)
    with written.open("wb") as file:
        file.truncate(2**30)  # a sparse file: its size counts, as that of whole ones does
    outputs.check_room(tiny_config, free + 0.5)


def test_how_the_work_is_spread_is_no_change_of_a_stage(tiny_config: RunConfig) -> None:
    assert outputs.changed_keys(tiny_config) == [], "there was no start before"
    outputs.claim(tiny_config)
    tiny_config.align.ep_size, tiny_config.train.accumulation = 4, 2
    assert outputs.changed_keys(tiny_config) == []
    tiny_config.train.lr *= 2
    tiny_config.axes = dict(reversed(tiny_config.axes.items()))
    assert outputs.changed_keys(tiny_config) == ["axes (their order)", "train.lr"]


def test_a_key_that_an_earlier_version_did_not_have_has_its_default(tiny_config: RunConfig) -> None:
    out = outputs.claim(tiny_config)
    recorded = yaml.safe_load(out.config.read_text())
    del recorded["train"]["clip"], recorded["judges"], recorded["axes"]["helpful"]["adapter"]
    out.config.write_text(yaml.safe_dump(recorded, sort_keys=False))
    assert outputs.changed_keys(tiny_config) == []
    tiny_config.train.clip = 7.0
    assert outputs.changed_keys(tiny_config) == ["train.clip"]
    out.config.write_text(yaml.safe_dump(recorded | {"a key of another version": 1}, sort_keys=False))
    assert "train.clip" in outputs.changed_keys(tiny_config)
