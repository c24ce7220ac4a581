"""Lets these tests import the tiny models."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "mocae"))
