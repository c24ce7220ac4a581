"""Decoding on a GPU: a captured step, compiled or not, gives the answers of the step that is not captured."""

from __future__ import annotations

import pytest
import torch
from tiny_models import MIXTURES, PECULIARITIES, aligned, base_model, low_rank_experts, padded, random_rows
from transformers import PreTrainedModel

from alignx_ds.baselines.fusion import H3FUSION, TRINITYX, FullExperts, FusionSettings, replace_ffns
from alignx_ds.evaluation.decode import CapturedStep, Decoder
from alignx_ds.mocae.backbones import BACKBONES

PAD, END, LIMIT = 0, 3, 20
LENGTHS = [[5], [4, 9], [5, 9, 2, 7, 1]]  # factors are gathered for one and two rows, not for five


def model_of(family: str, device: str) -> PreTrainedModel:
    base = base_model(family=family)
    return aligned(base, low_rank_experts(base)).to(device)


def captures(decoder: Decoder, device: str) -> bool:
    step = decoder.step
    return device == "cpu" or (isinstance(step, CapturedStep) and not step.disabled and step._graph is not None)


@pytest.mark.parametrize("family", BACKBONES)
def test_captured_answers_are_those_of_plain_steps(device: str, family: str) -> None:
    """With one decoder, every prompt has its own graph. A step with a moving window of attention is not captured."""
    model = model_of(family, device)
    plain, captured = Decoder(model, captured=False), Decoder(model)
    for seed, lengths in enumerate(LENGTHS):
        ids, mask = (t.to(device) for t in padded(random_rows(lengths, seed=seed), "left"))
        for ends in ([], [END, 17, 20]):
            expected = plain.greedy(ids, mask, LIMIT, ends, PAD)
            assert torch.equal(captured.greedy(ids, mask, LIMIT, ends, PAD), expected)
    host = family in MIXTURES  # it may have to know which of a mixture's own experts have tokens
    assert captures(captured, device) or "sliding_window" in PECULIARITIES[family] or host


@pytest.mark.parametrize("lengths", LENGTHS, ids=["one row", "two rows", "five rows"])
def test_compiled_and_captured_answers_are_those_of_plain_steps(device: str, lengths: list[int]) -> None:
    model = model_of("llama", device)
    ids, mask = (t.to(device) for t in padded(random_rows(lengths, seed=4), "left"))
    compiled = Decoder(model, compiled=True)
    for _ in range(2):
        found = compiled.greedy(ids, mask, 8, [END], PAD)
        assert torch.equal(found, Decoder(model, captured=False).greedy(ids, mask, 8, [END], PAD))
    assert captures(compiled, device)


def fusion(settings: FusionSettings, grouped: bool, device: str) -> PreTrainedModel:
    """Wide enough for the grouped GEMM, whose rows are multiples of 16 bytes."""
    model = base_model().to(device, torch.bfloat16)
    with torch.device(device):
        replace_ffns(model, BACKBONES["llama"], [1, 2], lambda layer, ffn: FullExperts([ffn] * 3, settings, grouped))
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "grouped", "whole"),
    [(H3FUSION, False, False), (H3FUSION, True, True), (TRINITYX, True, True)],
    ids=["H3Fusion, loop", "H3Fusion, grouped", "TrinityX"],
)
def test_fused_baselines_are_captured_unless_they_need_a_host_sync(
    device: str, settings: FusionSettings, grouped: bool, whole: bool
) -> None:
    model = fusion(settings, grouped, device)
    ids, mask = (t.to(device) for t in padded(random_rows([5, 9, 2], seed=4), "left"))
    decoder = Decoder(model)
    found = decoder.greedy(ids, mask, LIMIT, [], PAD)
    assert torch.equal(found, Decoder(model, captured=False).greedy(ids, mask, LIMIT, [], PAD))
    if device == "cuda":
        assert captures(decoder, device) == whole


def test_a_step_that_can_not_be_captured_runs_without_a_graph(device: str) -> None:
    """A hook synchronises without an announcement: the capture fails, and the answers are those of plain steps."""
    model = model_of("llama", device)
    ids, mask = (t.to(device) for t in padded(random_rows([5, 9, 2], seed=4), "left"))
    expected = Decoder(model, captured=False).greedy(ids, mask, LIMIT, [], PAD)
    hook = model.register_forward_hook(lambda module, inputs, output: bool(output.logits.isfinite().all()) and None)
    decoder = Decoder(model)
    assert torch.equal(decoder.greedy(ids, mask, LIMIT, [], PAD), expected)
    hook.remove()
    if device == "cuda":
        assert isinstance(decoder.step, CapturedStep) and decoder.step.disabled
    assert torch.equal(Decoder(model).greedy(ids, mask, LIMIT, [], PAD), expected)  # CUDA still works
