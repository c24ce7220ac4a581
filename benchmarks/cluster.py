"""Which way to spread each stage is fastest on 1 to 1,024 GPUs, for LLaMA-2-7B and 70B: A MODEL, NOT A MEASUREMENT.

    python benchmarks/cluster.py
    python benchmarks/cluster.py --recipes mistral-7b --ib-gb-s 20

The recipes give shapes and settings. Each GPU has the same rows in every step, in the micro batches that are fastest of
those that fit by the dry run's estimate. Compute is by FLOPs, communication by message (α) and byte (β), as in
scaling.py, which tests this form of a model against measurements. The speeds of GPUs and links are assumed, and each is
an option.

Columns: thousands of tokens a second and GPU by the way that a stage is spread (rows of a micro batch; r: activations
are recomputed); "-" where not even one row fits; the fastest is marked with *.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict, fields
from pathlib import Path

from suite import record
from suite.cluster import WAYS, Assumptions, Drawn, draw

from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.models import shapes
from alignx_ds.models.base import BaseModel, Planned
from alignx_ds.runtime import console

GPUS = [2**k for k in range(11)]
MODEL = "model, not a measurement"


def of_recipe(name: str) -> tuple[RunConfig, BaseModel]:
    """Its settings, and the shape of its model."""
    config = parse.load(name, [])
    known = shapes.shape(config.model.path)
    assert known is not None, f"no shape of {config.model.path} ships with the package"
    return config, BaseModel(config.model, Planned(Path(config.model.path), known))


def drawn(name: str, gpus: list[int], a: Assumptions) -> dict[int, list[Drawn | None]]:
    """By the number of GPUs, in the order of WAYS."""
    config, base = of_recipe(name)
    return {n: [draw(config, base, way, n, a) for way in WAYS] for n in gpus}


def cells(points: list[Drawn | None]) -> list[str]:
    """A table's, with the fastest way of each stage marked."""
    fastest = {max(of_stage, key=lambda d: d.tokens_per_second_and_gpu) for of_stage in _by_stage(points) if of_stage}
    return [_cell(point, point in fastest) for point in points]


def _by_stage(points: list[Drawn | None]) -> list[list[Drawn]]:
    stages = sorted({way.stage for way in WAYS})
    return [[p for p, way in zip(points, WAYS, strict=True) if p and way.stage == stage] for stage in stages]


def _cell(point: Drawn | None, best: bool) -> str:
    if point is None:
        return "-"
    how = f"{point.micro_rows}{' r' * point.recomputed}"
    return f"{point.tokens_per_second_and_gpu / 1000:.2f}{'*' * best} ({how})"


def assumed(a: Assumptions) -> str:
    return (
        f"{a.flops / 1e12:g} TFLOP/s achieved by a GPU of {a.gpu_gib:g} GiB; {a.overhead_ms:g} ms of overhead a step; "
        f"within nodes of {a.gpus_per_node} {a.nvlink_gb_s:g} GB/s and {a.nvlink_latency_us:g} µs a call, across them "
        f"{a.ib_gb_s:g} GB/s a GPU and {a.ib_latency_us:g} µs a hop; {a.rows_per_gpu} rows of {a.sequence:,} tokens "
        f"a GPU and step; {100 * a.padding:g} % padding of what is dispatched; {a.element} bytes an element; "
        "experts are spread within a node; nothing overlaps, no stragglers, FLOP/s independent of the batch."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=["llama2-7b", "llama2-70b"], help="(default: %(default)s)")
    parser.add_argument("--gpus", type=int, nargs="+", default=GPUS, help="(default: %(default)s)")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="directory of the JSON")
    for f in fields(Assumptions):
        name, kind = "--" + f.name.replace("_", "-"), type(f.default)
        parser.add_argument(name, type=kind, default=f.default, metavar="X", help="(default: %(default)s)")
    args = parser.parse_args()
    a = Assumptions(**{f.name: getattr(args, f.name) for f in fields(Assumptions)})
    made = {name: drawn(name, args.gpus, a) for name in args.recipes}
    for name, by_gpus in made.items():
        rows = [[str(n), *cells(points)] for n, points in by_gpus.items()]
        console.table(f"{name}, 1,000 tokens/s and GPU: A {MODEL.upper()}", ["GPUs", *(w.name for w in WAYS)], rows)
    console.say(f"Assumed, not measured: {assumed(a)}")
    points = {
        name: [asdict(point) | {"step": point.step} for points in by_gpus.values() for point in points if point]
        for name, by_gpus in made.items()
    }
    content = {"is": MODEL, "assumed": asdict(a), "assumed_in_words": assumed(a), "drawn": points}
    path = args.out / "cluster.json"
    record.write_plain(path, [sys.executable, "benchmarks/cluster.py", *sys.argv[1:]], "cpu", content)
    console.say(f"written: {path}")


if __name__ == "__main__":
    main()
