"""What stage 1 and stage 2 collect from batches is what each row shows alone, without padding."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_models import (
    ALIGNX_LAYERS,
    EXPERTS,
    TABLE,
    aligned,
    base_model,
    low_rank_experts,
    one_hot,
    random_changes,
    random_rows,
    relative,
    specialist,
)
from torch import Tensor, nn

from alignx_ds.config.schema import ModelConfig
from alignx_ds.data.encode import Example, LabelledExamples
from alignx_ds.experts.features import expert_factors
from alignx_ds.experts.low_rank import TaskFeatures
from alignx_ds.experts.task_vectors import add_task_vector, layer_file, read_factors, read_task_vector
from alignx_ds.mocae.experts import PROJECTIONS
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.models.base import BaseModel
from alignx_ds.routing.fit_geometry import collect

EXAMPLES = [Example(tuple(r), p) for r, p in zip(random_rows([5, 14, 7, 9, 3]), [2, 6, 3, 8, 1], strict=True)]


def recorder(kept: list[Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])

    return keep


@torch.no_grad()
def test_expert_factors_weigh_every_token_once_and_no_padding() -> None:
    base = base_model()
    changes = random_changes(base)
    model = specialist(base, changes, 2)
    own = {layer: changes[layer][1] for layer in ALIGNX_LAYERS}
    found = expert_factors(model, TABLE, own, EXAMPLES, pad_id=0, rank=3, batch=2)
    for layer in ALIGNX_LAYERS:
        view = TABLE.view(TABLE.ffn_of(model, layer))
        for p in PROJECTIONS:
            seen: list[Tensor] = []
            hook = view.projection(p).register_forward_pre_hook(recorder(seen))
            for example in EXAMPLES:
                model(torch.tensor([example.ids]))
            hook.remove()
            features = TaskFeatures(own[layer][p])
            features.add(torch.cat([rows[0] for rows in seen]))
            expected = features.factor(3)
            got = found[layer][p]
            assert relative(got.up @ got.down, expected.up @ expected.down) < 1e-4
            assert got.error == pytest.approx(expected.error, rel=1e-4)
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("scope", ["shared", "per_layer"])
@torch.no_grad()
def test_geometry_features_are_each_row_s_own_with_its_expert_forced(scope: str) -> None:
    base = base_model()
    model = aligned(base, low_rank_experts(base), scope=scope)
    rows = LabelledExamples(EXAMPLES, [1, 3, 0, 1, 1])  # nothing belongs to expert 2
    queries, outputs = collect(model, rows, pad_id=0, batch=2)
    assert sorted(queries) == (ALIGNX_LAYERS if scope == "per_layer" else ALIGNX_LAYERS[:1])
    assert sorted(outputs) == ALIGNX_LAYERS
    for index, layer in zip(ALIGNX_LAYERS, alignx_layers(model), strict=True):
        inputs: list[Tensor] = []
        made: list[Tensor] = []
        hooks = [
            layer.register_forward_pre_hook(recorder(inputs)),
            layer.calibration.register_forward_pre_hook(recorder(made)),
        ]
        for example, expert in zip(EXAMPLES, rows.experts, strict=True):
            model(torch.tensor([example.ids]), forced=one_hot([expert]))
        for hook in hooks:
            hook.remove()
        for e in range(EXPERTS):
            own = [i for i in range(len(EXAMPLES)) if rows.experts[i] == e]
            if not own:
                assert outputs[index].by_expert[e].numel() == 0
                continue
            if index in queries:
                prompts = [inputs[i][0, : EXAMPLES[i].prompt_length] for i in own]
                expected = [torch.cat([p.mean(0), p.max(0).values, p.min(0).values, p[-1]]) for p in prompts]
                assert relative(queries[index].by_expert[e], torch.stack(expected)) < 1e-5
            assert relative(outputs[index].by_expert[e], torch.cat([made[i][0] for i in own])) < 1e-5
    assert not any(layer.mixture._forward_hooks for layer in alignx_layers(model))


@torch.no_grad()
def test_a_task_vector_on_disk_makes_the_specialist(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    model = base_model()
    model.save_pretrained(tmp_path / "base")
    base = BaseModel(ModelConfig(path=str(tmp_path / "base"), layers=ALIGNX_LAYERS))
    rounded = BaseModel(replace(base.settings, dtype="bfloat16"))
    changes = random_changes(model)
    for layer in ALIGNX_LAYERS:
        tensors = {f"task_vector.{p}": changes[layer][0][p] for p in PROJECTIONS}
        tensors |= {
            f"factors.{p}.{s}": torch.full((2, 2), float(len(p + s))) for p in PROJECTIONS for s in ("down", "up")
        }
        save_file(tensors, layer_file(tmp_path, layer))
        assert all(torch.equal(c, changes[layer][0][p]) for p, c in read_task_vector(tmp_path, layer).items())
        assert float(read_factors(tmp_path, layer).down["gate"][0, 0]) == len("gatedown")
        for p in PROJECTIONS:
            weight = TABLE.view(TABLE.ffn_of(model, layer)).projection(p).weight
            assert torch.equal(base.weight(layer, p), weight)
            assert torch.equal(rounded.weight(layer, p), weight.bfloat16().float())
    add_task_vector(model, base, tmp_path)
    expected = specialist(base_model(), changes, 1)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))
