"""Time of one AlignX mixture against the dense FFN it replaces and against one full FFN per expert.

    python benchmarks/ffn.py --hidden 1024 --ffn 2752 --rank 64 --device cpu

Random weights. Every repeat times all systems in turn, so drift of the machine's speed hits all alike. Writes JSON with
hardware, versions and command to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor, nn

from alignx_ds import console
from alignx_ds.mocae.experts import PROJECTIONS, Factors, FeedForward
from alignx_ds.mocae.fused import FusedMixture

Work = Callable[[], Tensor]


def feed_forward(hidden: int, ffn: int) -> FeedForward:
    up, gate, down = nn.Linear(hidden, ffn, False), nn.Linear(hidden, ffn, False), nn.Linear(ffn, hidden, False)
    return FeedForward(gate, up, down, nn.SiLU())


def dense(f: FeedForward, x: Tensor) -> Tensor:
    out: Tensor = f.down(f.activation(f.gate(x)) * f.up(x))
    return out


def full_experts(experts: list[FeedForward], x: Tensor, chosen: Tensor) -> Tensor:
    """One full FFN per expert, top-1, as a loop with index_add (the usual block of MoE fusion)."""
    flat, ids = x.flatten(0, 1), chosen.repeat_interleave(x.shape[1])
    out = torch.zeros_like(flat)
    for number, expert in enumerate(experts):
        rows = (ids == number).nonzero().flatten()
        out.index_add_(0, rows, dense(expert, flat[rows]))
    return out.view_as(x)


def systems(args: argparse.Namespace, batch: int, length: int) -> dict[str, Work]:
    base = feed_forward(args.hidden, args.ffn)
    experts = []
    for _ in range(args.experts):
        weights = {p: base.projection(p) for p in PROJECTIONS}
        down = {p: torch.randn(args.rank, w.in_features) * 0.01 for p, w in weights.items()}
        up = {p: torch.randn(w.out_features, args.rank) * 0.01 for p, w in weights.items()}
        experts.append(Factors(down, up))
    fused = {k: FusedMixture(base, experts).to(args.device).eval() for k in (1, args.experts)}
    copies = [feed_forward(args.hidden, args.ffn) for _ in range(args.experts)]
    for f in (base, *copies):
        for p in PROJECTIONS:
            f.projection(p).to(args.device)
    x = torch.randn(batch, length, args.hidden, device=args.device)
    chosen = torch.arange(batch, device=args.device) % args.experts
    one_hot = nn.functional.one_hot(chosen, args.experts).float().unsqueeze(1)
    uniform = torch.full((batch, 1, args.experts), 1 / args.experts, device=args.device)
    return {
        "dense FFN": lambda: dense(base, x),
        "fused, top-1": lambda: fused[1](x, one_hot, 1),
        "fused, all experts mixed": lambda: fused[args.experts](x, uniform),
        "full FFN per expert, top-1": lambda: full_experts(copies, x, chosen),
    }


@torch.no_grad()
def measure(work: dict[str, Work], repeats: int, device: str) -> dict[str, list[float]]:
    """Milliseconds, interleaved; the first round is a warm-up and is dropped."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for _ in range(repeats + 1):
        for name, run in work.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(1000 * (time.perf_counter() - start))
    return {name: values[1:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 1024), ("ffn", 2752), ("rank", 64), ("experts", 4), ("repeats", 20)):
        parser.add_argument(f"--{name}", type=int, default=default, help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.manual_seed(0)
    rows, results = [], {}
    for title, batch, length in (("prefill 1 x 256", 1, 256), ("decode, batch 1", 1, 1), ("decode, batch 8", 8, 1)):
        times = measure(systems(args, batch, length), args.repeats, args.device)
        base = statistics.median(times["dense FFN"])
        results[title] = times
        for name, values in times.items():
            median, spread = statistics.median(values), statistics.quantiles(values, n=4)
            ratio = f"{median / base:.2f}"
            rows.append([f"{title}: {name}", f"{median:.2f}", f"{spread[0]:.2f} – {spread[2]:.2f}", ratio])
    console.table("One layer's FFN, milliseconds", ["what", "median", "quartiles", "x dense"], rows)
    hardware = (
        torch.cuda.get_device_name() if args.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    )
    content = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "hardware": hardware,
        "torch": torch.__version__,
        "milliseconds": results,
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"ffn-{args.device}-{args.hidden}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
