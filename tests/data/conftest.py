from __future__ import annotations

import pytest
from reading import SYSTEM

from alignx_ds.config.schema import AxisConfig, GeneralistConfig, RunConfig


@pytest.fixture
def one_axis(tiny_config: RunConfig) -> RunConfig:
    """No generalist, and one axis whose rows are still to be set."""
    tiny_config.generalist = GeneralistConfig()
    tiny_config.axes = {"kind": AxisConfig(prompt=SYSTEM, schema="plain")}
    tiny_config.data.decontaminate = False  # of three words, two of them function words, many are alike
    tiny_config.data.train_rows = tiny_config.data.held_out_rows = 10**6
    return tiny_config
