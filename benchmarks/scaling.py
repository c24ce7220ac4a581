"""Strong and weak scaling of stage 2's training step over ranks, and a cost model extrapolated to 1,024 GPUs.

    python benchmarks/scaling.py --shape tiny --device cpu
    python benchmarks/scaling.py --shape llama2-7b --device cuda --ranks 1 2 4 8 --rows 2 4 8 --length 2048

Measured: worlds of all sizes run at once and take turns; in its turn a world runs a step of every batch size. Experts
are spread over the largest number of ranks that divides them. Bytes are counted from the routes of Dispatch and checked
against the collectives that DeepSpeed called. Columns: ranks and rows per rank, median milliseconds of a step with
quartiles, CPU milliseconds, tokens per second, MiB that a rank sends in all-to-alls, share of padding in the dispatched
slots, and efficiencies: tokens per second and rank over one rank's, with the same global batch (strong) or the same
batch per rank (weak).

Modelled: seconds by token, and by message (α) and byte (β) of the collectives, which a microbenchmark on the same ranks
measures. The largest batch on the most ranks is left out of the fit, and its error tests the model. The model does not
include other processes, so it is fitted to the fastest rounds. Columns: the fastest measured step, the modelled step,
the part of it that is communication, the error, and whether the point was left out.

The extrapolation for `--drawn-shape` is A MODEL, NOT A MEASUREMENT: the speeds of GPUs and links are assumed, and each
is an option.
"""

from __future__ import annotations

import argparse
import textwrap
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from functools import partial
from itertools import repeat
from typing import Any

import torch
from suite import plots, ranks, record
from suite.cluster import Assumptions, Drawn, Shape, draw, expert_parallel
from suite.costs import ALL_TO_ALL, Fit, Point, World, fastest, rate
from suite.record import Target
from suite.shapes import NAMES, config_of
from suite.systems import AXES, Setting, alignx
from suite.timing import WARM_UP, Times, interleaved

from alignx_ds.mocae.layer import freeze_trunk
from alignx_ds.runtime import console, distributed

GPUS = [8 * 2**k for k in range(8)]
MODEL = "model, not a measurement"
MIB = 2**20


def measure(args: argparse.Namespace) -> World:
    """All measurements of this world size. Collective."""
    from suite.collectives import microbenchmark
    from suite.training import ep_sizes, here, random_rows, stage2

    world = distributed.world_size()
    ep_size = max(ep_sizes(world))
    setting = here(Setting.of(args))
    rows = random_rows(max(args.rows) * max(args.ranks), setting.config.vocab_size, args.length)
    trainee = stage2(setting, rows, world * args.rows[0], ep_size)
    trainees = {str(own): trainee.with_batch(world * own) for own in args.rows}
    points = [{"rows": world * own, **watched(trainees[str(own)])} for own in args.rows]
    steps = {name: repeat(next(t.stream())) for name, t in trainees.items()}  # the same step in every round
    spent: dict[str, list[float]] = {name: [] for name in trainees}
    work: dict[str, Callable[[], object]] = {n: partial(one_step, t, steps[n], spent[n]) for n, t in trainees.items()}
    turns = ranks.Turns(args.worker, args.ranks, world)
    turns.ready()
    times = interleaved(work, args.repeats, args.device, turns.turn)
    with turns.turn():
        links = microbenchmark(distributed.device(), args.repeats) if world > 1 else {}
    trainee.close()
    for point, name in zip(points, trainees, strict=True):
        point["milliseconds"], point["cpu_milliseconds"] = times[name].rounds, spent[name][WARM_UP:]
    return {"ranks": world, "ep_size": ep_size, "links": links, "points": points}


def one_step(trainee: Any, steps: Any, spent: list[float]) -> None:
    """A step and its CPU time on this rank: on a busy machine, wall time is mostly that of other processes."""
    before = time.process_time()
    trainee.steps(steps, 1)
    spent.append(1000 * (time.process_time() - before))


