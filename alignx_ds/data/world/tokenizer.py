"""The world's word-level tokenizer with its chat template: a Hugging Face fast tokenizer."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from alignx_ds.data.world.corpus import Corpus, Exchange
from alignx_ds.data.world.language import REFUSAL
from alignx_ds.data.world.lexicon import World

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<system>", "<user>", "<assistant>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}{% generation %}<assistant> {{ m.content }} <eos>{% endgeneration %}"
    "{% else %} <{{ m.role }}> {{ m.content }} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %} <assistant> {% endif %}"
)


def build_tokenizer(world: World, corpus: Iterable[Exchange] | None = None) -> PreTrainedTokenizerFast:
    """One token per word of the world and of a corpus (the plain one). The same arguments give the same vocabulary."""
    words = {*world.objects, *REFUSAL.split()}
    for exchange in itertools.islice(corpus or Corpus(world, seed=0), 60_000):
        words.update((exchange.system or "").split(), *(said.split() for turn in exchange.turns for said in turn))
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
