"""The dry run's estimate of a training stage's memory beside what a rank took, on a CPU.

    python benchmarks/training_memory.py
    python benchmarks/training_memory.py --cases 0 9

Each case trains three optimizer steps of a stage with the project's engines. Weights are random, and all rows have the
greatest length, which the estimate is for. Measured is the largest resident size of rank 0 from the first step on, over
its size before the model was made. glibc returns tensors to the system at once (MALLOC_MMAP_THRESHOLD_), so that
resident memory is memory in use. The estimate is `alignx_ds.plan.memory`'s with the same settings, for a CPU.

Columns, in MB: the estimate and its largest parts, the measured peak, and the ratio of the two (goal: 0.85 to 1.15).
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from suite import ranks, record
from suite.record import Target
from suite.shapes import Llama

from alignx_ds.runtime import console, distributed, memory

SMALL = Llama(hidden=512, ffn=1376, heads=8, layers=8)
SHALLOW = Llama(hidden=512, ffn=1376, heads=8, layers=4)
LARGE_VOCABULARY = Llama(hidden=512, ffn=1376, heads=8, layers=4, vocabulary=32000)
WIDE = Llama(hidden=1024, ffn=2752, heads=16, layers=4)
BUCKETS = {  # small enough for the models here, as DeepSpeed's defaults are for 7B
    "reduce_bucket_size": 2_000_000,
    "stage3_prefetch_bucket_size": 1_000_000,
    "stage3_max_live_parameters": 5_000_000,
}
STEPS, MB, MOST_OFF = 3, 1e6, 0.15
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Case:
    """A stage of a recipe, on a number of ranks."""

    stage: str  # train or align
    ranks: int
    zero: int
    shape: Llama = SMALL
    length: int = 128  # tokens of each row
    batch: int = 4  # rows of a step
    settings: dict[str, Any] = field(default_factory=dict)  # of the stage
    buckets: dict[str, int] = field(default_factory=dict)
    dtype: str = "float32"

    @property
    def name(self) -> str:
        size = f"{self.shape.layers} x {self.shape.hidden}"
        named = [f"{key}={value}" for key, value in self.settings.items()]
        small = ["small buckets"] if self.buckets else []
        return f"{self.stage}, {size}, {self.dtype}, {self.batch} x {self.length}, " + ", ".join(
            [f"{self.ranks} ranks, ZeRO-{self.zero}", *named, *small]
        )


AGAIN = {"checkpoint_activations": "true"}
EXPERTS = {"expert_lr_scale": 0.1}
CASES = [
    Case("train", 1, 3, length=256),
    Case("train", 1, 3, length=256, settings=AGAIN),
    Case("train", 2, 1),
    Case("train", 2, 2, batch=8, settings={"accumulation": 2}),
    Case("train", 2, 2, buckets=BUCKETS),
    Case("train", 2, 2, LARGE_VOCABULARY, length=256, settings=AGAIN),
    Case("train", 2, 2, dtype="bfloat16"),
    Case("train", 2, 3, length=256),
    Case("train", 2, 3, length=256, buckets=BUCKETS),
    Case("train", 2, 3, batch=8, settings={"accumulation": 2, **AGAIN}, buckets=BUCKETS),
    Case("train", 2, 3, WIDE, batch=2, buckets=BUCKETS),
    Case("align", 1, 2, SHALLOW, settings={"ep_size": 1, **EXPERTS}),
    Case("align", 2, 2, SHALLOW, settings={"ep_size": 2}),
    Case("align", 2, 2, SHALLOW, settings={"ep_size": 2, **EXPERTS, **AGAIN}),
    Case("align", 2, 2, SHALLOW, settings={"ep_size": 0, **EXPERTS}),
    Case("align", 2, 2, SHALLOW, settings={"ep_size": 0, **EXPERTS, **AGAIN}),
    Case("align", 2, 3, SHALLOW, settings={"ep_size": 0, **EXPERTS}, buckets=BUCKETS),
]
TINY = Llama(hidden=64, ffn=128, heads=4, layers=2, vocabulary=256)
WARM_UP = [Case("train", 0, 3, TINY, length=16), Case("align", 0, 2, TINY, length=16)]  # load the libraries


def measure(cases: list[Case]) -> list[dict[str, Any]]:
    """Of this world size. Collective."""
    for case in WARM_UP:
        run(case)
    own = [case for case in cases if case.ranks == distributed.world_size()]
    return [{"case": case.name, **asdict(case), **run(case)} for case in own]


def run(case: Case) -> dict[str, Any]:
    """Bytes: the estimate, its parts, and the measured peak of this rank. Collective."""
    import torch
    from suite.systems import AXES, Setting
    from suite.training import fine_tune, mixture

    from alignx_ds.config.schema import AlignConfig, AxisConfig, ModelConfig, RunConfig, SpecialistConfig
    from alignx_ds.data.encode import Example, LabelledExamples
    from alignx_ds.models.base import BaseModel, Planned, dtype_of
    from alignx_ds.plan.memory import Lengths, stage_memory
    from alignx_ds.training import engine as engines

    shape, half = case.shape.config(), case.length // 2
    setting = Setting(shape, "cpu", dtype_of(case.dtype))
    ids = torch.randint(3, shape.vocab_size, (case.batch, case.length)).tolist()
    rows = LabelledExamples([Example(tuple(row), half) for row in ids], [n % (AXES + 1) for n in range(case.batch)])
    stage = (SpecialistConfig if case.stage == "train" else AlignConfig)(
        **{"batch": case.batch, "checkpoint_activations": "false", **case.settings}
    )
    template = engines.read_template(stage.deepspeed, case.stage)
    template["zero_optimization"] |= {"stage": case.zero, **case.buckets}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(template, file)
        file.flush()
        stage.deepspeed = file.name
        layers = list(range(shape.num_hidden_layers)) if case.stage == "align" else []
        config = RunConfig(model=ModelConfig(path="random", dtype=case.dtype, layers=layers), **{case.stage: stage})
        config.axes = {f"axis {n}": AxisConfig() for n in range(AXES)}
        base = BaseModel(config.model, Planned(Path("random"), shape))
        lengths = [Lengths(case.length, case.length - half)] * case.batch
        estimate = stage_memory(config, base, case.stage, lengths, distributed.world_size(), on_gpu=False)
    memory.free()
    distributed.barrier()
    before = resident("VmRSS")
    trainee = (fine_tune if case.stage == "train" else mixture)(setting, rows, stage, template)  # type: ignore[operator]
    memory.free()
    distributed.barrier()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is what it is now
    trainee.steps(trainee.stream(), STEPS)
    peak = resident("VmHWM") - before
    trainee.close()
    z = estimate.zero
    parts = {"parameters": z.parameters, "optimizer": z.optimizer, "activations": estimate.activations}
    parts |= {"gradients": z.gradients, "logits": estimate.logits, "buckets": estimate.buckets}
    return {"estimate": estimate.peak, "measured": peak, "parts": parts}


def resident(name: str) -> int:
    """Bytes, of a field of this process's status."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:")]
    return 1024 * int(line.split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, nargs="+", metavar="N", help="their numbers in CASES (default: all)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="directory of the JSON")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    cases = CASES if args.cases is None else [CASES[n] for n in args.cases]
    if args.worker:
        ranks.work(args.worker, lambda: measure(cases))
    os.environ |= RETURN_MEMORY
    found = [one for world in sorted({c.ranks for c in cases}) for one in ranks.collect([world], "cpu")[0]]
    names = ("parameters", "optimizer", "activations")
    rows = []
    for one in found:
        sizes = [*(one["parts"][name] for name in names), one["estimate"], one["measured"]]
        rows.append([one["case"], *(f"{size / MB:.0f}" for size in sizes), f"{one['estimate'] / one['measured']:.3f}"])
    console.table("Memory of rank 0 in training, MB", ["case", *names, "estimate", "measured", "ratio"], rows)
    worst = max(abs(one["estimate"] / one["measured"] - 1) for one in found)
    target = Target("estimate over measured: furthest from 1", worst, MOST_OFF)
    record.print_targets([target])
    path = args.out / "training-memory-cpu.json"
    command = ["python", "benchmarks/training_memory.py", *(["--cases", *map(str, args.cases)] if args.cases else [])]
    record.write_plain(path, command, "cpu", {"steps": STEPS, "cases": found, "furthest_from_1": worst})
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
