"""Few-shot prompts: worked examples before the question, as earlier turns of the chat or as text before it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedTokenizerBase

from alignx_ds.data.encode import Example, encode, encode_prompts
from alignx_ds.data.rows import Row, Turn
from alignx_ds.models.templates import template_of

MOST = 8  # examples in one prompt


@dataclass(frozen=True)
class FewShotPrompts:
    """Draws the examples for a row from training rows; the same ones for the same row and seed."""

    tokenizer: PreTrainedTokenizerBase
    seed: int
    limit: int  # of tokens in a prompt with its answer; examples that do not fit are left out
    pools: dict[str, list[Row]]  # by expert: its training rows with an answer

    def examples(self, expert: str, row: Row, count: int) -> list[Row]:
        """`count` of the expert's rows, never the question itself; a larger count begins with the smaller's rows."""
        pool = self.pools[expert]
        assert count <= MOST
        drawn = random.Random(f"{self.seed} {row.question}").sample(pool, min(len(pool), MOST + 1))
        return [r for r in drawn if r.question != row.question][:count]

    def encoded(self, row: Row, examples: Sequence[Row], responses: Sequence[str]) -> list[Example]:
        """The examples and the row's prompt, once with each response; without responses, the prompt alone."""
        answers = [encode([replace(row, response=text)], self.tokenizer)[0] for text in responses]
        tails = [e.ids[e.prompt_length :] for e in answers] or [()]
        kept = list(examples)
        prompt = self._prompt(row, kept)
        while kept and len(prompt) + max(map(len, tails)) > self.limit:
            kept = kept[1:]
            prompt = self._prompt(row, kept)
        return [Example((*prompt, *tail), len(prompt)) for tail in tails]

    def _prompt(self, row: Row, examples: Sequence[Row]) -> list[int]:
        if template_of(self.tokenizer) is None:
            before = [i for example in encode(list(examples), self.tokenizer) for i in example.ids]
            return [*before, *encode_prompts([row.chat], self.tokenizer)[0]]
        turns = [turn for e in examples for turn in (*e.chat, Turn("assistant", e.response)) if turn.role != "system"]
        return encode_prompts([(*turns, *row.chat)], self.tokenizer)[0]
