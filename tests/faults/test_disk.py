"""Disks that are full or read-only: said in a line, nothing torn, and with room made the same command goes on."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from command import Command, results
from conftest import Record

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
def test_a_full_disk_stops_the_run_with_its_checkpoint_whole(
    mount: Mount,
    undisturbed,  # type: ignore[no-untyped-def]
    record: Record,
) -> None:
    disk = mount("size=64m")
    command = Command("align", disk / "run")
    first = command.start(fault={"rank": 0, "kind": "kill", "job": "stage1/harmless", "step": 3})
    assert first.codes[0] == -9
    used = shutil.disk_usage(disk).used
    mount(f"size={used + 200_000}", again=True)  # room for a part of the next checkpoint
    full = command.start()
    assert full.codes == [2, 2], full.said
    assert "No space left on device" in full.said
    assert full.said.count("alignx-ds: error:") == 1 and "Traceback" not in full.said
    kept = sorted(p.name for p in (command.output / "checkpoints/stage1/harmless").iterdir())
    assert kept == ["step_00000002"], "nothing torn is left beside the one before"
    mount("size=256m", again=True)
    ended = command.start()
    assert ended.well, ended.said
    assert "stage1/harmless: goes on after step 2" in ended.said
    assert results(command.output) == results(undisturbed("align"))
    record("disk", "full (a tmpfs) while a checkpoint is written", "one line, exit code 2; with room it goes on")


@pytest.mark.faults
@pytest.mark.timeout(280)
def test_a_read_only_output_is_refused_before_any_work(mount: Mount, record: Record) -> None:
    disk = mount("ro,size=1m")
    command = Command("align", disk / "run" / "deep", ranks=1)
    ended = command.start("align.ep_size=1")
    assert ended.codes == [2], ended.said
    assert "alignx-ds: error: output" in ended.said and "Read-only file system" in ended.said
    assert "fine-tune" not in ended.said
    record("disk", "a read-only output directory", "one line, exit code 2, before any work")
