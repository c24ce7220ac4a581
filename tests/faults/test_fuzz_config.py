"""Hundreds of configs that can't be run: each is refused as such, and names the key that is wrong.

ALIGNX_FUZZ=10 tries ten times as many combinations.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from dataclasses import is_dataclass
from math import inf, nan
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from alignx_ds.config import parse
from alignx_ds.config.schema import RoutingSourceConfig, RunConfig
from alignx_ds.errors import ConfigError, DataError
from alignx_ds.plan.checks import check
from alignx_ds.runs import outputs

FUZZ = int(os.environ.get("ALIGNX_FUZZ", "1"))
LEAST_REFUSED = 500
TOGETHER = 12  # wrong values in one config: to try each alone takes twice as long
VALUES_A_KEY = 3  # of the wrong ones of its type, in turn; more of them with ALIGNX_FUZZ
ENTRIES = {"axes": "helpful", "texts": "t", "sets": "s"}  # the entry of each mapping that is tried
LONG = "x" * 5000
WRONG: dict[Any, list[Any]] = {
    int: ["many", 1.5, True, None, [1], {"a": 1}, -1, nan, 10**30],
    float: ["fast", nan, inf, -inf, None, [1.0], {"a": 1.0}, 10**400],
    str: [None, ["a"], {"a": "b"}, "bell\a", LONG],
    bool: ["maybe", None, [True], 2],
    # a source of rows, or a list of sources
    Any: [3, None, [], {"a": "b"}, "bell\a", LONG, [None], [["a"]], [{"sorce": "a"}], ["bell\a"], [{"source": LONG}],
          [{"source": "world", "weight": nan}, "a"], [{"source": "world", "columns": 3}], True, nan],
    list[int]: [3, "a", None, {"a": 1}, [None], [[1]], [-1], [10**30], [0.5]],
    list[str]: [3, None, {"a": 1}, [None], [["ties"]], [{"a": 1}]],
    list[RoutingSourceConfig]: [3, "a", None, {"source": "world"}, [None], ["a"], [{}], [{"source": None}],
          [{"sorce": "a"}], [{"source": "world", "schema": "chat"}], [{"source": "world", "only": "harmful"}],
          [{"source": "nowhere.csv"}]],
    dict: [3, "a", None, [1], {"a.b": "x"}, {"": 3}],
}  # fmt: skip
Change = tuple[str, Any]  # dotted key, value that it can't have


def schema(kind: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, type) of every section, entry and leaf."""
    for name, hint in get_type_hints(kind).items():
        key = f"{prefix}{name}"
        if is_dataclass(hint):
            yield key, dict
            yield from schema(hint, f"{key}.")
        elif get_origin(hint) is dict:
            yield key, dict
            if is_dataclass(inner := get_args(hint)[1]):
                yield f"{key}.{ENTRIES[name]}", dict
                yield from schema(inner, f"{key}.{ENTRIES[name]}.")
        else:
            yield key, hint


SCHEMA = dict(schema(RunConfig))
SECTIONS = [
    key for key, kind in SCHEMA.items() if kind is dict and not key.endswith(("columns", "axes", "sets", "texts"))
]


def wrong_values() -> list[Change]:
    found: list[Change] = []
    for number, (key, kind) in enumerate(SCHEMA.items()):
        values = [v for v in WRONG[kind] if not (key.endswith(".prompt") and v == LONG)]
        if kind is float:
            values.append(-1.0)
        turned = [*values[number % len(values) :], *values[: number % len(values)]]
        found += [(key, value) for value in turned[: VALUES_A_KEY * FUZZ]]
    return found


