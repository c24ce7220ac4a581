"""Training throughput in tokens a second: stage 1 by ZeRO stage beside a bare DeepSpeed loop, stage 2 by ep_size.

    python benchmarks/throughput.py --shape tiny --device cpu
    python benchmarks/throughput.py --shape llama2-7b --device cuda --ranks 8 --batch 64 --length 2048 --zero 3
    python benchmarks/throughput.py --shape llama2-7b --device cuda --ranks 1 --length 1024 --zero 3 --stages 1

Random weights and rows; each world size is one launch. The bare loop has the same engine and the same packed batches,
made ahead, and does nothing but forward (with the model's own loss), backward and step; both loops take turns, and
their ratio is the median of the rounds' own ratios. Tokens are real ones: neither padding nor a row's copy is counted.
MFU is the FLOPs that these tokens need (training/flops.py) over the card's nominal rate, and over that of a large GEMM.

Columns: median tokens per second over all ranks, quartiles over the rounds, and TFLOP/s per rank; of stage 1 also the
bare loop's tokens per second and the ratio of the two ("x bare"). All ways of stage 2 take turns too: ep_size 0 is the
fused path, and "x ep_size 1" the median of the rounds' own ratios.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Callable, Iterator
from itertools import islice
from statistics import median
from typing import Any

from suite import ceilings, plots, ranks, record
from suite.record import Target
from suite.systems import AXES, Setting
from suite.timing import WARM_UP, Times, interleaved

from alignx_ds.runtime import console, distributed
from alignx_ds.training import flops

OURS, BARE = "training loop", "bare DeepSpeed loop"
FUSED = 0  # the ep_size of the fused path
Point = dict[str, Any]  # stage, ranks, zero, ep_size, tokens of each round, milliseconds of each round by system


def measure(args: argparse.Namespace) -> list[Point]:
    """Everything of this world size. Collective."""
    from suite.training import by_round, ep_sizes, here, random_rows, stage2

    setting = here(Setting.of(args))
    rows = random_rows(8 * args.batch, setting.config.vocab_size, args.length)
    points = [against_bare(setting, rows, zero, args) for zero in args.zero if 1 in args.stages]
    world = distributed.world_size()
    sizes = [FUSED, *ep_sizes(world)] if 2 in args.stages else []
    if not sizes:
        return [{"ranks": world, **point} for point in points]
    trainees = {f"ep_size {n}": stage2(setting, rows, args.batch, n) for n in sizes}
    rounds = (WARM_UP + args.repeats) * args.steps
    counted = by_round(list(islice(next(iter(trainees.values())).stream(), rounds)), args.steps)
    work = {name: runner(t, t.stream(), args.steps) for name, t in trainees.items()}
    times = interleaved(work, args.repeats, args.device)
    for size, (name, trainee) in zip(sizes, trainees.items(), strict=True):
        milliseconds = {OURS: times[name].rounds}
        points.append(
            {"stage": 2, "zero": 2, "ep_size": size, "tokens": counted, "milliseconds": milliseconds} | peak(args)
        )
        trainee.close()
    return [{"ranks": world, **point} for point in points]


def against_bare(setting: Setting, rows: Any, zero: int, args: argparse.Namespace) -> Point:
    from suite.training import bare_loop, by_round, stage1

    trainee = stage1(setting, rows, args.batch, zero)
    ahead = list(islice(trainee.stream(), (WARM_UP + args.repeats) * args.steps))
    prepared = iter(ahead)
    trainee.engine.train()
    if args.device == "cuda":
        bare_loop(
            trainee.engine, ahead
        )  # cuDNN plans its kernels for every new shape: neither loop should be the one that waits for it
    work = {
        OURS: runner(trainee, trainee.stream(), args.steps),
        BARE: lambda: bare_loop(trainee.engine, islice(prepared, args.steps)),
    }
    times = interleaved(work, args.repeats, args.device)
    trainee.close()
    counted = by_round(ahead, args.steps)
    milliseconds = {name: found.rounds for name, found in times.items()}
    return {"stage": 1, "zero": zero, "ep_size": 1, "tokens": counted, "milliseconds": milliseconds} | peak(args)


def peak(args: argparse.Namespace) -> dict[str, float]:
    """The peak of rank 0's allocated GPU memory since the last call, in GiB; nothing without a GPU."""
    import torch

    if args.device != "cuda":
        return {}
    found = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return {"peak_gib": found}


