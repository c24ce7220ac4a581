"""docs/extending.md, "A new backbone": the entry that the page shows is all that another architecture needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pages import code, text
from tiny_models import (
    PECULIARITIES,
    aligned,
    base_model,
    low_rank_experts,
    one_hot,
    padded,
    random_rows,
    relative,
    tiny_config,
)
from transformers import (
    AutoModelForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    PreTrainedTokenizerBase,
)

from alignx_ds.config.schema import ModelConfig
from alignx_ds.data.batches import collate, pack
from alignx_ds.data.encode import Example
from alignx_ds.errors import ConfigError
from alignx_ds.mocae.backbones import BACKBONES, FUSED, Backbone, backbone_of
from alignx_ds.mocae.modeling import Placement
from alignx_ds.models.base import BaseModel

PAGE, TITLE = "docs/extending.md", "A new backbone"
WITHIN = "A language model within another model"
PECULIAR: dict[str, dict[str, Any]] = {  # how each differs from the architectures of the table
    "granite": {"residual_multiplier": 0.5, "logits_scaling": 2.0},
    "stablelm": {"partial_rotary_factor": 0.5, "use_qkv_bias": True},
    "cohere": {"logit_scale": 0.5},  # attention and FFN side by side, on one norm
}


def entries() -> dict[str, Backbone]:
    """The entries printed on the page."""
    shown: dict[str, Backbone] = {}
    exec(f"shown.update({{{code(PAGE, TITLE)[0]}}})", {"shown": shown, "Backbone": Backbone})
    return shown


@pytest.fixture(params=PECULIAR)
def family(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    monkeypatch.setitem(BACKBONES, name, entries().get(name, Backbone()))
    monkeypatch.setitem(PECULIARITIES, name, PECULIAR[name])
    return name


def test_the_page_s_entry_is_new_and_the_others_are_named() -> None:
    assert set(entries()) == {"granite"} and not set(PECULIAR) & set(BACKBONES)
    assert all(f"`{name}`" in text(PAGE, TITLE) for name in (*PECULIAR, *BACKBONES, *FUSED))


@torch.no_grad()
def test_expert_parallel_is_fused_and_the_generalist_is_the_base_model(family: str) -> None:
    base = base_model(family=family)
    experts = low_rank_experts(base)
    fused, parallel = (aligned(base, experts, placement=p) for p in (None, Placement(1, 0)))
    ids, mask = padded(random_rows([5, 12, 8]))
    real = mask.bool()
    assert relative(parallel(ids, mask).logits[real], fused(ids, mask).logits[real]) < 1e-5
    plain = base(ids, attention_mask=mask).logits[real]
    untouched = aligned(base, experts, trained=False)  # before stage 2 the output calibration changes nothing
    assert relative(untouched(ids, mask, forced=one_hot([0, 0, 0])).logits[real], plain) < 1e-5
    for expert in (1, 2, 3):
        assert relative(untouched(ids, mask, forced=one_hot([expert] * 3)).logits[real], plain) > 0.01


@torch.no_grad()
def test_packed_rows_do_not_attend_to_each_other(family: str) -> None:
    """Stage 1 trains on packed lines."""
    base = base_model(family=family)
    rows = [Example(ids, 1) for ids in random_rows([6, 5, 12])]
    batch = pack(rows, 0)
    assert len(batch.input_ids) == 2
    packed = base(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
    found = {tuple(line.tolist()): logits for line, logits in zip(batch.input_ids, packed, strict=True)}
    for row in rows:
        alone = base(**{"input_ids": collate([row], 0).input_ids}, use_cache=False).logits[0]
        (at, logits) = next(
            (start, logits)
            for line, logits in found.items()
            for start in range(len(line))
            if list(line[start : start + len(row.ids)]) == row.ids
        )
        torch.testing.assert_close(logits[at : at + len(row.ids)], alone, rtol=0, atol=1e-5)


@torch.no_grad()
def test_it_generates(family: str) -> None:
    base = base_model(family=family)
    model = aligned(base, low_rank_experts(base))
    ids, mask = padded(random_rows([4, 7]), side="left")
    made = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False)
    whole = model.generate(ids, attention_mask=mask, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(made, whole) and made.shape[1] == ids.shape[1] + 5


@pytest.fixture
def multimodal(tmp_path: Path, world_tokenizer: PreTrainedTokenizerBase) -> Path:
    text = tiny_config("gemma3_text", tied=True, vocab_size=len(world_tokenizer)).to_dict()
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    vision = {**sizes, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    torch.manual_seed(0)
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path / "whole")
    world_tokenizer.save_pretrained(tmp_path / "whole")
    return tmp_path / "whole"


def test_a_multimodal_model_is_refused_and_the_page_s_code_takes_its_language_model(multimodal: Path) -> None:
    with pytest.raises(ConfigError, match="it is a gemma3, with a language model as one part; save that part alone"):
        BaseModel(ModelConfig(path=str(multimodal)))
    assert taken(WITHIN, multimodal) == "gemma3_text"


@torch.no_grad()
def taken(title: str, source: Path) -> str:
    """The architecture of what the section's code makes of a model. It computes the same."""
    target = source.with_name("target")
    exec(code(PAGE, title)[0], {"SOURCE": str(source), "TARGET": str(target)})
    base = BaseModel(ModelConfig(path=str(target)))
    assert base.checkpoint_problem() is None and base.tokenizer
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    found = [AutoModelForCausalLM.from_pretrained(path).eval()(input_ids=ids).logits for path in (source, target)]
    assert relative(*found) < 1e-6
    return str(base.config.model_type)


@pytest.mark.parametrize("kind", ["qwen2_moe", "glm4"])
def test_what_does_not_fit_is_refused_with_the_page(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"docs/extending\.md says what does not fit"):
        backbone_of(kind)
