"""What judges share whose model runs on this machine: loading, truncation, batches, the probability of a "yes"."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.data.batches import pad
from alignx_ds.errors import ConfigError, Problem
from alignx_ds.models.pretrained import NO_CODE
from alignx_ds.runtime.distributed import device
from alignx_ds.runtime.failures import is_out_of_memory

T = TypeVar("T")


@dataclass(frozen=True)
class LocalModel:
    """A judge's model and its tokenizer. Texts are lists of token ids here; padding never changes a verdict."""

    key: str  # of the config, for error messages
    path: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def problem(self, allowed: str, fix: str) -> ConfigError:
        return ConfigError(Problem(self.key, self.path, allowed, fix))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids. `special` adds the tokenizer's special tokens, which a chat template writes itself."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def fit(
        self, write: Callable[[str], str], answer: str, spare: int = 0, special: bool = True
    ) -> tuple[list[int], bool]:
        """(ids of `write(answer)`, whether it was truncated), with `spare` tokens of the context left for a reply.

        The answer is truncated at its end, so that the prompt and the judge's question stay. If that is not enough, the
        text is truncated at its beginning.
        """
        limit, shortened = self.limit - spare, answer
        ids = self.encode(write(shortened), special)
        while len(ids) > limit and shortened:
            # one character per token too many: most tokens are longer, so this takes a few rounds
            shortened = shortened[: -(len(ids) - limit)]
            ids = self.encode(write(shortened), special)
        return ids[-limit:], shortened != answer or len(ids) > limit

    @cached_property
    def limit(self) -> int:
        """The length of the context, in tokens."""
        return int(min(self.network.config.max_position_embeddings, self.tokenizer.model_max_length))

    @cached_property
    def pad_id(self) -> int:
        """The padding token. Any but the end-of-text token will do: a classifier's verdict is read at that one."""
        tokenizer, known = self.tokenizer, range(self.network.config.vocab_size)
        choices = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
        return next(int(i) for i in choices if i in known and i != tokenizer.eos_token_id)

    def inputs(self, texts: Sequence[list[int]], side: Literal["left", "right"]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both [B, T], on the model's device."""
        ids, mask = pad(texts, self.pad_id, side)
        return {"input_ids": ids.to(self.network.device), "attention_mask": mask.to(self.network.device)}

    @torch.no_grad()
    def label_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """A classifier's logits, [B, labels] float32."""
        logits: Tensor = self.network(**self.inputs(texts, "right")).logits
        return logits.float()

    @torch.no_grad()
    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """Logits of the token that follows each text, [B, vocabulary] float32."""
        inputs = self.inputs(texts, "left")
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self.network(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float()

    def yes_probabilities(self, texts: Sequence[list[int]], yes: int, no: int, batch: int) -> Iterator[float]:
        """P(yes) / (P(yes) + P(no)) of the token that follows each text; `yes` and `no` are token ids."""
        for part in batches(texts, batch):
            logits = self.next_logits(part)
            yield from torch.sigmoid(logits[:, yes] - logits[:, no]).tolist()

    def answer_tokens(self, question: str, *words: str) -> list[int]:
        """The token of each word after the question. Raises ConfigError unless every word is one token of its own."""
        before = self.encode(question)
        encoded = [self.encode(question + word) for word in words]
        tokens = [ids[-1] for ids in encoded if ids[:-1] == before and ids[-1] != self.tokenizer.unk_token_id]
        if len(set(tokens)) < len(words):
            listed = ", ".join(repr(w) for w in words)
            raise self.problem(f"a model with single tokens for {listed} after {question!r}", "use the published judge")
        return tokens


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def loaded(path: str, key: str, kind: Any) -> Iterator[LocalModel]:
    """A model from a directory or the hub, loaded with the transformers Auto class `kind`; freed after the block.

    Raises ConfigError naming `key` if it, or a part of its weights, can't be loaded.
    """
    model = _load(path, key, kind)
    try:
        yield model
    finally:
        model.network.to("meta")  # frees the weights even if something still refers to the model


def _load(path: str, key: str, kind: Any) -> LocalModel:
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    try:
        # Safetensors are preferred. Some published judges have none, so pickles are allowed, but of tensors only.
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
        network, found = kind.from_pretrained(path, dtype=dtype, **NO_CODE, weights_only=True, output_loading_info=True)
    except Exception as error:  # spoiled files make the libraries raise anything at all
        if is_out_of_memory(error):
            raise
        reason = " ".join(str(error).split())[:300]
        fix = f"give a directory that save_pretrained wrote, or a hub id that can be downloaded ({reason})"
        if "tiktoken" in reason:  # the fallback of transformers when it can't read a tokenizer.model
            fix = "pip install sentencepiece: its tokenizer is a SentencePiece model"
        raise ConfigError(Problem(key, path, "a judge's model with its tokenizer", fix)) from error
    model = LocalModel(key, path, network.to(device()).eval(), tokenizer)
    if found["missing_keys"]:  # transformers initializes these at random and only warns
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise model.problem(f"a checkpoint of {type(network).__name__}", f"its weights lack {missing}: use another")
    network.config.pad_token_id = model.pad_id  # a classifier finds the last token of a text by it
    return model