def watched(trainee: Any) -> Point:
    """An untimed step, for what the rank that sends most has dispatched and called. Collective."""
    from suite.collectives import listening, watching
    from suite.training import tokens

    step = next(trainee.stream())
    with watching(trainee.engine.module) as seen, listening() as tally:
        trainee.steps(iter([step]), 1)
    dispatched = tally.calls[ALL_TO_ALL] > 0
    assert not dispatched or seen.size == tally.size[ALL_TO_ALL], "Dispatch and DeepSpeed differ in the bytes sent"
    own: Point = {
        "tokens": tokens([step]),
        "slots": max(seen.capacities),
        "padding": sum(seen.padding) / len(seen.padding),
        "all_to_all_bytes": seen.size if dispatched else 0,
        "traffic": {kind: asdict(traffic) for kind, traffic in tally.traffic().items()},
    }
    every = distributed.gather(own)
    most = max(every, key=lambda found: int(found["all_to_all_bytes"]))
    total, padding = sum(found["tokens"] for found in every), sum(found["padding"] for found in every)
    return {**most, "tokens": total, "padding": padding / len(every)}


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


def show(worlds: list[World], fit: Fit) -> None:
    rows, checked = [], []
    for w in worlds:
        for p in w["points"]:
            times, name = Times(p["milliseconds"]), f"{w['ranks']} x {p['rows'] // w['ranks']}"
            strong, weak = ("-" if e is None else f"{e:.2f}" for e in efficiencies(worlds, w, p))
            sizes = [f"{p['all_to_all_bytes'] / MIB:.1f}", f"{100 * p['padding']:.1f} %"]
            quartiles = "{:.0f} – {:.0f}".format(*times.quartiles)
            rows.append(
                [
                    name,
                    f"{times.median:.0f}",
                    quartiles,
                    f"{Times(p['cpu_milliseconds']).median:.0f}",
                    f"{rate(p):.0f}",
                    *sizes,
                    strong,
                    weak,
                ]
            )
            left_out = (w["ranks"], p["rows"]) == fit.left_out
            modelled = [1000 * fit.predicted(w["ranks"], p), 1000 * fit.communication(w["ranks"], p)]
            milliseconds = [f"{v:.1f}" for v in (1000 * fastest(p), *modelled)]
            checked.append(
                [name, *milliseconds, f"{100 * fit.error(w['ranks'], p):+.1f} %", "LEFT OUT" if left_out else ""]
            )
    columns = [
        "ranks x rows",
        "ms a step",
        "quartiles",
        "CPU ms",
        "tokens/s",
        "all-to-all MiB",
        "padding",
        "strong",
        "weak",
    ]
    console.table("Measured: stage 2's step; all-to-all and padding per rank, efficiencies", columns, rows)
    links = [
        [f"{kind}, {n} ranks", f"{1e6 * link.alpha:.0f}", f"{1e-9 / link.beta:.2f}" if link.beta else "-"]
        for n, of_world in fit.links.items()
        for kind, link in of_world.items()
    ]
    console.table("Fitted to the microbenchmark", ["collective", "α, µs per call", "1/β, GB/s"], links)
    c = fit.compute
    title = f"The model against the measurement: {1000 * c.fixed:.1f} ms per step + {1e6 * c.per_slot:.0f} µs per token"
    columns = ["ranks x rows", "fastest ms", "modelled ms", "communication", "error", "in the fit"]
    console.table(title, columns, checked)


def show_drawn(drawn: dict[str, list[Drawn]], given: dict[str, Any]) -> None:
    for kind, points in drawn.items():
        rows = []
        for d in points:
            parts = [d.compute, d.all_to_all, d.all_reduce, d.overhead]
            efficiency = d.tokens_per_second / d.gpus / (points[0].tokens_per_second / points[0].gpus)
            milliseconds = [f"{1000 * part:.1f}" for part in (d.step, *parts)]
            rows.append([str(d.gpus), *milliseconds, f"{d.tokens_per_second / 1e6:.2f}", f"{efficiency:.3f}"])
        columns = ["GPUs", "ms a step", "compute", "all-to-all", "all-reduce", "overhead", "M tokens/s", "efficiency"]
        console.table(f"{given['shape']}, {kind} scaling: A {MODEL.upper()}", columns, rows)
    console.say(f"Assumed, not measured: {assumed(given)}")


