"""Makes transformers' Auto classes know the aligned model, without importing transformers before anyone asks for it.

transformers looks a model type up in a table of names, and imports `transformers.models.<model type>` for the classes.
Ours is entered into the table as soon as that is loaded, and the import leads here.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

MODEL_TYPE = "alignx"
TABLE = "transformers.models.auto.configuration_auto"  # holds CONFIG_MAPPING_NAMES: model type -> name of the class
OURS = f"transformers.models.{MODEL_TYPE}"


def install() -> None:
    """Do it now, if transformers has its table already; otherwise when it loads it."""
    if TABLE in sys.modules:
        _enter(sys.modules[TABLE])
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _enter(table: ModuleType) -> None:
    table.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "AlignXConfig"


class _Finder(MetaPathFinder):
    """Sees the table's import coming, and answers to our own name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == OURS:
            return ModuleSpec(fullname, _OurModule())
        found = PathFinder.find_spec(fullname, path) if fullname == TABLE else None
        if found is not None and found.loader is not None:
            found.loader = _ThenEnter(found.loader)
        return found


class _ThenEnter(Loader):
    """Loads the table as ever, then enters us into it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        """Whatever else is asked of a loader (its source, its resources) is asked of the real one."""
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _enter(module)


class _OurModule(Loader):
    """The config class by transformers' path to it; importing its module registers the model class beside it."""

    def exec_module(self, module: ModuleType) -> None:
        from alignx_ds.mocae import modeling

        module.AlignXConfig = modeling.AlignXConfig  # type: ignore[attr-defined]
        module.AlignXForCausalLM = modeling.AlignXForCausalLM  # type: ignore[attr-defined]
