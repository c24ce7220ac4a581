"""The pages as a whole: nothing missing, no link that leads nowhere, and no setting that a run would refuse."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from pages import FENCE, PAGES, ROOT, read, text

from alignx_ds import cli, config
from alignx_ds.config import RunConfig

TOPICS = (
    "method",
    "recipes",
    "launching",
    "performance",
    "reliability",
    "results",
    "extending",
    "export",
    "evaluation",
    "gpu",
)
RECIPES = sorted(ROOT.glob("launch/recipes/*.yaml"))
SECTIONS = {field.name for field in fields(RunConfig)}
SETTING = re.compile(r"`([a-z]\w*(?:\.\w+)*=[^\s…`]+(?: [a-z]\w*(?:\.\w+)*=[^\s…`]+)*)`")
EVERYTHING = "\n".join(map(read, PAGES))


def test_the_readme_is_short_and_links_every_page_in_one_place() -> None:
    assert len(read("README.md").splitlines()) <= 150
    assert {f"docs/{topic}.md" for topic in TOPICS} == set(PAGES) - {"README.md"}
    assert all(f"]({page})" in text("README.md", "The pages") for page in PAGES if page != "README.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", read(page))):
        if "://" not in target:
            file, _, heading = target.partition("#")
            there = (ROOT / page).parent / file if file else ROOT / page
            assert there.exists(), target
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in [re.sub(r"[^\w -]", "", t).lower().replace(" ", "-") for t in titles]


@pytest.mark.parametrize("page", PAGES)
def test_every_file_of_the_project_that_is_named_is_there(page: str) -> None:
    for name in re.findall(
        r"\b(?:alignx_ds|tests|launch|benchmarks|ds_configs|docs)/[\w./-]*\w(?!\{)\b", FENCE.sub("", read(page))
    ):
        assert (ROOT / name).exists(), name


def verbs(parser: argparse.ArgumentParser, before: str = "") -> Iterator[str]:
    """Every verb, and every verb of a verb."""
    for action in parser._actions:
        for name, below in action.choices.items() if isinstance(action, argparse._SubParsersAction) else ():
            yield before + name
            yield from verbs(below, f"{before}{name} ")


@pytest.mark.parametrize("verb", verbs(cli.parser()))
def test_every_verb_is_in_the_pages(verb: str) -> None:
    start = "(?:alignx-ds |-m alignx_ds |VERB=)"
    assert re.search(rf"{start}{verb}\b", EVERYTHING), f"no page mentions alignx-ds {verb}"


@pytest.mark.parametrize("section", sorted(SECTIONS))
def test_every_section_of_the_config_is_in_the_pages(section: str) -> None:
    assert re.search(rf"[`\s\"\[]{section}(\.\w|=|`)", EVERYTHING), f"no page mentions {section}"


def test_settings_that_the_pages_show_are_settings() -> None:
    shown = [setting for spans in SETTING.findall(EVERYTHING) for setting in spans.split()]
    kept = [setting for setting in shown if re.split(r"[.=]", setting)[0] in SECTIONS]
    assert len(kept) > 40
    for setting in kept:
        value = "launch" if "DIR" in setting else setting.partition("=")[2]
        config.load(ROOT / "launch/recipes/world.yaml", [f"{setting.partition('=')[0]}={value}"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_dry_runs_or_says_what_can_not_be_reached(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_launcher: None
) -> None:
    monkeypatch.chdir(ROOT)
    code = cli.main(["run", str(recipe), "--dry-run"])
    printed = capsys.readouterr()
    if code:
        lines = printed.err.splitlines()
        assert lines and all(re.search(r"(train|source|classifier_rows): got '.*/data/", line) for line in lines)
        assert "published files" in text("docs/recipes.md", "Recipes").split(recipe.stem)[1].split("\n")[0]
    else:
        assert "dry run: everything checked" in printed.out or "can't be reached" in printed.out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_its_line(recipe: Path) -> None:
    page = read("docs/recipes.md")
    assert f"| [{recipe.stem}](../launch/recipes/{recipe.name}) |" in page
    assert recipe.stem == "small-real" or f"\n| {recipe.stem} |" in page, "of memory"
