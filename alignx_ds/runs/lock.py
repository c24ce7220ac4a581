"""A lock file: one run at a time writes into a directory, also where several machines share it.

The file names the process that holds the lock. It comes into being as a hard link to a file that is written already:
of several processes that try, exactly one succeeds, on NFS too. Its modification time is the holder's last
heartbeat. A process that finds the lock of one that has ended takes it over and prints so.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Self

from alignx_ds.errors import EXIT_CODE, ConfigError, Problem, presentable
from alignx_ds.runtime import console
from alignx_ds.runtime.exit import exit_now, forget, remember

NAME = "alignx.lock"
BEAT = 15.0  # seconds between two heartbeats, which renew the file's modification time
EXPIRY = 120.0  # seconds without one, after which a process on another machine counts as ended
CLAIM = 60.0  # seconds after which a process that was about to take over the lock counts as ended
TRIES, PAUSE = 10, 0.2  # of a take-over; seconds between two
ZOMBIE = "Z"  # the state of a process that has ended and that its parent has not waited for


@dataclass(frozen=True)
class Holder:
    """The process that holds a lock. Its id means something on its machine alone."""

    host: str
    machine: str  # the start of the system and the namespace of its process ids
    pid: int
    started: str  # by the system's clock, since ids are given again
    since: str
    token: str  # of this lock and no other

    @classmethod
    def this_process(cls) -> Holder:
        now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        pid, token = os.getpid(), secrets.token_hex(8)
        return cls(socket.gethostname(), _machine(), pid, _state_of(pid)[1], now, token)

    def has_ended(self, age: float) -> bool:
        """`age`: seconds since its last heartbeat; on this machine the table of processes decides instead."""
        if self.machine != _machine():
            return age > EXPIRY
        try:
            os.kill(self.pid, 0)
        except (ProcessLookupError, OverflowError):
            return True
        except PermissionError:  # it runs, as another user
            pass
        state, started = _state_of(self.pid)
        return state == ZOMBIE or (bool(started) and started != self.started)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since}"


UNKNOWN = Holder("an unknown machine", "", 0, "", "an unknown time", "unknown")


class Lock:
    """Of the directory that the file at `path` lies in, or of what that file is named after.

    As a context it releases the lock at the end, if it has been taken. So do all ways in which a process can end, but
    for a kill. `key` and `given` are for messages.
    """

    def __init__(self, path: Path, key: str, given: str) -> None:
        self.path, self.key, self.given = path, key, given
        self.own: Holder | None = None
        self._released = threading.Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def check(self) -> None:
        """Raises ConfigError when another process holds the lock. Writes nothing."""
        try:
            holder, age = _read(self.path), time.time() - _modified(self.path)
        except OSError as error:
            fix = f"its {self.path.name} can't be read ({error.strerror}); choose another"
            raise ConfigError(Problem(self.key, self.given, "a directory that can be read", fix)) from error
        if holder is not None and not holder.has_ended(age):
            raise self._held(holder, age)

    def take(self) -> None:
        """Raises ConfigError when another process holds it."""
        own = Holder.this_process()
        with self._offered(own) as offer:
            if not _link(offer, self.path):
                self._take_over(offer)
        self.own = own
        remember(self.release)
        threading.Thread(target=self._beat, name="lock", daemon=True).start()

    def release(self) -> None:
        """Does nothing where it is not held."""
        self._released.set()
        forget(self.release)
        own, self.own = self.own, None
        if own is not None and _read(self.path) == own:
            self.path.unlink(missing_ok=True)

    @contextmanager
    def _offered(self, own: Holder) -> Iterator[Path]:
        """A file with the content of the lock, which may become the lock within the block."""
        offer = self.path.with_name(f".{self.path.name}.{own.token}")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            offer.write_text(json.dumps(asdict(own)) + "\n", encoding="utf-8")
        except OSError as error:
            fix = f"can't be written ({error.strerror}); choose another"
            raise ConfigError(Problem(self.key, self.given, "a writable directory", fix)) from error
        try:
            yield offer
        finally:
            offer.unlink(missing_ok=True)

    def _take_over(self, offer: Path) -> None:
        """Raises ConfigError unless the lock's holder has ended, and this process is the first to take it over."""
        for _ in range(TRIES):
            now = _modified(offer)  # by the clock of the file system, as the lock's own time
            holder, age = _read(self.path), now - _modified(self.path)
            if holder is None:  # released meanwhile
                if _link(offer, self.path):
                    return
            elif not holder.has_ended(age):
                raise self._held(holder, age)
            elif self._replace(holder, offer, now):
                ended = f"{self.path}: the lock of a run that has ended ({holder}); this run takes it over"
                console.warn(presentable(ended))
                return
            time.sleep(PAUSE)
            os.utime(offer)
        raise self._held(holder or Holder.this_process(), age)

    def _replace(self, ended: Holder, offer: Path, now: float) -> bool:
        """Put the offer in the place of this holder's lock; of several processes that try, one succeeds."""
        claim = self.path.with_name(f".{self.path.name}.after.{ended.token}")
        if not _link(offer, claim):
            if now - _modified(claim) > CLAIM:
                claim.unlink(missing_ok=True)
            return False
        try:
            if _read(self.path) != ended:
                return False
            os.replace(offer, self.path)
            return True
        finally:
            claim.unlink(missing_ok=True)

    def _beat(self) -> None:
        """Until the lock is released. Ends the process when another one has the lock."""
        while not self._released.wait(BEAT):
            own = self.own
            with suppress(OSError):  # a file system that does not answer for a while
                holder = _read(self.path)
                if own is None or holder in (own, UNKNOWN):
                    os.utime(self.path)
                elif holder is None:  # somebody has removed it
                    with self._offered(own) as offer:
                        _link(offer, self.path)
                else:
                    reason = f"{holder} has taken it over, because this process sent no heartbeat for too long"
                    exit_now(EXIT_CODE, f"alignx-ds: error: {presentable(f'{self.path}: {reason}')}\n")

    def _held(self, holder: Holder, age: float) -> ConfigError:
        seen = f"{holder}, last heartbeat {max(0.0, age):.0f} s ago"
        fix = f"another run holds it ({seen}); wait for its end or choose another, nothing was touched"
        return ConfigError(Problem(self.key, self.given, "a directory that no other run is using", fix))


