"""H3Fusion and TrinityX trained on real engines: any world size and accumulation gives plain torch's weights."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import EXAMPLES, LABELS, PAD, SEED, fusion_config, fusion_context, schedule
from tiny_models import ALIGNX_LAYERS, base_model, padded, random_changes, random_rows, relative, specialist, table_of
from torch import Tensor
from whole_logits import answer_nll
from worlds import Runs

from alignx_ds.baselines.fusion import FullExperts, fusion_layers, replace_ffns
from alignx_ds.data.batches import collate
from alignx_ds.data.encode import LabelledExamples
from alignx_ds.data.sampling import global_batches
from alignx_ds.mocae.experts import FeedForward
from alignx_ds.models.base import BaseModel
from alignx_ds.runs import manifest
from alignx_ds.stages import fuse
from alignx_ds.stages.stage import StageContext

NAMES = ("h3fusion", "trinityx")
VARIANTS = [(1, "acc1"), (1, "acc2"), (2, "acc1")]


def start(name: str) -> Any:
    """The specialists' FFNs side by side, with gates drawn at random."""
    model, table = copy.deepcopy(base_model()), table_of(base_model())
    specialists = [specialist(base_model(), random_changes(base_model()), n) for n in (1, 2, 3)]

    def make(layer: int, ffn: FeedForward) -> FullExperts:
        views = [table.view(table.ffn_of(s, layer)) for s in specialists]
        return FullExperts(views, fuse.SETTINGS[name], grouped=False)

    replace_ffns(model, table, ALIGNX_LAYERS, make)
    return model


def terms(model: Any, begin: list[Tensor], chosen: list[int], c: Any) -> Tensor:
    """The whole loss of one global batch, from its definition."""
    b = collate([EXAMPLES[i] for i in chosen], PAD)
    logits = model(input_ids=b.input_ids, attention_mask=b.attention_mask).logits
    loss = answer_nll(logits, b.labels) / sum(EXAMPLES[i].answer_length for i in chosen)
    for layer in fusion_layers(model):
        gates = (layer.logits.view(*b.input_ids.shape, 3) / layer.settings.temperature).softmax(-1)
        for row, i in enumerate(chosen):
            own = gates[row][b.attention_mask[row].bool()]
            scale = 1 / (len(chosen) * len(ALIGNX_LAYERS))
            if LABELS[i]:
                loss = loss - c.gating * scale * own.mean(0)[LABELS[i] - 1].log()
            entropy = -(own * own.log()).sum(-1).mean()
            loss = loss + scale * (c.entropy * entropy + c.uniform * (math.log(3) - entropy))
    if c.expert_lr_scale:
        weights = [w for layer in fusion_layers(model) for w in layer.weights.values()]
        moved = sum((w - w0).square().sum() for w, w0 in zip(weights, begin, strict=True))
        loss = loss + c.drift * moved / sum(w0.square().sum() for w0 in begin)
    return loss


def in_plain_torch(name: str, gates: dict[str, Tensor]) -> dict[str, Any]:
    c = getattr(fusion_config(Path("base"), 1).baselines, name)
    model = start(name).train()
    model.requires_grad_(False)
    for index, layer in zip(ALIGNX_LAYERS, fusion_layers(model), strict=True):
        layer.gate.weight.data.copy_(gates[f"{index}.gate.weight"])
    layers = fusion_layers(model)
    experts = [w for layer in layers for w in layer.weights.values()] if c.expert_lr_scale else []
    routers = [layer.gate.weight for layer in layers]
    gammas = [layer.gamma for layer in layers if layer.gamma is not None]
    for parameter in (*experts, *routers, *gammas):
        parameter.requires_grad_()
    groups = [
        {"params": routers, "initial": c.lr, "weight_decay": c.weight_decay},
        {"params": gammas, "initial": c.lr, "weight_decay": 0.0},
        {"params": experts, "initial": c.lr * c.expert_lr_scale, "weight_decay": c.weight_decay},
    ]
    optimizer = torch.optim.SGD([g for g in groups if g["params"]], lr=0.0)
    begin = [w.detach().clone() for layer in layers for w in layer.weights.values()]
    losses = []
    for number, chosen in enumerate(global_batches(len(EXAMPLES), c.batch, c.steps, SEED)):
        loss = terms(model, begin, chosen, c)
        loss.backward()
        losses.append(float(loss.detach()))
        torch.nn.utils.clip_grad_norm_([*experts, *routers, *gammas], c.clip)
        for group in optimizer.param_groups:
            group["lr"] = group["initial"] * schedule(number, c.warmup_steps, c.steps)
        optimizer.step()
        optimizer.zero_grad()
    state = {
        f"{i}.{k}": t for i, layer in zip(ALIGNX_LAYERS, layers, strict=True) for k, t in layer.state_dict().items()
    }
    return {"losses": losses, "tensors": state}


