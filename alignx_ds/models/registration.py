"""Registers the aligned model with transformers' Auto classes, without importing torch or transformers for it.

The public way, `AutoConfig.register`, needs both and all of our model code. That takes 4.4 s, and every command would
wait for it, `alignx-ds --help` too; importing transformers alone takes 0.8 s (measured on 2 cores). So where the Auto
classes are not imported yet, `register` prepares two things that they will find; this takes 6 ms. They look for the
config of a model type in a table of plain strings (models/auto/auto_mappings.py), and for its class in the module
`transformers.models.<model type>`. The table is loaded alone and our row is added to it. Our module is put in place,
and imports the model code when one of its classes is needed.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

MODEL_TYPE = "alignx"
CODE = "modeling_alignx"  # the module of an export that has these classes, for those who do not import this package
AUTO_MAP = {"AutoConfig": f"{CODE}.AlignXConfig", "AutoModelForCausalLM": f"{CODE}.AlignXForCausalLM"}
AUTO_CLASSES = "transformers.models.auto.configuration_auto"
TABLE = "transformers.models.auto.auto_mappings"  # its CONFIG_MAPPING_NAMES: model type -> name of the config class
OURS = f"transformers.models.{MODEL_TYPE}"


class _OurModule(ModuleType):
    """What transformers imports as `transformers.models.alignx`."""

    def __getattr__(self, name: str) -> object:
        if name not in ("AlignXConfig", "AlignXForCausalLM"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        from alignx_ds.mocae import modeling  # which also registers the model class for its config

        return getattr(modeling, name)


def register() -> None:
    """Make `AutoConfig` and `AutoModelForCausalLM` find the model type "alignx", imported before or after this."""
    table = None if AUTO_CLASSES in sys.modules else _table()
    if table is None:  # the public way, for Auto classes that are there already, or that have no such table
        from alignx_ds.mocae import modeling  # noqa: F401 (registers its classes)

        return
    table.CONFIG_MAPPING_NAMES[MODEL_TYPE] = "AlignXConfig"
    sys.modules.setdefault(OURS, _OurModule(OURS))


def _table() -> ModuleType | None:
    """The table under its own name, where transformers will find it; nothing else of the package is imported."""
    if TABLE in sys.modules:
        return sys.modules[TABLE]
    package = find_spec("transformers")
    folders = package.submodule_search_locations if package is not None else None
    file = Path(folders[0], *TABLE.split(".")[1:]).with_suffix(".py") if folders else None
    spec = spec_from_file_location(TABLE, file) if file is not None and file.is_file() else None
    if spec is None or spec.loader is None:
        return None
    table = module_from_spec(spec)
    spec.loader.exec_module(table)
    if not hasattr(table, "CONFIG_MAPPING_NAMES"):
        return None
    sys.modules[TABLE] = table
    return table
