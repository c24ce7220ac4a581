"""The pages as a whole: every topic is there, links lead to files, and the settings shown are accepted by a run."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
from pages import AT_THE_TOP, FENCE, PAGES, ROOT, read, text
from test_house import LEVEL

from alignx_ds import cli
from alignx_ds.config import parse
from alignx_ds.config.schema import RunConfig

TOPICS = (
    "method",
    "related",
    "recipes",
    "launching",
    "performance",
    "reliability",
    "results",
    "extending",
    "export",
    "serving",
    "evaluation",
    "gpu",
)
ROOMS = sorted(
    path.name
    for path in (ROOT / "alignx_ds").iterdir()
    if not path.name.startswith("_") and (path.suffix == ".py" or list(path.rglob("*.py")))
)
RECIPES = sorted(ROOT.glob("launch/recipes/*.yaml"))
SECTIONS = {field.name for field in fields(RunConfig)}
SETTING = re.compile(r"`([a-z]\w*(?:\.\w+)*=[^\s…`]+(?: [a-z]\w*(?:\.\w+)*=[^\s…`]+)*)`")
EVERYTHING = "\n".join(map(read, PAGES))


def test_the_readme_is_short_and_links_every_page_in_one_place() -> None:
    assert len(read("README.md").splitlines()) <= 150
    assert {f"docs/{topic}.md" for topic in TOPICS} == set(PAGES) - set(AT_THE_TOP)
    assert all(f"]({page})" in text("README.md", "The pages") for page in PAGES if page != "README.md")


def test_every_page_is_in_the_site() -> None:
    site = read("docs/site/mkdocs.yml")
    named = re.findall(r"^ +- (?:\w+: \[)?([\w-]+\.md)", site, re.MULTILINE)
    assert sorted(named) == sorted("index.md" if page == "README.md" else Path(page).name.lower() for page in PAGES)


def test_the_readme_s_map_names_every_room_in_the_order_of_the_imports() -> None:
    named = re.findall(r"`([\w/.]+?)/?`", text("README.md", "How it is built").partition("| | |")[2])
    inside = [name.removeprefix("alignx_ds/") for name in named if name.startswith("alignx_ds/")]
    assert sorted(inside) == ROOMS
    assert {"launch", "ds_configs", "benchmarks", "tests", "docs"} <= set(named)
    levels = [LEVEL[name.removesuffix(".py")] for name in inside]
    assert levels == sorted(levels)


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
def test_every_named_file_of_the_project_exists(page: str) -> None:
    for name in re.findall(
        r"\b(?:alignx_ds|tests|launch|benchmarks|ds_configs|docs)/[\w./-]*\w(?!\{)\b", FENCE.sub("", read(page))
    ):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", read(page)):
        assert any((place / name).exists() for place in (ROOT, ROOT / "alignx_ds")), name


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


def test_every_setting_in_the_pages_is_accepted() -> None:
    shown = [setting for spans in SETTING.findall(EVERYTHING) for setting in spans.split()]
    settings = sorted({setting for setting in shown if re.split(r"[.=]", setting)[0] in SECTIONS})
    assert len(settings) > 40
    for setting in settings:
        value = "launch" if "DIR" in setting else setting.partition("=")[2]
        parse.load(ROOT / "launch/recipes/world.yaml", [f"{setting.partition('=')[0]}={value}"])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_dry_runs_or_names_what_is_missing(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, no_launcher: None
) -> None:
    monkeypatch.chdir(ROOT)
    code = cli.main(["run", str(recipe), "data.train_rows=200", "data.held_out_rows=20", "--dry-run"])
    printed = capsys.readouterr()
    if code:
        lines = printed.err.splitlines()
        missing = (
            r"model\.path: .* the hub can't be reached|(train|source|classifier_rows|preferences).*: got '.*/data/"
        )
        assert lines and all(re.search(missing, line) for line in lines)
        (line,) = [line for line in read("docs/recipes.md").splitlines() if line.startswith(f"| [{recipe.stem}]")]
        assert "published files" in line
    else:
        assert "dry run: everything is checked" in printed.out or "can't be reached" in printed.out


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_has_its_line(recipe: Path) -> None:
    page = read("docs/recipes.md")
    assert f"| [{recipe.stem}](../launch/recipes/{recipe.name}) |" in page
    assert recipe.stem == "small-real" or f"\n| {recipe.stem} |" in page, "of memory"
