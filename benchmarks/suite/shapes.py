"""Model shapes by name: small ones for a laptop, and those of published 7B models."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig, PreTrainedConfig

from alignx_ds.models import shapes


@dataclass(frozen=True)
class Llama:
    hidden: int
    ffn: int
    heads: int
    layers: int
    vocabulary: int = 4096  # small, so that the head does not hide the layers
    key_value_heads: int = 0  # where not as many as heads
    tied: bool = False  # embedding and head

    def config(self) -> PreTrainedConfig:
        return AutoConfig.for_model(
            "llama",
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_value_heads or self.heads,
            num_hidden_layers=self.layers,
            vocab_size=self.vocabulary,
            max_position_embeddings=8192,
            tie_word_embeddings=self.tied,
            pad_token_id=0,
        )


SMALL = {
    "world": Llama(hidden=128, ffn=256, heads=4, layers=5, vocabulary=647),  # of the base model that ships
    "tiny": Llama(hidden=256, ffn=704, heads=4, layers=4),
    "small": Llama(hidden=1024, ffn=2752, heads=16, layers=4),
    "smollm2": Llama(576, 1536, heads=9, layers=30, vocabulary=49152, key_value_heads=3, tied=True),  # SmolLM2-135M
    "medium": Llama(hidden=2048, ffn=5504, heads=16, layers=4),
}
NAMES = (*SMALL, *shapes.SHAPES)


def config_of(name: str, layers: int = 0, vocabulary: int = 0) -> PreTrainedConfig:
    """The config of a shape; `layers` and `vocabulary` replace its own unless they are 0."""
    config = SMALL[name].config() if name in SMALL else shapes.shape(name)
    assert config is not None
    config.name_or_path = name  # instead of the file's path
    if vocabulary:
        config.vocab_size = vocabulary
    if layers:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    return config
