"""The output directory of a run: its layout, and the check that it belongs to this run and no other."""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from alignx_ds.config.parse import load, to_yaml
from alignx_ds.config.schema import SPREAD, RunConfig
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.runs import lock, manifest
from alignx_ds.runs.lock import Lock

REQUIRED = frozenset({"output", "model", "axes"})  # keys of every run's config.yaml


@dataclass(frozen=True)
class Outputs:
    root: Path
    specialists: Path

    @classmethod
    def of(cls, config: RunConfig) -> Outputs:
        root = Path(config.output)
        return cls(root, Path(config.specialists) if config.specialists else root / "specialists")

    @property
    def lock(self) -> Lock:
        return Lock(self.root / lock.NAME, "output", str(self.root))

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def base(self) -> Path:
        """A base model that the run trained from scratch."""
        return self.root / "base"

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def baselines(self) -> Path:
        return self.root / "baselines"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def nonfinite(self) -> Path:
        return self.root / "nonfinite"

    @property
    def answers(self) -> Path:
        return self.root / "answers"

    @property
    def likelihoods(self) -> Path:
        return self.root / "likelihoods"

    @property
    def verdicts(self) -> Path:
        return self.root / "verdicts"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"


def check_owner(config: RunConfig) -> None:
    """Raises ConfigError when the directory holds something that is no run. Writes nothing.

    Whether it holds results of another run is up to `stages.results`.
    """
    outputs = Outputs.of(config)
    for key, path in (("output", outputs.root), ("specialists", outputs.specialists)):
        blocking = next((p for p in (path, *path.parents) if p.exists()), path)
        if blocking.exists() and not blocking.is_dir():
            fix = f"a file has that name: {blocking}; choose another"
            raise ConfigError(Problem(key, str(path), "a directory", fix))
    if config.specialists:
        _check_specialists(config, outputs.specialists)
    if not outputs.config.is_file():
        if outputs.root.is_dir() and any(lock.NAME not in path.name for path in outputs.root.iterdir()):
            fix = "choose another output; nothing in it was touched"
            raise ConfigError(Problem("output", config.output, "a new directory, or this run's own", fix))
        return
    _recorded(config)


def _recorded(config: RunConfig) -> dict[str, Any]:
    """The config of the last start. Raises ConfigError when it is none."""
    try:
        there = yaml.safe_load(Outputs.of(config).config.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        fix = f"its config.yaml can't be read ({type(error).__name__}); choose another output"
        raise ConfigError(Problem("output", config.output, "this run's own directory", fix)) from error
    if not isinstance(there, dict) or not there.keys() >= REQUIRED:
        fix = "its config.yaml is not a run's; choose another output"
        raise ConfigError(Problem("output", config.output, "this run's own directory", fix))
    return there


def changed_keys(config: RunConfig) -> list[str]:
    """The dotted keys whose values differ from those of the last start in this directory; none where it is the first.

    Keys that only spread the work over ranks are left out. Raises ConfigError when config.yaml is not a run's.
    """
    if not Outputs.of(config).config.is_file():
        return []
    there = _recorded(config)
    with suppress(ConfigError):  # of a version with other keys; read as a recipe, it gets the defaults of new ones
        there = yaml.safe_load(to_yaml(load(Outputs.of(config).config)))
    return sorted(_differences(there, yaml.safe_load(to_yaml(config)), ""))


def check_room(config: RunConfig, gib: float) -> None:
    """Raises ConfigError when the disk has less room than `gib` GiB; what the run has written counts as room."""
    root = Path(config.output)
    place = next(p for p in (root, *root.absolute().parents) if p.is_dir())
    there = sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) if root.is_dir() else 0
    free = (shutil.disk_usage(place).free + there) / 2**30
    if free < gib:
        fix = f"only {free:.2f} GiB are free there; make room, lower checkpoints.keep, or choose another output"
        raise ConfigError(Problem("output", config.output, f"room for about {gib:.2f} GiB", fix))


def _check_specialists(config: RunConfig, directory: Path) -> None:
    """A shared directory may hold finished specialists only: anything else in it must not be removed."""
    for axis in config.axes:
        place = directory / axis
        if place.exists() and not (place / manifest.NAME).is_file() and (not place.is_dir() or any(place.iterdir())):
            fix = f"{place} holds no finished specialist; choose another directory, nothing in it was touched"
            raise ConfigError(Problem("specialists", config.specialists, "finished specialists", fix))


def claim(config: RunConfig) -> Outputs:
    """Make the directory and write the resolved config into it. Called on rank 0, after `check_owner`."""
    outputs = Outputs.of(config)
    try:
        outputs.root.mkdir(parents=True, exist_ok=True)
        manifest.write_text(outputs.config, to_yaml(config))
    except OSError as error:
        fix = f"can't be written ({error.strerror}); choose another output"
        raise ConfigError(Problem("output", config.output, "a writable directory", fix)) from error
    return outputs


def _differences(a: Any, b: Any, path: str) -> list[str]:
    """Dotted keys in which two configs differ; of the axes, also their order."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = {*a, *b} - (SPREAD - {"deepspeed"} if path else set())  # what counts in a JSON is up to its stage
        found = [d for k in keys for d in _differences(a.get(k), b.get(k), f"{path}.{k}" if path else str(k))]
        return [*found, f"{path} (their order)"] if path == "axes" and a.keys() == b.keys() and [*a] != [*b] else found
    return [] if a == b else [path]
