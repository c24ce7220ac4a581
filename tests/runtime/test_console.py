"""How far some work is, where no terminal shows a bar."""

from __future__ import annotations

import pytest

from alignx_ds.runtime import console


def test_a_log_has_a_line_a_minute_and_one_at_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    with console.progress("fine-tune a", 5) as progress:
        for step in range(1, 6):
            now = 25.0 * step
            progress.summary = f"loss {step}"
            progress.advance(progress.summary)
    assert capsys.readouterr().out.splitlines() == [
        "fine-tune a: 3 of 5 after 75 s (loss 3)",
        "fine-tune a: 5 done in 125 s (loss 5)",
    ]


def test_work_that_ends_early_says_how_much_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    with console.progress("fine-tune a", 5) as progress:
        progress.advance(by=3)
        progress.end_at(3)
    assert capsys.readouterr().out.startswith("fine-tune a: 3 done in 0 s")
