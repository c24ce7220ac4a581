"""Specialists that learn from bad answers too, beside those that imitate good ones: of the embedded world, or another.

    python benchmarks/objectives.py
    python benchmarks/objectives.py --objectives sft dpo+sft --seeds 0 --steps 60
    python benchmarks/objectives.py --recipe smollm2 --lr 4e-4 --seeds 0 --set model.path=models/smollm2

Same rows, same steps and batch. The axes are harmless and honest, whose rows have good and bad answers. `+sft` adds the
NLL of the good answers (`axes.X.sft_weight=1`). Each objective has the learning rate of --lr that scores best on the
first seed, as a mean of both axes; the JSON has that seed's other rates too.

Columns: the score on the axis (of harmless: refused of what asks for harm), its benign prompts that are served, and the
perplexity of the right answers. For pairs also the gradients of log π(y⁺) and log π(y⁻) before and after training
(gradient entanglement, Yuan et al. 2024, arXiv 2410.13828): their cosine, and on how many pairs ⟨∇⁺, ∇⁻⟩ > ‖∇⁺‖², so
that a step which only widens the margin makes the good answer less likely.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from math import isnan, nan
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from suite import record, specialists
from suite.specialists import Specialists
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignx_ds.config import parse
from alignx_ds.data.batches import collate
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.evaluation.compared import load_specialist
from alignx_ds.models import backbone
from alignx_ds.runtime import console, distributed
from alignx_ds.stages.finetune import train_ffns_alone
from alignx_ds.training.losses import answer_log_probabilities

AXES = ("harmless", "honest")
OBJECTIVES = ("sft", "poft", "dpo", "dpo+sft", "orpo", "simpo", "simpo+sft", "kto", "bco")
PAD = 0  # masked, so any token will do

Run = dict[str, Any]


def measure(objective: str, lr: float, seed: int, args: argparse.Namespace) -> Run:
    """Scores, perplexity and, of pairs, entanglement by axis."""
    name, _, plus = objective.partition("+")
    settings = [f"axes.{axis}.objective={name}" for axis in args.axes]
    if plus:
        settings += [f"axes.{axis}.sft_weight=1" for axis in args.axes]
    output = args.runs / f"{objective}-{lr:g}-{seed}"
    shared = [f"output={output}", f"seed={seed}", f"train.steps={args.steps}", f"train.lr={lr}"]
    config = parse.load(args.recipe, [*shared, "launch.ranks=1", "align.ep_size=0", *settings, *args.set])
    specialists.only(config, args.axes)
    found = specialists.trained(config)
    run: Run = {"objective": objective, "lr": lr, "seed": seed}
    for axis in args.axes:
        metrics = found.judged[axis].metrics[axis]
        sets = {name: found.judged[axis].metrics[name] for name in config.evaluation.sets}
        run[axis] = {
            "metrics": metrics,
            "sets": sets,
            "score": found.score(axis),
            "perplexity": found.judged[axis].perplexity[axis],
        }
        rows = found.inputs.data.compared.get(axis)
        if args.pairs and rows and rows.examples.others:
            run[axis]["gradients"] = entangled(found, axis, rows.examples, args.pairs)
    return run


def entangled(found: Specialists, axis: str, pairs: LabelledExamples, count: int) -> dict[str, dict[str, float]]:
    """The first pairs' gradients with respect to the trained weights, before and after training."""
    base = found.inputs.base
    models = {"before": backbone.load_backbone(base), "after": load_specialist(base, found.made[axis])}
    measured = {}
    for when, model in models.items():
        train_ffns_alone(model, base)
        products = list(_products(model, pairs, count))
        measured[when] = {
            "cosine": mean(inner / (good * bad) ** 0.5 for good, bad, inner in products),
            "good answer falls": mean(inner > good for good, _, inner in products),
        }
    return measured


