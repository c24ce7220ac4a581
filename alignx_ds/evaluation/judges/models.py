"""Judges that are models on this machine: loading them, cutting texts to size, batches, and how likely a "yes" is."""

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

T = TypeVar("T")


@dataclass(frozen=True)
class LocalModel:
    """A judge's model and its tokenizer. Texts are token ids here; padding never changes what is said of them."""

    key: str  # of the config, for error messages
    path: str
    network: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def problem(self, allowed: str, fix: str) -> ConfigError:
        return ConfigError(Problem(self.key, self.path, allowed, fix))

    def encode(self, text: str, special: bool = True) -> list[int]:
        """Token ids; `special`: with what the tokenizer puts around a text (a chat template writes that itself)."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
        return ids

    def fit(
        self, write: Callable[[str], str], answer: str, spare: int = 0, special: bool = True
    ) -> tuple[list[int], bool]:
        """(ids of `write(answer)`, whether it was cut): what the model can read, with `spare` tokens left to reply.

        The end of the answer goes, so that prompt and closing question stay; then the prompt's beginning.
        """
        limit, kept = self.limit - spare, answer
        ids = self.encode(write(kept), special)
        while len(ids) > limit and kept:
            kept = kept[: -(len(ids) - limit)]  # in small steps: most tokens are longer than a character
            ids = self.encode(write(kept), special)
        return ids[-limit:], kept != answer or len(ids) > limit

    @cached_property
    def limit(self) -> int:
        """Tokens that the model can read."""
        return int(min(self.network.config.max_position_embeddings, self.tokenizer.model_max_length))

    @cached_property
    def pad_id(self) -> int:
        """The filling token. It is masked, so any will do but the end of text, where a classifier's verdict is read."""
        tokenizer, known = self.tokenizer, range(self.network.config.vocab_size)
        choices = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
        return next(int(i) for i in choices if i in known and i != tokenizer.eos_token_id)

    def inputs(self, texts: Sequence[list[int]], side: Literal["left", "right"]) -> dict[str, Tensor]:
        """`input_ids` and `attention_mask`, both [B, T], on the model's device."""
        ids, mask = pad(texts, self.pad_id, side)
        return {"input_ids": ids.to(self.network.device), "attention_mask": mask.to(self.network.device)}

    @torch.no_grad()
    def label_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """A classifier's logits, [texts, labels], fp32."""
        logits: Tensor = self.network(**self.inputs(texts, "right")).logits
        return logits.float()

    @torch.no_grad()
    def next_logits(self, texts: Sequence[list[int]]) -> Tensor:
        """Logits of the token that follows each text, [texts, vocabulary], fp32."""
        inputs = self.inputs(texts, "left")
        positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits: Tensor = self.network(**inputs, position_ids=positions, use_cache=False, logits_to_keep=1).logits
        return logits[:, -1].float()

    def yes_probabilities(self, texts: Sequence[list[int]], yes: int, no: int, batch: int) -> Iterator[float]:
        """P(yes) / (P(yes) + P(no)) of the token that follows each text."""
        for part in batches(texts, batch):
            logits = self.next_logits(part)
            yield from torch.sigmoid(logits[:, yes] - logits[:, no]).tolist()

    def answer_tokens(self, question: str, *words: str) -> list[int]:
        """The one token that each word is when it follows the question. Raises ConfigError where it is not one."""
        before = self.encode(question)
        found = [self.encode(question + word) for word in words]
        tokens = [ids[-1] for ids in found if ids[:-1] == before and ids[-1] != self.tokenizer.unk_token_id]
        if len(set(tokens)) < len(words):
            given = ", ".join(repr(w) for w in words)
            raise self.problem(f"a model to which {given} are tokens after {question!r}", "give the published judge")
        return tokens


def batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def held(path: str, key: str, kind: Any) -> Iterator[LocalModel]:
    """A directory's or hub id's model, loaded by a transformers Auto class (`kind`), with memory for this block only.

    Raises ConfigError naming `key` if it can't be loaded whole.
    """
    model = _load(path, key, kind)
    try:
        yield model
    finally:
        model.network.to("meta")  # drops the weights, whoever still holds the object


def _load(path: str, key: str, kind: Any) -> LocalModel:
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    try:
        # Safetensors are taken where there are any. Some published judges have none: tensors only, then.
        tokenizer = AutoTokenizer.from_pretrained(path, **NO_CODE)
        network, found = kind.from_pretrained(path, dtype=dtype, **NO_CODE, weights_only=True, output_loading_info=True)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        fix = f"give a directory that save_pretrained wrote, or a hub id that can be fetched ({reason})"
        if "tiktoken" in reason:  # which transformers falls back to, and asks for, when it can't read a tokenizer.model
            fix = "pip install sentencepiece: its tokenizer is a SentencePiece model"
        raise ConfigError(Problem(key, path, "a judge's model with its tokenizer", fix)) from error
    model = LocalModel(key, path, network.to(device()).eval(), tokenizer)
    if found["missing_keys"]:  # transformers fills these at random, with no more than a warning
        missing = ", ".join(sorted(found["missing_keys"])[:3])
        raise model.problem(f"a checkpoint of {type(network).__name__}", f"its weights lack {missing}: take another")
    network.config.pad_token_id = model.pad_id  # by which a classifier finds a text's last token
    return model
