"""docs/gpu.md matches the results and names what was not measured."""

from __future__ import annotations

from pathlib import Path

from suite import gpu_page

REPO = Path(__file__).parents[2]


def test_the_page_matches_the_results() -> None:
    assert (REPO / "docs/gpu.md").read_text() == gpu_page.page(REPO / "benchmarks/results")


def test_a_section_without_results_says_so(tmp_path: Path) -> None:
    made = gpu_page.page(tmp_path)
    assert made.count("Not measured yet") == len(gpu_page.SECTIONS)
