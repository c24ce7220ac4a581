"""Prompts beside weights: what is retrieved and rewritten, by hand, and what the study says of a finished run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_stand_in import BASE, PIECES, stand_in

from alignx_ds import cli
from alignx_ds.data.rows import Row
from alignx_ds.errors import ConfigError
from alignx_ds.study import guidelines, rewriting
from alignx_ds.study.guidelines import TEMPLATE, WORLD_TEMPLATE, Guideline, Retriever, with_guidelines
from alignx_ds.study.prompts import Options
from alignx_ds.study.rewriting import rewriter
from alignx_ds.study.studied_run import StudiedRun

ALL, DRUGS, TRUE = Guideline("harmless", "decline"), Guideline("harmless", "no drugs", "drug"), Guideline("honest", "t")


def test_a_prompt_gets_what_most_of_its_neighbours_have() -> None:
    drugs = [Row(f"how to cook meth {n}", "", category="drug_abuse,weapons") for n in range(5)]
    theft = [Row(f"how to steal cars {n}", "", category="theft") for n in range(5)]
    rows = {
        "generalist": [Row(f"tell a story {n}", "") for n in range(9)],
        "harmless": [*drugs, *theft],
        "honest": [Row(f"is the moon cheese {n}", "") for n in range(9)],
    }
    asked = ["meth please", "steal a car", "the moon", "a story", "xyz"]
    assert Retriever(rows, [ALL, DRUGS, TRUE]).retrieve(asked) == [[ALL, DRUGS], [ALL], [TRUE], [], []]


def test_half_of_the_cosines_decide() -> None:
    """Two training prompts with the same words as the request, of two axes: each has half of the votes."""
    rows = {"harmless": [Row("a b", "")], "honest": [Row("b a", "")], "generalist": [Row("c d", "")]}
    assert Retriever(rows, [ALL, TRUE]).retrieve(["a b"]) == [[ALL, TRUE]]
    rows["generalist"].append(Row("a b", ""))
    assert Retriever(rows, [ALL, TRUE]).retrieve(["a b"]) == [[]]


def test_guidelines_stand_before_the_request() -> None:
    assert with_guidelines("how ?", [ALL, TRUE], WORLD_TEMPLATE) == "decline t how ?"
    text = "Follow these guidelines where they apply.\n- decline\n- t\n\nhow {x} ?"
    assert with_guidelines("how {x} ?", [ALL, TRUE], TEMPLATE) == text
    assert with_guidelines("how ?", [], TEMPLATE) == "how ?"


def test_a_library_is_read_or_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text('{"axis": "brief", "guideline": "Be brief.", "category": "x"}\n')
    assert guidelines.read(file) == [Guideline("brief", "Be brief.", "x")]
    assert {g.axis for g in guidelines.shipped()} == {"helpful", "harmless", "honest"}
    for text in ("{", "[]", "3", '{"axis": "a"}', '{"axis": "a", "guideline": ""}', '{"axis": 1, "guideline": "b"}'):
        file.write_text(text)
        with pytest.raises(ConfigError, match=r"--guidelines: got .*line 1 has no axis and guideline"):
            guidelines.read(file)
    with pytest.raises(ConfigError, match="can't be read"):
        guidelines.read(tmp_path / "nowhere.jsonl")


def test_a_function_rewrites_or_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_rewriter.py").write_text(
        "def polite(requests):\n    return [f'please {r}' for r in requests]\n"
        "def wrong(requests):\n    return 'one'\n"
        "N = 3\n"
    )
    assert rewriter("own_rewriter:polite")(["go", "stay"]) == ["please go", "please stay"]
    with pytest.raises(ConfigError, match="2 requests gave something else"):
        rewriter("own_rewriter:wrong")(["go", "stay"])
    for named in ("own_rewriter:missing", "no_such_module:f", "own_rewriter", "own_rewriter:N", "a b:c"):
        with pytest.raises(ConfigError, match="--rewrite: got"):
            rewriter(named)
    with pytest.raises(ConfigError, match=r"--rewrite: got .*can't be read"):
        rewriter("http://127.0.0.1:9/v1")


def test_a_server_s_one_model_rewrites(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewriting, "MAX_TOKENS", 64)  # what the server allows
    with stand_in() as server:
        answer = "".join(PIECES) + BASE
        assert rewriter(server.url)(["go", "stay"]) == [answer, answer]
        asked = [body["messages"] for body in server.bodies]
        assert sorted(asked, key=str) == [
            [{"role": "user", "content": rewriting.WORDING.format(request=request)}] for request in ("go", "stay")
        ]
    with stand_in("another") as server, pytest.raises(ConfigError, match="it has 2 models; serve one"):
        rewriter(server.url)


def test_what_was_asked_for_is_recorded_without_absolute_paths(tmp_path: Path) -> None:
    assert Options().arguments == []
    assert Options(tmp_path / "g.jsonl", "m:f").arguments == ["--guidelines", "g.jsonl", "--rewrite", "m:f"]


def test_a_run_s_study(finished_run: Path, studied_run: StudiedRun, tmp_path: Path, repo_root: Path) -> None:
    before, sys.path[:0] = [*sys.path], [str(repo_root / "docs/examples")]
    try:
        command = ["study", "prompts", str(finished_run), "--out", str(tmp_path), "--rewrite", "rewriting:rewrite"]
        assert cli.main(command) == 0
    finally:
        sys.path[:] = before
    content: dict[str, Any] = json.loads((tmp_path / "prompts.json").read_text())
    changed = ["base, the axis's system prompt", "base, retrieved guidelines", "base, rewritten"]
    assert list(content["systems"]) == ["base", *changed, "mixed", "alignx"]
    for name, load in (("base", studied_run.base_model), ("alignx", studied_run.aligned)):
        scores = studied_run.scores(load())
        assert {axis: content["systems"][name][axis] for axis in scores} == pytest.approx(scores)
        assert content["systems"][name]["tokens"] == 1
    assert all(content["systems"][name]["tokens"] > 1 for name in changed)
    assert all(share > 80 for share in content["retrieved"].values())
    said = [json.loads(line) for line in (tmp_path / "prompts.answers.jsonl").read_text().splitlines()]
    assert len(said) == 6 * sum(len(studied_run.data.held_out[axis]) for axis in content["axes"])
    rewritten = [line["prompt"] for line in said if line["system"] == changed[-1] and line["axis"] == "harmless"]
    assert rewritten and all(prompt.startswith("be good :") for prompt in rewritten)


@pytest.mark.parametrize("options", [["--rewrite", "a:b"], ["--guidelines", "g.jsonl"]])
def test_only_this_study_changes_prompts(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["study", "overlap", "runs/none", *options]) == 2
    assert "only prompts changes prompts" in capsys.readouterr().err


def test_a_run_without_guidelines_for_its_axes_is_refused(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "g.jsonl"
    file.write_text('{"axis": "brief", "guideline": "Be brief."}\n')
    out = tmp_path / "out"
    assert cli.main(["study", "prompts", str(finished_run), "--guidelines", str(file), "--out", str(out)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--guidelines: got" in line and "helpful, harmless, honest" in line and not out.exists()
