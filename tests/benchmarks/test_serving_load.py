"""The load of the serving benchmark: what the clients count is what the server did."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from served import serving
from suite.load import Load, Server, load


def test_clients_count_what_they_were_answered(saved_aligned: Path) -> None:
    bodies = [{"prompt": [5, 6, 7], "max_tokens": 4, "axes": axes, "model": "tiny"} for axes in ({}, {"helpful": 1})]
    with serving(saved_aligned, key=None, slots=2) as served:
        found = load(Server(served.port, psutil.Process()), [bodies, bodies, bodies])
        metrics = served.api.metrics.text().decode()
    assert len(found.latencies) == 6 and 0 < max(found.latencies) <= found.seconds
    assert f"alignx_answer_tokens_total {found.tokens}.0" in metrics
    assert found.requests_per_second * found.seconds == pytest.approx(6)
    assert found.cpu_seconds > 0


def test_requests_mix_the_axes_and_are_the_same_for_both_systems() -> None:
    import serving as benchmark

    args: Any = SimpleNamespace(requests=3, prompt=8, tokens=5)
    ours, base = (benchmark.requests(4, args, seed=1, mixed=mixed) for mixed in (True, False))
    assert [body["prompt"] for bodies in ours for body in bodies] == [b["prompt"] for bodies in base for b in bodies]
    assert [len({str(bodies[n]["axes"]) for bodies in ours}) for n in range(3)] == [4, 4, 4]
    assert not any("axes" in body for bodies in base for body in bodies)


def test_a_ratio_is_the_median_of_the_rounds_own() -> None:
    import serving as benchmark

    rounds = {
        benchmark.OURS: [Load(seconds, [1.0], 10, cpu) for seconds, cpu in ((1.0, 2.0), (20.0, 2.0), (4.0, 5.0))],
        benchmark.BASE: [Load(seconds, [1.0], 10, 1.0) for seconds in (1.0, 18.0, 3.0)],
    }
    assert benchmark.ratio(rounds) == pytest.approx(0.9) and benchmark.cpu_ratio(rounds) == pytest.approx(0.5)
