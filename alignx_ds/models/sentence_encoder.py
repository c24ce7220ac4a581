"""A sentence encoder of the Hugging Face hub, or of a directory: the mean of its last states, of length 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from alignx_ds.models.pretrained import NO_CODE, NO_PICKLE, reading
from alignx_ds.runtime import distributed

BATCH = 64
LONGEST = 512  # tokens of a text; the rest is cut off


class SentenceEncoder:
    """Texts -> [N, d] float32, as the encoders of sentence-transformers that average their states do.

    A causal LM works too. Raises ConfigError for the key where there is no model that can be read.
    """

    def __init__(self, name: str, key: str) -> None:
        with reading(key, name, "model", "an encoder, by its hub id or directory"):
            self.tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, **NO_CODE)
            self.network: PreTrainedModel = AutoModel.from_pretrained(name, dtype="auto", **NO_PICKLE)
        self.network = self.network.to(distributed.device()).eval()
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        most = getattr(self.network.config.get_text_config(), "max_position_embeddings", None) or LONGEST
        self.longest = min(LONGEST, int(most))

    @torch.inference_mode()
    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        found = np.zeros((len(texts), self.network.config.get_text_config().hidden_size), dtype=np.float32)
        for start in range(0, len(order), BATCH):
            chosen = order[start : start + BATCH]
            found[chosen] = self._mean([texts[i] for i in chosen])
        return found

    def _mean(self, texts: list[str]) -> NDArray[np.float32]:
        given = self.tokenizer(texts, padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        given = given.to(self.network.device)
        states = self.network(**given).last_hidden_state.float()
        mask = given["attention_mask"][..., None]
        means = (states * mask).sum(1) / mask.sum(1).clamp_min(1)
        result: NDArray[np.float32] = torch.nn.functional.normalize(means, dim=-1).cpu().numpy()
        return result
