"""The verb `doctor`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_verbs(verbs: Any) -> None:
    doctor = verbs.add_parser(
        "doctor",
        help="check this machine: versions, MPI, accelerator, two real ranks, disk, ports, launchers",
        description="Report what is wrong with this machine and how to fix it. Leaves no file behind.",
    )
    doctor.add_argument("directory", type=Path, nargs="?", default=Path("runs"), help="of the runs (default: runs)")
    doctor.set_defaults(work=_doctor)


def _doctor(args: argparse.Namespace) -> int:
    from alignx_ds.doctor import report

    return report.doctor(args.directory)
