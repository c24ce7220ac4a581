"""A finished run: the output directory of `alignx-ds align` or `alignx-ds run`, opened to be read.

The directory may have been moved or copied since: files are looked for in it, whatever `output` its config names.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runs.report import is_current, read_report

KEY = "RUN_DIR"


def refusal(root: Path, fix: str) -> ConfigError:
    return ConfigError(Problem(KEY, str(root), "the output directory of a finished run", fix))


@dataclass(frozen=True)
class FinishedRun:
    """A run whose stage 2 is done, and whose model is as its manifest describes it. Made by `open`."""

    root: Path
    config: RunConfig  # resolved; `output` is where the directory is now
    model_inputs: dict[str, Any]  # what stage 2 made the model from, by the model's manifest
    experts: list[str]  # names by id, as the saved model has them: the generalist first, then the axes

    @classmethod
    def open(cls, root: Path) -> FinishedRun:
        """Raises ConfigError when this is no finished run, and DataError when a file of its model has changed."""
        if not root.is_dir():
            raise refusal(root, "no such directory; give the recipe's `output`, e.g. runs/world")
        if (root / "config.json").is_file():
            raise refusal(root, "that is a model; give the directory above it, which holds config.yaml")
        if not (root / "config.yaml").is_file():
            raise refusal(root, "it holds no config.yaml, so no run wrote it; give the recipe's `output`")
        config = replace(parse.load(root / "config.yaml"), output=str(root))
        model = Outputs.of(config).model
        if not (model / manifest.NAME).is_file():
            fix = "its run has not finished stage 2; give its command (`alignx-ds align` or `run`) again: it goes on"
            raise refusal(root, fix)
        content, experts = manifest.read_verified(model), _experts_of(root, model)
        if experts != config.expert_names:
            fix = f"its config.yaml has the experts {config.expert_names}, its model has {experts}; restore config.yaml"
            raise refusal(root, fix)
        return cls(root, config, content["inputs"], experts)

    @property
    def out(self) -> Outputs:
        return Outputs.of(self.config)

    @property
    def axes(self) -> list[str]:
        """In the order of the model's experts."""
        return self.experts[1:]

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """What `alignx-ds run` measured of this model; None after `alignx-ds align` alone. Raises DataError."""
        found = read_report(self.root) if (self.root / "report.json").is_file() else None
        return found if found and is_current(self.root, found) else None

    def specialist(self, axis: str) -> Path:
        """Its directory. Raises DataError when it is missing or damaged, or when the model was made from another."""
        return self.fine_tune(axis, dict(self.model_inputs["specialists"]).get(axis, ""))

    def fine_tune(self, name: str, fingerprint: str) -> Path:
        """The directory of a specialist, of a stage of the sequence or of the mixed fine-tune with this fingerprint.

        Raises DataError when it is missing or damaged, or when it was made from other inputs.
        """
        directory = self.out.specialists / name
        if not (directory / manifest.NAME).is_file():
            raise DataError(f"{directory}: not there, or not finished; give the command that made the run again")
        if manifest.read_verified(directory)["fingerprint"] != fingerprint:
            reason = "made by another run, or from other rows, settings or model files than this run's are now"
            raise DataError(f"{directory}: {reason}; give the command that made the run again")
        return directory


def _experts_of(root: Path, model: Path) -> list[str]:
    try:
        experts = json.loads((model / "config.json").read_text(encoding="utf-8"))["experts"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise refusal(root, f"its model's config.json is not an aligned model's ({error!r}); align it again") from error
    return list(experts)
