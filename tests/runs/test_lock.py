"""The lock of a directory: one holder at a time, whatever starts at once, is killed, or runs on another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from alignx_ds.errors import ConfigError
from alignx_ds.runs import lock
from alignx_ds.runs.lock import Lock
from alignx_ds.runtime import exit as exits

Snapshot = Callable[[Path], dict[str, bytes | None]]


def lock_of(root: Path) -> Lock:
    return Lock(root / lock.NAME, "output", str(root))


def write(root: Path, seconds_ago: float = 0.0, **changes: object) -> None:
    """The lock that another process would have, and its last heartbeat."""
    own = lock.asdict(lock.Holder.this_process())
    (root / lock.NAME).write_text(json.dumps(own | changes))
    os.utime(root / lock.NAME, (time.time() - seconds_ago,) * 2)


@pytest.fixture
def ended() -> int:
    """The id of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_it_names_its_holder_and_leaves_nothing_behind(tmp_path: Path) -> None:
    root = tmp_path / "new" / "run"
    with lock_of(root) as held:
        held.take()
        content = json.loads((root / lock.NAME).read_text())
        assert content["pid"] == os.getpid() and content["since"].endswith("UTC")
        assert [path.name for path in root.iterdir()] == [lock.NAME]
    assert list(root.iterdir()) == []
    with lock_of(root) as again:
        again.take()


def test_a_second_run_is_refused_in_one_line_and_touches_nothing(tmp_path: Path, snapshot: Snapshot) -> None:
    with lock_of(tmp_path) as held:
        held.take()
        before = snapshot(tmp_path)
        for attempt in (Lock.check, Lock.take):
            second = lock_of(tmp_path)
            with second, pytest.raises(ConfigError) as refused:
                attempt(second)
            message = str(refused.value)
            assert "\n" not in message and message.startswith("output: got ")
            assert f"process {os.getpid()} on " in message and "nothing was touched" in message
        assert snapshot(tmp_path) == before


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt, SystemExit])
def test_it_is_released_however_the_work_ends(tmp_path: Path, error: type[BaseException] | None) -> None:
    with suppress(error or ()), lock_of(tmp_path) as held:
        held.take()
        if error:
            raise error
    assert list(tmp_path.iterdir()) == []
    assert not exits._remembered


def test_an_exit_without_a_teardown_releases_it(tmp_path: Path) -> None:
    """As when another rank fails, or at a second signal; after a kill the next run takes it over."""
    program = f"""if True:
        import os, signal, sys
        from pathlib import Path
        from alignx_ds.runs.lock import Lock
        from alignx_ds.runtime.exit import exit_now
        Lock(Path({str(tmp_path / lock.NAME)!r}), "output", "run").take()
        exit_now(3) if sys.argv[1] == "exit" else os.kill(os.getpid(), signal.SIGKILL)
    """
    assert subprocess.run([sys.executable, "-c", program, "exit"], check=False).returncode == 3
    assert list(tmp_path.iterdir()) == []
    assert subprocess.run([sys.executable, "-c", program, "kill"], check=False).returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == [lock.NAME]
    lock_of(tmp_path).check()
    with lock_of(tmp_path) as held:
        held.take()


@pytest.mark.parametrize("case", ["gone", "another process with its id", "another machine, silent", "not a lock"])
def test_the_lock_of_a_run_that_has_ended_is_taken_over_and_this_is_said(
    tmp_path: Path, ended: int, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if case == "gone":
        write(tmp_path, pid=ended)
    elif case == "another process with its id":
        write(tmp_path, started="12345")
    elif case == "another machine, silent":
        write(tmp_path, seconds_ago=lock.EXPIRY + 5, machine="another", host="node7")
    else:
        (tmp_path / lock.NAME).write_text("{")
        os.utime(tmp_path / lock.NAME, (0, 0))
    lock_of(tmp_path).check()
    with lock_of(tmp_path) as held:
        held.take()
        assert json.loads((tmp_path / lock.NAME).read_text())["token"] == (held.own and held.own.token)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "this run takes it over" in said
    assert ("node7" in said) == case.startswith("another machine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[" * 9999, b"[]", b"{}", b'{"pid": 1}', b"null", b"7"])
def test_whatever_a_lock_file_holds_it_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / lock.NAME).write_bytes(content)
    for attempt in (Lock.check, Lock.take):
        with pytest.raises(ConfigError, match="process 0 on an unknown machine"):
            attempt(lock_of(tmp_path))


def test_a_lock_file_with_odd_values_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({"pid": "x"}, {"host": 3}, {"started": None}, {"token": "../up"}):
        write(tmp_path, **changes)
        with pytest.raises(ConfigError, match="an unknown machine"):
            lock_of(tmp_path).take()
    write(tmp_path, pid=10**30, host="a\x1b[31m\nb")
    with lock_of(tmp_path) as held:
        held.take()
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("case", ["another machine", "stopped here", "half a lock"])
def test_the_lock_of_a_run_that_may_be_alive_is_respected(tmp_path: Path, case: str) -> None:
    """A process of this machine is alive as long as it exists, whenever its last heartbeat was."""
    if case == "another machine":
        write(tmp_path, seconds_ago=lock.EXPIRY - 60, machine="another", host="node7", pid=1)
    elif case == "stopped here":
        write(tmp_path, seconds_ago=10 * lock.EXPIRY)
    else:
        (tmp_path / lock.NAME).write_text('{"host": ')
    for attempt in (Lock.check, Lock.take):
        with pytest.raises(ConfigError, match="another run holds it"):
            attempt(lock_of(tmp_path))


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("links", [True, False])
def test_of_many_that_start_at_once_one_gets_it(
    tmp_path: Path, ended: int, stale: bool, links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    if not links:
        monkeypatch.setattr(os, "link", refuse)
    for _ in range(5):
        if stale:
            write(tmp_path, pid=ended)
        starts, won, lost = threading.Barrier(8), list[Lock](), list[str]()

        def start(starts: threading.Barrier = starts, won: list[Lock] = won, lost: list[str] = lost) -> None:
            attempt = lock_of(tmp_path)
            starts.wait()
            try:
                attempt.take()
                won.append(attempt)
            except ConfigError as error:
                lost.append(str(error))

        threads = [threading.Thread(target=start) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 7)
        won[0].release()
        assert list(tmp_path.iterdir()) == []


def test_its_holder_sends_heartbeats_and_sees_what_others_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends: list[str] = []
    monkeypatch.setattr(lock, "BEAT", 0.01)
    monkeypatch.setattr(lock, "exit_now", lambda code, text: ends.append(f"{code} {text}"))
    path = tmp_path / lock.NAME

    def soon(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 10
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    with lock_of(tmp_path) as held:
        held.take()
        os.utime(path, (0, 0))
        soon(lambda: path.stat().st_mtime > 0)
        path.unlink()
        soon(lambda: path.exists() and bool(path.read_text()))
        assert held.own is not None and json.loads(path.read_text())["token"] == held.own.token
        assert ends == []
        write(tmp_path, host="node7")
        soon(lambda: bool(ends))
        assert ends[0].startswith("2 alignx-ds: error: ") and "on node7" in ends[0]
        monkeypatch.setattr(lock, "BEAT", 60.0)
    assert path.exists(), "it is another's now"


def test_a_link_into_the_directory_is_the_same_directory(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with lock_of(tmp_path / "run") as held:
        held.take()
        with pytest.raises(ConfigError):
            lock_of(tmp_path / "link").take()
