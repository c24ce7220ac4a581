"""`alignx-ds explain`: its numbers against the gates' own, its words against the lexicon's, and what it refuses."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from finished_runs import write_run
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig
from alignx_ds.data.encode import Example, LabelledExamples, encode_prompts, pad_token
from alignx_ds.evaluation.generate import answers
from alignx_ds.experts.task_vectors import layer_file
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import gates_of
from alignx_ds.mocae.lexical import ngrams
from alignx_ds.models.base import BaseModel
from alignx_ds.routing.gate_terms import TERMS, gate_terms
from alignx_ds.serve.generate import answer
from alignx_ds.study.explain import picture, wording
from alignx_ds.study.explain.choices import MOST_WORDS, Candidate, Choice, Word, choices
from alignx_ds.study.explain.explanation import Explained, Explanation, explain
from alignx_ds.study.explain.finished import FinishedRun

ROOT = Path(__file__).parents[2]
PROMPTS = ["how do i burn the sailor ?", "what colour is the dog ?", "reverse the words .\ndog cat dog red"]
HOSTILE = "what [bold]colour[/bold] $x_$ <b> \x1b[31m"
LAYERS = [3, 4]
SETTINGS = {
    "shared": ["gate.scope=shared"],
    "per_layer": ["gate.scope=per_layer", "gate.lexical=0.7", "generalist.train=''", "generalist.held_out=''"],
}


def settings_of(scope: str) -> RunConfig:
    small = ["model.layers=[3, 4]", "data.train_rows=80", "data.held_out_rows=8", "gate.latent=8", "gate.anchors=8"]
    rest = ["gate.output_latent=8", "evaluation.max_new_tokens=4", "output=where/it/was/made", "align.ep_size=1"]
    return parse.load(ROOT / "launch/recipes/world.yaml", [*small, *rest, *SETTINGS[scope]])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, world_base: BaseModel) -> dict[str, Path]:
    """A run's directory by the scope of its gates; in the second the generalist has no rows."""
    root = tmp_path_factory.mktemp("runs")
    found = {}
    for scope in SETTINGS:
        settings = settings_of(scope)
        found[scope] = write_run(settings, BaseModel(settings.model), root / scope)
    return found


@pytest.fixture(params=tuple(SETTINGS))
def run(request: pytest.FixtureRequest, made: dict[str, Path]) -> FinishedRun:
    return FinishedRun.open(made[request.param])


@pytest.fixture
def copied(made: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(made["shared"], tmp_path / "run"))


def test_the_numbers_are_those_of_the_gates(run: FinishedRun) -> None:
    """As the temperature was fitted: in batches, padded on the other side, by another path."""
    model, names = run.mixture(), run.config.expert_names
    examples = [Example(tuple(ids), len(ids)) for ids in encode_prompts(PROMPTS, run.tokenizer)]
    terms = gate_terms(model, LabelledExamples(examples, [0] * len(PROMPTS)), pad_token(run.tokenizer), 2)
    gates = gates_of(model)
    for number, prompt in enumerate(PROMPTS):
        explained = choices(model, run.tokenizer, prompt)
        assert [choice.layer for choice in explained] == list(gates)
        for choice in explained:
            temperature = float(gates[choice.layer].calibration_temperature)
            assert choice.temperature == temperature != 1
            known = {t: terms[choice.layer][t][number] for t in TERMS}
            logits = torch.stack(list(known.values())).sum(0) / temperature
            sure = logits.softmax(-1)
            for candidate in choice.candidates:
                e = names.index(candidate.name)
                expected = {t: float(part[e]) for t, part in known.items()}
                assert candidate.parts == pytest.approx(expected, rel=1e-3, abs=1e-4)
                assert candidate.logit == pytest.approx(float(logits[e]), rel=1e-3, abs=1e-3)
                assert candidate.confidence == pytest.approx(float(sure[e]), abs=1e-3)
                assert candidate.gate == (candidate is choice.chosen)
            assert choice.chosen.name == names[int(logits.argmax())]
            assert sorted([*choice.never, *(c.name for c in choice.candidates)]) == sorted(names)
            confidences = [c.confidence for c in choice.candidates]
            assert confidences == sorted(confidences, reverse=True)