TYPOS: list[Change] = [
    *((f"{section}.stray", 1) for section in SECTIONS),
    ("aling", {}),
    ("sed", 1),
    ("axes.helpful.promt", "x"),
    ("train.lr.rate", 1.0),
    ("launch.ranks.of", 2),
]
SPECIAL: list[Change] = [
    ("model.dtype", "float16"),
    ("model.path", "no/such/model"),
    ("model.path", ""),
    ("model.path", "x" * 300),
    ("model.layers", [5]),
    ("model.layers", [2, 2]),
    ("output", ""),
    ("gate.scope", "global"),
    ("gate.latent", 10**6),
    ("gate.scales", 33),
    ("gate.top_k", 5),
    ("axes.helpful.schema", "chat"),
    ("axes.helpful.judge", "gpt"),
    ("axes.helpful.train", ""),
    ("axes.helpful.train", "nowhere.csv"),
    ("axes.helpful.columns", {"instruction": None}),
    ("axes.helpful.columns", {"question": "instruction"}),
    *((f"axes.{name}", {"prompt": "p", "schema": "plain", "train": "world", "held_out": "world"}) for name in
      ("a.b", "a b", "a[0]", "a\nb", "../up", "<b>", "", "base", "x" * 65, "???", "${seed}")),
    *((key, text) for key in ("seed", "output", "train.lr", "model.layers", "axes.helpful.prompt")
      for text in ("${nowhere}", f"${{{key}}}", "${train}", "${oc.env:NOT_SET}", "${nothing:1}", "${")),
    ("model.layers", ["${nowhere}"]),
    ("align.ep_size", 3),
    ("align.ep_size", -1),
    ("align.batch", 63),
    *((f"{stage}.checkpoint_activations", text) for stage in ("train", "align") for text in ("", "sometimes", 1)),
    ("train.accumulation", 7),
    ("train.evaluate.patience", 3),
    ("baselines.h3fusion.batch", 33),
    ("baselines.make", ["ties", "slerp"]),
    ("launch.ranks", 3),
    ("data.held_out_share", 1),
    ("data.calibration_share", 0),
    *((f"{stage}.warmup_steps", 1000) for stage in ("train", "align", "baselines.trinityx", "scratch.train")),
    ("train.deepspeed", "nowhere.json"),
    ("align.deepspeed", "ds_configs/stage1_zero3.json"),
    ("evaluation.sets.base", {"schema": "plain", "source": "world", "judge": "task"}),
    ("evaluation.sets.s.judge", "nobody"),
    ("scratch.vocabulary", 3),
    ("scratch.heads", 3),
]  # fmt: skip
CHANGES = [*wrong_values(), *TYPOS, *SPECIAL]
LEAVES = [c for c in wrong_values() if SCHEMA[c[0]] is not dict]  # none of them removes another's key


