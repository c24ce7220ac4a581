"""docs/gpu.md is what the results say, and says what has none."""

from __future__ import annotations

from pathlib import Path

from suite import gpu_page

REPO = Path(__file__).parents[2]


def test_the_page_is_that_of_the_results() -> None:
    assert (REPO / "docs/gpu.md").read_text() == gpu_page.page(REPO / "benchmarks/results")


def test_what_was_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    made = gpu_page.page(tmp_path)
    assert made.count("Not measured yet") == len(gpu_page.SECTIONS)
