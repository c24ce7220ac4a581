"""Every study on a tiny finished run: what it leaves, and that its figures are those of the models that it names."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignx_ds import cli
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.mocae.layer import alignx_layers, gates_of
from alignx_ds.routing.gate_terms import TERMS, gate_terms, sum_of
from alignx_ds.routing.metrics import router_metrics
from alignx_ds.runs import manifest
from alignx_ds.study.contributions import AVERAGED, FINE_TUNING, LADDER
from alignx_ds.study.forgetting import kept_checkpoints, restored
from alignx_ds.study.parts import Judged, serving
from alignx_ds.study.subject import SYSTEMS, Subject

AXES = ["helpful", "harmless", "honest"]
Snapshot = Callable[[Path], dict[str, bytes | None]]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="module")
def subject(finished: Path) -> Subject:
    return Subject.of(finished)


@pytest.fixture(scope="module")
def studied(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The JSON of a study, made once."""
    out = tmp_path_factory.mktemp("studies")

    def study(what: str) -> dict[str, Any]:
        if not (out / f"{what}.json").exists():
            assert cli.main(["study", what, str(finished), "--out", str(out)]) == 0
            assert (out / f"{what}.png").read_bytes().startswith(b"\x89PNG")
            assert (out / f"{what}.pdf").read_bytes().startswith(b"%PDF")
        content: dict[str, Any] = json.loads((out / f"{what}.json").read_text())
        return content

    return study


@pytest.mark.parametrize("what", ["drift", "forgetting", "contributions", "calibration"])
def test_a_study_says_how_it_was_made_names_no_place_and_leaves_the_run_alone(
    what: str, finished: Path, studied: Callable[[str], dict[str, Any]], snapshot: Snapshot
) -> None:
    before = snapshot(finished)
    content = studied(what)
    assert snapshot(finished) == before
    assert content["command"] == f"alignx-ds study {what} {finished.name}"
    assert {"date", "hardware", "seed"} <= set(content)
    assert {"python", "torch", "deepspeed", "transformers", "scikit-learn"} <= set(content["versions"])
    assert str(finished.parent) not in json.dumps(content)


def test_drift_has_all_indices_of_all_systems_at_every_layer(studied: Callable[[str], dict[str, Any]]) -> None:
    content = studied("drift")
    assert content["prompts"] == dict.fromkeys(["generalist", *AXES], 16)
    for by_layer in content["indices"].values():
        assert list(by_layer) == ["3", "4"]
        assert all(len(by_layer[layer][name]) == 5 for layer in by_layer for name in SYSTEMS)
    assert content["moved"]["alignx"]["generalist"] < min(content["moved"]["sequential"].values())
    assert all(len(content[kind][name]) == 64 for kind in ("pca", "tsne") for name in SYSTEMS)


def test_the_forgetting_matrix_is_of_the_models_that_the_run_judged(
    finished: Path, studied: Callable[[str], dict[str, Any]]
) -> None:
    content = studied("forgetting")
    stages = {seen["name"]: seen for seen in content["stages"]}
    report = json.loads((finished / "report.json").read_text())
    same = {
        "base": "base",
        "after helpful": "helpful",
        "after honest": "sequential",
        "mixed": "mixed",
        "AlignX": "alignx",
    }
    for stage, system in same.items():
        for axis in AXES:
            assert stages[stage]["scores"][axis] == report["systems"][system][axis]
            assert stages[stage]["perplexity"][axis] == pytest.approx(report["perplexity"][system][axis], rel=1e-4)
    assert content["ends"] == [0, 4, 8, 12]


def test_the_last_checkpoint_of_a_stage_is_the_stage(studied: Callable[[str], dict[str, Any]]) -> None:
    content = studied("forgetting")
    sequence = {seen["step"]: seen for seen in content["along"]["sequential"]}
    assert list(sequence) == [0, 2, 4, 6, 8, 10, 12]
    for seen in content["stages"][:4]:
        assert sequence[seen["step"]]["perplexity"] == pytest.approx(seen["perplexity"], rel=1e-4)
    mixed = content["along"]["mixed"]
    assert [seen["step"] for seen in mixed] == [0, 2, 4, 6, 8, 10, 12]
    assert mixed[-1]["perplexity"] == pytest.approx(content["stages"][4]["perplexity"], rel=1e-4)
    assert mixed[1]["perplexity"] != pytest.approx(mixed[-1]["perplexity"], rel=1e-4)


