"""Stage 1 in tokens a second beside a bare DeepSpeed loop, transformers' Trainer and TRL's SFTTrainer.

    python benchmarks/trainers.py --shape smollm2
    python benchmarks/trainers.py --shape tiny --quick

All train the same model with the same DeepSpeed JSON, the same trainable weights and the same micro batches in the same
order: random rows, packed, or with `--padded` one a line. Each has an engine of its own; the bare loop shares ours,
gets batches that were made ahead and does nothing but forward, backward and step. Logs, progress bars and checkpoints
are off in all. They take turns, each round starts with another, and a ratio is the median of the rounds' own ratios.

Columns: median tokens a second, without padding, and quartiles over the rounds; milliseconds a step; our tokens a
second over its own ("x"), by the clock and by this process's CPU time, which other processes disturb less.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from itertools import islice
from typing import Any

from suite import ranks, record
from suite.record import Target
from suite.systems import Setting
from suite.timing import WARM_UP, Times

from alignx_ds.runtime import console, distributed

OURS, BARE = "AlignX's loop", "bare DeepSpeed loop"
LIMITS = {BARE: 0.97}  # our tokens a second over its own, at least; 1 of the others
Found = dict[str, Any]  # ranks; tokens of each round; by system, milliseconds of each round by the clock and of the CPU


def measure(args: argparse.Namespace) -> Found:
    from suite.driven import TRAINER, TRL, driven
    from suite.training import bare_loop, by_round, here, random_rows, stage1

    setting = here(Setting.of(args))
    rows, packed = random_rows(8 * args.batch, setting.config.vocab_size, args.length), not args.padded
    rounds = WARM_UP + args.repeats
    ours = stage1(setting, rows, args.batch, args.zero, packed=packed)
    ahead = list(islice(ours.stream(), rounds * args.steps))
    stream, prepared = ours.stream(), iter(ahead)
    given = (setting, rows, ours.plan, ours.deepspeed, rounds * args.steps)
    trainers = {kind: driven(kind, *given, packed=packed) for kind in (TRAINER, TRL)}
    ours.engine.train()
    work: dict[str, Callable[[], object]] = {
        OURS: lambda: ours.steps(stream, args.steps),
        BARE: lambda: bare_loop(ours.engine, islice(prepared, args.steps)),
        **{kind: partial(trainer.steps, args.steps) for kind, trainer in trainers.items()},
    }
    times = clocked(work, args.repeats, args.device)
    for trainer in trainers.values():
        trainer.close()
    ours.close()
    return {"ranks": distributed.world_size(), "tokens": by_round(ahead, args.steps), **times}


def clocked(work: dict[str, Callable[[], object]], repeats: int, device: str) -> Found:
    """Milliseconds of each round by system: of the clock, and of this process's CPU time."""
    from suite.timing import interleaved

    cpu: dict[str, list[float]] = {name: [] for name in work}

    def counted(name: str) -> None:
        before = time.process_time()
        work[name]()
        cpu[name].append(1000 * (time.process_time() - before))

    found = interleaved({name: partial(counted, name) for name in work}, repeats, device)
    return {
        "milliseconds": {name: times.rounds for name, times in found.items()},
        "cpu_milliseconds": {name: rounds[WARM_UP:] for name, rounds in cpu.items()},
    }


def ratio(found: Found, system: str, by: str = "milliseconds") -> float:
    """Our tokens a second over this system's."""
    return Times(found[by][system]).over(Times(found[by][OURS]))


def targets(found: Found) -> list[Target]:
    others = [name for name in found["milliseconds"] if name != OURS]
    what = f"{ranks_of(found)}, tokens/s over those of the"
    return [Target(f"{what} {n}", ratio(found, n), LIMITS.get(n, 1.0), at_least=True) for n in others]


def ranks_of(found: Found) -> str:
    return f"{found['ranks']} rank{'s' * (found['ranks'] > 1)}"


def show(found: Found, args: argparse.Namespace) -> None:
    rows = []
    for name, rounds in found["milliseconds"].items():
        rates = Times([1000 * n / t for n, t in zip(found["tokens"], rounds, strict=True)])
        ratios = [f"{ratio(found, name, by):.3f}" for by in ("milliseconds", "cpu_milliseconds")]
        quartiles = "{:.0f} – {:.0f}".format(*rates.quartiles)
        rows.append([name, f"{rates.median:.0f}", quartiles, f"{Times(rounds).median / args.steps:.0f}", *ratios])
    columns = ["", "tokens/s", "quartiles", "ms a step", "x", "x, CPU time"]
    how = "padded" if args.padded else "packed"
    console.table(
        f"Stage 1, {args.shape}, ZeRO-{args.zero}, {args.batch} rows a step, {how}, {ranks_of(found)}", columns, rows
    )


def main() -> None:
    ranks.hide_gpus()
    parser = record.parser(__doc__, shape="tiny")
    ranks.add_options(parser, default=[1])
    parser.add_argument("--batch", type=int, default=8, help="rows of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="greatest tokens of a row (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps of a round (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=12, help="rounds (default: %(default)s)")
    parser.add_argument("--zero", type=int, choices=(1, 2, 3), default=3, help="(default: %(default)s)")
    parser.add_argument("--padded", action="store_true", help="one row a line, as both trainers do by themselves")
    args = parser.parse_args()
    if args.quick:
        args.repeats = min(args.repeats, 3)
    if args.worker:
        ranks.work(args.worker, lambda: measure(args))
        return
    from suite.training import ROWS

    notes = ranks.check(args.ranks, args.device)
    measured = [found for world in args.ranks for found in ranks.collect([world], args.device)]
    for found in measured:
        show(found, args)
    met = [target for found in measured for target in targets(found)]
    record.print_targets(met)
    for note in notes:
        console.say(note)
    content = {
        "threads_per_rank": ranks.threads(args.device),
        "step": {"rows": args.batch, "longest": args.length, "drawn": ROWS, "packed": not args.padded},
        "zero": args.zero,
        "steps_per_round": args.steps,
        "notes": notes,
        "trainers": {name: version(name) for name in ("accelerate", "trl")},
        "measured": measured,
    }
    path = record.write("trainers-padded" if args.padded else "trainers", args, content, met)
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
