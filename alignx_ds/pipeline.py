"""The main job, top to bottom: specialists -> baselines -> aligned model -> answers -> judgement -> report."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from alignx_ds import console, distributed, inputs, manifest, outputs
from alignx_ds.baselines.finetuned import MIXED, baseline_jobs, sequential_name
from alignx_ds.config import RunConfig, to_dict
from alignx_ds.evaluation import report, systems
from alignx_ds.evaluation.router import router_report
from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.specialists.base import BaseModel
from alignx_ds.specialists.finetune import Job, Workshop, ensure
from alignx_ds.specialists.vectors import add_task_vector, read_factors
from alignx_ds.training import engine as engines
from alignx_ds.training.align import AlignJob, align
from alignx_ds.training.loop import Scribe


class Run:
    """One run's inputs and outputs; each step finds what the steps before it left and goes on from there."""

    def __init__(self, config: RunConfig, base: BaseModel, data: inputs.Inputs) -> None:
        self.config, self.base, self.data = config, base, data
        self.started = time.monotonic()
        self.out = outputs.Outputs.of(config)
        distributed.on_main(lambda: outputs.claim(config))
        self.shop = Workshop(
            config,
            base,
            self.out.specialists,
            data.injected,
            data.digests,
            self.scribe,
            shared=bool(config.specialists),
        )

    def scribe(self, name: str) -> Scribe:
        """Writes a training curve to TensorBoard, on rank 0."""
        if not distributed.is_main():
            return lambda step, values: None
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(str(self.out.tensorboard / name))

        def write(step: int, values: dict[str, float]) -> None:
            for key, value in values.items():
                writer.add_scalar(key, value, step)
            writer.flush()

        return write

    def specialists(self) -> None:
        """Stage 1: an expert per axis."""
        console.heading("Stage 1: specialists")
        for axis in self.config.axes:
            ensure(Job(axis, (axis,), is_expert=True), self.shop)

    def baselines(self) -> None:
        console.heading("Baselines: sequential and mixed fine-tuning")
        for job in baseline_jobs(list(self.config.axes)):
            ensure(job, self.shop)

    def align(self) -> None:
        """Stage 2, unless the model there was made from just these specialists and settings."""
        console.heading("Stage 2: mixture of calibrated experts")
        made_from = self._align_inputs()
        if distributed.on_main(lambda: manifest.is_current(self.out.model, made_from)):
            console.say(f"alignx: unchanged, reused from {self.out.model}")
            return
        factors = {
            layer: [read_factors(self.shop.directory(axis), layer) for axis in self.config.axes]
            for layer in self.base.layers
        }
        job = AlignJob(self.config, self.base, factors, self.data.train, self.data.kept_back)
        model, losses = align(job, self.scribe("stage2"))
        if distributed.is_main():
            model.save_pretrained(self.out.model)
            self.base.tokenizer.save_pretrained(self.out.model)
            manifest.write(self.out.model, made_from, {"losses": losses})
        distributed.barrier()

    def _align_inputs(self) -> dict[str, Any]:
        settings = to_dict(self.config)
        return {
            "specialists": {a: manifest.read(self.shop.directory(a))["fingerprint"] for a in self.config.axes},
            "generalist": self.data.digests["generalist"],
            **{key: settings[key] for key in ("gate", "align", "data", "model", "seed")},
            "deepspeed": engines.read_template(self.config.align.deepspeed, "align.deepspeed"),
        }

    def evaluate(self) -> report.Report:
        """Every system on every axis's held-out rows, the router on the held-out prompts, and the report."""
        console.heading("Evaluation")
        builders = self._systems()
        judged = {}
        with console.progress("answer and judge", len(builders) * len(self.config.axes)) as bar:
            for name, build in builders.items():
                judged[name] = systems.judge(name, build(), self.config, self.base, self.data, self.out, bar)
        aligned = self._aligned()
        router = router_report(aligned, self.data, self.base, self.config)
        made = report.build(self.config, self.shop, judged, router, self.out, time.monotonic() - self.started)
        if distributed.is_main():
            report.write(made, self.out)
        return made

    def _systems(self) -> dict[str, Callable[[], PreTrainedModel]]:
        def specialist(name: str) -> Callable[[], PreTrainedModel]:
            return lambda: self._specialist(name)

        return {
            "base": lambda: self._specialist(None),
            **{axis: specialist(axis) for axis in self.config.axes},
            "sequential": specialist(sequential_name(list(self.config.axes))),
            "mixed": specialist(MIXED),
            "alignx": self._aligned,
        }

    def _specialist(self, name: str | None) -> PreTrainedModel:
        model = AutoModelForCausalLM.from_pretrained(self.base.path, dtype=engines.dtype_of(self.config.model.dtype))
        if name:
            add_task_vector(model, self.base, self.shop.directory(name))
        return model.to(distributed.device())

    def _aligned(self) -> AlignXForCausalLM:
        model: AlignXForCausalLM = AlignXForCausalLM.from_pretrained(
            self.out.model, dtype=engines.dtype_of(self.config.model.dtype)
        )
        model.to(distributed.device()).eval()
        return model
