"""Stage 1's evaluations under ZeRO-3: their losses, early ends, the best weights, and what they leave as it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluated import OBJECTIVES, OTHERS
from ranks import start
from safetensors.torch import load_file
from tiny_models import TABLE, base_model, specialist
from torch.nn.functional import cross_entropy
from worlds import Runs

from alignx_ds.mocae.experts import PROJECTIONS

WORLDS = pytest.mark.parametrize("world", [1, 2])


def of(runs: Runs, world: int, what: str) -> Any:
    first, *others = (part[what] for part in runs.of(world, "evaluated"))
    if what != "stopped":  # ranks hold the same
        assert all(other == first for other in others)
    return first


@torch.no_grad()
def mean_loss(vectors: dict[int, Any]) -> float:
    """Of all answer tokens of the evaluated rows, one row at a time, with these task vectors."""
    trained = specialist(base_model(), {layer: [vectors[layer]] for layer in vectors}, 1)
    total = count = 0.0
    for example in OTHERS:
        logits = trained(torch.tensor([example.ids])).logits[0, example.prompt_length - 1 : -1]
        total += float(cross_entropy(logits, torch.tensor(example.ids[example.prompt_length :]), reduction="sum"))
        count += example.answer_length
    return total / count


@WORLDS
@pytest.mark.parametrize("trainable", ["ffn", "lora"])
def test_evaluations_leave_training_as_it_was(world: int, trainable: str, runs: Runs) -> None:
    without, with_them = of(runs, world, "undisturbed")[trainable]
    assert "evaluation" not in without and len(with_them["evaluation"]["losses"]) == 3
    assert with_them["losses"] == without["losses"] and with_them["files"] == without["files"]
    assert with_them["fingerprint"] != without["fingerprint"], "and yet it is no other's result"


@WORLDS
def test_a_job_ends_when_evaluations_get_no_better_and_keeps_the_best_weights(world: int, runs: Runs) -> None:
    """The weights that it keeps have the lowest of the losses, which is that of every row by itself."""
    made = of(runs, world, "stopped")
    found = made["manifest"]["evaluation"]
    losses = [loss for _, loss in found["losses"]]
    assert [step for step, _ in found["losses"]] == [2, 4, 6, 8] and losses.index(min(losses)) == 1
    assert (found["best"], found["kept"], found["stopped"]) == (4, 4, 8)
    assert len(made["manifest"]["losses"]) == 8
    assert mean_loss(made["vectors"]) == pytest.approx(found["lowest"], rel=1e-5)
    assert made["checkpoints"] == ["step_00000004", "step_00000005"], "the best, and the newest"


@WORLDS
def test_the_kept_weights_are_the_best_checkpoint_s(world: int, runs: Runs) -> None:
    vectors, saved = of(runs, world, "stopped")["vectors"], dict[str, Any]()
    for file in runs.root.glob(f"evaluated stopped {world}/checkpoints/stage1/a/step_00000004/rank*.safetensors"):
        saved |= load_file(file)
    start_weights = dict(base_model().named_parameters())
    for layer, changes in vectors.items():
        for p in PROJECTIONS:
            name = TABLE.weight_name(layer, p)
            assert torch.equal(changes[p], saved[f"weight/{name}"] - start_weights[name].detach())


def test_two_ranks_find_what_one_does(runs: Runs) -> None:
    alone, together = (of(runs, world, "stopped")["manifest"] for world in (1, 2))
    np.testing.assert_allclose(together["evaluation"]["losses"], alone["evaluation"]["losses"], rtol=1e-5)
    np.testing.assert_allclose(together["losses"], alone["losses"], rtol=1e-3)


@WORLDS
def test_a_resumed_job_ends_where_an_uninterrupted_one_does(world: int, runs: Runs) -> None:
    """Stopped before its best step, and while it waited for a better one: the same counts, and the same weights."""
    whole = of(runs, world, "stopped")["manifest"]
    for resumed in of(runs, world, "resumed").values():
        assert resumed["evaluation"] == whole["evaluation"] and resumed["losses"] == whole["losses"]
        assert resumed["files"] == whole["files"]


def test_one_rank_s_unfinished_job_is_finished_by_two(runs: Runs, tmp_path: Path) -> None:
    """Its best step was before it was stopped: two ranks load the weights that one has saved."""
    whole = of(runs, 1, "stopped")
    start(Path(__file__).with_name("worker.py"), 2, str(runs.root), "moved", logs=tmp_path)
    made = torch.load(runs.root / "moved.0.2.pt", weights_only=False)
    np.testing.assert_allclose(
        made["manifest"]["evaluation"]["losses"], whole["manifest"]["evaluation"]["losses"], 1e-5
    )
    assert made["manifest"]["evaluation"]["kept"] == 4
    for layer, changes in whole["vectors"].items():
        for p in PROJECTIONS:
            assert torch.equal(made["vectors"][layer][p], changes[p])


@pytest.mark.parametrize(("world", "name"), [(world, name) for world, names in OBJECTIVES.items() for name in names])
def test_an_evaluation_of_the_training_rows_is_the_next_step_s_loss(world: int, name: str, runs: Runs) -> None:
    """Of the objective itself, with the shifts of kto and bco: each step has all rows, with the weights of then."""
    made = of(runs, world, "objectives")[name]
    evaluated = [loss for _, loss in made["evaluation"]["losses"]]
    np.testing.assert_allclose(evaluated[:-1], made["losses"][1:], rtol=1e-5)
    assert evaluated[-1] < evaluated[0]
