"""Prefill and decode latency of AlignX, its base model and the prior ways of fusing experts, side by side.

    python benchmarks/latency.py --shape small --device cpu
    python benchmarks/latency.py --shape llama2-7b --device cuda --batches 1 8 --lengths 512 2048

Whole models with random weights. Prefill is the time to the first token of a batch of prompts, decode the time of
every further token. All systems run in turn in every round; ratios are medians of the rounds' own ratios. On CUDA, a
decode step that never synchronises with the device is captured as a CUDA graph. With `--steps eager` it is not; with
`--steps compiled` it is compiled as well. The floor of a decode step is the bytes that it reads, divided by the
measured rate of a copy.

Columns: median milliseconds (decode: per token), quartiles over the rounds, and the ratio to the first system.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from suite import ceilings, plots, record
from suite.record import Target
from suite.systems import KINDS, NEEDS, Setting, System, systems
from suite.timing import WARM_UP, Times, interleaved
from suite.work import STEPS, WAYS, Pool, bytes_of_step, decode_work, prefill_work

from alignx_ds.runtime import console

BASE, OURS, THEIRS = "dense base", "AlignX", ("H3Fusion, loop", "H3Fusion, grouped")
Grid = dict[tuple[str, int, int], dict[str, Times]]


def measure(made: list[System], args: argparse.Namespace, keep: Callable[[Grid], object]) -> Grid:
    """Measure every cell. `keep` is called after each, so that a failure later loses no results."""
    grid: Grid = {}
    for batch, length in product(args.batches, args.lengths):
        work = {s.name: prefill_work(s, batch, length) for s in made}
        grid["prefill", batch, length] = interleaved(work, args.repeats, args.device)
        rounds = args.repeats + WARM_UP
        pool: Pool = []
        work.clear()
        work = {s.name: decode_work(s, batch, length, rounds, args.steps, pool) for s in made}
        found = interleaved(work, args.repeats, args.device)
        grid["decode", batch, length] = {n: Times([t / STEPS for t in times.rounds]) for n, times in found.items()}
        work.clear()
        keep(grid)
    return grid


def floors(made: list[System], args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds that a decode step needs to read its bytes at the rate of a copy, by batch and system."""
    rate = ceilings.copy_rate(args.device)
    cells = [
        {
            "batch": batch,
            "length": length,
            "milliseconds": {
                s.name: {k: v / rate / 1e6 for k, v in bytes_of_step(s, batch, length).items()} for s in own
            },
        }
        for batch, length in product(args.batches, args.lengths)
        for own in [[s for s in made if s.name in (BASE, OURS, *NEEDS)]]
    ]
    return {
        "copy_gb_s": rate,
        "matmul_tflop_s": ceilings.matmul_rate(args.device, made[0].models[0].dtype),
        "cells": cells,
    }


def stream_targets(grid: Grid, floor: dict[str, Any]) -> list[Target]:
    """The time to read the weights once, as a share of the measured time of a single row's decode step."""
    found = []
    for cell in floor["cells"]:
        times = grid.get(("decode", cell["batch"], cell["length"]), {})
        for name in (BASE, OURS) if {BASE, OURS} <= times.keys() and cell["batch"] == 1 else ():
            what = f"decode, batch 1, length {cell['length']}: {name}, floor of its weights over its time"
            share = cell["milliseconds"][name]["weights"] / times[name].median
            found.append(Target(what, share, 0.70, at_least=True))
    return found


def all_targets(grid: Grid, floor: dict[str, Any], device: str) -> list[Target]:
    return targets(grid, device) + (stream_targets(grid, floor) if device == "cuda" else [])


def targets(grid: Grid, device: str) -> list[Target]:
    """What was promised, for every cell of the grid that was measured."""
    limits = {"prefill": 1.15, "decode": 1.10} if device == "cpu" else {"prefill": 1.10, "decode": 1.08}
    found = []
    for (phase, batch, length), times in grid.items():
        if not {BASE, OURS} <= times.keys():
            continue
        where = f"{phase}, batch {batch}, length {length}"
        found.append(Target(f"{where}: AlignX over dense", times[OURS].over(times[BASE]), limits[phase]))
        for name in (n for n in NEEDS if n in times):
            found.append(Target(f"{where}: {name} over AlignX", times[name].over(times[OURS]), 1.02))
        for name in (n for n in THEIRS if n in times):
            theirs, ours = times[name].over(times[BASE]), times[OURS].over(times[BASE])
            if device == "cpu":
                what, limit = f"{where}: saved of what {name} costs above dense", 0.85
                found.append(Target(what, (theirs - ours) / max(theirs - 1, 1e-9), limit, at_least=True))
            else:
                limit = 0.5 if phase == "decode" and batch >= 8 else 0.35
                what = f"{where}: less latency than {name}"
                found.append(Target(what, 1 - times[OURS].over(times[name]), limit, at_least=True))
    return found


def show(grid: Grid) -> None:
    for (phase, batch, length), times in grid.items():
        base = next(iter(times.values()))
        rows = [
            [name, f"{t.median:.2f}", "{:.2f} – {:.2f}".format(*t.quartiles), f"{t.over(base):.3f}"]
            for name, t in times.items()
        ]
        unit = "ms" if phase == "prefill" else "ms a token"
        title = f"{phase}, batch {batch}, length {length}"
        console.table(title, ["system", unit, "quartiles", f"x {next(iter(times))}"], rows)


def plot(grid: Grid, path: Any) -> None:
    figure, axes = plots.subplots(1, len(grid), figsize=(3.4 * len(grid), 3.6), squeeze=False, sharey=True)
    for axis, ((phase, batch, length), times) in zip(axes[0], grid.items(), strict=True):
        base = next(iter(times.values()))
        names = list(times)[::-1]
        colours = [plots.OURS if n.startswith("AlignX") else plots.THEIRS for n in names]
        bars = axis.barh(names, [times[n].over(base) for n in names], color=colours)
        axis.bar_label(bars, fmt="%.2f", padding=2, fontsize=8)
        axis.axvline(1, color="#444", linewidth=0.8)
        axis.set_title(f"{phase}, batch {batch}, {length} tokens", fontsize=9)
        axis.set_xlabel(f"time over the {next(iter(times))}'s", fontsize=8)
        axis.margins(x=0.18)
    plots.save(figure, path)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    parser.add_argument(
        "--systems",
        nargs="+",
        choices=KINDS,
        default=[name for name in KINDS if name not in NEEDS],
        metavar="NAME",
        help=f"{', '.join(KINDS)} (default: all but those of needs)",
    )
    parser.add_argument("--steps", choices=WAYS, default="captured", help="how decode steps run (default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch._dynamo.config.recompile_limit = 64
    setting = Setting.of(args)
    made = systems(setting, args.systems)
    floor = floors(made, args)

    def keep(grid: Grid) -> Path:
        """Write the results so far as JSON."""
        cells = [
            {"phase": phase, "batch": batch, "length": length, "milliseconds": {n: t.rounds for n, t in times.items()}}
            for (phase, batch, length), times in grid.items()
        ]
        content = {"steps": args.steps, "cells": cells, "floors": floor}
        name = "latency" if args.steps == "captured" else f"latency-{args.steps}"
        return record.write(name, args, content, all_targets(grid, floor, args.device))

    grid = measure(made, args, keep)
    show(grid)
    record.print_targets(all_targets(grid, floor, args.device))
    path = keep(grid)
    plot(grid, path.with_suffix(".png"))
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