def assumed(given: dict[str, Any]) -> str:
    a = Assumptions(**given["cluster"])
    return (
        f"{a.flops / 1e12:g} TFLOP/s achieved by a GPU; {a.overhead_ms:g} ms of overhead a step; within nodes of "
        f"{a.gpus_per_node} {a.nvlink_gb_s:g} GB/s and {a.nvlink_latency_us:g} µs a call, across them {a.ib_gb_s:g} "
        f"GB/s a GPU and {a.ib_latency_us:g} µs a hop; {a.tokens_per_gpu:,} tokens a GPU and micro batch (strong "
        f"scaling: {a.strong_tokens:,} a global batch), sequences of {a.sequence}; {100 * a.padding:g} % padding; "
        f"{a.element} bytes an element. ep_size {given['ep_size']} within a node, data parallel across nodes, ZeRO-2 "
        f"on factors of rank {given['rank']} and {given['shared_trained'] / 1e6:.1f} M shared weights; all ranks have "
        "the same number of tokens, nothing overlaps, no stragglers, FLOP/s independent of the batch."
    )


def draw_all(args: argparse.Namespace) -> tuple[dict[str, list[Drawn]], dict[str, Any]]:
    cluster = Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)})
    config = config_of(args.drawn_shape)
    model = alignx(Setting(config, "meta", torch.bfloat16, args.rank))
    freeze_trunk(model)
    shared = sum(p.numel() for n, p in model.named_parameters() if p.requires_grad and ".mixture." not in n)
    shape = Shape.of(config, AXES + 1, args.rank, shared)
    drawn = {
        "weak": [draw(shape, n, n * cluster.tokens_per_gpu, cluster) for n in GPUS],
        "strong": [draw(shape, n, cluster.strong_tokens, cluster) for n in GPUS],
    }
    given = {
        "shape": args.drawn_shape,
        "rank": args.rank,
        "shared_trained": shared,
        "ep_size": expert_parallel(shape, GPUS[0], cluster),
        "cluster": asdict(cluster),
    }
    return drawn, given


def _with_sums(drawn: Drawn) -> dict[str, float]:
    return {**asdict(drawn), "step": drawn.step, "tokens_per_second": drawn.tokens_per_second}


