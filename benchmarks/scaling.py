"""Strong and weak scaling of both stages' training steps over ranks, and a cost model of them.

    python benchmarks/scaling.py --shape tiny --device cpu
    python benchmarks/scaling.py --shape llama2-7b --device cuda --ranks 1 2 4 8 --rows 2 4 8 --length 2048

Measured: stage 1 under ZeRO-3, and stage 2 with expert parallelism and on the fused path, both under ZeRO-2. Worlds of
all sizes run at once and take turns; in its turn a world runs a step of every stage and batch size. Experts are spread
over the largest number of ranks that divides them. Bytes are counted at the collectives that DeepSpeed called, those of
all-to-alls also from the routes of Dispatch. Columns: ranks and rows per rank, median milliseconds of a step with
quartiles, CPU milliseconds, tokens per second, MiB that a rank sends in all-to-alls, share of padding in the dispatched
slots, and efficiencies: tokens per second and rank over one rank's, with the same global batch (strong) or the same
batch per rank (weak).

Modelled, for each stage by itself: seconds by token, and by message (α) and byte (β) of the collectives, which a
microbenchmark on the same ranks measures; and how much slower a rank computes while the others do too (κ), by passes of
the same rows on every rank without communication. The largest batch on the most ranks is left out of the fit, and its
error tests the model. The model does not include other processes, so it is fitted to the fastest rounds. Columns: the
fastest measured step, the modelled step, the part of it that is communication, the error, and whether the point was
left out.

cluster.py draws a model of this form for many GPUs.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from itertools import repeat
from typing import Any

from suite import plots, ranks, record
from suite.costs import ALL_TO_ALL, Fit, Point, World, fastest, of_stage, rate
from suite.record import Target
from suite.systems import Setting
from suite.timing import WARM_UP, Times, interleaved

from alignx_ds.runtime import console, distributed
from alignx_ds.training.speed import own_tokens

STAGE1, EXPERT_PARALLEL, FUSED = "stage 1, ZeRO-3", "stage 2, expert parallel", "stage 2, fused"
STAGES = (STAGE1, EXPERT_PARALLEL, FUSED)
ALONE = "a pass without communication"
MIB = 2**20


def measure(args: argparse.Namespace) -> World:
    """All measurements of this world size. Collective."""
    from suite.collectives import microbenchmark
    from suite.training import ep_sizes, here, random_rows, stage1, stage2

    world = distributed.world_size()
    ep_size = max(ep_sizes(world))
    setting = here(Setting.of(args))
    rows = random_rows(max(args.rows) * max(args.ranks), setting.config.vocab_size, args.length)
    given = setting, rows, world * args.rows[0]
    engines = {EXPERT_PARALLEL: stage2(*given, ep_size), FUSED: stage2(*given, 0)}
    engines[STAGE1] = stage1(*given, zero=3)  # the last: from now on transformers shards the models that it makes
    trainees = {(stage, own): engine.with_batch(world * own) for stage, engine in engines.items() for own in args.rows}
    points = [{"stage": stage, "rows": world * own, **watched(trainee)} for (stage, own), trainee in trainees.items()]
    names = {name: f"{name[0]}, {name[1]} rows" for name in trainees}
    spent: dict[str, list[float]] = {name: [] for name in names.values()}
    work: dict[str, Callable[[], object]] = {
        names[n]: partial(one_step, t, repeat(next(t.stream())), spent[names[n]])  # the same step in every round
        for n, t in trainees.items()
    }
    work[ALONE] = trainees[FUSED, max(args.rows)].alone(max(args.rows))
    turns = ranks.Turns(args.worker, args.ranks, world)
    turns.ready()
    times = interleaved(work, args.repeats, args.device, turns.turn)
    with turns.turn():
        links = microbenchmark(distributed.device(), args.repeats) if world > 1 else {}
    for trainee in engines.values():
        trainee.close()
    for point, name in zip(points, names.values(), strict=True):
        point["milliseconds"], point["cpu_milliseconds"] = times[name].rounds, spent[name][WARM_UP:]
    return {"ranks": world, "ep_size": ep_size, "links": links, "alone": times[ALONE].rounds, "points": points}


def one_step(trainee: Any, steps: Any, spent: list[float]) -> None:
    """A step and its CPU time on this rank: on a busy machine, wall time is mostly that of other processes."""
    before = time.process_time()
    trainee.steps(steps, 1)
    spent.append(1000 * (time.process_time() - before))


def watched(trainee: Any) -> Point:
    """An untimed step, for what the rank with the most slots has dispatched and called. Collective."""
    from suite.collectives import listening, watching

    step = next(trainee.stream())
    with watching(trainee.engine.module) as seen, listening() as tally:
        trainee.steps(iter([step]), 1)
    dispatched = tally.calls[ALL_TO_ALL] > 0
    assert not dispatched or seen.size == tally.size[ALL_TO_ALL], "Dispatch and DeepSpeed differ in the bytes sent"
    own: Point = {
        "tokens": own_tokens(step),
        "slots": max(seen.capacities, default=sum(computed_slots(part, packed=trainee.packed) for part in step)),
        "padding": sum(seen.padding) / max(1, len(seen.padding)),
        "all_to_all_bytes": seen.size if dispatched else 0,
        "traffic": {kind: asdict(traffic) for kind, traffic in tally.traffic().items()},
    }
    every = distributed.gather(own)
    most = max(every, key=lambda found: int(found["slots"]))
    total, padding = sum(found["tokens"] for found in every), sum(found["padding"] for found in every)
    return {**most, "tokens": total, "padding": padding / len(every)}


def computed_slots(part: Any, *, packed: bool) -> int:
    """Places for tokens that a micro batch computes without dispatch: packed lines with their padding."""
    return part.batch.input_ids.numel() if packed else int(part.batch.attention_mask.sum())


def efficiencies(worlds: list[World], world: World, point: Point) -> tuple[float | None, float | None]:
    """(strong, weak): tokens/s per rank over one rank's, with the same global batch, or with the same batch per rank.

    Medians of the rounds' own ratios. None if one rank did not run that batch.
    """
    alone: list[Point] = next((w["points"] for w in worlds if w["ranks"] == 1), [])

    def over(rows: int) -> float | None:
        one = next((p for p in alone if p["rows"] == rows), None)
        if one is None:
            return None
        faster = Times(one["milliseconds"]).over(Times(point["milliseconds"]))
        return faster * float(point["tokens"]) / float(one["tokens"]) / int(world["ranks"])

    return over(point["rows"]), over(point["rows"] // world["ranks"])


def show(worlds: list[World], fits: dict[str, Fit]) -> None:
    for stage, fit in fits.items():
        own = of_stage(worlds, stage)
        columns = ["ranks x rows", "ms a step", "quartiles", "CPU ms", "tokens/s"]
        columns += ["all-to-all MiB", "padding", "strong", "weak"]
        title = f"Measured: {stage}; all-to-all and padding per rank, efficiencies"
        console.table(title, columns, [measured_row(own, w, p) for w in own for p in w["points"]])
        c = fit.compute
        slower = ", ".join(f"{factor:.2f} with {n} ranks" for n, factor in fit.slower.items() if n > 1)
        title = f"Modelled: {stage}; {1000 * c.fixed:.1f} ms per step + {1e6 * c.per_slot:.0f} µs per token; κ {slower}"
        columns = ["ranks x rows", "fastest ms", "modelled ms", "communication", "error", "in the fit"]
        console.table(title, columns, [modelled_row(fit, w["ranks"], p) for w in own for p in w["points"]])
    links = [
        [f"{kind}, {n} ranks", f"{1e6 * link.alpha:.0f}", f"{1e-9 / link.beta:.2f}" if link.beta else "-"]
        for n, of_world in next(iter(fits.values())).links.items()
        for kind, link in of_world.items()
    ]
    console.table("Fitted to the microbenchmark", ["collective", "α, µs per call", "1/β, GB/s"], links)


def measured_row(worlds: list[World], world: World, p: Point) -> list[str]:
    times = Times(p["milliseconds"])
    sizes = (
        [f"{p['all_to_all_bytes'] / MIB:.1f}", f"{100 * p['padding']:.1f} %"] if p["all_to_all_bytes"] else ["-", "-"]
    )
    ratios = ["-" if e is None else f"{e:.2f}" for e in efficiencies(worlds, world, p)]
    cpu = f"{Times(p['cpu_milliseconds']).median:.0f}"
    quartiles = "{:.0f} – {:.0f}".format(*times.quartiles)
    return [name_of(world["ranks"], p), f"{times.median:.0f}", quartiles, cpu, f"{rate(p):.0f}", *sizes, *ratios]


def modelled_row(fit: Fit, n: int, p: Point) -> list[str]:
    modelled = [1000 * fit.predicted(n, p), 1000 * fit.communication(n, p)]
    milliseconds = [f"{v:.1f}" for v in (1000 * fastest(p), *modelled)]
    left_out = "LEFT OUT" if (n, p["rows"]) == fit.left_out else ""
    return [name_of(n, p), *milliseconds, f"{100 * fit.error(n, p):+.1f} %", left_out]


def name_of(n: int, p: Point) -> str:
    return f"{n} x {p['rows'] // n}"


def plot(worlds: list[World], fits: dict[str, Fit], notes: list[str], title: str, path: Any) -> None:
    figure, axes = plots.subplots(2, len(fits), figsize=(4.4 * len(fits), 7.4))
    for (above, below), (stage, fit) in zip(axes.T, fits.items(), strict=True):
        own = of_stage(worlds, stage)
        draw_rates(above, own)
        above.set(xlabel="ranks", ylabel="tokens/s", title=stage, ylim=(0, None))
        draw_errors(below, own, fit)
        below.set(xlabel="ms a step, fastest round", ylabel="ms modelled")
        for axis in (above, below):
            axis.legend(fontsize=7, frameon=False)
    lines = [f"Above: measured, {title}. Below: the cost model against the measurement.", *(f"{n}." for n in notes)]
    figure.text(0.01, 0.01, "\n".join(textwrap.fill(line, 160) for line in lines), fontsize=7.5, color="#444")
    plots.save(figure, path, (0, 0.08, 1, 1))


def draw_rates(axis: Any, worlds: list[World]) -> None:
    for number, own in enumerate(sorted({p["rows"] // w["ranks"] for w in worlds for p in w["points"]})):
        line = [(w["ranks"], rate(p)) for w in worlds for p in w["points"] if p["rows"] == own * w["ranks"]]
        axis.plot(*zip(*line, strict=True), "o-", color=f"C{number}", label=f"weak: {own} rows a rank")
    for number, rows in enumerate(sorted({p["rows"] for w in worlds for p in w["points"]})):
        line = [(w["ranks"], rate(p)) for w in worlds for p in w["points"] if p["rows"] == rows]
        if len(line) > 1:
            axis.plot(*zip(*line, strict=True), "s--", color=f"C{number}", label=f"strong: {rows} rows")
    axis.set_xticks([w["ranks"] for w in worlds])


def draw_errors(axis: Any, worlds: list[World], fit: Fit) -> None:
    points = [(w["ranks"], p) for w in worlds for p in w["points"]]
    for n, p in points:
        out = (n, p["rows"]) == fit.left_out
        label = f"left out of the fit: {100 * fit.error(n, p):+.1f} %" if out else None
        x, y, mark, size = 1000 * fastest(p), 1000 * fit.predicted(n, p), "*" if out else "o", 14 if out else 6
        axis.plot(x, y, mark, markersize=size, color=f"C{n}", label=label)
    for n in sorted({n for n, _ in points}):
        axis.plot([], [], "o", color=f"C{n}", label=f"{n} rank{'s' * (n > 1)}")
    top = 1.1 * max(1000 * fastest(p) for _, p in points)
    axis.plot([0, top], [0, top], color="#9aa5b1", linewidth=1)


def modelled(worlds: list[World], stage: str, fit: Fit) -> dict[str, Any]:
    """What the fit of a stage found, and its prediction of the point left out."""
    n, rows = fit.left_out
    [out] = [p for w in of_stage(worlds, stage) for p in w["points"] if (w["ranks"], p["rows"]) == fit.left_out]
    return {
        "compute": asdict(fit.compute),
        "slower": {str(n): factor for n, factor in fit.slower.items()},
        "links": {str(n): {kind: asdict(link) for kind, link in links.items()} for n, links in fit.links.items()},
        "left_out": {
            "ranks": n,
            "rows": rows,
            "fastest_s": fastest(out),
            "predicted_s": fit.predicted(n, out),
            "error": fit.error(n, out),
        },
    }


def main() -> None:
    ranks.hide_gpus()
    parser = record.parser(__doc__, shape="tiny")
    ranks.add_options(parser, default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8], help="of a rank (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="greatest tokens of a row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    args = parser.parse_args()
    args.rows, args.ranks = sorted(set(args.rows)), sorted(set(args.ranks))
    if args.quick:
        args.repeats = min(args.repeats, 5)
    if args.worker:
        ranks.work(args.worker, lambda: measure(args))
        return
    from suite.training import ROWS

    notes = ranks.check(args.ranks, args.device)
    worlds = ranks.collect(args.ranks, args.device)
    fits = {stage: Fit(of_stage(worlds, stage)) for stage in STAGES}
    show(worlds, fits)
    for note in notes:
        console.say(note)
    model = {stage: modelled(worlds, stage, fit) for stage, fit in fits.items()}
    met = [
        Target(f"{stage}: error of the cost model on the point left out", abs(found["left_out"]["error"]), 0.1)
        for stage, found in model.items()
    ]
    record.print_targets(met)
    content = {
        "threads_per_rank": ranks.threads(args.device),
        "step": {"longest": args.length, "drawn": ROWS},
        "notes": notes,
        "measured": worlds,
        "model": model,
    }
    path = record.write("scaling", args, content, met)
    plot(worlds, fits, notes, f"{args.shape}, {args.device}", path.with_suffix(".png"))
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