def test_a_shared_gate_speaks_for_all_layers_and_others_for_themselves(made: dict[str, Path]) -> None:
    for scope, expected in (("shared", [(3, LAYERS)]), ("per_layer", [(3, [3]), (4, [4])])):
        run = FinishedRun.open(made[scope])
        found = choices(run.mixture(), run.tokenizer, PROMPTS[0])
        assert [(choice.layer, choice.layers) for choice in found] == expected
        assert {choice.never == ["generalist"] for choice in found} == {scope == "per_layer"}


def test_a_word_pulls_what_the_score_loses_without_it(run: FinishedRun) -> None:
    """No weight enters the length of a prompt: with a token's at zero its own share is gone, and no other."""
    model, names = run.mixture(), run.config.expert_names
    ids = torch.tensor(encode_prompts(PROMPTS[2:], run.tokenizer))
    mask, weight = torch.ones_like(ids), run.config.gate.lexical
    choice = choices(model, run.tokenizer, PROMPTS[2])[0]
    assert choice.runner_up is not None
    chosen, other = names.index(choice.chosen.name), names.index(choice.runner_up.name)

    def margin() -> float:
        scores = model.lexicon(ids, mask)[0]
        return weight * float(scores[chosen] - scores[other])

    whole, kept = margin(), model.lexicon.weights.clone()
    assert whole == pytest.approx(choice.margins()["lexical"], abs=1e-4)
    buckets = ngrams(ids, mask)[0][0].tolist()
    pieces = [[i] for i in ids[0].tolist()] + [list(pair) for pair in pairwise(ids[0].tolist())]
    texts = [run.tokenizer.decode(piece) for piece in pieces]
    assert len(choice.words) == MOST_WORDS
    for word in choice.words:
        model.lexicon.weights[:, buckets[texts.index(word.text)]] = 0.0
        assert whole - margin() == pytest.approx(word.pull, abs=1e-4), word.text
        model.lexicon.weights.copy_(kept)
    assert sum(w.pull for w in choice.words) + choice.other_words == pytest.approx(whole, abs=1e-4)
    steps = [abs(word.pull) for word in choice.words]
    assert steps == sorted(steps, reverse=True)


def test_everybody_answers_greedily(run: FinishedRun, world_base: BaseModel) -> None:
    """A specialist is the base model with its task vector added; each by itself, with nothing of another's left."""
    explanation = explain(run, PROMPTS)
    assert explanation.silent == {}
    systems = ["base", *run.config.axes, "alignx"]
    assert [list(e.answers) for e in explanation.prompts] == [systems] * len(PROMPTS)
    for name in systems[:-1]:
        model = AutoModelForCausalLM.from_pretrained(world_base.path)
        for layer in LAYERS if name != "base" else ():
            changes = load_file(layer_file(run.out.specialists / name, layer))
            with torch.no_grad():
                for p in PROJECTIONS:
                    weight = model.get_parameter(world_base.table.weight_name(layer, p))
                    weight += changes[f"task_vector.{p}"]
        expected = answers(model, run.tokenizer, PROMPTS, batch=3, max_new_tokens=4)
        assert [e.answers[name] for e in explanation.prompts] == expected, name
    assert [e.answers["alignx"] for e in explanation.prompts] == answer(str(run.out.model), PROMPTS, 4)
    assert len({e.answers[name] for e in explanation.prompts for name in systems}) > 5, "they do differ"


# --- what is not there ----------------------------------------------------------------------------------------------


