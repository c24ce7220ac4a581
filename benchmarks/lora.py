"""LoRA specialists beside FFN specialists of the embedded world, or another: same rows, same steps, without stage 2.

    python benchmarks/lora.py
    python benchmarks/lora.py --ranks 8 --of ffn attention both --seeds 0 --steps 60
    python benchmarks/lora.py --recipe smollm2 --axes honest --ranks 16 --steps 20 --set model.path=models/smollm2

Columns: each specialist's score on its own axis, their mean over axes and seeds, and the bytes that stage 1's optimizer
holds: fp32 weights and both of Adam's moments, which are what a checkpoint holds. Targets: LoRA within 2 points of FFN,
at a tenth of its optimizer memory.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from suite import record, specialists
from suite.record import Target

from alignx_ds.config import parse
from alignx_ds.config.schema import ATTENTION_TARGETS, FFN_TARGETS, LORA_TARGETS
from alignx_ds.runtime import console, distributed

MB, POINTS, SHARE = 1e6, 2.0, 0.1
TARGETS = {"ffn": FFN_TARGETS, "attention": ATTENTION_TARGETS, "both": LORA_TARGETS}


def measure(seed: int, settings: list[str], output: str, args: argparse.Namespace) -> dict[str, Any]:
    """Scores by axis, and bytes of the optimizer."""
    kept = [f"checkpoints.every={args.steps - 1}", "checkpoints.finished=true", "launch.ranks=1", "align.ep_size=0"]
    own = [f"output={output}", f"seed={seed}", f"train.steps={args.steps}", *kept]
    config = parse.load(args.recipe, [*own, *args.set, *settings])
    specialists.only(config, args.axes or list(config.axes))
    found = specialists.trained(config)
    scores = {axis: found.score(axis) for axis in found.made}
    files = (found.out.checkpoints / "stage1" / next(iter(found.made))).glob("step_*/rank*.safetensors")
    return {"seed": seed, "settings": settings, "scores": scores, "optimizer": sum(f.stat().st_size for f in files)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="world", help="a shipped one (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="settings of the recipe")
    parser.add_argument("--axes", nargs="+", metavar="NAME", help="default: all of the recipe")
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 32], help="of LoRA")
    parser.add_argument("--of", nargs="+", choices=TARGETS, default=["ffn"], metavar="WHAT", help=", ".join(TARGETS))
    parser.add_argument("--lr", type=float, default=5e-3, help="of LoRA; FFN specialists keep the recipe's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--runs", type=Path, default=Path("runs/lora"), help="what it holds is not trained again")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="directory of the JSON")
    args = parser.parse_args()
    lora = ["train.trainable=lora", f"train.lr={args.lr}"]
    kinds: dict[str, list[str]] = {"FFN": []}
    for what in args.of:
        chosen = [f"train.lora.targets=[{', '.join(TARGETS[what])}]", "baselines.make=[]"] if what != "ffn" else []
        named = f" of {what}" if what != "ffn" else ""
        kinds |= {f"LoRA, rank {rank}{named}": [*lora, f"experts.rank={rank}", *chosen] for rank in args.ranks}
    distributed.init_process_group(600)
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, settings in kinds.items():
        name = kind.replace(",", "").replace(" ", "-")
        found[kind] = [measure(seed, settings, f"{args.runs}/{name}-{seed}", args) for seed in args.seeds]
    distributed.shutdown()
    axes = list(found["FFN"][0]["scores"])
    means = {kind: {axis: mean(one["scores"][axis] for one in runs) for axis in axes} for kind, runs in found.items()}
    rows = [
        [kind, *(f"{scores[axis]:.1f}" for axis in axes), f"{mean(scores.values()):.1f}", f"{size(found[kind]):.2f}"]
        for kind, scores in means.items()
    ]
    console.table("Specialists on their own axes", ["trained", *axes, "mean", "optimizer, MB"], rows)
    targets = []
    for kind in list(kinds)[1:]:
        behind = mean(means["FFN"].values()) - mean(means[kind].values())
        targets.append(Target(f"{kind}: points behind FFN", behind, POINTS))
        targets.append(Target(f"{kind}: optimizer memory over FFN's", size(found[kind]) / size(found["FFN"]), SHARE))
    record.print_targets(targets)
    path = args.out / f"lora-{args.recipe}-cpu.json"
    record.write_plain(
        path, ["python", "benchmarks/lora.py", *sys.argv[1:]], "cpu", {"steps": args.steps, "runs": found}
    )
    console.say(f"written: {path}")


def size(runs: list[dict[str, Any]]) -> float:
    """Megabytes of the optimizer."""
    return float(runs[0]["optimizer"]) / MB


if __name__ == "__main__":
    main()