def test_the_parts_sum_to_the_gate_s_own_logits(subject: Subject) -> None:
    model = subject.aligned()
    terms = gate_terms(model, subject.data.routed, subject.pad_id, subject.batch)
    for index, gate in gates_of(model).items():
        kept = []
        hook = gate.register_forward_hook(lambda module, given, decision, kept=kept: kept.append(decision.logits))
        again = gate_terms(model, subject.data.routed, subject.pad_id, subject.batch)
        hook.remove()
        logits = torch.cat(kept) * gate.calibration_temperature
        assert torch.allclose(sum_of(terms[index]), logits, atol=1e-4, rtol=1e-5)
        assert torch.equal(sum_of(again[index]), sum(terms[index][name] for name in TERMS))  # type: ignore[arg-type]


@pytest.mark.parametrize("parts", [("linear",), ("linear", "lexical"), ("fractal", "natural"), TERMS, ()])
def test_a_gate_that_serves_with_some_parts_says_what_those_parts_say(subject: Subject, parts: tuple[str, ...]) -> None:
    model = subject.aligned()
    rows = (subject.data.routed, subject.pad_id, subject.batch)
    whole = gate_terms(model, *rows)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with serving(model, parts, 2, temperatures=dict.fromkeys(whole, 0.5)):
        served = gate_terms(model, *rows)
        assert all(float(gate.calibration_temperature) == 0.5 for gate in gates_of(model).values())
        assert {layer.top_k for layer in alignx_layers(model)} == {2}
        prompt = torch.tensor([subject.data.routed.examples[0].ids])
        with torch.no_grad():
            model(prompt, use_cache=False)
        assert all(int((d.gates > 0).sum()) == 2 for d in model.routing.decisions.values())
    for index, terms in served.items():
        expected = sum_of(whole[index], *parts) if parts else torch.zeros_like(whole[index]["linear"])
        assert torch.allclose(sum_of(terms), expected, atol=1e-4)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "as it was before"
    assert {layer.top_k for layer in alignx_layers(model)} == {model.config.gate_settings().top_k}
    assert all(gate.settings == model.config.gate_settings() for gate in gates_of(model).values())


def test_contributions_agree_with_the_run_s_own_report(
    finished: Path, studied: Callable[[str], dict[str, Any]]
) -> None:
    content = studied("contributions")
    report = json.loads((finished / "report.json").read_text())
    seen = content["configurations"]
    assert set(LADDER) < set(seen)
    assert seen["all parts"]["routing"] == pytest.approx(report["router"]["ablations"]["all"], abs=1e-6)
    assert seen["linear router, as stored"]["routing"] == pytest.approx(
        report["router"]["ablations"]["linear"], abs=1e-6
    )
    assert seen["all parts"]["scores"] == {axis: report["systems"]["alignx"][axis] for axis in AXES}
    assert seen[FINE_TUNING]["scores"] == {axis: report["systems"]["mixed"][axis] for axis in AXES}
    assert seen[AVERAGED]["routing"] is None
    assert content["top_k"]["top 1"]["perplexity"] == pytest.approx(report["perplexity"]["alignx"], rel=1e-4)
    assert list(content["top_k"]) == ["top 1", "top 2", "all", "top 2, T = 1", "all, T = 1"]
    assert content["top_k"]["all, T = 1"]["perplexity"] != pytest.approx(report["perplexity"]["alignx"], rel=1e-9)


def test_activations_and_query_types_are_shares(studied: Callable[[str], dict[str, Any]]) -> None:
    content = studied("contributions")
    for shares in content["activation"].values():
        assert sum(shares) == pytest.approx(1.0)
    types = content["query_types"]
    assert sum(seen["prompts"] for seen in types.values()) == 64
    weighted = sum(torch.tensor(seen["chosen"]) * seen["prompts"] for seen in types.values()) / 64  # type: ignore[attr-defined]
    assert weighted.tolist() == pytest.approx(content["activation"]["chosen"])
    assert {"harmless: harmful", "harmless: benign"} <= set(types)


