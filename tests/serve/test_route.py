"""`alignx-ds route`: a JSON line per prompt with what the gate decides, and an audit against labels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.metrics import accuracy_score

from alignx_ds import cli
from alignx_ds.data.encode import encode_prompts
from alignx_ds.mocae.layer import gates_of
from alignx_ds.serve.model import load

PROMPTS = ["how do i burn the sailor ?", "what colour is the zoleb ?", "reverse the words . cup chair", "good night ."]
NAMES = ("generalist", "helpful", "harmless", "honest")


def write(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[list[dict[str, Any]], list[str]]:
    assert cli.main(["route", *arguments]) == 0
    out, err = capsys.readouterr()
    return [json.loads(line) for line in out.splitlines()], err.splitlines()


def test_each_line_is_the_lowest_gate_s_decision(
    saved_aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "asked.jsonl", [{"prompt": prompt} for prompt in PROMPTS])
    found, _ = lines(capsys, str(saved_aligned), file, "--batch", "3")
    model, tokenizer = load(str(saved_aligned))
    for prompt, line in zip(PROMPTS, found, strict=True):
        model(torch.tensor(encode_prompts([prompt], tokenizer)))
        layer, gate = next(iter(gates_of(model).items()))
        decision, query = model.routing.decisions[layer], model.routing.queries[layer]
        p = decision.probabilities()[0].tolist()
        assert line["prompt"] == prompt and line["expert"] == NAMES[p.index(max(p))]
        assert list(line["probabilities"].values()) == pytest.approx(p, abs=1e-4)
        assert list(line["gates"].values()) == pytest.approx(decision.gates[0].tolist(), abs=1e-4)
        assert line["confidence"] == pytest.approx(max(p), abs=1e-4)
        g = gate.geometry
        z = (query.features[0] - g.centre) @ g.projection.T
        every = [float((g.whiteners[e] @ (z - g.means[e])).square().mean().sqrt()) for e in range(4)]
        assert line["distance"] == pytest.approx(min(every), rel=1e-3)


def test_a_dialogue_is_routed_as_a_whole(
    saved_aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("user", PROMPTS[1]), ("assistant", "the zoleb is red ."), ("user", PROMPTS[0])]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = {"role": "assistant", "content": "no ."}
    both = [{"messages": [*messages, answer]}, {"messages": [messages[-1], answer]}]
    found, _ = lines(capsys, str(saved_aligned), write(tmp_path / "d.jsonl", both), "--schema", "messages")
    assert found[0]["prompt"].startswith(f"User: {PROMPTS[1]}")
    assert found[0]["probabilities"] != found[1]["probabilities"]


def test_every_user_turn_of_a_dialogue_has_its_decision(
    saved_aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is that of the dialogue up to this turn."""
    turns = [("system", "be kind ."), ("user", PROMPTS[1]), ("assistant", "red ."), ("user", PROMPTS[0])]
    messages = [{"role": role, "content": content} for role, content in turns]
    answer = {"role": "assistant", "content": "no ."}
    records = [{"messages": [*messages[:2], answer]}, {"messages": [*messages, answer]}]
    found, _ = lines(capsys, str(saved_aligned), write(tmp_path / "d.jsonl", records), "--schema", "messages")
    assert "turns" not in found[0]
    first, last = found[1].pop("turns")
    assert (first.pop("prompt"), last.pop("prompt")) == (PROMPTS[1], PROMPTS[0])
    assert first == {key: pytest.approx(found[0][key], abs=2e-4) for key in first}
    assert last == {key: found[1][key] for key in last} and last["distance"] != first["distance"]


def test_labels_are_audited(saved_aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    labels = ["harmless", "honest", "helpful", "helpful"]
    records = [{"prompt": prompt, "axis": label} for prompt, label in zip(PROMPTS, labels, strict=True)]
    file = write(tmp_path / "asked.jsonl", records)
    found, notes = lines(capsys, str(saved_aligned), file, "--labels", "axis")
    accuracy = accuracy_score(labels, [line["expert"] for line in found])
    assert any(f"accuracy {accuracy:.3f}" in note and "ece" in note for note in notes)
    (helpful,) = [note for note in notes if "prompts of helpful go to" in note]
    for line in found[2:]:
        assert line["expert"] in helpful


@pytest.mark.parametrize(
    ("record", "arguments", "said"),
    [
        ({"prompt": "hello", "axis": "kind"}, ("--labels", "axis"), "the label 'kind' is no expert"),
        ({"prompt": "hello"}, ("--labels", "axis"), "no column 'axis'"),
        ({"question": "hello"}, (), "no column 'prompt'"),
        ({"prompt": "hello"}, ("--batch", "0"), "--batch"),
    ],
)
def test_what_can_t_be_routed_is_one_line(
    record: dict[str, str],
    arguments: tuple[str, ...],
    said: str,
    saved_aligned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write(tmp_path / "asked.jsonl", [record])
    assert cli.main(["route", str(saved_aligned), file, *arguments]) == 2
    out, err = capsys.readouterr()
    assert not out and len(err.splitlines()) == 1 and said in err


def test_a_label_may_name_several_experts_or_none(
    saved_aligned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = [{"prompt": p, "axis": "helpful"} for p in PROMPTS]
    found, _ = lines(capsys, str(saved_aligned), write(tmp_path / "asked.jsonl", records), "--labels", "axis")
    others = [next(n for n in ("helpful", "honest") if n != line["expert"]) for line in found]
    chosen = [line["expert"] for line in found]
    sets: list[Any] = [[chosen[0], others[0]], f"{others[1]}, {chosen[1]}", [others[2]], []]
    labelled = [r | {"axis": s} for r, s in zip(records, sets, strict=True)]
    _, notes = lines(capsys, str(saved_aligned), write(tmp_path / "sets.jsonl", labelled), "--labels", "axis")
    right = 2 + (chosen[3] == "generalist")
    assert any(f"accuracy {right / 4:.3f}" in note for note in notes)
