"""Time of each operator in a prefill and in a decode step, for the dense base model and for AlignX.

    python benchmarks/breakdown.py --shape small --device cpu

Columns: of each system, the self time of an operator (torch.profiler) in milliseconds, and its number of calls, both
per prefill or per decoded token. Operators with the largest time come first; the last line sums up all of them. The
profiler slows every operator down, so compare shares and not sums.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from suite import record
from suite.systems import Setting, System, systems
from suite.work import STEPS, decode_work, prefill_work
from torch.profiler import ProfilerActivity, profile

from alignx_ds.runtime import console

SYSTEMS = ["dense base", "AlignX"]
SHOWN = 12  # operators
Breakdown = dict[str, tuple[float, float]]  # by operator: milliseconds and calls, per pass


def breakdown(work: Callable[[], object], passes: int, device: str, steps: int) -> Breakdown:
    work()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profile(activities=activities) as seen:
        for _ in range(passes):
            work()
    count = passes * steps
    times = {}
    for event in seen.key_averages():
        own = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        times[event.key] = (own / 1000 / count, event.count / count)
    return times


def show(title: str, found: dict[str, Breakdown]) -> None:
    largest = sorted(
        {op for b in found.values() for op in b}, key=lambda op: -max(b.get(op, (0, 0))[0] for b in found.values())
    )
    rows = []
    for op in largest[:SHOWN]:
        cells = [f"{value:.3f}" for b in found.values() for value in b.get(op, (0.0, 0.0))]
        rows.append([op, *cells])
    totals = [f"{sum(value[i] for value in b.values()):.3f}" for b in found.values() for i in (0, 1)]
    rows.append(["all operators", *totals])
    console.table(title, ["operator", *(f"{name}, {what}" for name in found for what in ("ms", "calls"))], rows)


def main() -> None:
    parser = record.parser(__doc__)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--passes", type=int, default=5)
    args: argparse.Namespace = parser.parse_args()
    torch.manual_seed(0)
    setting = Setting.of(args)
    made: list[System] = systems(setting, SYSTEMS)
    cells = {}
    for batch in args.batches:
        for phase in ("prefill", "decode"):
            found = {}
            for system in made:
                if phase == "prefill":
                    work, steps = prefill_work(system, batch, args.length), 1
                else:
                    work, steps = decode_work(system, batch, args.length, args.passes + 1, "eager"), STEPS
                found[system.name] = breakdown(work, args.passes, args.device, steps)
            title = f"{phase}, batch {batch}, length {args.length}"
            show(title, found)
            cells[title] = found
    content = {"operators": cells}
    console.say(f"written: {record.write('breakdown', args, content, [])}")


if __name__ == "__main__":
    main()
