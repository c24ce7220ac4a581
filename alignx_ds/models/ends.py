"""The tokens that end an answer: one set for training, decoding, exports and comparisons."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.errors import ConfigError, DataError, Problem
from alignx_ds.models.templates import template_of
from alignx_ds.models.tokenizer import load_tokenizer


def answering_tokenizer(directory: Path, key: str, given: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model that is to answer.

    Raises ConfigError where its chat template can't be rendered, or no token can end an answer.
    """
    tokenizer = load_tokenizer(directory, key, given)
    if tokenizer.eos_token_id is None:
        fix = "its tokenizer has none; set eos_token in its tokenizer_config.json"
        raise ConfigError(Problem(key, given, "a model with an end-of-sequence token", fix))
    try:
        template_of(tokenizer)
    except DataError as error:
        raise ConfigError(Problem(key, given, "a chat template that writes a dialogue", str(error))) from error
    return tokenizer


def answer_end(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token after every answer in training: the chat template's, or the tokenizer's end-of-sequence token."""
    template = template_of(tokenizer)
    if template is not None and template.end:
        return int(tokenizer.convert_tokens_to_ids(template.end))
    assert tokenizer.eos_token_id is not None
    return int(tokenizer.eos_token_id)


def end_tokens(tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig | None, vocabulary: int) -> list[int]:
    """The tokenizer's end-of-sequence token, those of the generation config, and what ends an answer in training.

    Ids that the model has no logit for are left out: some generation configs switch a token off by such an id.
    """
    named = generation.eos_token_id if generation is not None else None
    ends = [int(i) for i in (named if isinstance(named, (list, tuple)) else [named]) if i is not None]
    if tokenizer.eos_token_id is not None:
        ends += [int(tokenizer.eos_token_id), answer_end(tokenizer)]
    return [i for i in dict.fromkeys(ends) if 0 <= i < vocabulary]


def ends_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that end this model's answers."""
    generation = model.generation_config if model.generation_config is not None else model.config
    return end_tokens(tokenizer, generation, vocabulary_of(model.config))


def set_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name these tokens in the model's generation config, and make that one which transformers saves.

    It refuses some that it reads: a temperature without `do_sample`, or a padding token of -1, as in old files.
    """
    ends = ends_of(model, tokenizer)
    generation: Any = model.generation_config or GenerationConfig.from_model_config(model.config)
    generation.eos_token_id = ends[0] if len(ends) == 1 else ends or None
    if isinstance(generation.pad_token_id, int) and generation.pad_token_id < 0:
        generation.pad_token_id = None
    if not _can_be_saved(generation):
        generation.do_sample = True
    if not _can_be_saved(generation):
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        generation = GenerationConfig(**{name: getattr(generation, name) for name in names})
    model.generation_config = generation


def _can_be_saved(generation: Any) -> bool:
    try:
        generation.validate(strict=True)
    except (ValueError, TypeError):
        return False
    return True


def vocabulary_of(config: Any) -> int:
    """The number of tokens that the model has logits for."""
    return int(config.get_text_config().vocab_size)
