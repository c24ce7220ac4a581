"""Where the published data sets are, for the tests that need them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

DATA = Path(os.environ.get("ALIGNX_DATA") or Path(__file__).resolve().parents[2] / "shared" / "data")


def needs(*paths: Path) -> pytest.MarkDecorator:
    """Skips a test where one of these files is missing."""
    missing = [path.name for path in paths if not path.is_file()]
    return pytest.mark.skipif(bool(missing), reason=f"no {', '.join(missing)} in ../shared/data; set ALIGNX_DATA")
