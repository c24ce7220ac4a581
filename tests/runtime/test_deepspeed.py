"""DeepSpeed is imported when it is used, and in one place, so that no order of imports matters."""

from __future__ import annotations

import ast
import subprocess
import sys

from processes import REPO, cpu_environment

PACKAGE = REPO / "alignx_ds"
# mocae/ imports nothing of the project; its expert parallelism needs process groups, so DeepSpeed is imported by then.
IMPORTERS = {"runtime/deepspeed.py", "mocae/parallel.py"}
OPTIONAL = [  # they import packages that are not always installed
    "alignx_ds.export.harness",  # lm_eval: it is a plugin of that command
    "alignx_ds.mocae.triton_kernels",  # triton, which torch's CPU builds do not include; kernels.py imports it
    "alignx_ds.mocae.triton_single",  # likewise
    "alignx_ds.mocae.triton_launch",
]

IMPORT_ALL = f"""
import importlib, pkgutil, sys
import alignx_ds
for module in pkgutil.walk_packages(alignx_ds.__path__, "alignx_ds."):
    if module.name not in {[*OPTIONAL, "alignx_ds.__main__"]}:
        importlib.import_module(module.name)
print(*({{"deepspeed", "mpi4py", "alignx_ds.training.engine"}} & set(sys.modules)))
"""
TIMEOUTS = """
from alignx_ds.runtime import distributed
distributed.init_process_group(77)
import torch
from deepspeed import comm
for group in (torch.distributed.group.WORLD, comm.new_group([0])):
    print(int(group._get_backend(torch.device("cpu")).options._timeout.total_seconds()))
distributed.shutdown()
"""


def output_of(program: str) -> list[str]:
    command = [sys.executable, "-c", program]
    environment = cpu_environment()
    done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_importing_every_module_imports_neither_deepspeed_nor_mpi4py() -> None:
    assert output_of(IMPORT_ALL) == ["alignx_ds.training.engine"]


def test_deepspeed_is_imported_in_one_place() -> None:
    importers = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "deepspeed" for name in names):
                importers.add(str(path.relative_to(PACKAGE)))
    assert importers == IMPORTERS


def test_all_process_groups_have_the_timeout_of_the_config() -> None:
    assert output_of(TIMEOUTS) == ["77", "77"]
