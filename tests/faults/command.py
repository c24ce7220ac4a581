"""Starts ranks of the real command, with a fault or without, and records how they end."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from processes import REPO, cpu_environment, kill_group, rank_variables

GRACE = 30.0  # seconds within which all ranks have to end once one has
SMALL = (
    "launch/recipes/world.yaml",
    "align.ep_size=2",
    "model.layers=[3, 4]",
    "data.train_rows=80",
    "data.held_out_rows=8",
    "train.steps=6",
    "train.warmup_steps=1",
    "train.batch=8",
    "align.steps=6",
    "align.warmup_steps=1",
    "align.batch=8",
    "baselines.make=[h3fusion, trinityx]",
    "baselines.h3fusion.steps=4",
    "baselines.h3fusion.warmup_steps=1",
    "baselines.h3fusion.batch=8",
    "baselines.trinityx.steps=4",
    "baselines.trinityx.warmup_steps=1",
    "baselines.trinityx.batch=8",
    "gate.latent=8",
    "gate.output_latent=8",
    "gate.anchors=8",
    "experts.rank=4",
    "experts.feature_rows=16",
    "evaluation.max_new_tokens=2",
    "checkpoints.every=2",
)


@dataclass
class RunResult:
    codes: list[int]
    survival: float  # seconds from the first failure of a rank to the end of the last one
    console: str  # everything that the ranks wrote

    @property
    def well(self) -> bool:
        return not any(self.codes)


@dataclass
class Command:
    """`alignx-ds VERB` on the small recipe, into `output`; each `start` is the same command again."""

    verb: str
    output: Path
    settings: tuple[str, ...] = ()
    ranks: int = 2
    address_space: int = 0  # bytes that a rank may map; 0: as many as it likes
    folder: Any = field(default_factory=tempfile.TemporaryDirectory)

    @property
    def logs(self) -> Path:
        return Path(self.folder.name)

    def _limit(self) -> None:
        """In a rank's own process, before it runs."""
        if self.address_space:
            resource.setrlimit(resource.RLIMIT_AS, (self.address_space, self.address_space))

    def start(
        self,
        *extra: str,
        fault: dict[str, Any] | None = None,
        during: Callable[[list[subprocess.Popen[bytes]]], None] | None = None,
        timeout: float = 240.0,
        ranks: int = 0,
    ) -> RunResult:
        """Run to the end. Ranks that outlive a failed one by more than GRACE are a hang: an AssertionError."""
        world = ranks or self.ranks
        shared = cpu_environment(FAULT=json.dumps(fault))
        line = [sys.executable, str(Path(__file__).with_name("faulty.py")), self.verb, *SMALL, *self.settings, *extra]
        started, running, files = time.monotonic(), [], []
        for rank, variables in enumerate(rank_variables(world)):
            files.append((self.logs / f"rank{rank}.log").open("wb"))
            command = [*line, f"output={self.output}"]
            running.append(
                subprocess.Popen(
                    command,
                    cwd=REPO,
                    env=shared | variables,
                    stdout=files[-1],
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    preexec_fn=self._limit,
                )
            )
        try:
            if during:
                during(running)
            survival = _wait(running, started + timeout)
        finally:
            for process in running:
                kill_group(process)
            for file in files:
                file.close()
        console = "\n".join((self.logs / f"rank{r}.log").read_text(errors="replace") for r in range(world))
        assert survival <= GRACE, f"a rank outlived the failed one by more than {GRACE:g} s\n{console}"
        return RunResult([p.returncode for p in running], survival, console)


def _wait(running: list[subprocess.Popen[bytes]], deadline: float) -> float:
    """The seconds by which the last rank outlived the first that failed."""
    failed = 0.0
    while True:
        codes = [process.poll() for process in running]
        now = time.monotonic()
        if any(codes) and not failed:
            failed = now
        if all(code is not None for code in codes):
            return now - failed if failed else 0.0
        if now > deadline or (failed and now - failed > GRACE):
            return now - (failed or deadline) + GRACE
        time.sleep(0.02)


def wait_for(path: Path, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)


JOBS = ("specialists/*", "baselines/*", "model")


def results(output: Path) -> dict[str, bytes]:
    """Everything that a run's stages end in, byte by byte: weights, losses, answers, likelihoods, scores."""
    found = {}
    for pattern in JOBS:
        for directory in sorted(output.glob(pattern)):
            for file in sorted(directory.glob("*.safetensors")):
                found[str(file.relative_to(output))] = file.read_bytes()
            content = json.loads((directory / "manifest.json").read_text())
            found[f"{directory.relative_to(output)} losses"] = json.dumps(content["losses"]).encode()
    for pattern in ("answers/*", "likelihoods/*"):
        found |= {str(f.relative_to(output)): f.read_bytes() for f in sorted(output.glob(pattern))}
    if (output / "report.json").is_file():
        report = json.loads((output / "report.json").read_text())
        found["scores"] = json.dumps([report["systems"], report["router"], report["perplexity"]]).encode()
    return found