def plot(
    worlds: list[World],
    fit: Fit,
    drawn: dict[str, list[Drawn]],
    given: dict[str, Any],
    notes: list[str],
    title: str,
    path: Any,
) -> None:
    figure, (left, middle, right) = plots.subplots(1, 3, figsize=(13, 4.9))
    for number, own in enumerate(sorted({p["rows"] // w["ranks"] for w in worlds for p in w["points"]})):
        line = [(w["ranks"], rate(p)) for w in worlds for p in w["points"] if p["rows"] == own * w["ranks"]]
        left.plot(*zip(*line, strict=True), "o-", color=f"C{number}", label=f"weak: {own} rows a rank")
    for number, rows in enumerate(sorted({p["rows"] for w in worlds for p in w["points"]})):
        line = [(w["ranks"], rate(p)) for w in worlds for p in w["points"] if p["rows"] == rows]
        if len(line) > 1:
            left.plot(*zip(*line, strict=True), "s--", color=f"C{number}", label=f"strong: {rows} rows")
    left.set(xlabel="ranks", ylabel="tokens/s", title=f"measured: stage 2, {title}", ylim=(0, None))
    left.set_xticks([w["ranks"] for w in worlds])
    points = [(w["ranks"], p) for w in worlds for p in w["points"]]
    for n, p in points:
        out = (n, p["rows"]) == fit.left_out
        label = f"left out of the fit: {100 * fit.error(n, p):+.1f} %" if out else None
        x, y, mark, size = 1000 * fastest(p), 1000 * fit.predicted(n, p), "*" if out else "o", 14 if out else 6
        middle.plot(x, y, mark, markersize=size, color=f"C{n}", label=label)
    for n in sorted({n for n, _ in points}):
        middle.plot([], [], "o", color=f"C{n}", label=f"{n} rank{'s' * (n > 1)}")
    top = 1.1 * max(1000 * fastest(p) for _, p in points)
    middle.plot([0, top], [0, top], color="#9aa5b1", linewidth=1)
    middle.set(xlabel="ms a step, fastest round", ylabel="ms modelled", title="the cost model against the measurement")
    for kind, style in (("weak", "o-"), ("strong", "s--")):
        of_one = [d.tokens_per_second / d.gpus for d in drawn[kind]]
        right.plot([d.gpus for d in drawn[kind]], [v / of_one[0] for v in of_one], style, color="#8e44ad", label=kind)
    right.set_xscale("log", base=2)
    right.set_xticks(GPUS, [str(n) for n in GPUS])
    right.set(xlabel="GPUs", ylabel=f"efficiency over {GPUS[0]} GPUs", ylim=(0, 1.08))
    right.set_title(f"MODEL, not a measurement: {given['shape']}", color="#8e44ad")
    for axis in (left, middle, right):
        axis.title.set_size(10)
        axis.legend(fontsize=8, frameon=False)
    lines = [*(f"Left, middle: {note}." for note in notes), f"Right: a {MODEL}. Assumed: {assumed(given)}"]
    caption = "\n".join(textwrap.fill(line, 215) for line in lines)
    figure.text(0.01, 0.01, caption, fontsize=7.5, color="#444", va="bottom")
    plots.save(figure, path, (0, 0.15, 1, 1))


def options() -> argparse.ArgumentParser:
    parser = record.parser(__doc__, shape="tiny")
    ranks.add_options(parser, default=[1, 2])
    parser.add_argument("--rows", type=int, nargs="+", default=[2, 4, 8], help="of a rank (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="greatest tokens of a row (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: %(default)s)")
    drawn = parser.add_argument_group(f"assumed for what is drawn ({MODEL})")
    drawn.add_argument("--drawn-shape", choices=NAMES, default="llama2-7b", help="(default: %(default)s)")
    for f in fields(Assumptions):
        name, kind = "--" + f.name.replace("_", "-"), type(f.default)
        drawn.add_argument(name, type=kind, default=f.default, metavar="X", help="(default: %(default)s)")
    return parser


def main() -> None:
    ranks.hide_gpus()
    args = options().parse_args()
    args.rows, args.ranks = sorted(set(args.rows)), sorted(set(args.ranks))
    if args.quick:
        args.repeats = min(args.repeats, 5)
    if args.worker:
        ranks.work(args.worker, lambda: measure(args))
        return
    from suite.training import ROWS

    notes = ranks.check(args.ranks, args.device)
    worlds = ranks.collect(args.ranks, args.device)
    fit = Fit(worlds)
    show(worlds, fit)
    for note in notes:
        console.say(note)
    drawn, given = draw_all(args)
    show_drawn(drawn, given)
    n, rows = fit.left_out
    left_out = next(p for w in worlds for p in w["points"] if (w["ranks"], p["rows"]) == fit.left_out)
    error = fit.error(n, left_out)
    met = [Target(f"cost model: error on the point left out, {n} ranks x {rows // n} rows", abs(error), 0.1)]
    record.print_targets(met)
    content = {
        "threads_per_rank": ranks.threads(args.device),
        "step": {"longest": args.length, "drawn": ROWS},
        "notes": notes,
        "measured": worlds,
        "model": {
            "compute": asdict(fit.compute),
            "links": {str(n): {kind: asdict(link) for kind, link in links.items()} for n, links in fit.links.items()},
            "left_out": {
                "ranks": n,
                "rows": rows,
                "fastest_s": fastest(left_out),
                "predicted_s": fit.predicted(n, left_out),
                "error": error,
            },
        },
        "drawn": {
            "is": MODEL,
            "assumed": given,
            "assumed_in_words": assumed(given),
            **{kind: [_with_sums(d) for d in points] for kind, points in drawn.items()},
        },
    }
    path = record.write("scaling", args, content, met)
    plot(worlds, fit, drawn, given, notes, f"{args.shape}, {args.device}", path.with_suffix(".png"))
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