def first_gates(runs: Runs, name: str) -> dict[str, Tensor]:
    """The gates that the job starts from: drawn from the seed, whatever was drawn before."""
    config = fusion_config(runs.root / "base", 1)
    torch.manual_seed(SEED)
    specialists = [runs.root / f"specialist{n}" for n in range(3)]
    base = BaseModel(config.model)
    model = fuse.assemble(base, specialists, fuse.SETTINGS[name])
    layers = zip(ALIGNX_LAYERS, fusion_layers(model), strict=True)
    return {f"{i}.gate.weight": layer.gate.weight.detach().clone() for i, layer in layers}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("world", "variant"), VARIANTS)
def test_a_few_steps_give_plain_torch_s_weights(runs: Runs, name: str, world: int, variant: str) -> None:
    for part in runs.of(world, "fusions"):
        expected = in_plain_torch(name, first_gates(runs, name))
        made = part[f"{name} {variant}"]
        np.testing.assert_allclose(made["losses"], expected["losses"], rtol=1e-5)
        assert made["tensors"].keys() == expected["tensors"].keys()
        for key, tensor in expected["tensors"].items():
            assert float((made["tensors"][key] - tensor).abs().max()) < 1e-6, key


@pytest.mark.parametrize("name", NAMES)
def test_only_the_trainable_parameters_change(runs: Runs, name: str) -> None:
    made, begun, gates = runs.of(1, "fusions")[0][f"{name} acc1"]["tensors"], start(name), first_gates(runs, name)
    for index, layer in zip(ALIGNX_LAYERS, fusion_layers(begun), strict=True):
        for p, weight in layer.weights.items():
            assert torch.equal(made[f"{index}.weights.{p}"], weight) == (name == "trinityx")
        assert float((made[f"{index}.gate.weight"] - gates[f"{index}.gate.weight"]).abs().max()) > 1e-3
        if name == "trinityx":
            assert (made[f"{index}.gamma"] != 1).all()


@pytest.mark.parametrize("name", NAMES)
def test_a_second_run_reuses_what_is_there(runs: Runs, name: str) -> None:
    first, second = runs.of(2, "fusions")[0][f"{name} acc1"]["written"]
    assert first == second


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_what_was_saved_is_loaded_again(runs: Runs, name: str) -> None:
    tensors = runs.of(1, "fusions")[0][f"{name} acc1"]["tensors"]
    base = BaseModel(fusion_config(runs.root / "base", 1).model)
    loaded = fuse.load(name, base, runs.root / "fusions11" / "baselines" / name).eval()
    expected = start(name).eval()
    for index, layer in zip(ALIGNX_LAYERS, fusion_layers(expected), strict=True):
        layer.load_state_dict({k.removeprefix(f"{index}."): t for k, t in tensors.items() if k.startswith(f"{index}.")})
    ids, mask = padded(random_rows([12, 7, 9]))
    assert relative(loaded(ids, mask).logits[mask.bool()], expected(ids, mask).logits[mask.bool()]) < 1e-5
    assert relative(loaded(ids, mask).logits[mask.bool()], start(name).eval()(ids, mask).logits[mask.bool()]) > 1e-3


def test_every_input_is_in_the_provenance(runs: Runs, tmp_path: Path) -> None:
    template = json.loads((runs.root / "sgd.json").read_text())
    (tmp_path / "sharded.json").write_text(json.dumps(template | {"zero_optimization": {"stage": 1}}))
    (tmp_path / "other.json").write_text(json.dumps(template | {"optimizer": {"type": "AdamW"}}))
    specialists = [runs.root / f"specialist{n}" for n in range(3)]

    def inputs(change: str = "", value: Any = None, name: str = "h3fusion", reverse: bool = False) -> str:
        context = fusion_context(runs.root, "provenance", 1)
        if change:
            target, key = context.config, change
            while "." in key:
                first, key = key.split(".", 1)
                target = getattr(target, first)
            setattr(target, key, value)
        return fingerprint(context, name, specialists[::-1] if reverse else specialists)

    def fingerprint(context: StageContext, name: str, directories: list[Path]) -> str:
        made = [manifest.read(directory)["fingerprint"] for directory in directories]
        return manifest.fingerprint(fuse.stage_of(context, name, made).inputs)

    def with_other_rows() -> str:
        context = fusion_context(runs.root, "provenance", 1)
        data = replace(context.data, train=LabelledExamples(EXAMPLES[::-1], LABELS))
        return fingerprint(replace(context, data=data), "h3fusion", specialists)

    changed = [
        inputs(),
        inputs("baselines.h3fusion.lr", 0.5),
        inputs("seed", 9),
        inputs("model.dtype", "bfloat16"),
        inputs("baselines.h3fusion.deepspeed", str(tmp_path / "other.json")),
        with_other_rows(),
        inputs(reverse=True),
        inputs(name="trinityx"),
    ]
    assert len(set(changed)) == len(changed)
    assert inputs("baselines.trinityx.lr", 0.5) == inputs(), "the other one's settings are not its own"
    assert inputs("data.calibration_share", 0.5) == inputs(), "the encoded rows decide, not how they were chosen"
    assert inputs("baselines.h3fusion.deepspeed", str(tmp_path / "sharded.json")) == inputs(), "only sharded otherwise"
    assert inputs("baselines.h3fusion.accumulation", 2) == inputs(), "only spread otherwise"