def test_without_specialists_the_rest_is_explained(copied: Path) -> None:
    shutil.rmtree(copied / "specialists" / "helpful")
    shutil.rmtree(copied / "specialists" / "honest")
    shutil.copytree(copied / "specialists" / "harmless", copied / "specialists" / "honest")
    layer_file(copied / "specialists" / "harmless", 3).write_bytes(b"damaged")
    explanation = explain(FinishedRun.open(copied), PROMPTS[:1])
    assert list(explanation.prompts[0].answers) == ["base", "alignx"]
    assert explanation.silent.keys() == {"helpful", "harmless", "honest"}
    assert "not there" in explanation.silent["helpful"]
    assert "not the one" in explanation.silent["honest"]
    assert "can't be read" in explanation.silent["harmless"]


def test_without_the_base_model_the_mixture_still_answers(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("path: world", "path: /moved/away"))
    assert cli.main(["explain", str(copied), PROMPTS[0]]) == 0
    said = capsys.readouterr().out
    for name in ("base", "helpful", "harmless", "honest"):
        assert f"no answer of {name}: the base model '/moved/away' can't be loaded" in said
    assert "alignx " in said


def test_specialists_that_are_shared_are_found_where_the_config_says(copied: Path) -> None:
    (copied / "specialists").rename(copied.parent / "shared")
    text = (copied / "config.yaml").read_text()
    (copied / "config.yaml").write_text(text.replace("specialists: ''", f"specialists: {copied.parent / 'shared'}"))
    assert explain(FinishedRun.open(copied), PROMPTS[:1]).silent == {}


Damage = Callable[[Path], Path | None]
REFUSED: dict[str, tuple[Damage, str]] = {
    "no such directory": (lambda run: shutil.rmtree(run), "no such directory"),
    "a file": (lambda run: run / "config.yaml", "no such directory"),
    "the model's own directory": (lambda run: run / "model", "directory above it"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "no config.yaml"),
    "unfinished": (lambda run: shutil.rmtree(run / "model"), "not finished stage 2"),
    "half written": (lambda run: (run / "model/manifest.json").unlink(), "not finished stage 2"),
    "no weights": (lambda run: (run / "model/model.safetensors").unlink(), "can't be loaded"),
    "damaged weights": (
        lambda run: (run / "model/model.safetensors").write_bytes(b"x" * 99) and None,
        "can't be loaded",
    ),
    "no tensors": (lambda run: _without(run / "model", "lexicon.bias"), "lexicon.bias"),
    "other shapes": (lambda run: _reshaped(run / "model/config.json"), "can't be loaded"),
}


def _without(model: Path, name: str) -> None:
    from safetensors.torch import save_file

    tensors = load_file(model / "model.safetensors")
    del tensors[name]
    save_file(tensors, model / "model.safetensors", {"format": "pt"})


def _reshaped(path: Path) -> None:
    config = json.loads(path.read_text())
    config["gate"]["latent"] = 5
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_finished_run_is_refused_in_one_line(
    copied: Path, case: str, capsys: pytest.CaptureFixture[str], snapshot: Callable[[Path], dict[str, bytes | None]]
) -> None:
    damage, named = REFUSED[case]
    given = damage(copied) or copied
    before = snapshot(copied.parent)
    assert cli.main(["explain", str(given), PROMPTS[0]]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.strip().splitlines()
    assert line.startswith("alignx-ds: error: RUN_DIR: got ")
    assert named in line
    assert snapshot(copied.parent) == before


def test_plots_that_cannot_be_written_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(copied), PROMPTS[0], "--out", str(copied / "config.yaml")]) == 2
    assert "--out: got" in capsys.readouterr().err


def test_a_prompt_that_is_no_text_is_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", str(copied), "fine", "not \udcff"]) == 2
    assert "prompt: got" in capsys.readouterr().err


# --- what is shown --------------------------------------------------------------------------------------------------


