"""On a GPU, in fp32 and bf16: the fused and the parallel path agree with each other and with the CPU."""

from __future__ import annotations

import copy
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import (
    TABLE,
    aligned,
    base_model,
    connect,
    factor_gradients,
    generator,
    low_rank_experts,
    one_hot,
    padded,
    random_rows,
    relative,
)
from torch import Tensor

from alignx_ds.data.batches import collate, pack
from alignx_ds.data.encode import Example
from alignx_ds.mocae.experts import PROJECTIONS, Factors
from alignx_ds.mocae.fused import FusedMixture
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXForCausalLM, Placement
from alignx_ds.mocae.parallel import ParallelMixture

DTYPES = {torch.float32: 2e-5, torch.bfloat16: 0.05}  # with the error that another order of the sums may cause
ROWS = random_rows([5, 9, 2, 7, 1], seed=4)


def model(device: str, dtype: torch.dtype, top_k: int = 1, placement: Placement | None = None) -> AlignXForCausalLM:
    base = base_model()
    made = aligned(base, low_rank_experts(base), top_k=top_k, placement=placement)
    made = made.to(device)
    made.backbone.to(dtype)
    for layer in alignx_layers(made):  # gate and calibration stay fp32, as in a loaded model
        layer.calibration.float()
        if layer.gate is not None:
            layer.gate.float()
    return made


@pytest.mark.parametrize("count", [1, 2, 4], ids=lambda n: f"top {n}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_two_paths_agree(device: str, group: None, dtype: torch.dtype, count: int) -> None:
    """Output and gradients of one layer's mixture, few rows and many."""
    base = base_model().to(device, dtype)
    ffn = TABLE.view(TABLE.ffn_of(base, 1))
    specialists = low_rank_experts(base_model())[1]
    ranks = {p: specialists[0].rank(p) for p in PROJECTIONS}
    experts = [Factors.zeros(ffn, ranks), *specialists]
    source = generator(5)
    for rows in (1, 2, 6):
        x = torch.randn(rows, 7, base.config.hidden_size, generator=source).to(device, dtype)
        weights = torch.rand(rows, 4, generator=source)
        best = weights.topk(count, dim=-1)
        gates = torch.zeros_like(weights).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
        gates = gates.unsqueeze(1).to(device)
        cotangent = torch.randn(x.shape, generator=source).to(device, dtype)
        found = []
        for mixture in (
            FusedMixture(ffn, experts).to(device),
            ParallelMixture(ffn, experts, ep_size=1, ep_rank=0).to(device),
        ):
            if isinstance(mixture, ParallelMixture):
                mixture.moe.set_deepspeed_parallelism()
            inputs = x.clone().requires_grad_()
            y = mixture(inputs, gates, count) if isinstance(mixture, FusedMixture) else mixture(inputs, gates)
            (y * cotangent).sum().backward()
            found.append((y.detach(), inputs.grad, gradients(mixture)))
        (fused, to_fused, of_fused), (parallel, to_parallel, of_parallel) = found
        assert relative(fused, parallel) < DTYPES[dtype]
        assert to_fused is not None and to_parallel is not None and relative(to_fused, to_parallel) < DTYPES[dtype]
        for name, gradient in of_parallel.items():
            nothing = not gradient.any()  # the generalist may be chosen for every row
            assert not of_fused[name].any() if nothing else relative(of_fused[name], gradient) < DTYPES[dtype], name


def gradients(mixture: FusedMixture | ParallelMixture) -> dict[str, Tensor]:
    if isinstance(mixture, FusedMixture):
        return factor_gradients(mixture)
    local = mixture.local_experts()
    found = {}
    for p in PROJECTIONS:
        found[f"down.{p}"] = torch.cat([e.down[p].grad for e in local])  # type: ignore[misc]
        found[f"up.{p}"] = torch.cat([e.up[p].grad for e in local], dim=1)  # type: ignore[misc]
    return found


@pytest.mark.parametrize("top_k", [1, 2, 4])
@pytest.mark.parametrize("path", ["fused", "parallel"])
@torch.no_grad()
def test_whole_models_in_fp32_are_those_of_the_cpu(device: str, group: None, path: str, top_k: int) -> None:
    placement = Placement(1, 0) if path == "parallel" else None
    here = model(device, torch.float32, top_k, placement)
    there = model("cpu", torch.float32, top_k)
    ids, mask = padded(ROWS, "left")
    if placement:
        connect(here)
    found = here(ids.to(device), mask.to(device), use_cache=False).logits.cpu()
    expected = there(ids, mask, use_cache=False).logits
    assert relative(found[mask.bool()], expected[mask.bool()]) < 1e-4


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_rows_are_independent_of_their_batch(device: str, dtype: torch.dtype, rows: int) -> None:
    """With one expert forced, rows give the same logits alone, where factors are gathered, as in a batch."""
    made = model(device, dtype)
    ids, mask = (t.to(device) for t in padded(ROWS[:rows], "left"))
    forced = one_hot([2] * rows).to(device)
    found = made(ids, mask, forced=forced, use_cache=False).logits
    apart = torch.cat(
        [made(ids[i : i + 1], mask[i : i + 1], forced=forced[:1], use_cache=False).logits for i in range(rows)]
    )
    assert relative(found[mask.bool()], apart[mask.bool()]) < DTYPES[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_packed_rows_are_rows_by_themselves(device: str, dtype: torch.dtype) -> None:
    """With the GPU's attention kernels, no row attends to another."""
    base = base_model(max_position_embeddings=256).to(device, dtype)
    source = generator(9)
    sizes = [40, 33, 7, 5, 21, 12, 3, 64]
    examples = [Example(tuple(torch.randint(1, 50, (n,), generator=source).tolist()), 1) for n in sizes]
    batch = pack(examples, 0).to(torch.device(device))
    packed = base(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    assert batch.position_ids is not None
    seen = 0
    by_ids = {e.ids: e for e in examples}
    for line, positions, logits in zip(batch.input_ids, batch.position_ids, packed, strict=True):
        starts = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        for start, end in pairwise(starts):
            example = by_ids.get(tuple(line[start:end].tolist()))
            if example is None:
                continue  # padding
            alone: Any = collate([example], 0).to(torch.device(device))
            expected = base(alone.input_ids, attention_mask=alone.attention_mask, use_cache=False).logits[0]
            assert relative(logits[start:end], expected) < DTYPES[dtype]
            seen += 1
    assert seen == len(examples)


def test_a_copy_of_the_model_keeps_fp32_where_it_is_needed(device: str) -> None:
    made = copy.deepcopy(model(device, torch.bfloat16))
    layer = alignx_layers(made)[0]
    assert layer.gate is not None and layer.gate.router.weight.dtype == torch.float32
    assert layer.mixture.down_in.dtype == torch.bfloat16  # type: ignore[union-attr]
