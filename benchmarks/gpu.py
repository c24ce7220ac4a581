"""The tests and benchmarks that need a GPU, in one command, for one card of 80 GB.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --only tests latency
    python benchmarks/gpu.py --tiny --device cpu --out runs/gpu-tiny

Each part is a process with its own time limit and writes a JSON file. A part whose file exists is skipped, unless
`--again` is set. docs/gpu.md is made from these files; `--page` does only that.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from suite import gpu_page, record

ROOT = Path(__file__).parents[1]
WORK = ROOT / "runs" / "gpu"
SIDE_BY_SIDE = (
    "dense base",
    "AlignX",
    "H3Fusion, loop",
    "H3Fusion, grouped",
)  # with their KV caches they fit on the card
OTHERS = ("dense base", "AlignX", "AlignX, 2 experts", "AlignX, all experts", "TrinityX", "ensemble of 3")
SMALL_WORLD = ("data.train_rows=60", "data.held_out_rows=20", "axes.honest.rows=0", "train.steps=1", "align.steps=1")
SMALL_WORLD += (
    "gate.anchors=16",
    "gate.latent=16",
    "train.warmup_steps=0",
    "align.warmup_steps=0",
    "baselines.make=[]",
)


@dataclass(frozen=True)
class Part:
    """`keep`: (seconds that it took) -> the content of the result, for commands that do not write it themselves."""

    name: str
    command: list[str]
    result: str
    limit: float  # seconds
    keep: Callable[[float], dict[str, Any]] | None = None


def parts(args: argparse.Namespace) -> list[Part]:
    """In the order in which they run: first the tests, then the cheapest."""
    shape = "tiny" if args.tiny else "llama2-7b"
    place = f"{shape}-{args.device}.json"
    common = ["--shape", shape, "--device", args.device]
    if args.out != record.RESULTS.resolve():
        common += ["--out", str(args.out)]  # else it is left out, so that the recorded command holds on every machine
    lengths = ["16"] if args.tiny else ["512", "2048"]
    few = ["--repeats", "3" if args.tiny else "7"]

    def benchmark(script: str, *options: str) -> list[str]:
        return [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *common, *options]

    def latency(way: str, limit: float, *lengths: str) -> Part:
        name = "latency" if way == "captured" else f"latency-{way}"
        systems = SIDE_BY_SIDE[:2] if way == "compiled" else SIDE_BY_SIDE  # compiling a step takes a minute or more
        options = ["--steps", way, "--lengths", *lengths, "--systems", *systems, *few]
        return Part(name, benchmark("latency", *options), f"{name}-{place}", limit)

    junit, world = WORK / "tests.xml", WORK / "world"
    run = [sys.executable, "-m", "alignx_ds", "run", str(ROOT / "launch/recipes/world.yaml"), f"output={world}"]
    run += ["launch.ranks=1", "align.ep_size=1", *(SMALL_WORLD if args.tiny else ()), *args.world]
    pytest = [sys.executable, "-m", "pytest", str(ROOT / "tests/cuda"), f"--junitxml={junit}", "-rs", "--durations=5"]
    training = ("--ranks", "1", "--steps", "2", *few)
    stage1 = ("--batch", "8", "--length", "64", "--zero", "3", "--stages", "1")
    stage2 = ("--batch", "4", "--length", "32", "--stages", "2")
    if not args.tiny:  # as many rows as fit on the card beside the optimizer states
        stage1 = ("--batch", "28", "--length", "1024", "--zero", "3", "--stages", "1", "--layers", "16")
        stage2 = ("--batch", "8", "--length", "1024", "--stages", "2", "--layers", "12")
    depth = "4" if args.tiny else "32"
    return [
        Part("tests", pytest, f"tests-{args.device}.json", 400, lambda seconds: tested(junit, pytest, seconds)),
        Part("memory", benchmark("memory", "--measure-layers", depth), f"memory-{place}", 300),
        Part("calibrator", benchmark("calibrator", "--layers", "2", *few), f"calibrator-{place}", 60),
        latency("captured", 240, *lengths),
        latency("eager", 200, lengths[0]),
        latency("compiled", 360, lengths[0]),
        Part("stage1", benchmark("throughput", *stage1, *training), f"throughput-stage1-{place}", 180),
        Part("stage2", benchmark("throughput", *stage2, *training), f"throughput-stage2-{place}", 180),
        Part("world", run, f"world-{args.device}.json", 600, lambda seconds: aligned(world, run, seconds)),
    ]  # fmt: skip


def tested(junit: Path, command: list[str], seconds: float) -> dict[str, Any]:
    """The outcome of every test, from pytest's JUnit file."""
    cases = ElementTree.parse(junit).getroot().iter("testcase")
    found = {
        f"{c.get('classname')}::{c.get('name')}": next(
            (kind for kind in ("failure", "error", "skipped") if c.find(kind) is not None), "passed"
        )
        for c in cases
    }
    outcomes = {kind: sum(v == kind for v in found.values()) for kind in ("passed", "failure", "error", "skipped")}
    return {"seconds": round(seconds, 1), "outcomes": outcomes, "tests": found}