def test_it_is_said_and_drawn(
    copied: Path, capsys: pytest.CaptureFixture[str], snapshot: Callable[[Path], dict[str, bytes | None]]
) -> None:
    before = snapshot(copied)
    assert cli.main(["explain", str(copied), PROMPTS[0], HOSTILE]) == 0
    said = capsys.readouterr().out
    assert "One gate, in layer 3, decides for layers 3 and 4 (gate.scope=shared):" in said
    assert r"“what [bold]colour[/bold] $x_$ <b> \x1b[31m”" in said
    assert "\x1b" not in said
    choice = choices(FinishedRun.open(copied).mixture(), FinishedRun.open(copied).tokenizer, PROMPTS[0])[0]
    for candidate in choice.candidates:
        cells = [*candidate.parts.values(), sum(candidate.parts.values()), candidate.logit]
        row = [*map(wording.signed, cells), *wording.percent(candidate.confidence).split()]
        assert any(
            line.split()[: len(row) + 2][-len(row) :] == row for line in said.splitlines() if candidate.name in line
        )
    new = snapshot(copied).keys() - before.keys()
    assert new == {"explain", "explain/decision.svg", "explain/decision.png"}
    assert all(str(copied / name) in said for name in new)
    root = ElementTree.fromstring((copied / "explain/decision.svg").read_text())
    texts = [element.text or "" for element in root.iter()]
    assert any(PROMPTS[0] in text for text in texts)
    assert any(r"$x_$ <b> \x1b[31m" in text for text in texts)
    assert (copied / "explain/decision.png").read_bytes().startswith(b"\x89PNG")


