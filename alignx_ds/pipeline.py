"""The main job, top to bottom: specialists -> baselines -> aligned model -> answers -> judgement -> report."""

from __future__ import annotations

import shutil
import time
from functools import partial
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from alignx_ds.baselines.merged import Merge, add_merged, merge_of
from alignx_ds.config.parse import substance, to_dict, to_yaml
from alignx_ds.config.schema import FUSIONS, MERGES, SCRATCH_MODEL, RunConfig
from alignx_ds.data import inputs
from alignx_ds.evaluation import report
from alignx_ds.evaluation.judges import registry
from alignx_ds.evaluation.judges.protocol import Judge
from alignx_ds.evaluation.systems import Examination, System, exams
from alignx_ds.experts.vectors import add_task_vector, read_factors
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.pretrained import NO_PICKLE
from alignx_ds.routing.report import router_report
from alignx_ds.runs import manifest, outputs
from alignx_ds.runtime import console, distributed, signals
from alignx_ds.stages import fuse as fusion_training
from alignx_ds.stages import scratch
from alignx_ds.stages.align import AlignJob, align
from alignx_ds.stages.finetune import Job, Workshop, ensure
from alignx_ds.stages.sequential import MIXED, baseline_jobs, sequential_name
from alignx_ds.training import engine as engines
from alignx_ds.training.keeper import Keeper, Keeping, Scribe, no_scribe


