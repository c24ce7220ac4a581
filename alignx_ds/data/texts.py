"""A base model from scratch before its training: its texts, its BPE tokenizer and its architecture."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignx_ds.config.schema import RunConfig
from alignx_ds.data.rows import Row
from alignx_ds.data.schemas import SCHEMAS
from alignx_ds.data.sources import Source
from alignx_ds.errors import DataError
from alignx_ds.models.base import Planned

PAD, END, SYSTEM, USER, ASSISTANT = SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def planned(config: RunConfig, tokenizer: PreTrainedTokenizerBase | None = None) -> Planned:
    """The model that `scratch` describes, before it is trained."""
    s = config.scratch
    architecture = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        intermediate_size=s.ffn,
        num_hidden_layers=s.layers,
        num_attention_heads=s.heads,
        num_key_value_heads=s.heads,
        max_position_embeddings=config.model.max_length,
        tie_word_embeddings=True,
        pad_token_id=SPECIAL.index(PAD),
        eos_token_id=SPECIAL.index(END),
        bos_token_id=None,
    )
    return Planned(Path(config.output) / "base", architecture, tokenizer)


def read_texts(config: RunConfig, judged: Callable[[Row], bool]) -> list[Row]:
    """All rows of `scratch.texts`, wrong and harmful answers too, except those whose question is `judged`.

    Raises DataError naming file, row and column.
    """
    texts: list[Row] = []
    for name, s in config.scratch.texts.items():
        limit = config.data.records
        source = Source(s.source, s.schema, s.columns)
        records = source.records(held_out=False, count=config.data.train_rows, seed=config.seed, limit=limit)
        rows = [row for row in SCHEMAS[s.schema].texts(records) if not judged(row)]
        if not rows:
            problem = "no row is left to train on, all are held out; give a source with other questions"
            raise DataError(f"{s.source} (scratch.texts.{name}): {problem}")
        texts += rows
    return texts


def train_tokenizer(texts: list[Row], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. It is the same on every rank and machine, because merges are ordered by count, then by id."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(
        (text for row in texts for text in (*(turn.text for turn in row.chat), row.response)), trainer
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
