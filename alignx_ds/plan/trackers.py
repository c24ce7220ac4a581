"""Problems of the trackers that a recipe names: a package that is missing, a login that is."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import Problem

LOCAL = ("offline", "disabled", "dryrun")  # modes of W&B that need no login


def problems(c: RunConfig) -> Iterator[Problem]:
    """Of the packages, which are extras, and of W&B's login, for which it would ask in the middle of the run."""
    if len(set(c.trackers)) != len(c.trackers):
        yield Problem("trackers", c.trackers, "distinct names", "remove what is repeated")
    for name in sorted({"wandb", "mlflow"} & set(c.trackers)):
        if importlib.util.find_spec(name) is None:
            yield Problem("trackers", name, "a package that is installed", f"pip install 'alignx-ds[{name}]'")
        elif name == "wandb" and os.environ.get("WANDB_MODE") not in LOCAL and not _logged_in():
            fix = "run `wandb login`, export WANDB_API_KEY, or WANDB_MODE=offline"
            yield Problem("trackers", name, "a login of W&B", fix)


def _logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False, verify=False))
