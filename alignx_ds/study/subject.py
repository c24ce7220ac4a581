"""A finished run, opened to be looked at: its settings, its rows, and the systems that it trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import pad_token
from alignx_ds.data.inputs import CALIBRATION, EncodedData, read_inputs
from alignx_ds.data.rows import Row, split_by_question
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.likelihood import Likelihood, likelihoods, perplexity
from alignx_ds.experts.task_vectors import add_task_vector
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.backbone import load_aligned, load_backbone
from alignx_ds.models.base import BaseModel
from alignx_ds.plan import checks
from alignx_ds.runs import manifest
from alignx_ds.runs.outputs import Outputs
from alignx_ds.runtime import distributed
from alignx_ds.stages.finetune import MIXED, sequential_name

FREE_JUDGES = ("task", "safety", "truth")  # a study asks about dozens of models: no judge model is called for that
SYSTEMS = ("base", "sequential", "mixed", "alignx")


@dataclass(frozen=True)
class Subject:
    """The run under study. Only its settings and rows are in memory; models are loaded when they are asked for."""

    config: RunConfig
    base: BaseModel
    data: EncodedData
    out: Outputs

    @classmethod
    def of(cls, directory: Path) -> Subject:
        """Raises ConfigError unless this is the directory of a run that has got as far as its baselines."""
        settings = _settings(directory)
        out = Outputs.of(settings)
        needed = [out.model, out.specialists / sequential_name(list(settings.axes)), out.specialists / MIXED]
        for path in needed:
            if not (path / manifest.NAME).is_file():
                fix = f"it has no {path.name}; give the command that began it again, it goes on"
                raise _refusal(directory, fix)
        # The ranks that trained it are gone; all that is asked of their number is that the experts fit on them.
        inputs = read_inputs(settings, checks.check(settings, settings.align.ep_size))
        return cls(settings, inputs.base, inputs.data, out)

    @property
    def axes(self) -> list[str]:
        return list(self.config.axes)

    @property
    def pad_id(self) -> int:
        return pad_token(self.base.tokenizer)

    @property
    def batch(self) -> int:
        return self.config.evaluation.batch

    def backbone(self) -> PreTrainedModel:
        """The base model, fresh from disk."""
        return load_backbone(self.base).to(distributed.device()).eval()

    def fine_tuned(self, name: str) -> PreTrainedModel:
        """What the fine-tune of this name ended in: a specialist, a stage of the sequence, or the mixture."""
        model = self.backbone()
        add_task_vector(model, self.base, self.out.specialists / name)
        return model

    def aligned(self) -> AlignXForCausalLM:
        model = load_aligned(self.out.model, self.base.dtype)
        model.to(distributed.device()).eval()
        return model

    def system(self, name: str) -> PreTrainedModel:
        """One of SYSTEMS."""
        assert name in SYSTEMS
        if name == "base":
            return self.backbone()
        if name == "alignx":
            return self.aligned()
        return self.fine_tuned(MIXED if name == "mixed" else sequential_name(self.axes))

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """By axis, 0–100, higher is better, of the answers to its held-out rows, where the judge costs nothing."""
        found = {}
        for name, axis in self.config.axes.items():
            if axis.judge not in FREE_JUDGES:
                continue
            rows, limit = self.data.held_out[name], self.config.evaluation.max_new_tokens
            prompts = [row.prompt for row in rows]
            said = answers(model, self.base.tokenizer, prompts, batch=self.batch, max_new_tokens=limit)
            judge = registry.make(axis.judge, self.config.judges)
            found[name] = judge.metrics(rows, list(judge.verdicts(rows, said)))["score"]
        return found

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """By axis, of the reference answers to its held-out rows, where it has any."""
        references = self.data.references
        found = likelihoods(model, references.examples, self.pad_id, self.batch)
        by_axis: dict[str, list[Likelihood]] = {axis: [] for axis in self.axes}
        for expert, likelihood in zip(references.experts, found, strict=True):
            if self.config.expert_names[expert] in by_axis:
                by_axis[self.config.expert_names[expert]].append(likelihood)
        return {axis: perplexity(some) for axis, some in by_axis.items() if some}

    def judged(self) -> list[str]:
        """The axes that `scores` has a figure for."""
        return [name for name, axis in self.config.axes.items() if axis.judge in FREE_JUDGES]

    def held_out(self) -> list[tuple[str, Row]]:
        """(expert's name, row) of every held-out row, in the order of `data.routed`."""
        sides = self.data.splits.held_out
        return [(name, row) for name in self.config.expert_names for row in sides[name].rows]

    def training(self) -> dict[str, tuple[list[Row], list[Row]]]:
        """By expert's name: (rows trained on, rows kept back from training)."""
        share = self.config.data.calibration_share
        sides = self.data.splits.train
        return {name: split_by_question(sides[name].rows, share, CALIBRATION) for name in self.config.expert_names}


def _settings(directory: Path) -> RunConfig:
    """The run's own config, wherever its directory has been moved to."""
    path = directory / "config.yaml"
    if not path.is_file():
        raise _refusal(directory, "no run has written a config.yaml there; give what `output` was")
    settings = parse.load(path)
    settings.output = str(directory)
    return settings


def _refusal(directory: Path, fix: str) -> ConfigError:
    return ConfigError(Problem("run_dir", str(directory), "the output directory of a finished run", fix))
