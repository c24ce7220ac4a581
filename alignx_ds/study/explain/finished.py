"""A finished run's directory as it lies there: its config, its aligned model, the specialists that are still there.

It may have been moved or copied since the run: what it holds is looked for in it, whatever its config says.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.config import parse
from alignx_ds.config.schema import SCRATCH_MODEL, RunConfig
from alignx_ds.errors import ConfigError, DataError, Problem, UserError
from alignx_ds.evaluation.generate import answers
from alignx_ds.experts.task_vectors import add_task_vector
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models import pretrained
from alignx_ds.models.backbone import load_aligned, load_backbone
from alignx_ds.models.base import BaseModel, dtype_of
from alignx_ds.models.pretrained import NO_CODE
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed

RUN = "RUN_DIR"


def refusal(given: Path, fix: str) -> ConfigError:
    return ConfigError(Problem(RUN, str(given), "the output directory of a finished run", fix))


@dataclass(frozen=True)
class FinishedRun:
    """`open` it: then all that its aligned model needs is there."""

    config: RunConfig
    out: Outputs

    @classmethod
    def open(cls, root: Path) -> FinishedRun:
        """Raises ConfigError when there is no such directory, or when its run has not finished stage 2."""
        if not root.is_dir():
            raise refusal(root, "no such directory; give the recipe's `output`, e.g. runs/world")
        if (root / "config.json").is_file():
            raise refusal(root, "that is a model; give the directory above it, which holds config.yaml")
        if not (root / "config.yaml").is_file():
            raise refusal(root, "it holds no config.yaml, so no run wrote it; give the recipe's `output`")
        settings = replace(parse.load(root / "config.yaml"), output=str(root))
        out = Outputs.of(settings)
        if not (out.model / manifest.NAME).is_file():
            fix = "its run has not finished stage 2; give the command that started it again: it goes on"
            raise refusal(root, fix)
        pretrained.check(out.model, RUN, str(root))
        return cls(settings, out)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return AutoTokenizer.from_pretrained(self.out.model, **NO_CODE)

    def mixture(self) -> AlignXForCausalLM:
        """Raises ConfigError when its weights are not those of today's modules."""
        try:
            model = load_aligned(self.out.model, dtype_of(self.config.model.dtype))
        except DataError as error:
            raise refusal(self.out.root, str(error)) from error
        model.to(distributed.device()).eval()
        return model

    @cached_property
    def base(self) -> BaseModel:
        settings = self.config.model
        if settings.path == SCRATCH_MODEL:
            settings = replace(settings, path=str(self.out.root / "base"))
        return BaseModel(settings)

    def specialists(self) -> Iterator[tuple[str, PreTrainedModel | str]]:
        """The base model and each specialist, one at a time: its name, and the model or why there is none."""
        try:
            yield "base", self._specialist(None)
        except (UserError, OSError, SafetensorError) as error:
            reason = f"the base model {self.config.model.path!r} can't be loaded ({_line(error)})"
            yield from ((name, reason) for name in ("base", *self.config.axes))
            return
        made_of = manifest.read(self.out.model).get("inputs", {}).get("specialists", {})
        for axis in self.config.axes:
            directory = self.out.specialists / axis
            try:
                if not (directory / manifest.NAME).is_file():
                    yield axis, "its files are not there"
                elif manifest.read(directory)["fingerprint"] != made_of.get(axis):
                    yield axis, "the specialist there is not the one that the mixture was made of"
                else:
                    yield axis, self._specialist(directory)
            except (UserError, OSError, SafetensorError, KeyError) as error:
                yield axis, f"its files can't be read ({_line(error)})"

    def _specialist(self, directory: Path | None) -> PreTrainedModel:
        model = load_backbone(self.base)
        if directory is not None:
            add_task_vector(model, self.base, directory)
        return model.to(distributed.device()).eval()

    def answers(self, model: PreTrainedModel, prompts: list[str]) -> list[str]:
        """Greedy, as the run's own evaluation makes them."""
        limits = self.config.evaluation
        return answers(model, self.tokenizer, prompts, batch=limits.batch, max_new_tokens=limits.max_new_tokens)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())
