"""Aligned models under lm-evaluation-harness: `python -m alignx_ds.export.harness run --model alignx …`.

The harness's own `hf` model passes prompt and answer together, right-padded and without a mask, so that an aligned
model would route by all of it. `alignx` marks which tokens are the prompt, and encodes prompt and answer separately, as
in training. Needs `pip install lm_eval`.
"""

from __future__ import annotations

from typing import Any

import torch
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from alignx_ds.data.batches import collate
from alignx_ds.data.encode import Example, encode_texts, pad_token
from alignx_ds.export.fidelity import plain, routed

Request = tuple[Any, list[int], list[int]]  # key in the harness's cache, token ids of the prompt, and of the answer


@register_model("alignx")
class AlignXLM(HFLM):
    """Any causal language model; an aligned one is routed by the prompt alone."""

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        (prompt,) = encode_texts([context], self.tokenizer)
        return prompt, self.tok_encode(continuation, add_special_tokens=False)

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        """For each request, in order: the answer's log-probability, and whether greedy decoding would return it."""
        examples = [self._example(prompt, answer) for _, prompt, answer in requests]
        by_length = sorted(range(len(examples)), key=lambda i: -len(examples[i].ids))
        batch = override_bs or (int(self.batch_size) if str(self.batch_size).isdigit() else 8)
        found: list[tuple[float, bool]] = [(0.0, False)] * len(examples)
        for start in tqdm(range(0, len(by_length), batch), disable=disable_tqdm or self.rank != 0):
            chosen = by_length[start : start + batch]
            for i, scored in zip(chosen, self._scored([examples[i] for i in chosen]), strict=True):
                found[i] = scored
                if requests[i][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[i][0], scored)
        return found

    def _example(self, prompt: list[int], answer: list[int]) -> Example:
        """A text that is too long loses the beginning of its prompt, as everywhere in the harness."""
        kept = prompt[-max(1, self.max_length - len(answer)) :]
        return Example((*kept, *answer), len(kept))

    def _scored(self, examples: list[Example]) -> list[tuple[float, bool]]:
        batch = collate(examples, pad_token(self.tokenizer)).to(self.device)
        predict = routed(self.model) if self.model.config.model_type == "alignx" else plain(self.model)
        logs = predict(batch).flatten(0, 1)[batch.predicting].float().log_softmax(-1)  # of the answers' tokens, [N, V]
        own = logs.gather(-1, batch.targets.unsqueeze(-1)).squeeze(-1).double()
        other = (logs.argmax(-1) != batch.targets).double()
        rows = batch.predicting // batch.labels.shape[1]
        sums, others = (own.new_zeros(len(examples)).index_add(0, rows, each) for each in (own, other))
        return list(zip(sums.tolist(), (others == 0).tolist(), strict=True))


if __name__ == "__main__":
    cli_evaluate()