def test_each_gate_has_its_say_and_its_picture(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = [f"what colour is the dog {n} ?" for n in range(picture.PAGE + 1)]
    assert cli.main(["explain", str(made["per_layer"]), "--out", str(tmp_path / "new/pictures"), *prompts]) == 0
    said = capsys.readouterr().out
    for layer in LAYERS:
        assert said.count(f"Layer {layer} decides for itself (gate.scope=per_layer):") == len(prompts)
    assert "generalist has no prompts of its own, so no gate ever chooses it." in said
    names = {
        f"decision.layer{layer}{page}.{kind}" for layer in LAYERS for page in ("", ".9") for kind in ("svg", "png")
    }
    assert {path.name for path in (tmp_path / "new/pictures").iterdir()} == names
    assert not (made["per_layer"] / "explain").exists()


def test_json_holds_everything_and_nothing_else_is_printed(made: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own: libraries that speak when they are imported would be heard."""
    command = [sys.executable, "-m", "alignx_ds", "explain", str(made["shared"]), "--json", "--out", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for name in ("DS_ACCELERATOR", "RANK", "WORLD_SIZE", "LOCAL_RANK"):
        environment.pop(name, None)
    ended = subprocess.run([*command, *PROMPTS], env=environment, capture_output=True, text=True, check=True, cwd=ROOT)
    found: dict[str, Any] = json.loads(ended.stdout)
    assert [entry["prompt"] for entry in found["prompts"]] == PROMPTS
    assert found["scope"] == "shared" and found["silent"] == {}
    assert [Path(path).is_file() for path in found["pictures"]] == [True, True]
    (choice,) = found["prompts"][0]["choices"]
    assert choice["chosen"] == choice["candidates"][0]["name"]
    assert choice["runner_up"] == choice["candidates"][1]["name"]
    margin = (choice["candidates"][0]["logit"] - choice["candidates"][1]["logit"]) * choice["temperature"]
    assert sum(choice["margins"].values()) == pytest.approx(margin, rel=1e-4)
    assert found["prompts"][0]["answers"].keys() == {"base", "helpful", "harmless", "honest", "alignx"}


def test_a_long_answer_is_folded_and_not_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """Off a terminal a line has 120 characters."""
    words = [f"word{n}" for n in range(100)]
    explained = Explained("a prompt", [chosen(0.9, 0.1)], {"base": " ".join(words), "alignx": "first\nsecond"})
    wording.show(Explanation("runs/x", "shared", [explained], {"helpful": "its files are not there"}), [])
    lines = capsys.readouterr().out.splitlines()
    assert [word for line in lines for word in line.split() if word in words] == words
    assert max(map(len, (line for line in lines if "word" in line))) <= 120
    assert "alignx  first ⏎ second" in [line.strip() for line in lines]
    assert "no answer of helpful: its files are not there" in lines


# --- words and pictures of decisions made by hand --------------------------------------------------------------------


def chosen(*confidences: float, top: int = 1) -> Choice:
    """A decision with these confidences, whose logits are 2·parts."""
    names = ["helpful", "harmless", "honest", "generalist"]
    made = [
        Candidate(n, {"linear": math.log(c) / 2 - 3, "lexical": 3.0}, math.log(c), c, 1 / top if i < top else 0.0)
        for i, (n, c) in enumerate(zip(names, confidences, strict=False))
    ]
    return Choice(2, [2, 3], 0.5, made, [], [Word(" dog", 0.5), Word("cat", -0.25)], 0.125)


def test_a_sure_decision_and_a_torn_one_read_as_what_they_are() -> None:
    sure, torn = (" ".join(wording.sentences(chosen(*c))) for c in ((0.95, 0.03, 0.02), (0.5, 0.5)))
    assert "The gate is sure: helpful with 95.0 % confidence, 32 times as likely as the runner-up, harmless." in sure
    assert "The gate is torn: helpful with 50.0 % confidence, 1.0 times as likely" in torn
    assert "as if between 2.00 of 2 experts (entropy 1.00 of at most 1.00 bits)" in torn
    assert f"Ahead of harmless by {math.log(0.95 / 0.03) / 2:.2f}: linear +1.73, lexical +0.00." in sure
    assert "Words for helpful (+) or harmless (−): “dog” +0.50, “cat” −0.25; all else +0.12." in sure


def test_nothing_is_called_certain_that_is_not() -> None:
    assert [wording.percent(x) for x in (1.0, 0.9996, 0.9994, 0.0004, 0.0)] == [
        "> 99.9 %",
        "> 99.9 %",
        "99.9 %",
        "< 0.1 %",
        "< 0.1 %",
    ]
    said = " ".join(wording.sentences(chosen(1.0, 1e-30)))
    assert "The gate is certain: helpful with over 99.9 % confidence, over 10,000 times as likely" in said
    assert wording.times(1.0, 0.0) == "over 10,000 times"


def test_several_experts_that_serve_together_are_named() -> None:
    assert "What serves is 50.0 % helpful and 50.0 % harmless." in " ".join(wording.sentences(chosen(0.6, 0.4, top=2)))


def test_an_expert_without_rivals_has_no_runner_up() -> None:
    alone = replace(chosen(1.0), never=["generalist"], words=[])
    assert alone.runner_up is None and alone.margins() == {} and alone.entropy == alone.most_entropy == 0
    assert list(wording.sentences(alone))[-1] == "There is no other expert to choose than helpful."
    picture.draw(["a prompt"], [alone])


def test_the_bars_of_an_expert_end_at_its_logit_against_the_mean() -> None:
    choice = chosen(0.6, 0.3, 0.1)
    for candidate in choice.candidates:  # both terms pull the same way, so that they are stacked
        candidate.parts.update(dict.fromkeys(candidate.parts, candidate.logit / 4))
    terms, sure = picture.draw(["a prompt"], [choice]).axes
    mean = sum(c.logit for c in choice.candidates) / 3
    expected = [c.logit - mean for c in choice.candidates[::-1]]
    stacked = [sum(bars[i].get_width() for bars in terms.containers) for i in range(3)]
    assert stacked == pytest.approx(expected)
    (marks,) = [line for line in terms.lines if line.get_label() == "together"]
    assert list(marks.get_xdata()) == pytest.approx(expected)
    for i in range(3):  # no bar hides another
        spans = sorted(sorted((b[i].get_x(), b[i].get_x() + b[i].get_width())) for b in terms.containers)
        assert all(a[1] <= b[0] + 1e-9 for a, b in pairwise(spans))
    assert [bar.get_width() for bar in sure.containers[0]] == [0.1, 0.3, 0.6]
    assert [label.get_text() for label in terms.get_yticklabels()] == ["honest", "harmless", "helpful"]
