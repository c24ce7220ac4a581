"""Aligned models among transformers' own: Auto classes, shards, device maps, pipelines and every way of generating."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from tiny_models import aligned, base_model, low_rank_experts, padded, random_rows
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from alignx_ds.mocae.modeling import AlignXForCausalLM

GREEDY: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def tiny(**settings: Any) -> AlignXForCausalLM:
    base = base_model(**settings)
    return aligned(base, low_rank_experts(base), scope="per_layer", top_k=1)


@pytest.fixture(scope="module")
def model() -> AlignXForCausalLM:
    return tiny()


@pytest.fixture(scope="module")
def speaking(world_tokenizer: PreTrainedTokenizerBase) -> AlignXForCausalLM:
    """One whose vocabulary is the world's."""
    return tiny(vocab_size=len(world_tokenizer), eos_token_id=world_tokenizer.eos_token_id)


def logits(model: Any) -> torch.Tensor:
    ids, mask = padded(random_rows([6, 9]))
    with torch.no_grad():
        found: torch.Tensor = model(ids, attention_mask=mask).logits
    return found


def experts_of(model: AlignXForCausalLM, prompt: list[int]) -> tuple[int, ...]:
    with torch.no_grad():
        model(torch.tensor([prompt]))
    return tuple(int(d.gates.argmax()) for d in model.routing.decisions.values())


@pytest.mark.parametrize("placed", [{}, {"device_map": "auto"}, {"device_map": "cpu"}], ids=["plain", "auto", "cpu"])
def test_shards_are_loaded_with_the_same_logits(
    model: AlignXForCausalLM, tmp_path: Path, placed: dict[str, str]
) -> None:
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, **placed).eval()
    assert torch.equal(logits(loaded), logits(model))


def test_layers_may_lie_on_the_disk(model: AlignXForCausalLM, tmp_path: Path) -> None:
    """accelerate fetches a module's weights when the module is called."""
    model.save_pretrained(tmp_path)
    parts = ["lexicon", "backbone.lm_head", *(f"backbone.model.{p}" for p in ("embed_tokens", "norm", "rotary_emb"))]
    places = dict.fromkeys([*parts, "backbone.model.layers.0"], "cpu")
    places |= {f"backbone.model.layers.{i}": "disk" for i in (1, 2)}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "off").eval()
    assert loaded.backbone.model.layers[2].mlp.mixture.up_out.is_meta
    assert torch.equal(logits(loaded), logits(model))
    for count in (1, 3):  # few rows' factors are gathered; of many, all experts' are read
        ids, mask = padded(random_rows([6] * count), "left")
        made = [m.generate(ids, attention_mask=mask, **GREEDY).tolist() for m in (loaded, model)]
        assert made[0] == made[1]


def test_no_decoder_layer_is_split_over_devices(model: AlignXForCausalLM) -> None:
    assert "LlamaDecoderLayer" in (model._no_split_modules or ())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_is_loaded_in_the_dtype_that_is_asked_for(
    model: AlignXForCausalLM, tmp_path: Path, dtype: torch.dtype
) -> None:
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    loaded.save_pretrained(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto").dtype == dtype


def test_the_backbone_s_way_of_generating_is_carried_over(tmp_path: Path) -> None:
    base = base_model()
    base.generation_config = GenerationConfig(eos_token_id=[3, 7], pad_token_id=0, temperature=0.7, do_sample=True)
    model = aligned(base, low_rank_experts(base))
    model.save_pretrained(tmp_path)
    kept = AutoModelForCausalLM.from_pretrained(tmp_path).generation_config
    assert (kept.eos_token_id, kept.temperature, kept.do_sample) == ([3, 7], 0.7, True)


def test_a_pipeline_answers(
    speaking: AlignXForCausalLM, world_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    speaking.save_pretrained(tmp_path)
    world_tokenizer.save_pretrained(tmp_path)
    ask = pipeline("text-generation", str(tmp_path))
    ids = world_tokenizer("hello , how are you ?", return_tensors="pt")["input_ids"]
    made = speaking.generate(ids, max_new_tokens=5, do_sample=False)[0]
    (answer,) = ask("hello , how are you ?", max_new_tokens=5, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == world_tokenizer.decode(made[ids.shape[1] :], skip_special_tokens=True)


def test_sampling_repeats_under_its_seed(model: AlignXForCausalLM) -> None:
    ids, mask = padded(random_rows([5, 9], seed=4), "left")

    def sample(seed: int) -> list[list[int]]:
        torch.manual_seed(seed)
        made = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            do_sample=True,
            temperature=1.5,
            num_return_sequences=2,
            pad_token_id=0,
        )
        return list(made.tolist())

    assert len(sample(0)) == 4
    assert sample(0) == sample(0) != sample(1)


@pytest.mark.parametrize("use_cache", [True, False])
def test_beams_keep_the_experts_of_their_own_prompt(model: AlignXForCausalLM, use_cache: bool) -> None:
    prompts = random_rows([5, 9, 7, 3], seed=4)
    assert len({experts_of(model, p) for p in prompts}) > 1, "the prompts must go to different experts"
    settings = GREEDY | {"num_beams": 3, "num_return_sequences": 3, "use_cache": use_cache}
    ids, mask = padded(prompts, "left")
    together = model.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :].unflatten(0, (-1, 3))
    for row, prompt in zip(together, prompts, strict=True):
        alone = model.generate(torch.tensor([prompt]), **settings | {"use_cache": True})
        assert alone[:, len(prompt) :].tolist() == row.tolist()


def test_streamed_tokens_are_those_that_are_generated(
    speaking: AlignXForCausalLM, world_tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    ids = world_tokenizer("hello , how are you ?", return_tensors="pt")["input_ids"]
    settings = {"max_new_tokens": 6, "do_sample": False}
    expected = world_tokenizer.decode(speaking.generate(ids, **settings)[0, ids.shape[1] :])
    streamer = TextIteratorStreamer(world_tokenizer, skip_prompt=True)
    Thread(target=speaking.generate, args=(ids,), kwargs=settings | {"streamer": streamer}).start()
    assert "".join(streamer) == expected
    speaking.generate(ids, **settings, streamer=TextStreamer(world_tokenizer, skip_prompt=True))
    assert capsys.readouterr().out.strip() == expected.strip()


@pytest.mark.parametrize("how", ["assisted", "assisting", "lookup", "static cache"])
def test_other_ways_of_generating_give_the_greedy_answer(model: AlignXForCausalLM, how: str) -> None:
    """An assistant's guesses follow the prompt in the first pass, and must not be routed by."""
    # Two tokens long, so that a guess taken for a part of the prompt weighs enough to change the decision.
    for prompt in random_rows([2] * 12, seed=5):
        asked, plain = model, base_model()
        if how == "assisting":
            asked, plain = plain, model
        ways: dict[str, dict[str, Any]] = {
            "assisted": {"assistant_model": plain},
            "assisting": {"assistant_model": plain},
            "lookup": {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
            "static cache": {"cache_implementation": "static"},
        }
        ids = torch.tensor([prompt])
        expected = asked.generate(ids, **GREEDY).tolist()
        assert asked.generate(ids, **GREEDY, **ways[how]).tolist() == expected


def test_a_prompt_in_chunks_is_refused(model: AlignXForCausalLM) -> None:
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(torch.tensor(random_rows([6])), **GREEDY, prefill_chunk_size=2)