class Run:
    """One run's inputs and outputs; each step finds what the steps before it left and goes on from there."""

    def __init__(self, config: RunConfig, material: inputs.Material) -> None:
        self.config, self.material = config, material
        self.base, self.data = material.base, material.data
        self.started, self.ranks = time.monotonic(), distributed.world_size()
        self.out = outputs.Outputs.of(config)
        distributed.on_main(lambda: outputs.claim(config))
        self.shop = Workshop(
            config,
            self.base,
            self.out.specialists,
            self.data.injected,
            self.data.digests,
            self.keep,
            shared=bool(config.specialists),
        )

        self.keeping = Keeping(
            self.out.checkpoints, self.out.nonfinite, config.checkpoints, config.nonfinite, to_yaml(config), config.seed
        )

    def keep(self, name: str, made_from: dict[str, Any]) -> Keeper:
        """What a training job leaves besides its result."""
        return Keeper(name, made_from, self.keeping, self.scribe(name), lambda ids: self.base.tokenizer.decode(ids))

    def scribe(self, name: str) -> Scribe:
        """Writes a training curve to TensorBoard, on rank 0."""
        if not distributed.is_main():
            return no_scribe
        from torch.utils.tensorboard import SummaryWriter

        writers = list[SummaryWriter]()

        def write(step: int, values: dict[str, float]) -> None:
            if not writers:  # of a job that goes on, what was written after its checkpoint is dropped
                writers.append(SummaryWriter(str(self.out.tensorboard / name), purge_step=step))
            for key, value in values.items():
                writers[0].add_scalar(key, value, step)
            writers[0].flush()

        return write

    def base_model(self) -> None:
        """Train the base model, where the recipe asks for one from scratch."""
        if self.config.model.path == SCRATCH_MODEL:
            console.heading("Base model from scratch")
            scratch.ensure(self.config, self.base, self.material.texts, self.keep)

    def specialists(self) -> None:
        """Stage 1: an expert per axis."""
        console.heading("Stage 1: specialists")
        for axis in self.config.axes:
            signals.stop_if_asked("stage 1")
            ensure(Job(axis, (axis,), is_expert=True), self.shop)

    def baselines(self) -> None:
        """The merges have nothing to train: they are made from the specialists when they are asked."""
        console.heading("Baselines")
        for job in baseline_jobs(list(self.config.axes)):
            ensure(job, self.shop)
        for name in self._made(FUSIONS):
            fusion_training.ensure(self._fusion(name), self.keep)

    def _made(self, names: tuple[str, ...]) -> list[str]:
        """Those of these baselines that the recipe asks for."""
        return [name for name in names if name in self.config.baselines.make]

    def _fusion(self, name: str) -> fusion_training.FusionJob:
        directories = [self.shop.directory(axis) for axis in self.config.axes]
        return fusion_training.FusionJob(
            name, self.config, self.base, directories, self.data.train, self.data.digests, self.out.baselines / name
        )

    def align(self) -> None:
        """Stage 2, unless the model there was made from just these specialists and settings."""
        console.heading("Stage 2: mixture of calibrated experts")
        made_from = self._align_inputs()
        if distributed.on_main(lambda: manifest.is_current(self.out.model, made_from)):
            console.say(f"alignx: unchanged, reused from {self.out.model}")
            self.keep("stage2", made_from).finish()
            return
        factors = {
            layer: [read_factors(self.shop.directory(axis), layer) for axis in self.config.axes]
            for layer in self.base.layers
        }
        job = AlignJob(self.config, self.base, factors, self.data.train, self.data.calibration_rows)
        model, losses = align(job, self.keep, made_from)

        def save() -> None:
            shutil.rmtree(self.out.model, ignore_errors=True)
            model.save_pretrained(self.out.model)
            self.base.tokenizer.save_pretrained(self.out.model)
            manifest.write(self.out.model, made_from, {"losses": losses})

        distributed.on_main(save)
        self.keep("stage2", made_from).finish()

    def _align_inputs(self) -> dict[str, Any]:
        settings = to_dict(self.config)
        return {
            "specialists": {a: manifest.read(self.shop.directory(a))["fingerprint"] for a in self.config.axes},
            "generalist": self.data.digests["generalist"],
            "align": substance(self.config.align),
            **{key: settings[key] for key in ("gate", "data", "model", "seed")},
            "deepspeed": engines.settings_of(self.config.align.deepspeed, "align.deepspeed"),
        }

    def evaluate(self) -> None:
        """Every system's answers and likelihoods, and the router on the held-out prompts. Collective."""
        console.heading("Evaluation")
        everyone, examination = self._systems(), self._examination()
        answered = sum(exam.is_answered for exam in exams(self.config, self.data))
        with console.progress("answers and likelihoods", len(everyone) * (answered + 1)) as bar:
            for system in everyone:
                signals.stop_if_asked("evaluation")
                examination.sit(system, bar)
        self.router = router_report(self._aligned(), self.data, self.base, self.config)

    def report(self) -> report.Report:
        """Judge what was answered, and write the report. On rank 0 alone, after the process group has ended."""
        names = sorted({exam.judge for exam in exams(self.config, self.data) if exam.is_answered})
        judges: dict[str, Judge] = {name: registry.make(name, self.config.judges) for name in names}
        examination = self._examination()
        results = {system.name: examination.judged(system, judges) for system in self._systems()}
        seconds = time.monotonic() - self.started
        made = report.build(self.config, self.data, results, self.router, self.out, seconds, self.ranks)
        report.write(made, self.out)
        return made

    def _examination(self) -> Examination:
        return Examination(self.config, self.base, self.data, self.out)

    def _systems(self) -> list[System]:
        axes = list(self.config.axes)
        base = {"base": self.base.digest, "dtype": self.config.model.dtype}
        systems = [System("base", base, lambda: self._specialist(None))]
        for name, directory in [*zip(axes, axes, strict=True), ("sequential", sequential_name(axes)), (MIXED, MIXED)]:
            made = base | {"specialist": manifest.read(self.shop.directory(directory))["fingerprint"]}
            systems.append(System(name, made, partial(self._specialist, directory)))
        specialists = base | {"specialists": {a: manifest.read(self.shop.directory(a))["fingerprint"] for a in axes}}
        for name in self._made(MERGES):
            merge, settings = merge_of(name, self.config.baselines, axes, self.config.seed)
            systems.append(System(name, specialists | {name: settings}, partial(self._merged, merge)))
        for name in self._made(FUSIONS):
            made = base | {name: manifest.read(self.out.baselines / name)["fingerprint"]}
            systems.append(System(name, made, partial(self._fused, name)))
        aligned = base | {"aligned": manifest.read(self.out.model)["fingerprint"]}
        return [*systems, System("alignx", aligned, self._aligned)]

    def _backbone(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            self.base.path, dtype=engines.dtype_of(self.config.model.dtype), **NO_PICKLE
        )

    def _specialist(self, name: str | None) -> PreTrainedModel:
        model = self._backbone()
        if name:
            add_task_vector(model, self.base, self.shop.directory(name))
        return model.to(distributed.device())

    def _merged(self, merge: Merge) -> PreTrainedModel:
        model = self._backbone()
        add_merged(model, self.base, [self.shop.directory(axis) for axis in self.config.axes], merge)
        return model.to(distributed.device())

    def _fused(self, name: str) -> PreTrainedModel:
        dtype = engines.dtype_of(self.config.model.dtype)
        model = fusion_training.load(name, self.base, dtype, self.out.baselines / name)
        return model.to(distributed.device())

    def _aligned(self) -> AlignXForCausalLM:
        model: AlignXForCausalLM = AlignXForCausalLM.from_pretrained(
            self.out.model, dtype=engines.dtype_of(self.config.model.dtype), **NO_PICKLE
        )
        model.to(distributed.device()).eval()
        return model
