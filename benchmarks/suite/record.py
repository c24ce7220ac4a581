"""Results of a benchmark: a table on the terminal, and JSON with everything that is needed to repeat it."""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from suite.shapes import NAMES, config_of

RESULTS = Path(__file__).parents[1] / "results"
PACKAGES = ("torch", "deepspeed", "transformers")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Target:
    """A measured value and the limit that it should keep."""

    what: str
    seen: float
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        return self.seen >= self.limit if self.at_least else self.seen <= self.limit

    def row(self) -> list[str]:
        sign = "≥" if self.at_least else "≤"
        return [self.what, f"{self.seen:.3f}", f"{sign} {self.limit:g}", "met" if self.met else "NOT MET"]


def parser(doc: str | None, shape: str = "small") -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--shape", choices=NAMES, default=shape, help="model shape; random weights (default: %(default)s)"
    )
    made.add_argument("--layers", type=int, default=0, help="decoder layers, where not the shape's own")
    made.add_argument("--vocabulary", type=int, default=0, help="tokens, where not the shape's own")
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 on a GPU")
    made.add_argument("--rank", type=int, default=64, help="of the experts' factors (default: %(default)s)")
    made.add_argument("--out", type=Path, default=RESULTS, help="directory of the JSON and the plot")
    return made


def dtype_of(args: argparse.Namespace) -> torch.dtype:
    return DTYPES[args.dtype or ("bfloat16" if args.device == "cuda" else "float32")]


def hardware(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpu = next(
        (line.split(":")[1].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")),
        platform.processor(),
    )
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def _commit() -> str:
    """The current commit; BENCHMARK_COMMIT replaces it where the tree is a copy without history."""
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return described.stdout.strip() or "unknown"


def provenance(command: list[str], device: str) -> dict[str, Any]:
    """Date, command, commit, hardware and versions of a measurement. Where its result is written changes nothing."""
    shown = [word for n, word in enumerate(command) if "--out" not in (word, *command[n - 1 : n])]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python " + shlex.join(shown),
        "commit": _commit(),
        "hardware": hardware(device),
        "versions": {"python": platform.python_version(), **{p: version(p) for p in PACKAGES}},
    }


def write_plain(path: Path, command: list[str], device: str, content: dict[str, Any]) -> None:
    """Write the result of a command that is not a benchmark; `command` begins with the Python interpreter."""
    root = str(Path(__file__).parents[2]) + os.sep
    shown = [part.replace(root, "") for part in command[1:]]
    path.parent.mkdir(parents=True, exist_ok=True)
    made = provenance(shown, device) | content
    path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write(name: str, args: argparse.Namespace, content: dict[str, Any], targets: list[Target]) -> Path:
    """`results/NAME-SHAPE-DEVICE.json`."""
    args.out.mkdir(parents=True, exist_ok=True)
    path: Path = args.out / f"{name}-{args.shape}-{args.device}.json"
    record = {
        **provenance(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]], args.device),
        "shape": config_of(args.shape, args.layers, args.vocabulary).to_dict(),
        "rank": args.rank,
        "dtype": str(dtype_of(args)),
        **content,
        "targets": [{"what": t.what, "seen": t.seen, "limit": t.limit, "met": t.met} for t in targets],
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def print_targets(targets: list[Target]) -> None:
    from alignx_ds.runtime import console

    if targets:
        console.table("Targets", ["what", "seen", "target", ""], [t.row() for t in targets])
