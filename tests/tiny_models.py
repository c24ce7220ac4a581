"""Tiny random models that the tests share: bases, specialists made by changing their FFNs, and aligned models."""

from __future__ import annotations

import copy
import os
from dataclasses import replace
from typing import Any

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read by deepspeed when it is imported

from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from alignx_ds.mocae.backbones import BACKBONES, Backbone, backbone_of
from alignx_ds.mocae.experts import ATTENTION, PROJECTIONS, Factors
from alignx_ds.mocae.fused import FusedMixture, unstack
from alignx_ds.mocae.geometry import Geometry
from alignx_ds.mocae.layer import alignx_layers
from alignx_ds.mocae.modeling import AlignXConfig, AlignXForCausalLM, LayerParts, Placement
from alignx_ds.mocae.parallel import ParallelMixture
from alignx_ds.mocae.routing_state import SUMMARIES
from alignx_ds.mocae.settings import GateSettings

VOCABULARY, HIDDEN, FFN, LAYERS, EXPERTS = 50, 32, 48, 3, 4
ALIGNX_LAYERS = [1, 2]
FAMILIES = tuple(BACKBONES)
DENSE = tuple(family for family, table in BACKBONES.items() if table.projections)  # experts can change their FFNs
MIXTURES = tuple(family for family in FAMILIES if family not in DENSE)
TABLE = BACKBONES["llama"]  # of base_model()'s default family
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
ATTENTION_RANKS = {"q": 2, "o": 3}  # the largest, of `attention_experts`
Changes = dict[int, list[dict[str, Tensor]]]  # by AlignX layer, by specialist (expert id - 1), by projection


