"""The model's code as one file of an export, for `trust_remote_code=True` where this package is not installed.

The file is made from the modules of alignx_ds/mocae and from errors.py, which follow each other in the order of their
imports, comments included. So every formula is written once, and whoever trusts the code reads one file. Copies of
the modules beside each other would not do: before it loads code from the hub, transformers checks that everything is
installed that any of the copies imports.

Left out is what a model on one rank does not need: expert parallelism, which imports DeepSpeed, and the Triton kernels,
of which two modules define the same names. Without them the layers compute in PyTorch, as they do on a CPU.
"""

from __future__ import annotations

import ast
import inspect
import symtable
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import TypeGuard

from alignx_ds.mocae.modeling import AlignXForCausalLM
from alignx_ds.models.registration import AUTO_MAP, CODE
from alignx_ds.runs import manifest
from alignx_ds.runtime.versions import version

PACKAGE, FOLDER = "alignx_ds", "alignx_ds.mocae"
ROOT = f"{FOLDER}.modeling"
LEFT_OUT = {f"{FOLDER}.{name}" for name in ("parallel", "triton_kernels", "triton_launch", "triton_single")}
HEAD = '''\
"""The aligned model of alignx-ds {version} in one file, which `trust_remote_code=True` runs.

`alignx-ds export hf` made it from the package's modules. Where `alignx_ds` is imported, its own classes are used.
"""

# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

'''
INSTALL = 'raise ImportError("this needs the package, which the file is made from: pip install alignx-ds")'


def save(model: AlignXForCausalLM, directory: Path, max_shard_size: str) -> None:
    """Sharded safetensors, and the code that loads them, named in config.json.

    Raises ValueError for a size that transformers does not read.
    """
    model.config.auto_map = AUTO_MAP
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    manifest.write_text(directory / f"{CODE}.py", source())


def source() -> str:
    """The text of the file: the model's config, the model, and what they need beside torch and transformers."""
    trees: dict[str, ast.Module] = {}
    _read(ROOT, trees)
    parts = [_imports(trees.values()), *(_section(module, tree) for module, tree in trees.items())]
    names = Counter(name for part in parts for name in _defined(part))
    assert max(names.values()) == 1, f"several modules define {[name for name, count in names.items() if count > 1]}"
    return HEAD.format(version=version("alignx-ds")) + "\n\n".join(parts)


def _read(module: str, trees: dict[str, ast.Module]) -> None:
    """Add the module, after all of the package's modules that it imports."""
    tree = ast.parse(_text(module))
    for node in filter(_of_package, tree.body):
        for other in _modules(node):
            if other not in trees and other not in LEFT_OUT:
                _read(other, trees)
    trees[module] = tree


def _text(module: str) -> str:
    return inspect.getsource(import_module(module))


def _of_package(node: ast.AST) -> TypeGuard[ast.ImportFrom]:
    return isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == PACKAGE


def _modules(node: ast.ImportFrom) -> list[str]:
    """The modules that an import names: `from alignx_ds.mocae import kernels` or `from alignx_ds.errors import …`."""
    assert not any(alias.asname for alias in node.names), ast.unparse(node)
    return [f"{FOLDER}.{alias.name}" for alias in node.names] if node.module == FOLDER else [str(node.module)]


def _imports(trees: Iterable[ast.Module]) -> str:
    """What the modules import from elsewhere, once, and this file under the names of those that are used as modules."""
    whole, names = {"import sys"}, defaultdict[str, set[str]](set)
    own: set[str] = set()
    for node in (node for tree in trees for node in tree.body):
        if isinstance(node, ast.Import):
            whole.add(ast.unparse(node))
        elif isinstance(node, ast.ImportFrom) and node.module == FOLDER:
            own.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not _of_package(node) and node.module != "__future__":
            names[str(node.module)].update(map(ast.unparse, node.names))
    listed = [f"from {module} import {', '.join(sorted(found))}" for module, found in sorted(names.items())]
    return "\n".join([*sorted(whole), *listed, "", *(f"{name} = sys.modules[__name__]" for name in sorted(own)), ""])


def _section(module: str, tree: ast.Module) -> str:
    """A module's text without its imports, and without the calls that register its classes: transformers makes them.

    A block that imports a module that is left out raises ImportError there instead.
    """
    lines: list[str | None] = list(_text(module).splitlines())
    for node in tree.body:
        only_types = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        is_call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)
        if isinstance(node, ast.Import | ast.ImportFrom) or only_types or is_call:
            start = node.lineno - 1
            while start and not lines[start - 1]:  # the blank lines before
                start -= 1
            _put(lines, start, node, None)
            continue
        for block in _blocks(node):
            first = next(filter(_of_package, block), None)
            if first is not None:
                assert set(_modules(first)) <= LEFT_OUT, f"{module}: {ast.unparse(first)} stands within a block"
                _put(lines, first.lineno - 1, block[-1], " " * first.col_offset + INSTALL)
    path = f"{module.replace('.', '/')}.py"
    return "\n".join([f"# --- {path} ---", *(line for line in lines if line is not None), ""])


def _put(lines: list[str | None], start: int, last: ast.stmt, text: str | None) -> None:
    """The text, or nothing, in place of the lines from `start` to the statement's end."""
    end = last.end_lineno or last.lineno
    lines[start:end] = [text, *[None] * (end - start - 1)]


def _blocks(node: ast.AST) -> Iterator[list[ast.stmt]]:
    """Every list of statements within it."""
    for inner in ast.walk(node):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(inner, field, None)
            if isinstance(block, list):
                yield block


def _defined(part: str) -> Iterator[str]:
    """The names that a part of the file defines for all of it."""
    for symbol in symtable.symtable(part, "part", "exec").get_symbols():
        if symbol.is_assigned() or symbol.is_imported():
            yield symbol.get_name()
