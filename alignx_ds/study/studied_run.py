"""A finished run as the studies use it: the run, its base model, its rows, and its systems."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from transformers import PreTrainedModel

from alignx_ds.config.schema import FUSIONS, RESTORED, RunConfig
from alignx_ds.data.encode import pad_token
from alignx_ds.data.inputs import CALIBRATION, EncodedData, read_inputs
from alignx_ds.data.rows import Row, split_by_question
from alignx_ds.evaluation.compared import Trained, compared_systems, load_base, load_specialist
from alignx_ds.evaluation.evaluate import System
from alignx_ds.evaluation.generate import answers
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.likelihood import perplexity_by_axis
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.base import BaseModel
from alignx_ds.models.finished import aligned_of
from alignx_ds.plan import checks
from alignx_ds.runs import manifest
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.stages import results
from alignx_ds.stages.finetune import MIXED, mixed_name, sequences, sequential_name
from alignx_ds.stages.stage import StageContext

FREE_JUDGES = ("task", "safety", "truth", "composite")  # a study judges dozens of models, so it calls no judge model
SYSTEMS = ("base", "sequential", "mixed", "alignx")


@dataclass(frozen=True)
class StudiedRun:
    """Settings and rows are in memory; every method that returns a model loads it anew."""

    run: FinishedRun
    base: BaseModel
    data: EncodedData
    fingerprints: dict[str, str]  # by fine-tune: of those that this run makes; others may lie beside them

    @classmethod
    def open(cls, directory: Path) -> StudiedRun:
        """Raises ConfigError when this is no finished run, and DataError when its baselines are missing or damaged."""
        run = FinishedRun.open(directory)
        inputs = read_inputs(run.config, checks.check(run.config, max(1, run.config.align.ep_size)))
        stages = results.planned(StageContext(run.config, inputs.base, inputs.data, run.out), inputs.texts)
        fingerprints = {stage.label: manifest.fingerprint(stage.inputs) for stage in stages}
        studied = cls(run, inputs.base, inputs.data, fingerprints)
        for name in (*run.axes, sequential_name(run.axes), mixed_name(run.axes)):
            studied.fine_tune(name)
        return studied

    def fine_tune(self, name: str) -> Path:
        """Its directory: a specialist's, that of a stage of the sequence, or the mixed one's. Raises DataError."""
        return self.run.fine_tune(name, self.fingerprints.get(name, ""))

    @property
    def config(self) -> RunConfig:
        return self.run.config

    @property
    def axes(self) -> list[str]:
        return self.run.axes

    @property
    def experts(self) -> list[str]:
        return self.run.experts

    @property
    def pad_id(self) -> int:
        return pad_token(self.base.tokenizer)

    @property
    def batch(self) -> int:
        return self.config.evaluation.batch

    def base_model(self) -> PreTrainedModel:
        return load_base(self.base).eval()

    def fine_tuned(self, name: str) -> PreTrainedModel:
        """A fine-tune by its directory's name: a specialist, a stage of the sequence, or the mixed one."""
        return load_specialist(self.base, self.fine_tune(name)).eval()

    def aligned(self) -> AlignXForCausalLM:
        return aligned_of(self.run)

    def system(self, name: str) -> PreTrainedModel:
        """One of SYSTEMS."""
        assert name in SYSTEMS
        if name == "base":
            return self.base_model()
        if name == "alignx":
            return self.aligned()
        return self.fine_tuned(mixed_name(self.axes) if name == MIXED else sequential_name(self.axes))

    def compared(self) -> list[System]:
        """Every system that the run compares, the base model first and AlignX last; merges with its report's scales."""
        config, out, report = self.config, self.run.out, self.run.report
        if config.baselines.tune and report:
            found = report["config"]["baselines"].items()
            scales = {key: value for key, value in found if key.endswith(("_scale", "_density"))}
            config = replace(config, baselines=replace(config.baselines, **scales))
        made = config.baselines.make
        fine_tunes = {name: self.fine_tune(sequential_name(self.axes, name)) for name in sequences(config)}
        fine_tunes[MIXED] = self.fine_tune(mixed_name(self.axes))
        fine_tunes |= {name: out.baselines / name for name in (RESTORED,) if name in made}
        fusions = {name: out.baselines / name for name in FUSIONS if name in made}
        specialists = {axis: self.fine_tune(axis) for axis in self.axes}
        return compared_systems(config, self.base, Trained(specialists, fine_tunes, fusions, out.model))

    @property
    def scored_axes(self) -> list[str]:
        """The axes for which `scores` has a score."""
        return [name for name, axis in self.config.axes.items() if axis.judge in FREE_JUDGES]

    def scores(self, model: PreTrainedModel) -> dict[str, float]:
        """By axis with a free judge: the score of the answers to its held-out rows, 0–100, higher is better."""
        found = {}
        for name in self.scored_axes:
            rows, limit = self.data.held_out[name], self.config.evaluation.max_new_tokens
            prompts = [row.chat for row in rows]
            outputs = answers(model, self.base.tokenizer, prompts, batch=self.batch, max_new_tokens=limit)
            judge = registry.make(self.config.axes[name].judge, self.config.judges)
            found[name] = judge.metrics(rows, list(judge.verdicts(rows, outputs)))["score"]
        return found

    def perplexities(self, model: PreTrainedModel) -> dict[str, float]:
        """By axis with reference answers: their perplexity on the held-out rows."""
        return perplexity_by_axis(model, self.data.references, self.config, self.pad_id)

    def held_out_rows(self) -> list[tuple[str, Row]]:
        """(expert, row) of every held-out row, in the order of `data.routed`."""
        splits = self.data.splits.held_out
        return [(name, row) for name in self.experts for row in splits[name].rows]

    def training_rows(self) -> dict[str, tuple[list[Row], list[Row]]]:
        """By expert: (training split, calibration split)."""
        share = self.config.data.calibration_share
        splits = self.data.splits.train
        return {name: split_by_question(splits[name].rows, share, CALIBRATION) for name in self.experts}

    def calibration_rows(self) -> list[tuple[str, Row]]:
        """(owner, row) of the calibration split, joined rows and routing rows included."""
        share = self.config.data.calibration_share
        found = [(name, row) for name, (_, rows) in self.training_rows().items() for row in rows]
        found += [(axis, row) for axis, made in self.data.joined.items() for row in made.calibration]
        for part in self.data.splits.routing:
            found += [(part.owner, row) for row in split_by_question(part.train.rows, share, CALIBRATION)[1]]
        return found
