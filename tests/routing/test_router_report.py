"""The yardstick of the router: a classifier of words, trained and tested on the run's own prompts."""

from __future__ import annotations

import random

import pytest
import torch

from alignx_ds.data.inputs import JoinedRows
from alignx_ds.data.routing import RoutingRows
from alignx_ds.data.rows import Row
from alignx_ds.data.split_rows import SplitRows
from alignx_ds.data.splits import DataSplits
from alignx_ds.routing.router_report import surface_router

EXPERTS = ["generalist", "helpful", "harmless", "honest"]
WORDS = {
    "generalist": "hello night morning friend thanks".split(),
    "helpful": "reverse sort count words list".split(),
    "harmless": "poison steal break hurt hide".split(),
    "honest": "what colour is the myth".split(),
}
SHARED = "the a dog cat and of it".split()


def side(name: str, count: int, seed: int) -> SplitRows:
    source = random.Random(f"{name}{seed}")
    rows = [Row(" ".join(source.choices(WORDS[name], k=3) + source.choices(SHARED, k=4)), "") for _ in range(count)]
    return SplitRows("file" if rows else "", count, rows, [])


def rows(sizes: dict[str, int]) -> DataSplits:
    train = {name: side(name, sizes.get(name, 0), 1) for name in EXPERTS}
    held_out = {name: side(name, sizes.get(name, 0) // 2, 2) for name in EXPERTS}
    return DataSplits(train, held_out, {}, frozenset())


SIZES = {"generalist": 40, "helpful": 80, "harmless": 40, "honest": 40}


def test_informative_words_beat_the_majority() -> None:
    figures = surface_router(rows(SIZES), EXPERTS)
    majority = max(SIZES.values()) / sum(SIZES.values())
    assert figures["accuracy"] > 0.9 > majority
    assert figures["nll"] < 0.7 and figures["brier"] < 0.3
    assert 0 <= figures["ece"] <= 1


def test_uninformative_words_do_not_beat_the_majority() -> None:
    """The same prompts for every expert."""
    one = side("helpful", 40, 1)
    same = DataSplits(dict.fromkeys(EXPERTS, one), dict.fromkeys(EXPERTS, one), {}, frozenset())
    figures = surface_router(same, EXPERTS)
    assert figures["accuracy"] == pytest.approx(0.25, abs=0.1)
    assert figures["nll"] == pytest.approx(torch.tensor(4.0).log().item(), abs=0.02)


@pytest.mark.parametrize("absent", ["generalist", "harmless"])
def test_an_expert_without_rows_is_never_chosen_and_changes_nothing(absent: str) -> None:
    """Its probability is zero: all figures are those of a router that has never heard of it."""
    some = rows({name: n for name, n in SIZES.items() if name != absent})
    present = [name for name in EXPERTS if name != absent]
    found, expected = surface_router(some, EXPERTS), surface_router(some, present)
    assert found == pytest.approx(expected)
    assert all(torch.isfinite(torch.tensor(list(found.values()))))


def test_it_is_tested_on_held_out_prompts_only() -> None:
    """Held-out rows of another axis's words: what it learned is wrong there."""
    given = rows(SIZES)
    swapped = {**given.held_out, "helpful": given.held_out["honest"], "honest": given.held_out["helpful"]}
    figures = surface_router(DataSplits(given.train, swapped, {}, frozenset()), EXPERTS)
    assert figures["accuracy"] < 0.55


@pytest.mark.parametrize("text", ["x", "1 + 2", "?"])
def test_prompts_without_words_are_told_apart_by_their_characters(text: str) -> None:
    marked = [Row(f"{text} {'a b'[2 * n]}", "") for n in (0, 1) for _ in range(9)]
    splits = {"helpful": SplitRows("file", 9, marked[:9], []), "honest": SplitRows("file", 9, marked[9:], [])}
    assert surface_router(DataSplits(splits, splits, {}, frozenset()), ["helpful", "honest"])["accuracy"] == 1.0


def test_a_single_class_needs_no_classifier() -> None:
    """One axis without a generalist."""
    figures = surface_router(rows({"helpful": 10}), EXPERTS)
    assert (figures["accuracy"], figures["nll"]) == (1.0, 0.0)


def test_it_learns_from_joined_rows_and_routing_rows_too() -> None:
    """Words that only they have are then told apart, and in needs a prompt of two axes has both."""
    strange = {"helpful": "frob glib", "honest": "zork quux"}
    asked = {name: [Row(text, "", needs=(name,))] * 20 for name, text in strange.items()}
    both = [Row(f"{WORDS['helpful'][0]} {WORDS['honest'][0]}", "", needs=("helpful", "honest"))] * 20
    given = rows(SIZES)
    held_out = dict.fromkeys(EXPERTS, SplitRows("", 0, [], []))
    tested = {**held_out, "helpful": SplitRows("file", 40, [*asked["helpful"], *both], [])}
    tested["honest"] = SplitRows("file", 20, asked["honest"], [])
    part = RoutingRows("honest", "more (honest)", SplitRows("file", 20, asked["honest"], []), held_out["honest"])
    joined = {"helpful": JoinedRows([*asked["helpful"], *both], both[:5], [])}
    for kind in ("choice", "needs"):
        before = surface_router(DataSplits(given.train, tested, {}, frozenset()), EXPERTS, {}, kind)
        after = surface_router(DataSplits(given.train, tested, {}, frozenset(), (part,)), EXPERTS, joined, kind)
        assert after["accuracy"] == 1.0 > before["accuracy"] + 0.2


def test_in_needs_an_axis_without_rows_is_never_needed() -> None:
    some = rows({name: n for name, n in SIZES.items() if name != "harmless"})
    figures = surface_router(some, EXPERTS, kind="needs")
    assert figures["accuracy"] > 0.9
    assert all(torch.isfinite(torch.tensor(list(figures.values()))))