def aligned(world: Path, command: list[str], seconds: float) -> dict[str, Any]:
    """The scores and router metrics of the world run's report."""
    report = json.loads((world / "report.json").read_text(encoding="utf-8"))
    scores = {name: {k: v for k, v in system.items() if k != "details"} for name, system in report["systems"].items()}
    router = {k: v for k, v in report["router"].items() if isinstance(v, int | float)}
    return {"seconds": round(seconds, 1), "scored": report["scored"], "systems": scores, "router": router}


def work(part: Part, args: argparse.Namespace) -> str:
    """Run a part, unless its result exists. Returns its outcome in a few words."""
    path = args.out / part.result
    if path.is_file() and not args.again:
        return "skipped: its result exists"
    WORK.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if args.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "CUDA_TESTS_ON": "cpu"}
    began, written = time.monotonic(), (WORK / f"{part.name}.log")
    with written.open("wb") as log:
        process = subprocess.Popen(
            part.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(part.limit * args.patience)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # it leads the process group of everything that it started
                process.wait()
    seconds = time.monotonic() - began
    print(written.read_text(encoding="utf-8", errors="replace")[-6000:], flush=True)
    if part.keep is not None and (code == 0 or part.name == "tests"):
        record.write_plain(path, part.command, args.device, part.keep(seconds))
    if code == 0:
        return f"{seconds:.0f} s"
    return f"FAILED after {seconds:.0f} s: " + (f"exit code {code}" if code is not None else "time limit reached")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="PART", help="run only these parts")
    parser.add_argument("--skip", nargs="+", default=[], metavar="PART", help="run all parts but these")
    parser.add_argument("--again", action="store_true", help="also run parts whose results exist")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to test the parts themselves")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--world", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the world's recipe")
    parser.add_argument("--patience", type=float, default=1.0, help="factor on every part's time limit")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="directory of the JSON files")
    parser.add_argument("--page", action="store_true", help="only write docs/gpu.md from the existing results")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # a part is then ended too
    args.out = args.out.resolve()
    if args.page:
        gpu_page.write(ROOT / "docs" / "gpu.md", args.out)
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no GPU found; `--tiny --device cpu` tests the parts on a CPU", file=sys.stderr)
        return 2
    every = parts(args)
    unknown = {*args.only, *args.skip} - {part.name for part in every}
    if unknown:
        parser.error(f"unknown part: {', '.join(sorted(unknown))}; the parts are {', '.join(p.name for p in every)}")
    outcomes = {}
    for part in every:
        if part.name not in args.skip and (not args.only or part.name in args.only):
            print(f"== {part.name}", flush=True)
            outcomes[part.name] = work(part, args)
    for name, outcome in outcomes.items():
        print(f"{name:18} {outcome}")
    if not args.tiny:
        gpu_page.write(ROOT / "docs" / "gpu.md", args.out)
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
