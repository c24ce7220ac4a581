"""A finished run as an export finds it, and new directories that hold a whole export or are not there at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from alignx_ds.config import parse
from alignx_ds.config.schema import SCRATCH_MODEL, WORLD_MODEL, RunConfig
from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.backbone import load_aligned
from alignx_ds.models.base import WORLD_BASE
from alignx_ds.models.pretrained import NO_CODE
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed
from alignx_ds.runtime.deepspeed import choose_accelerator


@dataclass(frozen=True)
class FinishedRun:
    """A run's directory whose stage 2 is done, every file of the model as its manifest says."""

    root: Path
    config: RunConfig

    @classmethod
    def at(cls, root: Path) -> FinishedRun:
        """Raises ConfigError or DataError."""
        if not (root / "config.yaml").is_file():
            fix = "give the output directory of `alignx-ds align` or `alignx-ds run`"
            raise ConfigError(Problem("RUN_DIR", str(root), "a run's directory, with a config.yaml", fix))
        run = cls(root, parse.load(root / "config.yaml"))
        if not manifest.is_current(run.out.model, _inputs_of(run.out.model)):
            raise DataError(f"{run.out.model}: holds no finished model; run `alignx-ds align` first")
        return run

    @property
    def out(self) -> Outputs:
        """Where things lie, wherever the directory has been moved to."""
        return Outputs(self.root, self.root / "specialists")

    @cached_property
    def model(self) -> AlignXForCausalLM:
        """The aligned model, in the dtype that it was saved in, ready to serve."""
        choose_accelerator()  # save_pretrained, with which exports end, imports DeepSpeed
        logging.disable_progress_bar()
        model = load_aligned(self.out.model)
        model.to(distributed.device()).eval()
        return model

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.out.model, **NO_CODE)

    @cached_property
    def report(self) -> dict[str, Any] | None:
        """What `alignx-ds run` measured; None after `alignx-ds align` alone."""
        path = self.root / "report.json"
        content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        return content

    @property
    def axes(self) -> list[str]:
        return list(self.config.axes)

    def expert(self, axis: str) -> int:
        """The global id of an axis's expert."""
        return self.config.expert_names.index(axis)

    @property
    def base_path(self) -> str:
        """Where the base model can be loaded from: a hub id as it was given, or a directory."""
        given = self.config.model.path
        known = {WORLD_MODEL: WORLD_BASE, SCRATCH_MODEL: self.root / "base"}
        if given in known or Path(given).is_dir():
            return str(Path(known.get(given, given)).resolve())
        return given

    @property
    def hub_id(self) -> str | None:
        """The base model's name on the hub, if it came from there."""
        return None if Path(self.base_path).is_dir() else self.base_path


def _inputs_of(directory: Path) -> dict[str, Any]:
    if not (directory / manifest.NAME).is_file():
        return {}
    inputs: dict[str, Any] = manifest.read(directory).get("inputs", {})
    return inputs


@contextmanager
def new_directory(out: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `out` when all of it is there. Raises ConfigError."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(
            Problem("OUT", str(out), "a new or an empty directory", "choose another; nothing was touched")
        )
    partial = out.with_name(f".{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    except OSError as error:
        fix = f"it can't be made ({error.strerror}); choose another"
        raise ConfigError(Problem("OUT", str(out), "a directory that can be written", fix)) from error
    try:
        yield partial
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
