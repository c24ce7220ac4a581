"""Full and read-only disks: one error line, no partial file, and once there is room the same command continues."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Command, results, wait_for
from recording import Record

Mount = Callable[..., Path]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Mount]:
    """`mount("size=1m")`: a tmpfs with these options; again with others, remounted with what is in it."""
    place = tmp_path / "disk"
    place.mkdir()

    def make(options: str, *, again: bool = False) -> Path:
        flags = f"remount,{options}" if again else options
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", flags, "tmpfs", str(place)], capture_output=True, text=True
        )
        if made.returncode:
            pytest.skip(f"needs the right to mount a tmpfs: {made.stderr.strip()}")
        return place

    yield make
    subprocess.run(["umount", "-l", str(place)], capture_output=True)


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_full_disk_stops_the_run_with_its_checkpoint_whole(mount: Mount, tmp_path: Path, record: Record) -> None:
    disk = mount("size=96m")
    command = Command("align", disk / "run", ("train.steps=40",))
    checkpoints = command.output / "checkpoints/stage1/harmless"

    def fill(ranks: object) -> None:
        wait_for(checkpoints / "step_00000004")
        mount(f"size={shutil.disk_usage(disk).used + 200_000}", again=True)  # room for a part of the next one

    full = command.start(during=fill)
    assert full.codes == [2, 2], full.console
    assert "No space left on device" in full.console and "a checkpoint can't be written" in full.console
    assert full.console.count("alignx-ds: error:") == 1 and "Traceback" not in full.console
    assert checkpoints.is_dir() and not list(checkpoints.glob("*.partial")), "nothing torn is left"
    mount("size=256m", again=True)
    ended = command.start()
    assert ended.well, ended.console
    assert "stage1/harmless: resumes after step" in ended.console
    whole = Command("align", tmp_path / "whole", ("train.steps=40",))
    assert whole.start().well
    assert results(command.output) == results(whole.output)
    record("disk", "full (a tmpfs) while a checkpoint is written", "one line, exit code 2; with room it goes on")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_disk_that_is_too_small_is_refused_before_any_work(mount: Mount, record: Record) -> None:
    command = Command("align", mount("size=8m") / "run", ranks=1)
    ended = command.start("align.ep_size=1")
    assert ended.codes == [2], ended.console
    assert "expected room for about" in ended.console and "GiB are free there" in ended.console
    assert not command.output.exists()
    record("disk", "too small for what the run will write", "one line, exit code 2, nothing written")


@pytest.mark.faults
@pytest.mark.timeout(600)
def test_a_read_only_output_is_refused_before_any_work(mount: Mount, record: Record) -> None:
    disk = mount("ro,size=96m")
    command = Command("align", disk / "run" / "deep", ranks=1)
    ended = command.start("align.ep_size=1")
    assert ended.codes == [2], ended.console
    assert "alignx-ds: error: output" in ended.console and "Read-only file system" in ended.console
    assert "fine-tune" not in ended.console
    record("disk", "a read-only output directory", "one line, exit code 2, before any work")