def _products(model: PreTrainedModel, pairs: LabelledExamples, count: int) -> Iterator[tuple[float, float, float]]:
    """(‖∇⁺‖², ‖∇⁻‖², ⟨∇⁺, ∇⁻⟩) of the first pairs."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    for number in range(min(count, len(pairs.examples))):
        good, bad = (_gradient(model, weights, answer) for answer in pairs.at((number,)))
        yield float(good @ good), float(bad @ bad), float(good @ bad)


def _gradient(model: PreTrainedModel, weights: list[nn.Parameter], answer: Any) -> Tensor:
    """Of the answer's log-probability, flat."""
    found = answer_log_probabilities(model, collate([answer], PAD).to(distributed.device()), 1)
    return torch.cat([part.flatten() for part in torch.autograd.grad(found.sum(), weights)])


def all_seeds(objective: str, args: argparse.Namespace) -> tuple[list[Run], list[Run]]:
    """The runs of all seeds at the best rate, and the first seed's at the others."""
    first = [measure(objective, lr, args.seeds[0], args) for lr in args.lr]
    best = max(first, key=lambda run: sum(run[axis]["score"] for axis in args.axes))
    runs = [best, *(measure(objective, best["lr"], seed, args) for seed in args.seeds[1:])]
    return runs, [run for run in first if run is not best]


def of_run(run: Run) -> list[str]:
    """Its axes, in their order."""
    return [axis for axis in AXES if axis in run]


def row(objective: str, runs: list[Run]) -> list[str]:
    cells = [objective, f"{runs[0]['lr']:g}"]
    for axis in of_run(runs[0]):
        cells.append(spread([run[axis]["score"] for run in runs]))
        if axis == "harmless":
            cells.append(spread([run[axis]["metrics"].get("benign_served", nan) for run in runs]))
        cells.append(spread([run[axis]["perplexity"] for run in runs], 2))
    return cells


def spread(values: list[float], digits: int = 1) -> str:
    if any(map(isnan, values)):
        return "–"
    shown = f"{mean(values):.{digits}f}"
    return f"{shown} ± {stdev(values):.{digits}f}" if len(values) > 1 else shown


def gradient_rows(objective: str, runs: list[Run]) -> Iterator[list[str]]:
    for axis in of_run(runs[0]):
        if "gradients" in runs[0][axis]:
            cells = [objective, axis]
            for when in ("before", "after"):
                found = [run[axis]["gradients"][when] for run in runs]
                cells += [
                    f"{mean(f['cosine'] for f in found):.2f}",
                    f"{mean(f['good answer falls'] for f in found):.0%}",
                ]
            yield cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="world", help="a shipped one with these axes (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=OBJECTIVES, metavar="NAME")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, metavar="NAME", help="default: both")
    parser.add_argument("--lr", type=float, nargs="+", default=[2e-3, 5e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--pairs", type=int, default=32, help="whose gradients are compared (default: %(default)s)")
    parser.add_argument("--runs", type=Path, default=Path("runs/objectives"), help="what it holds is not trained again")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="directory of the JSON")
    args = parser.parse_args()
    distributed.init_process_group(600)
    found = {objective: all_seeds(objective, args) for objective in args.objectives}
    distributed.shutdown()
    axes = "" if set(args.axes) == set(AXES) else "-".join(["", *args.axes])
    path = args.out / f"objectives-{args.recipe}{axes}-cpu.json"
    command = ["python", "benchmarks/objectives.py", *sys.argv[1:]]
    runs = {objective: {"best rate": chosen, "other rates": others} for objective, (chosen, others) in found.items()}
    record.write_plain(path, command, "cpu", {"steps": args.steps, "runs": runs})
    console.say(f"written: {path}")
    best = {objective: chosen for objective, (chosen, _) in found.items()}
    by_axis = {"harmless": ["harmless", "benign served", "perplexity"], "honest": ["honest", "perplexity"]}
    head = ["objective", "lr", *(column for axis in AXES if axis in args.axes for column in by_axis[axis])]
    console.table("Specialists on their own axes", head, [row(name, runs) for name, runs in best.items()])
    head = ["objective", "axis", "cosine before", "y⁺ falls", "cosine after", "y⁺ falls"]
    console.table(
        "Gradients of both answers", head, [r for name, runs in best.items() for r in gradient_rows(name, runs)]
    )


if __name__ == "__main__":
    main()