PECULIARITIES: dict[str, dict[str, Any]] = {  # the windows are shorter than most rows, the heads not d / heads wide
    "llama": {},
    "mistral": {"sliding_window": 6},
    "gemma": {"head_dim": 12},
    "gemma2": {
        **{"head_dim": 12, "sliding_window": 5, "query_pre_attn_scalar": 3},
        **{"final_logit_softcapping": 5.0, "attn_logit_softcapping": 1.0},
    },
    "gemma3_text": {"head_dim": 12, "sliding_window": 5, "layer_types": MIXED, "query_pre_attn_scalar": 3},
    "olmo2": {},
    "olmo3": {"sliding_window": 5, "layer_types": MIXED},
    "qwen2": {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2},  # the last layer's alone
    "qwen3": {"head_dim": 12},
    "smollm3": {"no_rope_layer_interval": 2},  # the second layer has no positions
    "mixtral": {"sliding_window": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
    "qwen3_moe": {  # the second layer, an AlignX layer, has a dense FFN
        **{"head_dim": 12, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
        "mlp_only_layers": [1],
    },
    "phi3": {"sliding_window": 6},  # read as Mistral (FUSED)
}


def tiny_config(family: str = "llama", tied: bool = False, **settings: Any) -> PreTrainedConfig:
    """A config of this family, with what sets the family apart; `settings` overrule it."""
    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": FFN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,  # large enough for the logits to depend on every part
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
        "tie_word_embeddings": tied,
    }
    return AutoConfig.for_model(family, **{**common, **PECULIARITIES[family], **settings})


def table_of(model: PreTrainedModel) -> Backbone:
    return backbone_of(model.config.model_type)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@torch.no_grad()
def base_model(seed: int = 0, tied: bool = False, family: str = "llama", **settings: Any) -> PreTrainedModel:
    """Biases are random, and so are the norms' weights (all ones in the default family)."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, tied, **settings)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or (parameter.dim() == 1 and family != "llama"):
            parameter += 0.3 * torch.randn_like(parameter)
    return model


def random_changes(base: PreTrainedModel, seed: int = 1, size: float = 0.2) -> Changes:
    """A full-rank task vector per specialist, as large as the weights that it changes."""
    source, table = generator(seed), table_of(base)
    made: Changes = {}
    for layer in ALIGNX_LAYERS:
        view = table.view(table.ffn_of(base, layer))
        shapes = {p: view.projection(p).weight.shape for p in PROJECTIONS}
        made[layer] = [
            {p: size * torch.randn(shape, generator=source) for p, shape in shapes.items()} for _ in range(EXPERTS - 1)
        ]
    return made


@torch.no_grad()
def specialist(base: PreTrainedModel, changes: Changes, number: int) -> PreTrainedModel:
    """The base model with specialist `number`'s task vector added to its weights; 0 is the base model itself."""
    model, table = copy.deepcopy(base), table_of(base)
    for layer in ALIGNX_LAYERS if number else ():
        view = table.view(table.ffn_of(model, layer))
        for p in PROJECTIONS:
            view.projection(p).weight += changes[layer][number - 1][p]
    return model


def exact_factors(change: dict[str, Tensor]) -> Factors:
    """Full rank, by the thinner side's identity: no decomposition is involved."""
    down, up = {}, {}
    for p, c in change.items():
        wide = c.shape[0] <= c.shape[1]
        down[p] = c if wide else torch.eye(c.shape[1])
        up[p] = torch.eye(c.shape[0]) if wide else c
    return Factors(down, up)


def random_factors(base: PreTrainedModel, layer: int, rank: int, source: torch.Generator) -> Factors:
    """Of the FFN's projections that an expert can change: none in a mixture of experts."""
    table = table_of(base)
    weights = {p: table.linear(base, layer, p).weight for p in table.projections}
    down = {p: 0.3 * torch.randn(rank, w.shape[1], generator=source) for p, w in weights.items()}
    return Factors(down, {p: 0.3 * torch.randn(w.shape[0], rank, generator=source) for p, w in weights.items()})


def random_geometry(latent: int, seed: int, d: int = HIDDEN, experts: int = EXPERTS) -> Geometry:
    """Valid (the whiteners are those of real covariances), otherwise arbitrary."""
    source = generator(seed)
    roots = torch.randn(experts, latent, latent, generator=source, dtype=torch.float64)
    covariances = roots @ roots.mT / latent + 0.5 * torch.eye(latent, dtype=torch.float64)
    cholesky = torch.linalg.cholesky(covariances)
    f, anchors, scales = min(3, latent), 5, 4
    return Geometry(
        centre=0.1 * torch.randn(d, generator=source),
        projection=torch.randn(latent, d, generator=source) / d**0.5,
        means=torch.randn(experts, latent, generator=source),
        whiteners=torch.linalg.inv(cholesky).float(),
        log_volumes=cholesky.diagonal(dim1=-2, dim2=-1).log().sum(-1).float(),
        anchors=torch.randn(experts, anchors, f, generator=source),
        scales=0.5 * 2.0 ** torch.arange(scales),
        present=torch.ones(experts),
        dimensions=1 + torch.rand(experts, generator=source),
        score_shift=torch.tensor([-2.0, -1.5]),
        score_scale=torch.tensor([0.7, 0.4]),
    )


def query_geometry(latent: int, seed: int) -> Geometry:
    """A gate's: centred where the mean, largest, smallest and last of a few normed hidden states lie."""
    centre = torch.tensor([0.0, 1.5, -1.5, 0.0]).repeat_interleave(HIDDEN)
    return replace(random_geometry(latent, seed, d=SUMMARIES * HIDDEN), centre=centre)


def aligned_config(base: PreTrainedModel, ranks: dict[str, int], **gate: Any) -> AlignXConfig:
    return AlignXConfig(
        text_config=copy.deepcopy(base.config),
        experts=["generalist", "helpful", "harmless", "honest"],
        layers=ALIGNX_LAYERS,
        ranks=ranks,
        gate=GateSettings(**{"output_latent": 5, **gate}, latent=6, fractal_dimensions=3, anchors=5, scales=4),
    )


def aligned(
    base: PreTrainedModel,
    experts: dict[int, list[Factors]],
    *,
    scope: str = "shared",
    top_k: int = 0,
    kind: str = "choice",
    combine: str = "outputs",
    placement: Placement | None = None,
    trained: bool = True,
    floors: dict[str, float] | None = None,
    **gate: Any,
) -> AlignXForCausalLM:
    """An aligned model of these specialists (by layer, without the generalist), with arbitrary geometries.

    `trained` gives routers and reinjections random weights; otherwise they are what stage 2 starts from.
    """
    table = table_of(base)
    ranks = {p: max(f.rank(p) for fs in experts.values() for f in fs) for p in table.projections}
    gate |= {"scope": scope, "top_k": top_k, "kind": kind, "combine": combine}
    config = aligned_config(base, ranks, **gate)
    config.floors = floors or {}
    changed = {p: [f.rank(p) for fs in experts.values() for f in fs if p in f.down] for p in ATTENTION}
    config.attention_ranks = {p: max(found) for p, found in changed.items() if found}
    settings = config.gate_settings()
    parts = {}
    for layer in ALIGNX_LAYERS:
        generalist = table.generalist(base, layer, ranks)
        query = query_geometry(settings.latent, seed=100 + layer) if config.gate_layer(layer) == layer else None
        output = random_geometry(settings.output_latent, seed=200 + layer) if settings.output_latent else None
        parts[layer] = LayerParts([generalist, *experts[layer]], query, output)
    model = AlignXForCausalLM(config, backbone=copy.deepcopy(base), parts=parts, placement=placement)
    source = generator(7)
    if trained:
        for name, buffer in model.lexicon.named_buffers():
            noise = torch.randn(buffer.shape, generator=source)
            buffer.copy_(1 + noise.abs() if name == "rarity" else noise)
    with torch.no_grad():
        for layer in alignx_layers(model) if trained else ():
            if layer.calibration is not None:
                reinjection = layer.calibration.reinjection
                reinjection.copy_(0.1 * torch.randn(reinjection.shape, generator=source))
            router = torch.randn(EXPERTS, settings.latent, generator=source)
            if layer.gate is not None:
                layer.gate.router.weight.copy_(router)
                spread = 1.0 if kind == "needs" else 0.1  # a choice then has rows of at least three experts
                layer.gate.router.bias.copy_(spread * torch.randn(EXPERTS, generator=generator(9)))
    return model.eval()


def low_rank_experts(base: PreTrainedModel, rank: int = 3, seed: int = 3) -> dict[int, list[Factors]]:
    """Those of a mixture of experts change its attention."""
    return _ffn_experts(base, rank, seed) if table_of(base).projections else attention_experts(base)


def _ffn_experts(base: PreTrainedModel, rank: int, seed: int) -> dict[int, list[Factors]]:
    source = generator(seed)
    return {i: [random_factors(base, i, rank, source) for _ in range(EXPERTS - 1)] for i in ALIGNX_LAYERS}


def attention_experts(base: PreTrainedModel) -> dict[int, list[Factors]]:
    """Low-rank experts of which the first two also change q, and the last two o, in the upper layer."""
    made, source, table = _ffn_experts(base, 3, 3), generator(21), table_of(base)
    for number, factors in enumerate(made[ALIGNX_LAYERS[-1]]):
        for p in ("q",) if number == 0 else ("q", "o") if number == 1 else ("o",):
            linear, rank = table.linear(base, ALIGNX_LAYERS[-1], p), ATTENTION_RANKS[p] - (number == 1)
            factors.down[p] = 0.3 * torch.randn(rank, linear.in_features, generator=source)
            factors.up[p] = 0.3 * torch.randn(linear.out_features, rank, generator=source)
    return made


def exact_experts(changes: Changes) -> dict[int, list[Factors]]:
    return {layer: [exact_factors(c) for c in by_expert] for layer, by_expert in changes.items()}


def connect(model: AlignXForCausalLM) -> AlignXForCausalLM:
    """Set every MoE layer's process groups, as an engine does before the first forward pass."""
    for layer in alignx_layers(model):
        assert isinstance(layer.mixture, ParallelMixture)
        layer.mixture.moe.set_deepspeed_parallelism()
    return model


def relative(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the largest value of b."""
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def random_rows(lengths: list[int], seed: int = 11) -> list[list[int]]:
    """Token ids, without the padding id."""
    source = generator(seed)
    return [torch.randint(1, VOCABULARY, (n,), generator=source).tolist() for n in lengths]


def padded(rows: list[list[int]], side: str = "right", extra: int = 0) -> tuple[Tensor, Tensor]:
    """(ids, attention mask) [B, T], padded to the longest row and `extra` columns beyond."""
    width = max(map(len, rows)) + extra
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if side == "left" else 0
        ids[i, start : start + len(row)] = torch.tensor(row)
        mask[i, start : start + len(row)] = 1
    return ids, mask


def one_hot(experts: list[int]) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(experts), EXPERTS).float()


def factor_gradients(mixture: FusedMixture) -> dict[str, Tensor]:
    """By side and projection, all experts' along the rank, as the expert-parallel path's concatenate.

    The generalist, which the fused path does not store, has zero factors, and zero factors have zero gradients.
    """
    grads = {name: parameter.grad for name, parameter in mixture.named_parameters()}
    assert all(g is not None for g in grads.values())
    specialists = unstack({name: g for name, g in grads.items() if g is not None})
    found = {}
    for p in PROJECTIONS:
        down, up = [f.down[p] for f in specialists], [f.up[p] for f in specialists]
        found[f"down.{p}"] = torch.cat([torch.zeros_like(down[0]), *down])
        found[f"up.{p}"] = torch.cat([torch.zeros_like(up[0]), *up], dim=1)
    return found