def _link(offer: Path, path: Path) -> bool:
    """Whether `path` did not exist, and now does, with the content of the offer."""
    try:
        os.link(offer, path)
    except OSError as error:
        if offer.stat().st_nlink > 1:  # it was made, but the server's first answer was lost, and it was asked again
            return True
        return not isinstance(error, FileExistsError) and _copy(offer, path)
    return True


def _copy(offer: Path, path: Path) -> bool:
    """As `_link`, where the file system has no hard links."""
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(handle, "wb") as file:
        file.write(offer.read_bytes())
    return True


def _read(path: Path) -> Holder | None:
    """None where there is no lock. Of a file with another content nothing is known, so its age decides."""
    try:
        content = path.read_bytes()  # opening it makes NFS ask the server
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        found = Holder(**json.loads(content))
    except (ValueError, TypeError, RecursionError):
        return UNKNOWN
    texts = (found.host, found.machine, found.started, found.since, found.token)
    whole = isinstance(found.pid, int) and all(isinstance(text, str) for text in texts)
    return found if whole and found.token.isalnum() else UNKNOWN  # the token becomes part of a file's name


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except (FileNotFoundError, NotADirectoryError):
        return 0.0


def _machine() -> str:
    """The same for all processes that see each other's ids: containers of one machine do not."""
    try:
        started = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{started} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:  # no Linux
        return socket.gethostname()


def _state_of(pid: int) -> tuple[str, str]:
    """(state of a process, when it was started in the system's ticks); empty where that can't be known."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
