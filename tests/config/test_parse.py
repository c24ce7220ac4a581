"""The run's config: what overrules what, and that every mistake is named by its key, all at once."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from alignx_ds.config import parse, schema
from alignx_ds.config.schema import RunConfig
from alignx_ds.errors import ConfigError
from alignx_ds.plan.checks import check

WriteRecipe = Callable[..., Path]


def problems(recipe: Path, *overrides: str) -> dict[str, str]:
    """Key -> the whole message, of a config that must be refused."""
    with pytest.raises(ConfigError) as error:
        parse.load(recipe, list(overrides))
    assert str(error.value).splitlines() == [str(p) for p in error.value.problems], "one line per problem"
    return {p.key: str(p) for p in error.value.problems}


def without(recipe: Path, *keys: str) -> Path:
    """The recipe file without these keys."""
    values = OmegaConf.load(recipe)
    for key in keys:
        *parents, last = key.split(".")
        node = OmegaConf.select(values, ".".join(parents)) if parents else values
        del node[last]
    OmegaConf.save(values, recipe)
    return recipe


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict):
        for key, child in node.items():
            yield from leaves(child, f"{path}.{key}" if path else key)
    else:
        yield path, node


def test_every_shipped_recipe_loads(repo_root: Path) -> None:
    recipes = sorted((repo_root / "launch/recipes").glob("*.yaml"))
    assert recipes
    for recipe in recipes:
        assert parse.load(recipe).axes


def test_the_command_line_overrules_the_recipe_and_the_recipe_the_defaults(write_recipe: WriteRecipe) -> None:
    recipe = write_recipe("train.lr=0.5", "train.batch=8")
    loaded = parse.load(recipe, ["train.lr=0.25"])
    assert (loaded.train.lr, loaded.train.batch, loaded.train.clip) == (0.25, 8, schema.TrainConfig().clip)
    assert parse.load(recipe).train.lr == 0.5
    assert parse.load(recipe, ["train.lr=0.25", "train.lr=0.125"]).train.lr == 0.125  # the last one counts


def test_any_leaf_can_be_set_on_the_command_line_and_changes_nothing_else(write_recipe: WriteRecipe) -> None:
    """Half of the leaves at a time, by each bit of their number: any two are once set apart, either way round."""
    recipe = write_recipe()
    before = dict(leaves(parse.to_dict(parse.load(recipe))))
    other = {int: 7, float: 0.75, str: "other", bool: True}
    source: Any = {"source": "other", "schema": "", "columns": {}, "only": ""}
    empty = {"refusals": "other", "trackers": "other", "routing": source, "negatives": source, "noise_layers": 7}
    changes = {
        k: ([other[type(v[0])] if v else empty[k.rpartition(".")[2]]]) if isinstance(v, list) else other[type(v)]
        for k, v in before.items()
    }
    for bit, side in itertools.product(range(len(before).bit_length()), (0, 1)):
        chosen = {key: value for n, (key, value) in enumerate(changes.items()) if n >> bit & 1 == side}
        loaded = parse.load(recipe, [f"{key}={value}" for key, value in chosen.items()])
        assert dict(leaves(parse.to_dict(loaded))) == before | chosen


def test_an_axis_is_a_config_entry(write_recipe: WriteRecipe) -> None:
    entry = {"prompt": "be kind .", "schema": "plain", "train": "world", "held_out": "world", "judge": "task"}
    loaded = parse.load(write_recipe(), [f"axes.kind.{key}={value}" for key, value in entry.items()])
    assert loaded.expert_names == ["generalist", "helpful", "harmless", "honest", "kind"]
    assert loaded.axes["kind"] == schema.AxisConfig(**entry)


def test_what_is_written_loads_as_what_it_was(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    loaded = parse.load(write_recipe("seed=5", "model.layers=[1,4]", "train.lr=3e-5"))
    written = tmp_path / "written.yaml"
    written.write_text(parse.to_yaml(loaded))
    assert parse.load(written) == loaded


@pytest.mark.parametrize(
    ("typo", "meant"),
    [("train.stps", "train.steps"), ("aling", "align"), ("axes.helpful.promt", "axes.helpful.prompt")],
)
def test_an_unknown_key_is_refused_with_what_was_meant(write_recipe: WriteRecipe, typo: str, meant: str) -> None:
    found = problems(write_recipe(), f"{typo}=1")
    assert list(found) == [typo]
    assert f"did you mean '{meant}'?" in found[typo]


def test_an_unknown_key_in_the_file_is_refused_too(write_recipe: WriteRecipe) -> None:
    found = problems(write_recipe("train.momentum=0.9"))
    assert list(found) == ["train.momentum"]
    assert "0.9" in found["train.momentum"]


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("train.steps=many", "train.steps"),
        ("train.steps=1.5", "train.steps"),
        ("train.lr=fast", "train.lr"),
        ("model.layers=2", "model.layers"),
        ("model.layers=[a]", "model.layers"),
        ("train=3", "train"),
        ("axes=3", "axes"),
        ("axes.helpful=3", "axes.helpful"),
        ("seed=", "seed"),
    ],
)
def test_a_value_of_the_wrong_type_is_named(write_recipe: WriteRecipe, override: str, key: str) -> None:
    assert key in problems(write_recipe(), override)


@pytest.mark.parametrize("override", ["lonely", "=3", "output=[1", "output=${nowhere}"])
def test_an_override_that_cannot_be_read_is_refused(write_recipe: WriteRecipe, override: str) -> None:
    (message,) = problems(write_recipe(), override).values()
    assert override.split("=")[-1] in message


@pytest.mark.parametrize("key", ["output", "model.path", "axes.honest.schema", "axes.honest.train"])
def test_a_missing_value_is_named(write_recipe: WriteRecipe, key: str) -> None:
    assert list(problems(without(write_recipe(), key))) == [key]
    assert list(problems(write_recipe(), f"{key}=???")) == [key]


def test_what_an_axis_can_do_without_may_be_left_out(write_recipe: WriteRecipe) -> None:
    loaded = parse.load(without(write_recipe(), "axes.honest.judge", "axes.honest.held_out", "generalist"))
    assert (loaded.axes["honest"].judge, loaded.axes["honest"].held_out) == ("", "")
    assert loaded.generalist == schema.GeneralistConfig()


def test_columns_are_mapped_in_the_file_or_on_the_command_line(write_recipe: WriteRecipe, tmp_path: Path) -> None:
    """Also where a name has spaces in it."""
    values = OmegaConf.load(write_recipe())
    values.axes.honest.columns = {"Best Answer": "the best"}
    OmegaConf.save(values, tmp_path / "mapped.yaml")
    loaded = parse.load(tmp_path / "mapped.yaml", ["axes.honest.columns.Question=asked"])
    assert loaded.axes["honest"].columns == {"Best Answer": "the best", "Question": "asked"}
    assert loaded.axes["helpful"].columns == {}
    assert list(problems(write_recipe(), "axes.honest.columns=asked")) == ["axes.honest.columns"]


@pytest.mark.parametrize("key", ["evaluation.sets.x", "scratch.texts.x"])
def test_an_entry_that_lacks_a_value_is_named(write_recipe: WriteRecipe, key: str) -> None:
    found = problems(write_recipe(), f"{key}.schema=plain")
    assert f"{key}.source" in found
    assert all(name.startswith(f"{key}.") for name in found)


def test_all_problems_are_reported_at_once(write_recipe: WriteRecipe) -> None:
    recipe = without(write_recipe("gate.latnt=3", "train.batch=big"), "output")
    found = problems(recipe, "align.seps=1", "seed=x", "lonely")
    assert set(found) == {"output", "gate.latnt", "train.batch", "align.seps", "seed", "command line"}


@pytest.mark.parametrize("content", [b"a: [", b"\xff\xfe", b"- 1", b"a: 1\na: 2\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert list(problems(tmp_path / "r.yaml")) == ["recipe"]


def test_a_recipe_that_is_not_there_is_refused(tmp_path: Path) -> None:
    assert "nowhere.yaml" in problems(tmp_path / "nowhere.yaml")["recipe"]
    assert "recipe" in problems(tmp_path)


@pytest.mark.parametrize("name", ["my.axis", "3"])
def test_an_axis_with_an_odd_name_in_the_file_is_refused_not_fatal(repo_root: Path, tmp_path: Path, name: str) -> None:
    """Whether it is refused on loading or by the checks that follow."""
    text = (repo_root / "launch/recipes/world.yaml").read_text().replace("  helpful:", f"  {name}:")
    (tmp_path / "odd.yaml").write_text(text)
    with pytest.raises(ConfigError, match=rf"axes\.{re.escape(name)}"):
        check(parse.load(tmp_path / "odd.yaml", ["launch.ranks=1", "align.ep_size=1"]), 1)


def test_expert_zero_is_the_generalist(tiny_config: RunConfig) -> None:
    assert tiny_config.expert_names == ["generalist", *tiny_config.axes]
