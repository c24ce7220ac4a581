"""Greedy answers of several models at once: every token is the likeliest by the mean of what they predict.

Shapes: M models, B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from alignx_ds.evaluation.decode import Decoder, Predict

Mean = Literal["logits", "probabilities"]
MEANS: dict[Mean, Callable[[Tensor], Tensor]] = {  # [M, B, V] -> [B, V], in the order of the means
    "logits": lambda logits: logits.mean(0),
    "probabilities": lambda logits: logits.softmax(-1).mean(0),
}


class AveragedDecoder(Decoder):
    """Decodes with models of one vocabulary, each with a cache of its own.

    The mean of the logits has the same order of tokens as that of the log-probabilities, since these differ by a
    constant for each row and model: one model that rules a token out has a veto. In the mean of the probabilities the
    surest model decides.
    """

    def __init__(self, models: Sequence[PreTrainedModel], mean: Mean) -> None:
        super().__init__(models[0], captured=False)
        self.decoders = [Decoder(model, captured=False) for model in models]
        self.mean = MEANS[mean]

    def predictor(self, ids: Tensor, new_tokens: int) -> Predict:
        each = [decoder.predictor(ids, new_tokens) for decoder in self.decoders]

        def mean(ids: Tensor, mask: Tensor, position: Tensor) -> Tensor:
            return self.mean(torch.stack([predict(ids, mask, position) for predict in each]).float())

        return mean

    def greedy(self, ids: Tensor, mask: Tensor, limit: int, ends: list[int], pad_id: int) -> Tensor:
        return self.sampled(ids, mask, limit, ends, pad_id, lambda scores: scores.argmax(-1, keepdim=True))