def test_zero_shot_calibration_is_the_report_s(
    finished: Path, subject: Subject, studied: Callable[[str], dict[str, Any]]
) -> None:
    router = studied("calibration")["router"]
    report = json.loads((finished / "report.json").read_text())["router"]
    assert router["0"]["ece"] == pytest.approx(report["uncalibrated"]["ece"], abs=1e-5)
    assert router["0"]["ece_t"] == pytest.approx(report["ece"], abs=1e-5)
    assert router["0"]["brier_own"] == pytest.approx(report["brier"], abs=1e-5)
    assert router["0"]["ece_t"] == router["0"]["ece_t_refitted"]
    assert router["0"]["temperatures"]["own"] == router["3"]["temperatures"]["own"]
    assert router["0"]["nll_none"] != router["1"]["nll_none"] != router["3"]["nll_none"], "examples are seen"
    judged = Judged.of(subject.aligned(), subject)
    raw = router_metrics(sum_of(judged.tested[judged.lowest]), judged.labels)
    assert router["0"]["brier_none"] == pytest.approx(raw["brier"], abs=1e-5)


def test_answers_are_calibrated_for_every_system_and_number_of_examples(
    studied: Callable[[str], dict[str, Any]],
) -> None:
    content = studied("calibration")
    assert set(content["answers"]) == set(SYSTEMS)
    for seen in content["answers"].values():
        assert list(seen) == ["0", "1", "3"]
        assert seen["0"]["nll_none"] != seen["1"]["nll_none"] != seen["3"]["nll_none"]
    assert content["rows"]["answers"]["held out"] == 16


def test_checkpoints_of_another_fine_tune_are_passed_over_and_damaged_ones_named(
    subject: Subject, finished: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    moved = Subject.of(copy)
    here = copy / "checkpoints" / "stage1"
    assert len(kept_checkpoints(moved, "helpful")) == 2
    shutil.copytree(here / "honest" / "step_00000004", here / "helpful" / "step_00000006")
    assert [p.name for p in kept_checkpoints(moved, "helpful")] == ["step_00000002", "step_00000004"]
    path = next((here / "helpful" / "step_00000002").glob("rank*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4] + b"\x00\x00\x00\x01")
    with pytest.raises(DataError, match="differs from its manifest"):
        kept_checkpoints(moved, "helpful")


def test_a_checkpoint_replaces_just_what_was_trained(subject: Subject) -> None:
    first, last = kept_checkpoints(subject, "helpful")
    base, early, late = (
        m.state_dict() for m in (subject.backbone(), restored(subject, first), restored(subject, last))
    )
    changed = {name for name in base if not torch.equal(base[name], late[name])}
    table = subject.base.table
    assert changed == {table.weight_name(layer, p) for layer in (3, 4) for p in ("gate", "up", "down")}
    assert all(not torch.equal(early[name], late[name]) for name in changed)


def test_a_checkpoint_that_two_ranks_wrote_is_read_whole(subject: Subject, tmp_path: Path) -> None:
    whole = kept_checkpoints(subject, "helpful")[-1]
    (file,) = whole.glob("rank*.safetensors")
    tensors = load_file(file)
    for rank in (0, 1):
        share = {name: tensors[name] for name in sorted(tensors)[rank::2]}
        save_file(share, tmp_path / f"rank{rank}-000.safetensors")
    expected, found = restored(subject, whole).state_dict(), restored(subject, tmp_path).state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("what", ["drift", "forgetting", "contributions", "calibration"])
def test_no_such_run_is_one_line_and_exit_code_2(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", what, str(tmp_path / "nowhere")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("alignx-ds: error: run_dir: got ") and "finished run" in line
    assert not (tmp_path / "nowhere").exists()


def test_an_unfinished_run_is_refused_and_says_what_it_lacks(finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "part", ignore=shutil.ignore_patterns("checkpoints"))
    (tmp_path / "part" / "specialists" / "mixed" / manifest.NAME).unlink()
    with pytest.raises(ConfigError, match="it has no mixed"):
        Subject.of(tmp_path / "part")


def test_results_that_can_t_be_written_are_refused_before_any_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("mine")
    assert cli.main(["study", "drift", str(finished), "--out", str(tmp_path / "file" / "in")]) == 2
    assert "--out" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"