@pytest.fixture(scope="module")
def whole(repo_root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The world's recipe with an entry in every mapping, so that every key is there and looked at."""
    recipe = yaml.safe_load((repo_root / "launch/recipes/world.yaml").read_text())
    recipe["output"] = str(tmp_path_factory.mktemp("run") / "new")
    recipe["scratch"] = {"texts": {"t": {"schema": "plain", "source": "world"}}, "train": {"steps": 50}}
    recipe["evaluation"]["sets"] = {"s": {"schema": "plain", "source": "world", "judge": "task"}}
    return recipe


def refusal(recipe: Path, *overrides: str) -> ConfigError | DataError | None:
    """The messages of a dry run before it reads a row. Errors other than our own propagate."""
    try:
        loaded = parse.load(recipe, list(overrides))
        check(loaded, min(8, loaded.launch.ranks), weights=False)
        outputs.check_owner(loaded)
    except (ConfigError, DataError) as error:
        return error
    return None


def changed(values: dict[str, Any], changes: list[Change]) -> dict[str, Any]:
    values = copy.deepcopy(values)
    for key, value in changes:
        head, _, name = key.partition(".")
        section, place = values, key.split(".")
        if key.startswith(("axes.", "evaluation.sets.")) and isinstance(value, dict):  # entries of any name
            section = section["axes"] if head == "axes" else section["evaluation"]["sets"]
            place = [name.removeprefix("sets.")]
        for parent in place[:-1]:
            if not isinstance(section.get(parent), dict):
                section[parent] = {}
            section = section[parent]
        section[place[-1]] = value
        if head == "scratch":
            values["model"] = {"path": "scratch"}
    return values


def written(values: dict[str, Any], path: Path) -> Path:
    path.write_text(yaml.dump(values, Dumper=yaml.CSafeDumper, sort_keys=False, allow_unicode=True))
    return path


def shown(key: str) -> str:
    """As a message has it: the key, or the one above it that holds a value and no more keys."""
    parts = key.split(".")
    above = [".".join(parts[:n]) for n in range(1, len(parts))]
    key = next((a for a in above if SCHEMA.get(a, dict) is not dict or ".columns." in a), key)
    return key.removesuffix(".columns").encode("unicode_escape", "surrogatepass").decode()


def is_told(error: ConfigError | DataError | None, key: str) -> bool:
    """Whether it is an error that names the key, and a line for each of its problems."""
    if error is None:
        return False
    lines = str(error).splitlines()
    tidy = all(line.isprintable() for line in lines) and len(lines) == len(getattr(error, "problems", lines))
    return tidy and any(shown(key) in line for line in lines)


def own_line(key: str, line: str) -> bool:
    return line.startswith(f"{shown(key)}: ")


def test_the_recipe_that_is_spoiled_can_be_run(whole: dict[str, Any], tmp_path: Path) -> None:
    assert refusal(written(whole, tmp_path / "r.yaml")) is None
    assert refusal(written(changed(whole, [("scratch.heads", 8)]), tmp_path / "r.yaml")) is None


@pytest.mark.tried(
    "input",
    "more than 500 invalid values, alone or a dozen in one config",
    "code 2 before anything starts, a line that names the key",
)
def test_every_wrong_value_is_refused_and_its_key_is_named(whole: dict[str, Any], tmp_path: Path) -> None:
    """Leaves together first; then each by itself that has no line of its own there, since earlier checks hide it."""
    wrong, left = [], [c for c in CHANGES if c not in LEAVES]
    groups = -(-len(LEAVES) // TOGETHER)
    for group in (LEAVES[start::groups] for start in range(groups)):
        error = refusal(written(changed(whole, group), tmp_path / "r.yaml"))
        lines = str(error).splitlines()
        left += [c for c in group if not is_told(error, c[0]) or not any(own_line(c[0], line) for line in lines)]
    for key, value in left:
        error = refusal(written(changed(whole, [(key, value)]), tmp_path / "r.yaml"))
        if not is_told(error, key):
            wrong.append((key, value, str(error)))
    assert not wrong, wrong
    assert len(CHANGES) >= LEAST_REFUSED


def as_override(change: Change) -> str:
    key, value = change
    return f"{key}={yaml.safe_dump([value], default_flow_style=True, width=inf, allow_unicode=True).strip()[1:-1]}"


ON_THE_COMMAND_LINE = [c for c in CHANGES if not isinstance(c[1], (dict, list)) and not str(c[1]).startswith("${")]


@pytest.mark.tried(
    "input", "several invalid keys at once, in the recipe and on the command line", "a line for every one of them"
)
@settings(max_examples=30 * FUZZ, deadline=None, derandomize=True)
@given(
    in_file=st.lists(st.sampled_from(CHANGES), max_size=2),
    given=st.lists(st.sampled_from(ON_THE_COMMAND_LINE), max_size=2),
)
def test_several_at_once_in_the_recipe_and_on_the_command_line(
    whole: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, in_file: list[Change], given: list[Change]
) -> None:
    above = {key for key, _ in given}
    given = [(key, value) for key, value in given if not any(key.startswith(f"{a}.") for a in above)]  # it would win
    if in_file or given:
        scratch = ["model.path=scratch"] if any(key.startswith("scratch") for key, _ in given) else []
        recipe = written(changed(whole, in_file), tmp_path_factory.mktemp("fuzz") / "r.yaml")
        error = refusal(recipe, *scratch, *map(as_override, given))
        assert error is not None
        assert any(is_told(error, key) for key, _ in [*in_file, *given]), str(error)


TOO_MANY_DIGITS = "9" * 5000
RECIPES = {
    "not UTF-8": b"output: \xe9\n",
    "UTF-16": "output: x\n".encode("utf-16"),
    "a NUL byte": b"output: a\0b\n",
    "a list": b"- output\n",
    "a word": b"hello\n",
    "nothing": b"",
    "two documents": b"seed: 1\n---\nseed: 2\n",
    "a key twice": b"seed: 1\nseed: 2\n",
    "a key twice within": b"train: {lr: 1, lr: 2}\n",
    "a mapping that holds itself": b"train: &a\n  lr: *a\n",
    "a list that holds itself": b"model: &a [*a]\n",
    "anchors that grow": b"a: &a [x,x]\n"
    + b"".join(b"%c: &%c [%s]\n" % (n, n, b",".join([b"*%c" % (n - 1)] * 9)) for n in b"bcdefgh"),
    "nested too deep": b"a: " + b"[" * 3000 + b"]" * 3000,
    "mappings too deep": b"a: " + b"{a: " * 2000 + b"}" * 2000,
    "too many digits": b"seed: " + TOO_MANY_DIGITS.encode(),
    "code": b"seed: !!python/object/apply:os.getpid []\n",
    "a list as a key": b"? [a, b]\n: 1\n",
    "nothing as a key": b"? \n: 1\n",
    "a tab": b"train:\n\tlr: 1\n",
    "half an interpolation": b"seed: ${\n",
    "an unclosed list": b"seed: [1\n",
    "an unknown alias": b"seed: *a\n",
}


@pytest.mark.tried("input", "files that are no recipe", "one line with the reason")
@pytest.mark.parametrize("content", RECIPES.values(), ids=RECIPES)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.yaml").write_bytes(content)
    assert isinstance(refusal(tmp_path / "r.yaml"), ConfigError)


OVERRIDES = [
    "lonely", "", "=", "==", ".=3", "train.=3", ".train=3", "train..lr=3", "axes.=3", "train.lr==3", "a\nb=3",
    "\x1b[31m=3", "seed=[", "seed={", "seed={a", "seed=*a", "seed=&a [*a]", "seed=${", "seed=\0", "seed=\ud800",
    "output=\udcff", f"seed={TOO_MANY_DIGITS}", "seed=" + "[" * 3000, "seed=!!python/name:os.getpid", "seed=- 3",
    "seed=???",
    "train[lr]=3", "train.lr[0]=3", "model.layers[0]=3", "model.layers.0=3", "axes.helpful=null", "axes.new={}",
    'model.layers=["???"]', "axes.helpful.columns.x.y=3", "axes.helpful.columns={1: 2}", "judges.endpoint=http://[ ",
]  # fmt: skip


@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: ascii(text)[:40])
def test_an_override_that_can_not_be_read_is_refused(whole: dict[str, Any], tmp_path: Path, override: str) -> None:
    judged = ["evaluation.sets.s.judge=alpaca_eval"]  # so that the endpoint is looked at
    error = refusal(written(whole, tmp_path / "r.yaml"), override, *judged)
    assert isinstance(error, ConfigError)
    key = override.partition("=")[0]
    assert is_told(error, key) or is_told(error, "command line")


VALID: list[Change] = [
    ("seed", 2**31 - 1),
    ("model.layers", [0]),
    ("train.warmup_steps", 120),
    ("train.lr", "${align.lr}"),
    ("output", "${oc.env:HOME}/never-made"),
    ("axes.helpful.prompt", "two\nlines\tand ü 🙂"),
    ("axes.helpful.prompt", LONG),
    ("axes.grüße", {"prompt": "p", "schema": "plain", "train": "world", "held_out": "world"}),
    ("evaluation.compile", "yes"),
    ("gate.scales", 32),
    ("train.checkpoint_activations", True),
    ("align.checkpoint_activations", "false"),
]


@pytest.mark.parametrize("change", VALID, ids=lambda change: change[0])
def test_odd_but_right_values_pass(whole: dict[str, Any], tmp_path: Path, change: Change) -> None:
    error = refusal(written(changed(whole, [change, ("align.ep_size", 1)]), tmp_path / "r.yaml"))
    assert error is None, error
