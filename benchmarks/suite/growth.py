"""Whether a process holds on to memory or files: samples of both, and the lines through them."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from statistics import linear_regression
from types import TracebackType
from typing import Any

import psutil

EVERY = 1.0  # seconds between two samples
WARM_UP = 0.3  # of the time: pools of threads and memory are filled in it


@dataclass(frozen=True)
class Sample:
    seconds: float  # since the start
    bytes: int  # resident
    files: int  # that are open


@dataclass(frozen=True)
class Growth:
    """Samples in order."""

    samples: list[Sample]

    @property
    def _warm(self) -> list[Sample]:
        return [one for one in self.samples if one.seconds >= WARM_UP * self.samples[-1].seconds]

    @property
    def megabytes(self) -> float:
        """How much resident memory came after the warm-up, by the line of least squares."""
        warm = self._warm
        return self.megabytes_a_minute * (warm[-1].seconds - warm[0].seconds) / 60

    @property
    def megabytes_a_minute(self) -> float:
        return self._slope([one.bytes / 1e6 for one in self._warm])

    @property
    def files_a_minute(self) -> float:
        return self._slope([float(one.files) for one in self._warm])

    def _slope(self, values: list[float]) -> float:
        """Of a line of least squares, for each minute."""
        return 60 * linear_regression([one.seconds for one in self._warm], values).slope

    def record(self) -> dict[str, Any]:
        return {
            "megabytes_a_minute": self.megabytes_a_minute,
            "files_a_minute": self.files_a_minute,
            "warm_up": WARM_UP,
            "samples": [[round(one.seconds, 2), one.bytes, one.files] for one in self.samples],
        }


class Watch:
    """Samples a process while it is open."""

    def __init__(self, process: psutil.Process) -> None:
        self._process, self._samples = process, list[Sample]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def growth(self) -> Growth:
        return Growth(self._samples)

    def _run(self) -> None:
        started = time.monotonic()
        while not self._done.wait(EVERY):
            with self._process.oneshot():
                sample = Sample(time.monotonic() - started, self._process.memory_info().rss, self._process.num_fds())
            self._samples.append(sample)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
