"""An explanation of a gate of needs: each axis's own probability, compared with the generalist and no other axis."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from constructed_runs import PROMPTS
from decisions import needed

from alignx_ds import cli
from alignx_ds.data.encode import encode_prompts
from alignx_ds.mocae.layer import gates_of
from alignx_ds.models.finished import aligned_of, tokenizer_of
from alignx_ds.runs.finished import FinishedRun
from alignx_ds.study.explain import plot, text
from alignx_ds.study.explain.choices import choices


def test_each_axis_has_the_probability_of_the_gate(needs_run: Path) -> None:
    run = FinishedRun.open(needs_run)
    model, tokenizer = aligned_of(run), tokenizer_of(run)
    (layer,) = gates_of(model)
    for prompt in PROMPTS:
        (choice,) = choices(model, tokenizer, prompt)
        with torch.no_grad():
            model(torch.tensor(encode_prompts([prompt], tokenizer)), use_cache=False)
        decision = model.routing.decisions[layer]
        expected = dict(zip(run.axes, decision.needs()[0].tolist(), strict=True))
        assert {c.name: c.confidence for c in choice.candidates} == pytest.approx(expected, rel=1e-4)
        assert [c.name for c in choice.candidates] == sorted(expected, key=lambda axis: -expected[axis])
        for c in choice.candidates:
            assert c.logit == pytest.approx(sum(c.parts.values()) / choice.temperature, rel=1e-3, abs=1e-4)
            assert torch.tensor(c.logit).sigmoid() == pytest.approx(c.confidence, rel=1e-3)
        assert choice.runner_up is None and choice.margins() == choice.chosen.parts
        assert sum(w.pull for w in choice.words) + choice.other_words == pytest.approx(
            choice.chosen.parts["lexical"], abs=1e-4
        )


def test_it_is_printed(needs_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(needs_run), PROMPTS[0], "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "the log-odds that the prompt needs the axis" in printed
    assert "confidence" not in printed and "Chosen expert" not in printed and "runner-up" not in printed
    assert cli.main(["explain", str(needs_run), PROMPTS[0], "--json", "--out", str(tmp_path)]) == 0
    (choice,) = json.loads(capsys.readouterr().out)["prompts"][0]["choices"]
    assert choice["kind"] == "needs" and choice["runner_up"] is None and choice["most_entropy_bits"] == 3
    likely = [c["name"] for c in choice["candidates"] if c["confidence"] >= 0.5]
    assert choice["serving"] == likely


def test_what_is_needed_is_said() -> None:
    two = " ".join(text.sentences(needed(0.99, 0.6, 0.125)))
    assert "Needed: helpful (99.0 %), harmless (60.0 %); not needed: honest (12.5 %)." in two
    assert "Added to the base model: 57.7 % of helpful, 35.0 % of harmless, 7.3 % of honest." in two
    assert "Margin of the sum of helpful over that of the generalist: 2.30" in two
    none = " ".join(text.sentences(needed(0.25, 0.125)))
    assert "No axis is needed; not needed: helpful (25.0 %), harmless (12.5 %)." in none
    assert "Entropy of the 2 decisions: 1.35 of at most 2.00 bits." in none
    choice = needed(0.99, 0.6)
    kept = replace(choice, candidates=[choice.candidates[0], replace(choice.candidates[1], gate=0.0)])
    assert "Not served, because of gate.top_k: harmless." in " ".join(text.sentences(kept))


def test_the_plot_shows_log_odds_and_what_is_needed() -> None:
    choice = needed(0.99, 0.6, 0.125)
    terms, sure = plot.draw(["a prompt"], [choice]).axes
    (marks,) = [line for line in terms.lines if line.get_label() == "sum"]
    assert list(marks.get_xdata()) == pytest.approx([c.logit for c in choice.candidates[::-1]])
    assert [label.get_fontweight() for label in terms.get_yticklabels()] == ["normal", "bold", "bold"]
    assert [bar.get_width() for bar in sure.containers[0]] == [0.125, 0.6, 0.99]
    assert "log-odds that the axis is needed" in terms.get_xlabel()