def runner(trainee: Any, stream: Iterator[Any], steps: int) -> Callable[[], object]:
    return lambda: trainee.steps(stream, steps)


def rate(point: Point, system: str = OURS) -> list[float]:
    """Tokens a second, by round."""
    return [1000 * n / t for n, t in zip(point["tokens"], point["milliseconds"][system], strict=True)]


def ratio(point: Point) -> float:
    """Our tokens a second over the bare loop's."""
    times = {name: Times(rounds) for name, rounds in point["milliseconds"].items()}
    return times[BARE].over(times[OURS])


def over_one(point: Point, points: list[Point]) -> float:
    """Tokens a second over those of ep_size 1 on as many ranks."""
    [one] = [p for p in points if p["stage"] == 2 and p["ranks"] == point["ranks"] and p["ep_size"] == 1]
    return Times(one["milliseconds"][OURS]).over(Times(point["milliseconds"][OURS]))


def add_mfu(points: list[Point], args: argparse.Namespace) -> dict[str, Any]:
    """Add FLOPs per token and MFU to every point. Returns the card's rates in TFLOP/s."""
    from suite.training import LEARNED

    setting = Setting.of(args)
    rates = {"matmul": ceilings.matmul_rate(args.device, setting.dtype), "nominal": ceilings.nominal_rate()}
    layers, experts = setting.config.num_hidden_layers, AXES + 1
    for p in points:
        p["flops_per_token"] = (
            flops.fine_tune(setting.config, range(layers // 2, layers), learned=LEARNED)
            if p["stage"] == 1
            else flops.mixture(
                setting.config, range(layers), experts, setting.rank, fused=p["ep_size"] == FUSED, learned=LEARNED
            )
        )
        done = median(rate(p)) * p["flops_per_token"] / 1e12 / p["ranks"]
        p["tflop_s_per_rank"] = done
        p["mfu"] = {name: done / r for name, r in rates.items() if r}
    return rates


def targets(points: list[Point]) -> list[Target]:
    promised = [p for p in points if p["stage"] == 1 and p["zero"] == 3]
    met = [Target(f"{name_of(p)}: tokens/s over the bare loop's", ratio(p), 0.95, at_least=True) for p in promised]
    fused = [p for p in points if p["stage"] == 2 and p["ep_size"] == FUSED]
    met += [Target(f"{name_of(p)}: tokens/s over ep_size 1's", over_one(p, points), 1.5, at_least=True) for p in fused]
    known = [p for p in promised if "nominal" in p["mfu"]]
    return met + [Target(f"{name_of(p)}: MFU of stage 1", p["mfu"]["nominal"], 0.40, at_least=True) for p in known]


def name_of(point: Point) -> str:
    how = f"ZeRO-{point['zero']}" if point["stage"] == 1 else f"ep_size {point['ep_size']}"
    return f"{how}, {point['ranks']} rank{'s' * (point['ranks'] > 1)}"


def show(points: list[Point]) -> None:
    rows = []
    for p in (p for p in points if p["stage"] == 1):
        bare = Times(rate(p, BARE))
        rows.append([name_of(p), *figures(p), f"{p['tflop_s_per_rank']:.3g}", f"{bare.median:.0f}", f"{ratio(p):.3f}"])
    columns = ["engine", "tokens/s", "quartiles", "TFLOP/s per rank", f"{BARE}'s", "x bare"]
    if rows:
        console.table("Stage 1: fine-tuning a specialist, packed rows", columns, rows)
    second = [p for p in points if p["stage"] == 2]
    rows = [[name_of(p), *figures(p), f"{p['tflop_s_per_rank']:.3g}", f"{over_one(p, points):.3f}"] for p in second]
    if rows:
        console.table("Stage 2: the mixture, ZeRO-2", [*columns[:4], "x ep_size 1"], rows)


def figures(point: Point) -> list[str]:
    found = Times(rate(point))
    return [f"{found.median:.0f}", "{:.0f} – {:.0f}".format(*found.quartiles)]


def plot(points: list[Point], notes: list[str], title: str, path: Any) -> None:
    stages = [[p for p in points if p["stage"] == stage][::-1] for stage in (1, 2)]
    if not all(stages):
        return  # one stage alone has only its table
    figure, axes = plots.subplots(
        2, 1, figsize=(7, 0.5 * len(points) + 2.2), height_ratios=[2 * len(stages[0]) + 1, len(stages[1]) + 1]
    )
    first, second = axes
    places = range(len(stages[0]))
    for offset, system, colour in ((0.2, OURS, plots.OURS), (-0.2, BARE, plots.THEIRS)):
        values = [median(rate(p, system)) for p in stages[0]]
        bars = first.barh([place + offset for place in places], values, 0.38, color=colour, label=system)
        labels = [f"{v:,.0f}" + (f"  ({ratio(p):.2f} x bare)" if system == OURS else "") for v, p in
                  zip(values, stages[0], strict=True)]  # fmt: skip
        first.bar_label(bars, labels, padding=3, fontsize=8)
    first.set_yticks(list(places), [name_of(p) for p in stages[0]])
    first.legend(fontsize=8, frameon=False, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    first.set_title("stage 1", fontsize=10, loc="left")
    bars = second.barh([name_of(p) for p in stages[1]], [median(rate(p)) for p in stages[1]], 0.5, color=plots.OURS)
    second.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize=8)
    second.set_title("stage 2 (ep_size 0: fused path)", fontsize=10, loc="left")
    second.set_xlabel(f"tokens/s, median of the rounds; {title}", fontsize=9)
    for axis in axes:
        axis.margins(x=0.25)
    figure.text(0.02, 0.01, "\n".join(textwrap.fill(note, 120) for note in notes), fontsize=7.5, color="#444")
    plots.save(figure, path, (0, 0.05 if notes else 0, 1, 1))


def main() -> None:
    ranks.hide_gpus()
    parser = record.parser(__doc__, shape="tiny")
    ranks.add_options(parser, default=[1, 2])
    parser.add_argument("--batch", type=int, default=8, help="rows of a step over all ranks (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="greatest tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a round (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=12, help="rounds (default: %(default)s)")
    parser.add_argument("--zero", type=int, nargs="+", choices=(1, 2, 3), default=[1, 2, 3], help="stage 1's ZeRO")
    parser.add_argument("--stages", type=int, nargs="+", choices=(1, 2), default=[1, 2], help="(default: both)")
    args = parser.parse_args()
    if args.quick:
        args.zero, args.repeats = [3], 6
    if args.worker:
        ranks.work(args.worker, lambda: measure(args))
        return
    from suite.training import ROWS

    notes = ranks.check(args.ranks, args.device)
    points = [point for world in args.ranks for point in ranks.collect([world], args.device)[0]]
    rates = add_mfu(points, args)
    show(points)
    met = targets(points)
    record.print_targets(met)
    for note in notes:
        console.say(note)
    content = {
        "threads_per_rank": ranks.threads(args.device),
        "step": {"rows": args.batch, "longest": args.length, "drawn": ROWS},
        "steps_per_round": args.steps,
        "notes": notes,
        "tflop_s": rates,
        "points": points,
    }
    name = "throughput" if len(args.stages) == 2 else f"throughput-stage{args.stages[0]}"
    path = record.write(name, args, content, met)
    plot(points, notes, f"{args.shape}, {args.device}, {args.batch} rows a step", path.with_suffix(".png"))
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
