"""Makes docs/gpu.md from the results of benchmarks/gpu.py; a section without a result says so."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

HEAD = """\
# On a GPU

`make gpu` runs the tests and benchmarks that need a GPU, on one card of 80 GB, and makes this page from the results in
[benchmarks/results](../benchmarks/results). `python benchmarks/gpu.py --only tests latency` (needs a GPU) runs single
parts, and `python benchmarks/gpu.py --page` (needs the results) makes only the page. The file of each result holds its
command, hardware, versions, date and commit. Ratios are medians of the rounds' own ratios. The first measurements below
were made while faults were still being corrected. They name the commit that was measured, and no full run has replaced
them yet.
"""
MEMORY = {  # as benchmarks/memory.py calls them
    "dense": "dense base",
    "alignx": "AlignX",
    "h3fusion": "H3Fusion",
    "trinityx": "TrinityX",
    "stock": "DeepSpeed MoE",
    "ensemble": "ensemble of 3",
}
NONE = "Not measured yet: `python benchmarks/gpu.py --only {}` (needs a GPU).\n"


def write(path: Path, results: Path) -> None:
    path.write_text(page(results), encoding="utf-8")


def page(results: Path) -> str:
    made = [HEAD]
    for title, files, render, part in SECTIONS:
        there = [json.loads((results / f).read_text(encoding="utf-8")) for f in files if (results / f).is_file()]
        made.append(f"## {title}\n")
        made += [render(content) for content in there] or [NONE.format(part)]
    return "\n".join(made)


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def source(content: dict[str, Any]) -> str:
    date = str(content.get("date", ""))[:10]
    versions = content["versions"]
    made_with = f"torch {versions['torch']}, DeepSpeed {versions['deepspeed']}, transformers {versions['transformers']}"
    made_by = f"`{content['command']}` (needs a GPU)"
    return f"{made_by}: {content['hardware']}, {made_with}, {date}, commit {content.get('commit', 'unknown')}.\n"


def met(content: dict[str, Any]) -> str:
    rows = [
        [t["what"], f"{t['seen']:.3f}", f"{t['limit']:g}", "met" if t["met"] else "not met"] for t in content["targets"]
    ]
    return table(["target", "measured", "limit", ""], rows) if rows else ""


def tests(content: dict[str, Any]) -> str:
    if "runs" not in content:
        outcomes = ", ".join(f"{n} {kind}" for kind, n in content["outcomes"].items())
        return f"{outcomes}, in {content['seconds']} s. {source(content)}"
    rows = [
        [r["date"][:16].replace("T", " "), r["commit"], r["tests"], str(r["passed"]), str(r["failed"]), r["note"]]
        for r in content["runs"]
    ]
    return table(["date", "commit", "tests", "passed", "failed", ""], rows)


def memory(content: dict[str, Any]) -> str:
    systems = {MEMORY[kind]: found for kind, found in content["systems_gib"].items()}
    base = systems["dense base"]["weights"]
    rows = [
        [name, f"{f['weights']:.2f}", f"{f['weights'] / base:.3f}", f"{f['peak']:.2f}" if "peak" in f else ""]
        for name, f in systems.items()
    ]
    return source(content) + "\n" + table(["GiB", "weights", "over dense", "peak"], rows) + "\n" + met(content)


def latency(content: dict[str, Any]) -> str:
    names = list(content["cells"][0]["milliseconds"])
    rows = []
    for cell in content["cells"]:
        times = cell["milliseconds"]
        base = times[names[0]]
        shown = [
            f"{median(times[n]):.2f} ms ({median(a / b for a, b in zip(times[n], base, strict=True)):.3f})"
            for n in names
        ]
        rows.append([f"{cell['phase']}, {cell['batch']} x {cell['length']}", *shown])
    how = f"Decode steps: {content['steps']}. A copy moves {content['floors']['copy_gb_s']:.0f} GB/s. "
    return how + source(content) + "\n" + table(["", *names], rows) + "\n" + met(content)


def first_measurements(content: dict[str, Any]) -> str:
    """Runs of which only the medians were kept."""
    parts = [f"{content['shape']}; {content['hardware']}. {content['what']}.\n"]
    for run in content["runs"]:
        names = list(max(run["cells"].values(), key=len))
        rows = [
            [cell, *(f"{found[n][0]:.2f} ({found[n][1]:.3f})" if n in found else "" for n in names)]
            for cell, found in run["cells"].items()
        ]
        parts += [f"{run['date'][:10]}, commit {run['commit']}: {run['note']}.\n", table(["ms", *names], rows)]
    return "\n".join(parts)


def throughput(content: dict[str, Any]) -> str:
    layers = content["shape"]["num_hidden_layers"]
    rows = []
    for p in content["points"]:
        rates = {n: [1000 * t / ms for t, ms in zip(p["tokens"], r, strict=True)] for n, r in p["milliseconds"].items()}
        shown = ", ".join(f"{name} {median(r):,.0f}" for name, r in rates.items())
        how = f"stage {p['stage']}, " + (f"ZeRO-{p['zero']}" if p["stage"] == 1 else f"ep_size {p['ep_size']}")
        mfu = f"{100 * p['mfu']['nominal']:.1f} %, {100 * p['mfu']['matmul']:.1f} %"
        rows.append([how, shown, f"{p['flops_per_token'] / 1e9:.1f}", mfu, f"{p.get('peak_gib', 0):.1f}"])
    columns = ["", "tokens/s", "GFLOP per token", "MFU, nominal and of a measured GEMM", "peak GiB"]
    rows_of = f"{content['step']['rows']} rows of at most {content['step']['longest']} tokens per step. "
    return (
        f"{layers} layers, {rows_of}"
        + source(content)
        + "\n"
        + table(columns, rows)
        + ("\n" + met(content) if content["targets"] else "")
    )


def printed_throughput(content: dict[str, Any]) -> str:
    rate = content["tokens_per_second"]
    row = [f"{rate['training loop']:,}", f"{rate['bare DeepSpeed loop']:,}", f"{rate['ratio']:.3f}"]
    row += [f"{content['tflop_s']}", f"{100 * content['mfu_nominal']:.1f} %"]
    columns = ["training loop, tokens/s", "bare DeepSpeed loop", "ratio", "TFLOP/s", "MFU of nominal"]
    return f"{source(content)}\nThese are {content['note']}.\n\n" + table(columns, [row]) + "\n" + met(content)


def world(content: dict[str, Any]) -> str:
    columns = [*content["scored"], "avg", "benign_served"]
    rows = [[name, *(f"{s[c]:.1f}" for c in columns)] for name, s in content["systems"].items()]
    return f"{content['seconds']} s. {source(content)}\n" + table(["system", *columns], rows)


def calibrator(content: dict[str, Any]) -> str:
    rows = [[name, f"{median(times):.3f}"] for name, times in content["milliseconds"].items()]
    return source(content) + "\n" + table(["part", "ms"], rows) + "\n" + met(content)


SHAPE = "llama2-7b-cuda.json"
SECTIONS: list[tuple[str, list[str], Callable[[dict[str, Any]], str], str]] = [
    ("Tests", ["tests-cuda.json", "tests-first-cuda.json"], tests, "tests"),
    ("The world, end to end", ["world-cuda.json"], world, "world"),
    ("Latency, LLaMA-2-7B", [f"latency-{SHAPE}"], latency, "latency"),
    ("Latency, steps not captured", [f"latency-eager-{SHAPE}"], latency, "latency-eager"),
    ("Latency, compiled steps", [f"latency-compiled-{SHAPE}"], latency, "latency-compiled"),
    ("Latency, first measurements", ["latency-layers32-first-cuda.json"], first_measurements, "latency"),
    ("Latency, first measurements with four layers", ["latency-layers4-cuda.json"], first_measurements, "latency"),
    ("Attention with cuDNN and without", ["attention-first-cuda.json"], first_measurements, "latency"),
    ("Memory, LLaMA-2-7B", [f"memory-{SHAPE}"], memory, "memory"),
    ("Training, stage 1", [f"throughput-stage1-{SHAPE}", "throughput-stage1-first-cuda.json"], throughput, "stage1"),
    ("Training, stage 1, 16 layers", ["throughput-stage1-layers16-cuda.json"], printed_throughput, "stage1"),
    ("Training, stage 1, 16 layers, H200", ["throughput-stage1-layers16-h200-cuda.json"], printed_throughput, "stage1"),
    ("Training, stage 2", [f"throughput-stage2-{SHAPE}", "throughput-stage2-first-cuda.json"], throughput, "stage2"),
    ("Gate and calibrations", [f"calibrator-{SHAPE}"], calibrator, "calibrator"),
]  # fmt: skip
