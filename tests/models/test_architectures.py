"""Configs of supported architectures that are refused, because the model would not compute what it was trained to."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_models import PECULIARITIES, base_model, tiny_config
from transformers import Gemma2PreTrainedModel

from alignx_ds.config.schema import ModelConfig
from alignx_ds.errors import ConfigError
from alignx_ds.models.base import BaseModel


def refusal(directory: Path) -> str:
    with pytest.raises(ConfigError) as error:
        BaseModel(ModelConfig(path=str(directory))).skeleton  # noqa: B018
    text = str(error.value)
    assert "\n" not in text
    return text


def test_a_model_that_sees_later_tokens_is_refused(tmp_path: Path) -> None:
    tiny_config("gemma3_text", use_bidirectional_attention=True).save_pretrained(tmp_path)
    told = "expected a model with causal attention; its config.json has use_bidirectional_attention"
    assert told in refusal(tmp_path)


def test_where_transformers_would_leave_out_the_cap_of_attention_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As transformers 5.20 does."""
    base_model(family="gemma2").save_pretrained(tmp_path)
    assert PECULIARITIES["gemma2"]["attn_logit_softcapping"]
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    assert "leaves out its attn_logit_softcapping; install a newer one" in refusal(tmp_path)
    base_model(family="gemma2", attn_logit_softcapping=None).save_pretrained(tmp_path)
    assert BaseModel(ModelConfig(path=str(tmp_path))).skeleton is not None
