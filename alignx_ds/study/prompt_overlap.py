"""Whether harmful and harmless prompts have subspaces of hidden states of their own.

Mode subspace overlap (Ponkshe et al., ICLR 2026, arXiv 2505.14185): each set of prompts spans the leading directions
that hold ENERGY of its states' squared norm, after its mean is taken away. Two of them, A [d, a] and B [d, b], overlap
by ‖AᵀB‖²_F / min(a, b): 1 where one holds the other, 0 where they are orthogonal, max(a, b) / d at random.

Shapes: N prompts, d hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.data.encode import Example
from alignx_ds.study.layer_outputs import decoder_layers, layer_outputs
from alignx_ds.study.studied_run import SYSTEMS, StudiedRun

ENERGY = 0.9
FEWEST = 8  # prompts of a kind: half a set then spans up to three directions


def measure(studied: StudiedRun) -> dict[str, Any]:
    """By system and decoder layer: the overlap of harmful with harmless prompts, and of the halves of each set.

    The prompts are the held-out ones of the axes that have harmful ones. Empty where there are too few of a kind.
    """
    owners = studied.held_out_rows()
    axes = {name for name, row in owners if row.harmful}
    examples = [studied.data.routed.examples[n] for n, (name, _) in enumerate(owners) if name in axes]
    harmful = torch.tensor([row.harmful for name, row in owners if name in axes], dtype=torch.bool)
    counts = {"harmful": int(harmful.sum()), "harmless": int((~harmful).sum())}
    if min(counts.values()) < FEWEST:
        return {}
    systems = {}
    for name in SYSTEMS:
        states = last_states(studied.system(name).eval(), studied, examples)
        systems[name] = {str(layer): compared(own[harmful], own[~harmful]) for layer, own in states.items()}
    return {"prompts": counts, "systems": systems}


def compared(harmful: Tensor, harmless: Tensor) -> dict[str, float]:
    """Of states [N, d] of each kind: `overlap`, `random`, and `halves`, the mean over both kinds of that of its halves.

    A set's halves are its even and odd prompts. They tell how much of a missing overlap is the sample's.
    """
    overlap, random = mode_overlap(harmful, harmless)
    halves = [mode_overlap(states[::2], states[1::2])[0] for states in (harmful, harmless)]
    return {"overlap": overlap, "random": random, "halves": sum(halves) / 2}


def mode_overlap(first: Tensor, second: Tensor) -> tuple[float, float]:
    """Of states [N, d]: the overlap of their leading directions, and what it is at random."""
    a, b = leading_modes(first), leading_modes(second)
    sizes = a.shape[1], b.shape[1]
    return float((a.T @ b).square().sum()) / min(sizes), max(sizes) / len(a)


def leading_modes(states: Tensor) -> Tensor:
    """[d, k]: the fewest principal directions of states [N, d] that hold ENERGY of their squared norm."""
    centred = states.double() - states.double().mean(0)
    _, sizes, directions = torch.linalg.svd(centred, full_matrices=False)
    energy = sizes.square().cumsum(0)
    count = int((energy < ENERGY * energy[-1]).sum()) + 1
    modes: Tensor = directions[:count].T
    return modes


@torch.no_grad()
def last_states(model: PreTrainedModel, studied: StudiedRun, examples: list[Example]) -> dict[int, Tensor]:
    """By decoder layer, [N, d] fp32: the output at the prompt's last token."""
    layers = list(range(len(decoder_layers(model, studied))))
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for part, outputs in layer_outputs(model, studied, layers, examples):
        columns = torch.arange(part.prompt_mask.shape[1], device=part.prompt_mask.device)
        last = (part.prompt_mask * columns).argmax(1)
        for layer, hidden in outputs.items():
            found[layer].append(hidden[torch.arange(len(hidden), device=last.device), last].float().cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}
