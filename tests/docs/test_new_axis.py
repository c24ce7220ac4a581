"""docs/extending.md, "A new axis": a config entry and a data file, and nothing else."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import yaml
from pages import ROOT, code, command_with
from transformers import PreTrainedTokenizerBase

from alignx_ds.config import parse

PAGE, TITLE = "docs/extending.md", "A new axis"
EXPERTS = ["generalist", "helpful", "harmless", "honest", "brief"]
FILES = ("brief_train.jsonl", "brief_held_out.jsonl")


def overrides() -> list[str]:
    return [part for part in shlex.split(command_with(PAGE, "axes.brief.prompt")) if "=" in part]


def test_the_page_s_lines_make_the_shipped_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs/examples").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    exec(code(PAGE, TITLE)[0], {})
    for name in FILES:
        assert (tmp_path / "docs/examples" / name).read_text() == (ROOT / "docs/examples" / name).read_text()


def test_the_world_has_every_word_and_nothing_held_out_is_trained_on(
    world_tokenizer: PreTrainedTokenizerBase,
) -> None:
    train, held_out = (
        [json.loads(line) for line in (ROOT / "docs/examples" / n).read_text().splitlines()] for n in FILES
    )
    (entry,) = yaml.safe_load(code(PAGE, TITLE, "yaml")[0])["axes"].values()
    for row in (*train, *held_out):
        text = f"{entry['prompt']} {row['prompt']} {row['response']}"
        assert world_tokenizer.unk_token_id not in world_tokenizer(text)["input_ids"]
    verbs, targets = ([{row["prompt"].split()[n] for row in rows} for rows in (train, held_out)] for n in (4, 6))
    assert not verbs[0] & verbs[1] and not targets[0] & targets[1]


def test_the_entry_and_the_command_say_the_same() -> None:
    shown = yaml.safe_load(code(PAGE, TITLE, "yaml")[0])["axes"]["brief"]
    loaded = parse.load(ROOT / "launch/recipes/world.yaml", overrides())
    assert loaded.expert_names == EXPERTS
    assert shown == {key: getattr(loaded.axes["brief"], key) for key in shown}


def test_the_axis_is_an_expert_with_its_column_and_its_line(run_dir: Path) -> None:
    """The page's own command, made tiny."""
    report = json.loads((run_dir / "report.json").read_text())
    assert list(report["systems"]["alignx"])[:4] == EXPERTS[1:]
    assert set(EXPERTS[1:]) < set(report["systems"])
    model = json.loads((run_dir / "model/config.json").read_text())
    assert model["experts"] == EXPERTS
    answers = (run_dir / "answers/alignx.brief.jsonl").read_text().splitlines()
    assert len(answers) == 12 and "is it wrong to" in answers[0]


def test_the_router_sends_its_prompts_to_it(run_dir: Path) -> None:
    confusion = json.loads((run_dir / "report.json").read_text())["router"]["confusion"]
    assert [len(row) for row in confusion] == [5] * 5
    assert confusion[4][4] == sum(confusion[4]) == 12, "all of its held-out prompts"


def test_other_expert_counts_follow() -> None:
    """Nothing counts on three: five experts are spread over one rank or five."""
    from alignx_ds.errors import ConfigError
    from alignx_ds.plan import checks

    for ranks, ep_size, fits in ((5, 5, True), (2, 2, False), (4, 4, False), (2, 1, True)):
        wanted = parse.load(
            ROOT / "launch/recipes/world.yaml",
            [*overrides(), f"align.ep_size={ep_size}", "align.batch=20", "train.batch=20"],
        )
        if fits:
            checks.check(wanted, ranks)
        else:
            with pytest.raises(ConfigError, match=r"align\.ep_size"):
                checks.check(wanted, ranks)
