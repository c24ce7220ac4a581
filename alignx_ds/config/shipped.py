"""The recipes and DeepSpeed JSONs that come with the package: within it in a wheel, beside it in a checkout."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from alignx_ds.config.schema import OptimizerConfig, RunConfig
from alignx_ds.errors import ConfigError, Problem

JSONS = "ds_configs"  # also the folder in which recipes name a DeepSpeed JSON
CHECKOUT = {"recipes": "launch/recipes", JSONS: JSONS}  # setup.py puts them into the wheel


def _folder(name: str) -> Path:
    packaged = Path(str(files("alignx_ds") / name))
    return packaged if packaged.is_dir() else Path(__file__).parents[2] / CHECKOUT[name]


def recipes() -> dict[str, Path]:
    """The shipped recipes by name."""
    found = {path.stem: path for path in _folder("recipes").glob("*.yaml")}
    return dict(sorted(found.items()))


def summary(recipe: Path) -> str:
    """What a shipped recipe is for: the first line of its comment."""
    return recipe.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def recipe_file(given: str | Path) -> Path:
    """The file as given where there is one, otherwise the shipped recipe of that name. Raises ConfigError."""
    if os.path.isfile(given):  # False where pathlib raises: on names that are too long
        return Path(given)
    shipped = recipes()
    if str(given) in shipped:
        return shipped[str(given)]
    meant = Path(given).stem
    fix = f"did you mean the shipped recipe '{meant}'?" if meant in shipped else "correct the path"
    raise ConfigError(Problem("recipe", str(given), "a YAML file, or a recipe that `alignx-ds recipes` lists", fix))


def deepspeed_file(given: str) -> Path:
    """The path as given where it exists, otherwise the shipped JSON of that name below ds_configs/."""
    path = Path(given)
    shipped = _folder(JSONS) / path.name
    return shipped if str(path.parent) == JSONS and not os.path.exists(path) and os.path.isfile(shipped) else path


def use_own_files(config: RunConfig, recipe: Path) -> None:
    """A DeepSpeed JSON that lies beside the recipe is meant, wherever the command is given."""
    for stage in _stages(config):
        own = recipe.parent / stage.deepspeed
        if os.path.isfile(own):
            stage.deepspeed = str(own)


def _stages(config: Any) -> Iterator[OptimizerConfig]:
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, OptimizerConfig):
            yield value
        elif is_dataclass(value):
            yield from _stages(value)


def copy(name: str, config: RunConfig, directory: Path) -> list[Path]:
    """Copy a shipped recipe with the DeepSpeed JSONs that its config refers to. Raises ConfigError."""
    wanted = {directory / f"{name}.yaml": recipes()[name]}
    wanted |= {directory / stage.deepspeed: deepspeed_file(stage.deepspeed) for stage in _stages(config)}
    if there := [str(path) for path in wanted if os.path.exists(path)]:
        fix = f"{there[0]} exists already; choose another directory, nothing was touched"
        raise ConfigError(Problem("DEST", str(directory), "a directory without these files", fix))
    try:
        for path, source in wanted.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
    except OSError as error:
        fix = f"it can't be written ({error.strerror}); choose another"
        raise ConfigError(Problem("DEST", str(directory), "a directory", fix)) from error
    return list(wanted)
