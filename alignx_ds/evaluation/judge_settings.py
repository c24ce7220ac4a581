"""The settings of judges that the command line gives as KEY=VALUE."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from alignx_ds.config.bounds import unfit_texts, violations
from alignx_ds.config.evaluation import JudgesConfig
from alignx_ds.errors import ConfigError, Problem


def judges_config(given: list[str]) -> JudgesConfig:
    """The defaults with these overrides. Raises ConfigError."""
    try:
        merged: Any = OmegaConf.merge(OmegaConf.structured(JudgesConfig), OmegaConf.from_dotlist(given))
        settings = OmegaConf.to_object(merged)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        known = ", ".join(f.name for f in fields(JudgesConfig))
        reason = " ".join(str(error).split("full_key:")[0].split())
        raise ConfigError(Problem("judges", " ".join(given), f"keys of judges ({known})", reason)) from error
    assert isinstance(settings, JudgesConfig)
    if wrong := [*unfit_texts(settings, "judges."), *violations(settings, {}, "judges.")]:
        raise ConfigError(*wrong)
    return settings
