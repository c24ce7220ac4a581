"""The configs of the paper's 7B models and of LLaMA-2-70B, for dry runs and benchmarks, which need no weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, PreTrainedConfig

from alignx_ds.models.pretrained import NO_CODE

SHAPES: dict[str, str] = {  # name, also of the file in assets/shapes -> hub id of the model
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "gemma-7b": "google/gemma-7b",
    "deepseek-llm-7b": "deepseek-ai/deepseek-llm-7b-base",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
}
SIBLINGS: dict[str, str] = {  # hub id of a chat model of exactly the same shape -> name
    "meta-llama/Llama-2-7b-chat-hf": "llama2-7b",
    "meta-llama/Llama-2-70b-chat-hf": "llama2-70b",
    "mistralai/Mistral-7B-Instruct-v0.1": "mistral-7b",  # v0.2 has no sliding window, v0.3 another vocabulary
    "google/gemma-7b-it": "gemma-7b",
    "google/gemma-1.1-7b-it": "gemma-7b",
    "deepseek-ai/deepseek-llm-7b-chat": "deepseek-llm-7b",
}
ASSETS = Path(__file__).parent / "assets" / "shapes"


def shape(name_or_hub_id: str) -> PreTrainedConfig | None:
    """The config of a name in SHAPES, or of a hub id in SHAPES or SIBLINGS; None for any other."""
    names = {name: name for name in SHAPES} | {hub_id: name for name, hub_id in SHAPES.items()} | SIBLINGS
    name = names.get(name_or_hub_id)
    return None if name is None else AutoConfig.from_pretrained(ASSETS / f"{name}.json", **NO_CODE)
