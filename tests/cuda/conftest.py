"""Tests that need a GPU. Without one they are skipped; CUDA_TESTS_ON=cpu runs them on the CPU, to test the tests."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import process_group

DEVICE = os.environ.get("CUDA_TESTS_ON") or ("cuda" if torch.cuda.is_available() else "")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cuda)
            if not DEVICE:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def group() -> Iterator[None]:
    with process_group():
        yield
